"""What several processes, saves and feeding cost: SFT of the phantom model on this machine.

    PYTHONPATH=.:tests/helpers:tests python benchmarks/scale.py [--steps=12] [--mib=1024] [--only=saves,feeding]

processes: the same run (batch 8, 4 fake devices) as 1 x 4, 2 x 2 and 4 x 1 processes x devices: median seconds of a
step and how far the losses are apart. On two cores the ratio is what the processes cost, not what they gain.
saves: a train state of --mib MiB: seconds until `save` returns, until it is on disk and read back, and of a restore,
beside writing and reading the same bytes as one plain file (with fsync), in one run.
feeding: SFT on phantom DICOMs (224 px, batch 16), each read for the first time, plain and compressed (RLE): the share
of the time that steps wait for data (goal: < 2 %).

2026-11-26, 2 cores (AMD EPYC, Zen 5), Python 3.11.7, jax 0.10.2, `--steps=8`, GLIBC_TUNABLES=glibc.malloc.hugetlb=1,
nothing else running:
    1x4: 0.22 s a step, 1.00 x 1x4
    2x2: 0.49 s a step, 2.20 x 1x4; losses within 1e-07 of 1x4's
    4x1: 0.78 s a step, 3.46 x 1x4; losses within 1e-07 of 1x4's
    1024 MiB: a save holds the run up for 0.16 s and is on disk and read back after 1.40 s (0.7 x a plain write and
    fsync, 2.09 s); restore 1.25 s (0.5 x a plain read, 2.49 s)
    256 phantom DICOMs of 224 px, plain, batch 16, 0.40 s a step: waiting for data 0.01 % of the time (worst step 0.0 %)
    256 phantom DICOMs of 224 px, compressed, batch 16, 0.40 s a step: waiting for data 0.01 % of the time
Orbax does not fsync every file, the plain write does. Not measured: the overlap of save and step on an accelerator.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import several
from oracle import mesh_runs

from cxr_jax.metrics import run_log


def processes(steps: int, folder: Path) -> None:
    flags = ["--config.batch_size=8", "--config.locate_steps=0"]
    first = None
    for layout in ("1x4", "2x2", "4x1"):
        rows, _ = mesh_runs.run("sft", layout, steps, folder / layout, flags)
        rows = [r for r in rows if r["kind"] == "train"]
        times = [b["time"] - a["time"] for a, b in zip(rows[1:], rows[2:], strict=False)]
        first = first or (rows, statistics.median(times))
        apart, _ = mesh_runs.furthest(first[0], rows, mesh_runs.LOSSES)
        print(
            f"{layout}: {statistics.median(times):.2f} s a step, {statistics.median(times) / first[1]:.2f} x 1x4; "
            f"losses within {apart:.0e} of 1x4's",
            flush=True,
        )


def saves(mib: int, folder: Path) -> None:
    import jax
    import numpy as np

    from cxr_jax.runtime.checkpoints import Checkpoints

    rows = 256
    shape = rows, mib * 2**20 // (4 * 16 * rows)
    # Random, as weights are: what Orbax writes is compressed.
    make = jax.jit(
        lambda: {"params": {f"{i}": jax.random.normal(jax.random.key(i), shape) for i in range(16)}}
    )
    state = make()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    host = np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(state)])

    def plain_write():
        with open(folder / "plain", "wb") as f:
            f.write(memoryview(host))
            f.flush()
            os.fsync(f.fileno())

    written, read = clock(plain_write), clock(lambda: (folder / "plain").read_bytes())
    checkpoints = Checkpoints(str(folder))
    blocked = clock(lambda: checkpoints.save(1, state, {}))
    checkpoints.wait()
    whole = checkpoints.last_save["seconds"]
    restored = clock(lambda: jax.block_until_ready(checkpoints.restore(state)[0]))
    checkpoints.close()
    print(
        f"{size / 2**20:.0f} MiB: a save holds the run up for {blocked:.2f} s and is on disk and read back after "
        f"{whole:.2f} s ({whole / written:.1f} x a plain write and fsync, {written:.2f} s); restore {restored:.2f} s "
        f"({restored / read:.1f} x a plain read, {read:.2f} s)",
        flush=True,
    )


def clock(action) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def feeding(steps: int, folder: Path, n: int = 256) -> None:
    import numpy as np
    import pydicom

    from cxr_jax.data.sources import phantom
    from cxr_jax.labels.taxonomy import CHEXPERT_14
    from cxr_jax.phantom import dicom_writer

    source = phantom.PhantomSource("A", "train", 3)
    lines = []
    for start in range(0, n, 32):
        indices = np.arange(start, start + 32)
        batch = source.batch(indices)
        for i, image, truth, text in zip(
            indices, batch["image"], batch["solution"], source.targets(batch, indices), strict=True
        ):
            dicom_writer.write_dicom(
                folder / f"{i}.dcm", image, hospital="A", ap=False, seed=int(i)
            )
            names = [CHEXPERT_14[k] for k in np.flatnonzero(truth)] or ["No Finding"]
            talk = [
                {"role": "user", "content": source.prompt},
                {"role": "assistant", "content": text},
            ]
            lines.append(
                json.dumps(
                    {
                        "id": f"p{i}",
                        "image": f"{i}.dcm",
                        "patient_id": f"p{i}",
                        "solution": ", ".join(names),
                        "messages": talk,
                    }
                )
            )
    (folder / "sft.jsonl").write_text("\n".join(lines) + "\n")
    argv = [
        "--config=experiments/sft.py:nv_reason_3b",
        "--config.model=phantom",
        "--config.data.size=224",
        "--config.batch_size=16",
        "--config.max_completion=208",
        "--config.dtype=float32",
        "--config.remat=none",
        f"--config.steps={steps}",
        "--config.log_every=1",
        "--config.save_every=100000",
        "--config.eval.every=100000",
        "--config.eval.n=4",
        "--config.eval.n_final=4",
        "--config.eval.bootstrap=10",
        f"--config.data.manifest={folder / 'sft.jsonl'}",
        f"--config.data.image_root={folder}",
    ]
    for kind in ("plain", "compressed"):
        if kind == "compressed":
            for i in range(n):
                film = pydicom.dcmread(folder / f"{i}.dcm")
                film.compress(pydicom.uid.RLELossless)
                film.save_as(folder / f"{i}.dcm")
        for code, out, err in several.end(
            several.start([*argv, f"--workdir={folder / kind}"], 1, 1)
        ):
            assert code == 0, out + err
        rows = [r for r in run_log.read(folder / kind) if r["kind"] == "train"][2:]
        share = [r["perf/data_wait_share"] for r in rows]
        seconds = statistics.median(
            b["time"] - a["time"] for a, b in zip(rows, rows[1:], strict=False)
        )
        print(
            f"{n} phantom DICOMs of {source.size} px, {kind}, batch 16, {seconds:.2f} s a step: waiting for data "
            f"{100 * statistics.mean(share):.2f} % of the time (worst step {100 * max(share):.1f} %)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--only", default="processes,saves,feeding")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            {
                "processes": lambda f: processes(args.steps, f),
                "saves": lambda f: saves(args.mib, f),
                "feeding": lambda f: feeding(args.steps, f),
            }[name](Path(folder))


if __name__ == "__main__":
    main()
