"""Plans by the compiler of TPUs itself; skipped where libtpu is not installed (pip install 'jax[tpu]')."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
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


def test_a_step_of_the_phantom_is_compiled_for_a_slice():
    """Figures of libtpu 0.0.42.1: 40.9 MiB of code, 86 all-gathers; 45 s of a core."""
    code, rows, err = plan("--config=sft", "--topology=v5e:2x2")
    # The compiler's own chatter is no part of the answer; the verdict is the only line.
    assert code == 0 and err.strip().startswith("fits: ") and err.strip().count("\n") == 0
    (row,) = rows
    sizes = row["bytes"]
    assert row["name"] == "SFT step" and row["refused"] == ""
    assert sizes["code"] < 60 * 2**20 and row["calls"]["all-gather"] < 150
    assert sizes["temporary"] > 0 and sizes["padding"] > 0
    assert row["peak"] == sum(sizes.values())
    # What is divided is gathered, and its gradient given back in parts.
    assert row["moved"]["all-gather"] > 0 and row["moved"]["reduce-scatter"] > 0
    assert row["flops"] > 0 and "of what it writes" in row["waste"]


def test_a_program_that_does_not_fit_one_chip_is_refused_in_the_compilers_words():
    """One chip, no mesh. A product of 262,144 rows with itself is 256 GiB; one of 1,024 fits."""
    from cxr_jax.planning import programs, slice_needs, slices

    chip = slices.open_slice("v5e:1x1").devices[0]

    @jax.jit
    def cumulated(x):
        return jnp.cumsum(x @ x.T, axis=0)

    def needs(rows):
        arguments = {"batch": jax.ShapeDtypeStruct((rows, 80), "float32")}
        program = programs.Program("product", cumulated, arguments, [1], rows, {})
        return slice_needs.needs_on_slice(program, chip)

    large = needs(262144)
    assert "Ran out of memory" in large.refused and "15.75G" in large.refused
    assert large.bytes == {"batch": 262144 * 80 * 4} and large.flops == 2 * 80 * 262144**2
    small = needs(1024)
    assert small.refused == "" and small.bytes["output"] == 1024**2 * 4
    # Rows lie in tiles of 128 numbers, or the other way round in tiles of 8 rows, of which 80 is a multiple.
    assert 0 <= small.bytes["padding"] <= 48 * 1024 * 4
    assert small.bytes["code"] > 0 and small.moved == {} and small.calls == {}
