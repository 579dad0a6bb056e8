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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import several
from oracle import mesh_runs

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import run_log

FILMS = 256  # that `feeding` reads, each once


def processes(steps: int, folder: Path) -> None:
    """Print the time of a step on three layouts, and how far their losses are apart."""
    flags = ["--config.batch_size=8", "--config.locate_steps=0"]
    first_rows, first_seconds = None, 0.0
    for layout in ("1x4", "2x2", "4x1"):
        rows, _ = mesh_runs.run("sft", layout, steps, folder / layout, flags)
        rows = [row for row in rows if row["kind"] == "train"]
        seconds = median_step(rows[1:])
        if first_rows is None:
            first_rows, first_seconds = rows, seconds
        apart, _ = mesh_runs.furthest(first_rows, rows, mesh_runs.LOSSES)
        print(
            f"{layout}: {seconds:.2f} s a step, {seconds / first_seconds:.2f} x 1x4; "
            f"losses within {apart:.0e} of 1x4's",
            flush=True,
        )


def median_step(rows: list[dict]) -> float:
    """Seconds between two lines of metrics.jsonl, the median."""
    return statistics.median(
        later["time"] - row["time"] for row, later in zip(rows, rows[1:], strict=False)
    )


def saves(mib: int, folder: Path) -> None:
    """Print what a save and a restore take, beside writing and reading the same bytes as one file."""
    import jax

    from cxr_jax.runtime.checkpoints import Checkpoints

    rows = 256
    shape = rows, mib * 2**20 // (4 * 16 * rows)

    # Random, as weights are: what Orbax writes is compressed.
    @jax.jit
    def make() -> dict:
        leaves = {f"{leaf}": jax.random.normal(jax.random.key(leaf), shape) for leaf in range(16)}
        return {"params": leaves}

    state = make()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    host = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(state)])

    def plain_write() -> None:
        with open(folder / "plain", "wb") as file:
            file.write(memoryview(host))
            file.flush()
            os.fsync(file.fileno())

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


def clock(action: Callable[[], object]) -> float:
    """Seconds of action()."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def feeding(steps: int, folder: Path) -> None:
    """Print the share of the time that steps of SFT wait for films, plain ones and compressed ones."""
    size = write_films(folder)
    for kind in ("plain", "compressed"):
        if kind == "compressed":
            compress_films(folder)
        flags = [*feeding_flags(folder, steps), f"--workdir={folder / kind}"]
        for code, out, err in several.end(several.start(flags, 1, 1)):
            assert code == 0, out + err
        # The first two steps compile and fill the queue.
        rows = [row for row in run_log.read(folder / kind) if row["kind"] == "train"][2:]
        share = [row["perf/data_wait_share"] for row in rows]
        print(
            f"{FILMS} phantom DICOMs of {size} px, {kind}, batch 16, {median_step(rows):.2f} s a step: waiting for "
            f"data {100 * statistics.mean(share):.2f} % of the time (worst step {100 * max(share):.1f} %)",
            flush=True,
        )


def write_films(folder: Path) -> int:
    """Write FILMS phantoms as DICOMs and sft.jsonl, which lists them; returns their side in pixels."""
    from cxr_jax.data.sources import phantom
    from cxr_jax.phantom import dicom_writer

    source = phantom.PhantomSource("A", "train", 3)
    lines = []
    for start in range(0, FILMS, 32):
        indices = np.arange(start, start + 32)
        batch = source.batch(indices)
        examples = zip(
            indices, batch["image"], batch["solution"], source.targets(batch, indices), strict=True
        )
        for index, image, solution, text in examples:
            name = f"{index}.dcm"
            dicom_writer.write_dicom(folder / name, image, hospital="A", ap=False, seed=int(index))
            row = {
                "id": f"p{index}",
                "image": name,
                "patient_id": f"p{index}",
                "solution": ", ".join(np.array(CHEXPERT_14)[solution]) or "No Finding",
                "messages": [
                    {"role": "user", "content": source.prompt},
                    {"role": "assistant", "content": text},
                ],
            }
            lines.append(json.dumps(row))
    (folder / "sft.jsonl").write_text("\n".join(lines) + "\n")
    return source.size


def compress_films(folder: Path) -> None:
    """Compress the films in place, by RLE."""
    import pydicom

    for index in range(FILMS):
        film = pydicom.dcmread(folder / f"{index}.dcm")
        film.compress(pydicom.uid.RLELossless)
        film.save_as(folder / f"{index}.dcm")


def feeding_flags(folder: Path, steps: int) -> list[str]:
    """The flags of an SFT run on those films, with nothing else to wait for."""
    settings = {
        "model": "phantom",
        "data.size": 224,
        "batch_size": 16,
        "max_completion": 208,
        "dtype": "float32",
        "remat": "none",
        "steps": steps,
        "epochs": 0,
        "log_every": 1,
        "save_every": 100000,
        "eval.every": 100000,
        "eval.n": 4,
        "eval.n_final": 4,
        "eval.bootstrap": 10,
        "data.manifest": folder / "sft.jsonl",
        "data.image_root": folder,
    }
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["--config=experiments/sft.py:nv_reason_3b", *keys]


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--only", default="processes,saves,feeding")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    parts = {
        "processes": (processes, args.steps),
        "saves": (saves, args.mib),
        "feeding": (feeding, args.steps),
    }
    for name in args.only.split(","):
        part, amount = parts[name]
        with tempfile.TemporaryDirectory() as folder:
            part(amount, Path(folder))


if __name__ == "__main__":
    main()
