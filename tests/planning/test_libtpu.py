"""Plans by the compiler of TPUs itself; skipped where libtpu is not installed (pip install 'jax[tpu]')."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from places import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]
MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")


def plan(*arguments):
    """(exit code, rows, stderr) of a plan of phantom-sized steps."""
    done = subprocess.run(
        [sys.executable, "-m", "cxr_jax.plan", *arguments, *MESH, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize(
    "task, most_mib_of_code",
    # Measured with libtpu 0.0.42.1: CODE_FIGURES.
    [("sft", {"SFT step": 60}), ("rl", {"RL rollout": 400, "RL update": 400})],
)
def test_steps_of_the_phantom_are_compiled_for_a_slice(task, most_mib_of_code):
    code, rows, err = plan(
        f"--config={task}", "--config.model=random:phantom", "--topology=v5e:2x2"
    )
    # The compiler's own chatter is no part of the answer; the verdict is the only line.
    assert code == 0 and err.strip().startswith("fits: ") and err.strip().count("\n") == 0
    assert [row["name"] for row in rows] == list(most_mib_of_code)
    for row in rows:
        sizes = row["bytes"]
        assert sizes["code"] < most_mib_of_code[row["name"]] * 2**20
        assert sizes["temporary"] > 0 and sizes["padding"] > 0 and row["refused"] == ""
        assert row["peak"] == sum(sizes.values())
        # Parameters are gathered by every device on its way; nothing moves uncounted.
        assert row["calls"]["all-gather"] > 0 and row["calls"].keys() == row["moved"].keys()
        assert row["flops"] > 0 and "of what it writes" in row["waste"]


def test_what_does_not_fit_is_refused():
    """A chip of 16 GiB does not hold the 3B with its optimizer: the compiler says so, before it has compiled."""
    code, rows, err = plan(
        "--config=sft:nv_reason_3b", "--config.micro_batches=64", "--topology=v5e:1x1"
    )
    assert code == 1 and rows[0]["refused"] and "does not fit: SFT step: " in err
    assert rows[0]["bytes"]["parameters"] > 13 * 2**30
