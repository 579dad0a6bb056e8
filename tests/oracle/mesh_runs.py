"""One run on several layouts (processes x fake devices): the same batches and samples, and metrics equal to rounding.

    PYTHONPATH=.:tests/helpers:tests python tests/oracle/mesh_runs.py [--layouts=1x8,2x4] [--moves=4x2:1x1] [--sft=50]
        [--rl=10] [--keep=FOLDER] [--config.mesh.fsdp=2 ...]

Batches: every process makes its rows of the first steps, and a hash of the whole batch is compared. Samples: the groups
that RL records at every step (samples.jsonl): texts, lengths, answers. Metrics: those of metrics.jsonl but for times; a
difference is relative to the larger of the two and 1e-3. Moves: a run that SIGTERM to one process stops half way on
one layout, and that goes on from its checkpoint on another. `--config...` flags go to every run. Prints a line a
comparison; exits 1 if batches or samples differ or a loss by more than 1e-5; after a move by 1e-4, for one device sums
in another order than eight, and the loss of RL, a sum that cancels, is a thousandth of its terms.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import several

from cxr_jax.metrics import run_log

LOSSES = ("loss", "locate_loss")
SMALL = [
    "--config.eval.bootstrap=10",
    "--config.eval.cases=2",
    "--config.eval.batch_size=8",
    "--config.eval.n=8",
    "--config.eval.n_final=8",
]
RUNS = {
    "sft": [
        "--config=experiments/sft.py",
        "--config.model=random:phantom",
        "--config.batch_size=8",
        "--config.log_every=1",
        "--config.save_every=1000",
        "--config.eval.every=1000",
        "--config.locate_steps=5",
        "--config.optim.warmup_steps=5",
    ],
    "rl": [
        "--config=experiments/rl.py",
        "--config.rl.prompts_per_step=8",
        "--config.rl.oversample=1",
        "--config.rl.group_size=4",
        "--config.save_every=1000",
        "--config.eval.every=1",
    ],
}
HASHED = 3  # steps whose batches are hashed


def run(task, layout, steps, folder, more=()):
    """A run's metrics and samples."""
    processes, devices = map(int, layout.split("x"))
    argv = [*RUNS[task], *SMALL, *more, f"--config.steps={steps}", f"--workdir={folder}"]
    for code, out, err in several.end(several.start(argv, processes, devices), timeout=3000):
        assert code == 0, out + err
    samples = [
        json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()
    ]
    return run_log.read(folder), samples


