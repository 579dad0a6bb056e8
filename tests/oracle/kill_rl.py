"""Kills (-9) small RL runs at random moments and compares what they end with to a run that nothing interrupted.

    PYTHONPATH=. python tests/oracle/kill_rl.py [--kills=20] [--seed=0] [--keep=FOLDER] [--config.rl.num_iterations=2]

One run goes through uninterrupted. Then each of `kills` runs is killed once and started again: a third of them at a
moment drawn uniformly from the whole life of the uninterrupted run, from its first line on; a third after its first
step, for before it a small run is busy compiling; a third while a save is under way (a temporary folder of a checkpoint
or of the export is there). Last, one run is killed that many times in a row, at moments of the first two kinds. All
must equal the first, bit for bit: the arrays of the last and of the best checkpoint, the export, the lines of
metrics.jsonl but for times, samples.jsonl, results. Further `--config...` flags go to every run.

Prints a line a kill; exits 1 if anything differs.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np

from cxr_jax.metrics import run_log
from cxr_jax.runtime import checkpoint_folder
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.weights import hf_folder

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 5
RUN = [
    "--config=experiments/rl.py",
    "--config.model=random:phantom",
    f"--config.steps={STEPS}",
    "--config.save_every=2",
    "--config.eval.every=2",
    "--config.eval.n=2",
    "--config.eval.n_final=2",
    "--config.eval.batch_size=2",
    "--config.eval.bootstrap=10",
    "--config.eval.cases=2",
    "--config.max_completion=12",
    "--config.rl.prompts_per_step=2",
    "--config.rl.group_size=2",
]
SAVES = {
    **dict.fromkeys(("checkpoints/last", "checkpoints/best"), "*.orbax-checkpoint-tmp*"),
    ".": ".hf.*.partial",
}
"""Folder -> the names of the temporary ones that a save makes there."""
NEVER = 1e9


@dataclasses.dataclass
class Attempt:
    """One process of a run. seconds: from its first line to its end; killed: its phase then, None if it finished."""

    lines: list[str]
    seconds: float
    killed: str | None
    steps: int  # that its metrics knew of at the end


class Runs:
    """Starts runs with the same flags; keeps the times of the uninterrupted one."""

    def __init__(self, folder, flags):
        self.folder, self.flags = folder, flags
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.env.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.rollout_seconds = 0.0

    def attempt(self, name, *, after=NEVER, stepped=NEVER, during=None, nth=1, more=0.0) -> Attempt:
        """Runs (or resumes) until it ends, or is killed: `after` seconds from its first line on, `stepped` seconds from
        its first step on, or `more` seconds after the nth temporary folder of `during`, a key of SAVES, has come."""
        folder = self.folder / name
        started = time.time()
        command = [sys.executable, "-m", "cxr_jax.main", *self.flags, f"--workdir={folder}"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        said, lines, errors, seen, began, due = queue.Queue(), [], [], set(), None, None
        threads = [
            threading.Thread(target=lambda: [said.put(x) for x in process.stdout]),
            threading.Thread(target=lambda: errors.extend(process.stderr)),
        ]
        for t in threads:
            t.start()
        while process.poll() is None:
            while not said.empty():
                lines.append(said.get().rstrip())
            now = time.monotonic()
            if began is None and lines:
                began, due = now, now + after
            if stepped < NEVER and due and due > now + stepped and logged(folder, "train", started):
                due = now + stepped
            if during and due and due > now + more:
                seen |= set((folder / during).glob(SAVES[during]))
                if len(seen) >= nth:
                    due = now + more
            if due and now >= due:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001 if during else 0.01)
        code, end = process.wait(), time.monotonic()
        for t in threads:
            t.join()
        lines += [said.get().rstrip() for _ in range(said.qsize())]
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(
                f"{name}: exit code {code}\n" + "\n".join(lines) + "\n" + "".join(errors)
            )
        killed = self.phase(folder) if code else None
        steps = max(logged(folder, "train"), default=0)
        return Attempt(lines, end - (began or end), killed, steps)

    def phase(self, folder) -> str:
        """What a run was doing when it was killed, as far as its files tell."""
        for where, pattern in SAVES.items():
            if list((folder / where).glob(pattern)):
                return "export" if where == "." else f"save ({pathlib.Path(where).name})"
        step, saved = max(logged(folder, "train"), default=0), folder / "checkpoints/last"
        if step not in logged(folder, "eval") and (step % 2 == 0 or step == STEPS):
            return (
                f"start or look {step}"
                if step == 0 or (saved / str(step)).exists()
                else f"save {step}"
            )
        if step == STEPS:
            done = [name for name in ("hf", "done.json") if (folder / name).exists()]
            return ("export", "final evaluation", "end")[len(done)]
        idle = time.time() - (folder / run_log.FILE).stat().st_mtime
        return f"{'rollout' if idle < self.rollout_seconds else 'reward or learn'} {step + 1}"


def logged(folder, kind, since=0.0) -> list[int]:
    """The steps of which metrics.jsonl has a line that was written since then."""
    return [r["step"] for r in run_log.read(folder) if r["kind"] == kind and r["time"] > since]


def arrays(folder) -> dict:
    """Every array of both checkpoints and of the export, by name; and what goes with the checkpoints."""
    out, checkpoints = {}, Checkpoints(str(folder))
    for name, manager in (("last", checkpoints.last), ("best", checkpoints.best)):
        at = str(folder / "checkpoints" / name / str(manager.latest_step()))
        meta, table = checkpoint_folder.read_json(at)
        likes = {k: jax.ShapeDtypeStruct(shape, dtype) for k, (dtype, shape, _) in table.items()}
        out[f"{name}: steps"] = manager.all_steps()
        out |= {f"{name}: {k}": v for k, v in meta.items() if k != "seconds"}
        out |= {
            f"{name}: {k}": np.asarray(x)
            for k, x in checkpoint_folder.read_arrays(at, likes).items()
        }
    checkpoints.close()
    exported = jax.tree_util.tree_leaves_with_path(hf_folder.load(folder / "hf", np.float32)[1])
    return out | {f"export: {jax.tree_util.keystr(p)}": np.asarray(x) for p, x in exported}


def content(folder) -> dict:
    """All that a finished run has left and that does not depend on the clock, by name."""
    clock = lambda k: (
        "second" in k or k in ("time", "step_time") or k.startswith(("perf/", "goodput/"))
    )
    timeless = lambda d: {k: v for k, v in d.items() if not clock(k)}
    out = arrays(folder)
    for i, row in enumerate(run_log.read(folder)):
        out |= {f"metrics.jsonl:{i + 1} {k}": v for k, v in timeless(row).items()}
    for name in ("samples.jsonl", "evaluation.json"):
        out[name] = (folder / name).read_bytes()
    return out | {"done.json": timeless(json.loads((folder / "done.json").read_text()))}


def different(a: dict, b: dict) -> list[str]:
    """The names under which two contents differ."""
    same = lambda x, y: (
        type(x) is type(y) and (np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y)
    )
    return [k for k in {**a, **b} if k not in a or k not in b or not same(a[k], b[k])]


def lost(killed: Attempt, resumed: Attempt) -> int:
    """Steps that were done and had to be done again."""
    if not killed.killed or any("this run is complete" in line for line in resumed.lines):
        return 0
    found = re.search(r"^resuming at step (\d+)", "\n".join(resumed.lines), re.MULTILINE)
    return killed.steps - int(found[1] if found else 0)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--kills", type=int, default=20)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument(
        "--keep", type=pathlib.Path, help="an empty folder for the runs, kept afterwards"
    )
    args, more = flags.parse_known_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax: restoring without a target is meant
    with tempfile.TemporaryDirectory() as temporary:
        return compare(
            Runs((args.keep or pathlib.Path(temporary)).absolute(), [*RUN, *more]),
            args.kills,
            args.seed,
        )


def compare(runs: Runs, kills: int, seed: int) -> int:
    """Kills and compares; prints; returns the exit code."""
    draw, began, bad = random.Random(seed), time.monotonic(), 0
    runs.attempt("compile")  # so that all others load the same programs
    whole = runs.attempt("whole")
    rows = [r for r in run_log.read(runs.folder / "whole") if r["kind"] == "train"]
    runs.rollout_seconds = float(np.median([r["perf/rollout_seconds"] for r in rows[1:]]))
    truth = content(runs.folder / "whole")
    twice = different(truth, content(runs.folder / "compile"))
    print(
        f"uninterrupted: {whole.seconds:.1f} s; {len(truth)} values; twice the same: {'no' if twice else 'yes'}"
    )
    saves = [*(("checkpoints/last", n) for n in (1, 2, 3)), ("checkpoints/best", 1), (".", 1)]
    pace = 1.0
    tail = (runs.folder / "whole/done.json").stat().st_mtime - rows[0]["time"]

    def moment(kind) -> dict:
        if kind == 2:
            during, nth = draw.choice(saves)
            return {"during": during, "nth": nth, "more": draw.uniform(0, 0.02)}
        return (
            {"stepped": draw.uniform(0, pace * tail)}
            if kind
            else {"after": draw.uniform(0, pace * whole.seconds)}
        )

    def interrupted(name, kind) -> Attempt:
        nonlocal pace
        while not (attempt := runs.attempt(name, **moment(kind))).killed:
            pace = (
                attempt.seconds / whole.seconds
            )  # it came to its end first: once more, by the machine's new pace
            shutil.rmtree(runs.folder / name)
        return attempt

    def report(name, attempt, then):
        print(
            f"{name:>5}  {attempt.seconds:6.1f} s  {attempt.killed or '-':<22} {then}", flush=True
        )

    def resumed(name, killed) -> str:
        nonlocal bad
        last = runs.attempt(name)
        diff = different(truth, content(runs.folder / name))
        bad += bool(diff)
        return f"{lost(killed, last)} steps lost  " + (
            f"DIFFERS: {', '.join(diff[:3])}" if diff else "equal"
        )

    print("  run    killed  while                  then")
    for i in range(kills):
        attempt = interrupted(f"k{i}", i % 3)
        report(f"k{i}", attempt, resumed(f"k{i}", attempt))
    attempt = interrupted("many", 0)
    for i in range(1, kills):
        following = runs.attempt("many", **moment(i % 2))
        report("many", attempt, f"{lost(attempt, following)} steps lost")
        attempt = following
        if not attempt.killed:
            break
    report("many", attempt, resumed("many", attempt))
    print(f"{bad} of {kills + 1} runs differ; {time.monotonic() - began:.0f} s in all")
    return int(bool(bad or twice))


if __name__ == "__main__":
    sys.exit(main())
