"""How a process finds its place, and which rows it makes. Whole runs of several processes: test_several.py."""

import os
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

from cxr_jax.errors import UserError
from cxr_jax.runtime import layout as runtime_layout
from cxr_jax.runtime import processes


def place(monkeypatch, **variables):
    for name in (
        "CXR_COORDINATOR",
        "CXR_NUM_PROCESSES",
        "CXR_PROCESS_ID",
        "CXR_DISTRIBUTED",
        "CXR_START_TIMEOUT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"CXR_{name}", value)


GOOD = dict(COORDINATOR="127.0.0.1:1234", NUM_PROCESSES="2", PROCESS_ID="1")
BAD = [
    (dict(COORDINATOR="127.0.0.1:1234"), "CXR_NUM_PROCESSES is not set, but CXR_COORDINATOR is"),
    (
        dict(NUM_PROCESSES="2", PROCESS_ID="1"),
        "CXR_COORDINATOR is not set, but CXR_NUM_PROCESSES is",
    ),
    (GOOD | dict(PROCESS_ID="2"), "CXR_PROCESS_ID=2 is not below CXR_NUM_PROCESSES=2"),
    (GOOD | dict(PROCESS_ID="-1"), "CXR_PROCESS_ID=-1 is not a whole number >= 0"),
    (GOOD | dict(NUM_PROCESSES="two"), "CXR_NUM_PROCESSES=two is not a whole number >= 1"),
    (GOOD | dict(COORDINATOR="somewhere"), "CXR_COORDINATOR=somewhere is not HOST:PORT"),
    (GOOD | dict(START_TIMEOUT="0"), "CXR_START_TIMEOUT=0 is not a whole number >= 1"),
]


@pytest.mark.parametrize("variables, line", BAD)
def test_variables_that_make_no_place_are_refused(monkeypatch, variables, line):
    place(monkeypatch, **variables)
    with pytest.raises(UserError, match=line):
        processes.start()


def test_alone_without_variables(monkeypatch):
    place(monkeypatch, DISTRIBUTED="0")
    processes.start()
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.agree(True) and not processes.agree(False)
    assert processes.together(lambda: 3) == 3 and processes.leave(2) == 2
    with pytest.raises(UserError, match="mine"):
        processes.together(lambda: (_ for _ in ()).throw(UserError("mine")))
    np.testing.assert_array_equal(processes.gather_to_host({"a": np.arange(3)})["a"], np.arange(3))


def test_a_process_that_never_joins_is_named():
    """Process 1 of 2, whose coordinator nobody started."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CXR_START_TIMEOUT": "1",
        "CXR_COORDINATOR": "127.0.0.1:9",
        "CXR_NUM_PROCESSES": "2",
        "CXR_PROCESS_ID": "1",
    }
    command = [sys.executable, "-m", "cxr_jax.main", "--config=experiments/sft.py", "--dry_run"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = "error: process 1 of 2: not all processes met at the coordinator 127.0.0.1:9 within 1 s. Was every"
    assert (
        (done.returncode, done.stdout) == (1, "")
        and done.stderr.startswith(line)
        and done.stderr.count("\n") == 1
    )


def test_one_device_makes_all_rows():
    layout = runtime_layout.ONE_DEVICE
    assert layout.shards == 1 and str(layout) == "one device"
    np.testing.assert_array_equal(layout.rows_of(5), np.arange(5))
    batch = {"image": np.ones((5, 2))}
    assert layout.batch(batch) is batch


def test_meshes_that_are_not_the_devices():
    devices = list(range(8))
    for sizes, asked in (
        ((3, 1, 1), "3 x 1 x 1"),
        ((-1, 3, 1), "-1 x 3 x 1"),
        ((-1, -1, 1), "-1 x -1 x 1"),
        ((0, 8, 1), "0 x 8 x 1"),
        ((-1, 16, 1), "-1 x 16 x 1"),
    ):
        with pytest.raises(UserError, match=rf"config.mesh: {asked} .* is not 8 device"):
            runtime_layout.make_mesh(*sizes, devices=devices)
