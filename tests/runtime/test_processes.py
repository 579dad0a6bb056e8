"""How a process finds its place, and which rows it makes. Whole runs of several processes: test_several.py."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
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


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, as far as a mesh asks about it; a CPU is in no slice."""

    id: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "none"


def numbers(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


def test_slices_are_the_outer_part_of_data_and_then_of_fsdp():
    # Not in the order of their slices.
    devices = [Device(number, (number // 2) % 2) for number in range(16)]
    for sizes, slices, of_slice in (
        ((4, 2, 2), 2, lambda data, fsdp: data // 2),
        ((1, 4, 4), 2, lambda data, fsdp: fsdp // 2),
    ):
        mesh = runtime_layout.make_mesh(*sizes, devices=devices, slices=slices)
        assert mesh.devices.shape == sizes and len(set(mesh.devices.flat)) == 16
        for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
            assert device.slice_index == of_slice(data, fsdp)
    # Both axes: 2 x 2 slices. Devices that are in no slice, as CPUs are, go by their order.
    cpus = [Device(number) for number in range(16)]
    mesh = runtime_layout.make_mesh(2, 4, 2, devices=cpus, slices=4)
    np.testing.assert_array_equal(numbers(mesh)[..., 0] // 4, [[0, 0, 1, 1], [2, 2, 3, 3]])
    # Heads of a model with 2 key heads beside it.
    heads = runtime_layout.Heads(16, 2)
    mesh = runtime_layout.make_mesh(2, 2, 4, devices=cpus, slices=2, heads=heads)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "key_copies": 2}
    np.testing.assert_array_equal(numbers(mesh), np.arange(16).reshape(2, 2, 2, 2))
    # GPUs of one run may be in several of what JAX calls slices.
    assert runtime_layout.make_mesh(16, 1, 1, devices=devices).size == 16


def test_slices_that_do_not_divide_a_mesh():
    devices = [Device(number, number // 4) for number in range(16)]
    for sizes, slices, reason in (
        ((1, 2, 8), 4, "slices=4 does not divide data x fsdp = 1 x 2, and tensor stays in a slice"),
        ((2, 8, 1), 3, "slices=3 does not divide data x fsdp = 2 x 8"),
        ((16, 1, 1), 2, "slices=2: the devices are 4 slice"),
    ):
        with pytest.raises(UserError, match=rf"^config.mesh.{reason}"):
            runtime_layout.make_mesh(*sizes, devices=devices, slices=slices)
    on_tpu = [dataclasses.replace(device, platform="tpu") for device in devices]
    with pytest.raises(UserError, match="slices=1: the devices are 4 slice"):
        runtime_layout.make_mesh(16, 1, 1, devices=on_tpu)


def test_heads_that_tensor_does_not_divide():
    for tensor, heads, shape in (
        (4, (16, 4), {"tensor": 4}),
        (4, (16, 2), {"tensor": 2, "key_copies": 2}),
        (6, (12, 4), {"tensor": 2, "key_copies": 3}),
        (8, (8, 1), {"tensor": 1, "key_copies": 8}),
    ):
        devices = [Device(number) for number in range(tensor)]
        mesh = runtime_layout.make_mesh(
            1, 1, tensor, devices=devices, heads=runtime_layout.Heads(*heads)
        )
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, **shape}
    with pytest.raises(UserError, match="^config.mesh.tensor=6 does not divide the 16 heads"):
        runtime_layout.make_mesh(1, 1, 6, devices=range(6), heads=runtime_layout.Heads(16, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerators_multiply_float32_in_float32(dtype):
    def precision_of(chosen):
        with runtime_layout.product_precision(chosen, dtype):
            text = jax.jit(lambda x: x @ x).lower(np.ones((2, 2), np.float32)).as_text()
        return re.findall(r"precision = \[(\w+)", text)[0]

    want = "HIGHEST" if dtype == "float32" else "DEFAULT"
    assert precision_of("auto") == want and precision_of("highest") == "HIGHEST"
    assert precision_of("high") == "HIGH" and precision_of("default") == "DEFAULT"


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