def moved(task, layout, to, steps, folder, more=()):
    """As `run`, but half of it on one layout and the rest on another."""
    processes, devices = map(int, layout.split("x"))
    argv = [*RUNS[task], *SMALL, *more, f"--config.steps={steps}", f"--workdir={folder}"]
    started = several.start(argv, processes, devices)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ended = pool.submit(several.end, started, 3000)
        file = Path(folder) / "metrics.jsonl"
        while not ended.done() and not (
            file.exists()
            and any(r["step"] >= steps // 2 for r in run_log.read(folder) if r["kind"] == "train")
        ):
            time.sleep(0.1)
        started[-1].send_signal(signal.SIGTERM)
        for code, out, err in ended.result():
            assert code == 0, out + err
    at = max(int(p.name) for p in (Path(folder) / "checkpoints/last").iterdir() if p.name.isdigit())
    assert steps // 2 <= at < steps, at
    return *run(task, to, steps, folder, more), at


def said(samples) -> list:
    """What does not depend on rounding: the texts, lengths and answers of every group of RL."""
    keys = ("text", "length", "finished", "answer")
    return [
        [(g["step"], g["id"], *(c[k] for k in keys)) for c in g["completions"]]
        for g in samples
        if g.get("kind") == "group"
    ]


def without_times(row: dict) -> dict:
    """A line of metrics but for what depends on the clock: what took time differs, and what took none is not there."""
    timed, kinds = ("time", "step_time", "samples_per_second"), ("perf/", "goodput/")
    return {k: v for k, v in row.items() if k not in timed and not k.startswith(kinds)}


def furthest(a, b, names=None) -> tuple[float, str]:
    """The largest relative difference of two runs' metrics, and where it is."""
    worst = (0.0, "nowhere")
    for x, y in zip(a, b, strict=True):
        x, y = (without_times(row) for row in (x, y))
        assert x.keys() == y.keys(), x.keys() ^ y.keys()
        for k in x:
            if not isinstance(x[k], float) or (names and k not in names):
                continue
            difference = abs(x[k] - y[k]) / max(abs(x[k]), abs(y[k]), 1e-3)
            worst = max(worst, (difference, f"{k} of step {x['step']}"))
    return worst


def batches(layout) -> str:
    """A hash over the whole batches of the first steps, as the processes of a layout make them together."""
    processes, devices = map(int, layout.split("x"))
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if processes > 1:
        env |= {
            "CXR_COORDINATOR": f"127.0.0.1:{several.free_port()}",
            "CXR_NUM_PROCESSES": str(processes),
        }
    command = [sys.executable, __file__, "--hash"]
    started = [
        subprocess.Popen(
            command,
            env=env | ({"CXR_PROCESS_ID": str(k)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(processes)
    ]
    ended = several.end(started)
    assert all(code == 0 for code, *_ in ended), ended
    return ended[0][1].split()[-1]


def print_hash():
    from cxr_jax.runtime import processes

    processes.start()
    import jax

    from cxr_jax.config.sections import DataConfig, RunConfig
    from cxr_jax.data.sources import splits
    from cxr_jax.inference import prompts as inference_prompts
    from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
    from cxr_jax.rl import batches
    from cxr_jax.runtime import layout as runtime_layout
    from cxr_jax.sft import loop
    from cxr_jax.training import conversations, targets
    from cxr_jax.weights import pretrained
    from experiments import rl as rl_config
    from experiments import sft as sft_config

    digest = hashlib.sha256()
    for module, config in ((loop, sft_config.get_config()), (batches, rl_config.get_config())):
        layout, start = (
            runtime_layout.Layout.from_config(config.mesh),
            pretrained.load_starting_model(config.model, config.seed),
        )
        source = splits.open_splits(DataConfig.from_config(config)).train
        prompts = inference_prompts.Prompts(
            start.tokenizer, start.config, PROCESSOR.grid(224, 224), config.max_completion
        )
        completions = targets.Completions(start.tokenizer, config.max_completion)
        examples = conversations.Examples(prompts, completions, config.train_turns)
        encoders = (examples,) if module is loop else (prompts, examples)
        make = module.make_batch_fn(RunConfig.from_config(config), source, *encoders, layout)
        for step in range(HASHED):
            batch = make(step)
            shown = batch.pop("shown", None)
            for path, x in jax.tree_util.tree_leaves_with_path(
                processes.gather_to_host(layout.batch(batch))
            ):
                digest.update(f"{path} {x.dtype} {x.shape} {shown}".encode() + x.tobytes())
    print(digest.hexdigest(), flush=True)
    processes.leave(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layouts", default="1x8,2x4,4x2")
    parser.add_argument("--moves", default="4x2:1x1,4x2:2x1")
    parser.add_argument("--sft", type=int, default=50)
    parser.add_argument("--rl", type=int, default=10)
    parser.add_argument("--keep", default="")
    parser.add_argument("--hash", action="store_true", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    if args.hash:
        return print_hash()
    first, *others = args.layouts.split(",")
    bad = 0
    hashes = {layout: batches(layout) for layout in (first, *others)}
    same = len(set(hashes.values())) == 1
    bad += not same
    say = lambda line: print(line, flush=True)
    say(
        f"batches of {HASHED} SFT and {HASHED} RL steps on {args.layouts}: {'the same' if same else hashes}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for task, steps in (("sft", args.sft), ("rl", args.rl)):
            go = lambda layout, task=task, steps=steps: run(
                task, layout, steps, Path(args.keep or temporary) / f"{task}_{layout}", more
            )
            if not steps:
                continue
            rows, samples = go(first)

            def compare(
                what, got, sampled, most_loss, task=task, steps=steps, rows=rows, samples=samples
            ):
                loss, where = furthest(rows, got, LOSSES)
                most, at = furthest(rows, got)
                same = said(samples) == said(sampled)
                n = sum(map(len, said(samples)))
                texts = (
                    f"; {n} completions shown: {'the same' if same else 'NOT the same'}"
                    if task == "rl"
                    else ""
                )
                say(
                    f"{task}, {steps} steps, {what} against {first}: losses differ by {loss:.1e} at most ({where}); "
                    f"any metric by {most:.1e} ({at}){texts}"
                )
                return loss > most_loss or not same

            for layout in others:
                bad += compare(layout, *go(layout), 1e-5)
            for layout, to in (move.split(":") for move in args.moves.split(",") if move):
                folder = Path(args.keep or temporary) / f"{task}_{layout}_{to}"
                got, sampled, at = moved(task, layout, to, steps, folder, more)
                bad += compare(f"{layout} until step {at}, then {to},", got, sampled, 1e-4)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
