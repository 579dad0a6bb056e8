"""What a run loses when things go wrong: signals in every loop, on one process and on two, full and damaged disks, NaN.

    PYTHONPATH=.:tests/helpers:tests python tests/oracle/faults.py [--only=PART OF A NAME,...] [--keep=FOLDER]

Small SFT and RL runs go through undisturbed; then each fault is done to a run of its own, which is started again until
it is complete, and what it ends with is compared, bit for bit, with the undisturbed run (`kill_rl.content`; two
processes against two processes). Runs save every second step. Prints a table; exits 1 if anything is lost but steps
since the last save, if an exit code is another, or if a run ends with other values. Kills (-9) at random moments:
kill_rl.py --kills=50. As root it mounts a tmpfs of its own for the full disk.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import kill_rl
import several

from cxr_jax.metrics import run_log

SFT = [
    "--config=experiments/sft.py",
    "--config.model=random:phantom",
    "--config.steps=6",
    "--config.locate_steps=2",
    "--config.batch_size=2",
    "--config.log_every=1",
    "--config.save_every=2",
    "--config.eval.every=3",
    "--config.eval.n=2",
    "--config.eval.n_final=2",
    "--config.eval.batch_size=2",
    "--config.eval.bootstrap=10",
    "--config.eval.cases=2",
]
RUNS = {"sft": SFT, "rl": [*kill_rl.RUN, "--config.save_every=2"]}
STALL = """
from cxr_jax.data.sources import phantom
real = phantom.PhantomSource.batch
def batch(self, indices):
    if self.split == "train" and indices[0] >= 6:
        time.sleep(1e6)
    return real(self, indices)
phantom.PhantomSource.batch = batch
"""
BREAK = """
import jax, jax.numpy as jnp
from cxr_jax.training import optimizer
real = optimizer.guarded_update
optimizer.guarded_update = lambda tx, state, grads: real(
    tx, state, jax.tree.map(lambda g: jnp.where(state["step"] >= FROM, jnp.nan, g), grads))
