"""What `cxr_jax.plan` says beside what a run takes on this machine: bytes of arrays, and the memory that steps touch.

    PYTHONPATH=. python tests/oracle/plan_memory.py [--devices=1] [--only=sft,rl] [--config.batch_size=64 ...]

A run of the phantom model of STEPS steps is watched from between its programs, when all arrays are ready. Held: what
is live on the first device there, beside the plan's parameters, optimizer state and what is fixed. Temporary: how far
the process's resident memory has risen above that at most since the last look (VmHWM, reset at each), beside the
plan's batch and temporary memory; with several fake devices the process holds those of all. The last step counts: the
first ones compile. Exits 1 if held differs by more than 2 % or a step took more than 1.05 of what the plan says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

STEPS = 3
WATCH = """
import json, sys
import jax
from cxr_jax.runtime import checkpoints, signals

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))

def look(name):
    jax.block_until_ready(jax.live_arrays())
    first = jax.devices()[0]
    live = [x for x in jax.live_arrays() if any(s.device == first for s in x.addressable_shards)]
    held = sum(s.data.nbytes for x in live for s in x.addressable_shards if s.device == first)
    largest = sorted(((x.nbytes, str(x.aval)) for x in live), reverse=True)[:3]
    row = {"name": name, "held": held, "resident": status("VmRSS"), "most": status("VmHWM"), "largest": largest}
    print("LOOK " + json.dumps(row), file=sys.stderr, flush=True)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")

def watched(cls, method):
    real = getattr(cls, method)
    def call(self, *args):
        look(method)
        return real(self, *args)
    setattr(cls, method, call)

watched(checkpoints.Checkpoints, "poll")
watched(signals.Stop, "check")
from cxr_jax import main
sys.exit(main.main(sys.argv))
"""
RUNS = {
    "sft": [
        "--config=experiments/sft.py",
        "--config.model=random:phantom",
        "--config.batch_size=64",
        "--config.locate_steps=0",
    ],
    "rl": ["--config=experiments/rl.py", "--config.model=random:phantom"],
}
SHORT = [
    f"--config.steps={STEPS}",
    "--config.save_every=1000",
    "--config.eval.every=1000",
    "--config.eval.n=2",
    "--config.eval.n_final=2",
    "--config.eval.batch_size=2",
    "--config.eval.bootstrap=10",
    "--config.eval.cases=2",
]


def output(command, devices) -> subprocess.CompletedProcess:
    flag = f"--xla_force_host_platform_device_count={devices}"
    # Freed memory goes back to the system at once, or the next program takes it without a rise.
    env = os.environ | {
        "XLA_FLAGS": flag,
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def looks_of(task, devices, more) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        done = output(["-c", WATCH, *RUNS[task], *SHORT, *more, f"--workdir={folder}/run"], devices)
    return [json.loads(line[5:]) for line in done.stderr.splitlines() if line.startswith("LOOK ")]


def measured(looks) -> list[tuple[int, int]]:
    """(held, risen) of each program of the last step: the looks between the last poll but one and the last."""
    polls = [i for i, look in enumerate(looks) if look["name"] == "poll"][:STEPS]
    step = looks[polls[-2] + 1 : polls[-1] + 1]  # begins with the check before the step
    return [(b["held"], b["most"] - a["resident"]) for a, b in zip(step, step[1:], strict=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--only", default="sft,rl")
    args, more = parser.parse_known_args()
    bad, mib = 0, 2**20
    for task in args.only.split(","):
        plan = output(
            ["-m", "cxr_jax.plan", *RUNS[task], *more, f"--devices={args.devices}", "--json"],
            args.devices,
        )
        programs = [json.loads(line) for line in plan.stdout.splitlines()]
        for program, (held, risen) in zip(
            programs, measured(looks_of(task, args.devices, more)), strict=True
        ):
            said = program["bytes"]
            on_mesh = (
                ("batch",) if args.devices > 1 else ()
            )  # laid out before the step, not handed over with the call
            lies = sum(said.get(k, 0) for k in ("parameters", "optimizer", "fixed", *on_mesh))
            takes = (said["batch"] + said["temporary"]) * args.devices
            bad += abs(held / lies - 1) > 0.02 or risen > 1.05 * takes
            print(
                f"{program['name']}: plan {lies / mib:,.2f} MiB held, live {held / mib:,.2f} "
                f"({held / lies - 1:+.2%}); plan {takes / mib:,.0f} MiB for batch and temporary, "
                f"risen by {risen / mib:,.0f} ({risen / takes:.2f} of it)",
                flush=True,
            )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