"""


class Faults:
    def __init__(self, folder):
        self.folder = folder
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(folder / "cache")
        )
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self.truths = {}

    def start(self, task, name, processes=1, patch="", more=(), **environment):
        argv = [*RUNS[task], *more, f"--workdir={self.folder / name}"]
        if not patch:
            return several.start(argv, processes, 1, **environment)
        code = f"import sys, time\n{patch}\nfrom cxr_jax import main\nsys.exit(main.main(['main.py', *sys.argv[1:]]))"
        return [
            subprocess.Popen(
                [sys.executable, "-c", code, *argv],
                cwd=several.ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(several.ROOT)} | environment,
            )
        ]

    def truth(self, task, processes):
        """What an undisturbed run ends with."""
        key = task, processes
        if key not in self.truths:
            name = f"whole_{task}_{processes}"
            for code, out, err in several.end(self.start(task, name, processes)):
                assert code == 0, out + err
            self.truths[key] = kill_rl.content(self.folder / name)
        return self.truths[key]

    def finish(self, task, name, processes=1):
        """Runs it to its end: (steps that were done twice, the values that differ)."""
        before = max(kill_rl.logged(self.folder / name, "train"), default=0)
        ended = several.end(self.start(task, name, processes))
        assert all(code == 0 for code, *_ in ended), ended
        found = re.search(r"^resuming at step (\d+)", ended[0][1], re.MULTILINE)
        lost = (
            0 if "this run is complete" in ended[0][1] else before - int(found[1] if found else 0)
        )
        return lost, kill_rl.different(
            self.truth(task, processes), kill_rl.content(self.folder / name)
        )


def when(started, condition, action, timeout=300):
    """Does `action` once `condition(text so far)` holds, while the processes run. Returns what they ended with."""
    texts = [[] for _ in started]
    readers = [
        threading.Thread(target=lambda p=p, t=t: t.extend(iter(p.stdout.readline, "")))
        for p, t in zip(started, texts, strict=True)
    ]
    errors = [[] for _ in started]
    readers += [
        threading.Thread(target=lambda p=p, t=t: t.extend(iter(p.stderr.readline, "")))
        for p, t in zip(started, errors, strict=True)
    ]
    for r in readers:
        r.start()
    deadline = time.monotonic() + timeout
    while not condition("".join(texts[0])):
        assert time.monotonic() < deadline and started[0].poll() is None, "".join(
            texts[0] + errors[0]
        )
        time.sleep(0.005)
    began = time.monotonic()
    action()
    for p in started:
        p.wait(timeout)
    seconds = time.monotonic() - began
    for r in readers:
        r.join()
    return [
        (p.returncode, "".join(t), "".join(e))
        for p, t, e in zip(started, texts, errors, strict=True)
    ], seconds


def signalled(faults, task, name, condition, processes=1, to=0, number=signal.SIGTERM, **options):
    started = faults.start(task, name, processes, **options)
    ended, seconds = when(started, condition, lambda: started[to].send_signal(number))
    return [code for code, *_ in ended], seconds, ended


def said(text):
    return lambda out: text in out


def logged(faults, name, step):
    return lambda out: step in kill_rl.logged(faults.folder / name, "train")


def saved(faults, name, step):
    return lambda out: (faults.folder / name / f"checkpoints/last/{step}").exists()


def term(task, where, processes=1, to=0, **options):
    """A case: SIGTERM at `where(faults, name)`; exit code 0 of all; nothing but steps since the last save is lost."""

    def case(faults, name):
        codes, seconds, _ = signalled(
            faults, task, name, where(faults, name), processes, to, **options
        )
        lost, different = faults.finish(task, name, processes)
        return codes, [0] * processes, f"stopped in {seconds:.1f} s", lost, different

    return case


def full_disk(faults, name):
    """A small tmpfs: the run fails with one line, what was saved before stays; with room it goes on."""
    folder = faults.folder / name
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=45m", "tmpfs", folder], check=True)
    try:
        [(code, out, err)] = several.end(faults.start("sft", name))
        line = err.strip().splitlines()[-1] if err.strip() else ""
        assert err.count("\n") == 1 and "No space left" in line, err
        subprocess.run(["mount", "-o", "remount,size=2g", folder], check=True)
        lost, different = faults.finish("sft", name)
        return [code], [1], line.split(": ", 1)[1][-60:], lost, different
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def truncated(faults, name):
    started = faults.start("sft", name)
    when(started, saved(faults, name, 4), started[0].kill)
    newest = faults.folder / name / "checkpoints/last/4"
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:1000])
    lost, different = faults.finish("sft", name)
    return [0], [0], "step 4 truncated", lost, different


def not_finite(faults, name):
    """Every gradient from step 3 on is NaN: skipped and counted, then the run ends; it can go on from its save."""
    patch = BREAK.replace("FROM", "3")
    [(code, out, err)] = several.end(
        faults.start("sft", name, patch=patch, more=["--config.max_skipped=2"])
    )
    rows = [r for r in run_log.read(faults.folder / name) if r["kind"] == "train"]
    assert "were not finite" in err and [r["skipped"] for r in rows][:5] == [0, 0, 0, 1, 2], (
        err,
        rows,
    )
    lost, different = faults.finish("sft", name)
    # The save of step 4 holds one skipped step: the run that goes on is not the undisturbed one, and says so.
    return (
        [code],
        [1],
        err.strip()[-60:],
        lost,
        [] if different else ["no skipped step was counted"],
    )


def hangs(faults, name):
    [(code, out, err)] = several.end(
        faults.start("sft", name, patch=STALL, more=["--config.step_timeout=20"])
    )
    assert "Timeout" in err and "in sleep" not in out, err
    lost, different = faults.finish("sft", name)
    return [code], [1], "stacks of all threads", lost, different


def peer(faults, name):
    started = faults.start("rl", name, 2)
    ended, seconds = when(started, logged(faults, name, 3), started[1].kill)
    codes = [code for code, *_ in ended]
    lost, different = faults.finish("rl", name, 2)
    return (
        [bool(codes[0]), codes[1]],
        [True, -9],
        f"the other ended in {seconds:.1f} s",
        lost,
        different,
    )


def compiling(faults, name):
    """With a compilation cache of its own, so that the first step takes its time."""
    with tempfile.TemporaryDirectory() as cache:
        case = term("sft", lambda *_: said("sft on"), JAX_COMPILATION_CACHE_DIR=cache)
        return case(faults, name)


SAVE_LOST = (
    "full disk",
    "truncated newest checkpoint",
)  # in them a save is lost, and the steps since the one before
CASES = {
    "SIGTERM while compiling": compiling,
    "SIGTERM in training": term("sft", lambda f, n: logged(f, n, 3)),
    "SIGTERM in a rollout": term("rl", lambda f, n: logged(f, n, 3)),
    "SIGTERM in an evaluation": term("rl", lambda f, n: saved(f, n, 2)),
    "SIGTERM in the last evaluation": term("sft", lambda f, n: said("evaluating ")),
    "SIGTERM waiting for data": term("sft", lambda f, n: logged(f, n, 3), patch=STALL),
    "SIGINT in training": term("sft", lambda f, n: logged(f, n, 3), number=signal.SIGINT),
    "SIGTERM to one of two, training": term("rl", lambda f, n: logged(f, n, 3), 2, 1),
    "SIGTERM to one of two, evaluation": term("rl", lambda f, n: saved(f, n, 2), 2, 1),
    "full disk": full_disk,
    "truncated newest checkpoint": truncated,
    "NaN gradients": not_finite,
    "a step that hangs": hangs,
    "a peer that dies": peer,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=pathlib.Path)
    args = parser.parse_args()
    only, bad = [name for name in CASES if any(part in name for part in args.only.split(","))], 0
    with tempfile.TemporaryDirectory() as temporary:
        faults = Faults((args.keep or pathlib.Path(temporary)).absolute())
        print(f"{'fault':<34} {'exit':<10} {'steps lost':<11} {'then':<8} what")
        for i, name in enumerate(only):
            codes, wanted, what, lost, different = CASES[name](faults, f"f{i}")
            right = codes == wanted and lost <= (4 if name in SAVE_LOST else 2) and not different
            bad += not right
            then, wrong = (
                "DIFFERS" if different else "equal",
                "" if right else f"  WRONG {different[:3]}",
            )
            print(
                f"{name:<34} {' '.join(map(str, codes)):<10} {lost:<11} {then:<8} {what}{wrong}",
                flush=True,
            )
            if not args.keep:
                shutil.rmtree(faults.folder / f"f{i}", ignore_errors=True)
    print(f"{bad} of {len(only)} went wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
