"""Checkpoints over processes: what 2 processes x 2 devices saved loads, bit for bit, onto other meshes; run by hand.

    python tests/oracle/checkpoint_mesh.py

A state of every type, divided over all devices (FSDP), is saved by 2 processes with 2 fake devices each, and given away
(donated) at once. It is restored on 1 x 1, 1 x 4, 2 x 1 and 2 x 2, compared with its definition in NumPy, given to a
donated step, and saved again. Then: a damaged newest checkpoint, which all processes pass over; a checkpoint of another
model, which all refuse; and a process that cannot write, of which all learn. About two minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def definition(step: int) -> dict:
    """The state of a step as NumPy arrays. The first axis of those that are divided divides by 4."""
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": rng.standard_normal((3, 64, 40), dtype=np.float32),
            "h": rng.standard_normal((8, 33), dtype=np.float32).astype(ml_dtypes.bfloat16),
            "large": rng.standard_normal((4096, 1024), dtype=np.float32),
        },
        "keys": rng.integers(0, 2**32, (4, 2), dtype=np.uint32),
        "mask": rng.random((12,)) > 0.5,
        "none": np.zeros((0, 4), np.float32),
        "step": np.int32(step),
    }


def shardings(tree):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def one(x):
        axis = next((i for i, n in enumerate(x.shape) if n and n % 4 == 0), None)
        spec = (
            PartitionSpec() if axis is None or not x.size else PartitionSpec(*[None] * axis, "fsdp")
        )
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, tree)


def on_devices(tree):
    import jax

    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
        tree,
        shardings(tree),
    )


def assert_same(tree, want):
    import jax
    import numpy as np

    assert jax.tree.structure(tree) == jax.tree.structure(want)
    for got, x in zip(jax.tree.leaves(tree), jax.tree.leaves(want), strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        for shard in got.addressable_shards:
            assert (
                np.asarray(shard.data).tobytes() == np.ascontiguousarray(x[shard.index]).tobytes()
            )


def child(action: str, folder: str, step: int) -> None:
    from cxr_jax.runtime import processes

    processes.start()
    import jax

    from cxr_jax.errors import UserError
    from cxr_jax.runtime import checkpoints

    jax.config.update("jax_compilation_cache_dir", None)
    step_of = jax.jit(
        lambda tree: jax.tree.map(
            lambda x: x ^ True if x.dtype == bool else x + x.dtype.type(1), tree
        ),
        donate_argnums=0,
    )
    c = checkpoints.Checkpoints(folder, about={"git_sha": "0" * 40})
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        definition(0),
        shardings(definition(0)),
    )
    if action == "save":
        for s in range(1, step + 1):
            state = on_devices(definition(s))
            c.save(s, state, {"score": 0.1 * s})
            jax.block_until_ready(step_of(state))
            while c.last_save is None or c.last_save["step"] < s:
                c.poll()
        c.save_best(step, on_devices(definition(step)["params"]), {"best": True})
        c.wait()
        print(json.dumps(c.last_save))
    elif action == "restore":
        state, meta, found = c.restore(like)
        assert (found, meta) == (step, {"score": 0.1 * step}), (found, meta)
        assert_same(state, definition(step))
        jax.block_until_ready(step_of(state))
        params, meta, _ = c.restore_best(like["params"])
        assert meta == {"best": True}
        assert_same(params, definition(int(os.environ["BEST"]))["params"])
        c.save(step + 1, on_devices(definition(step + 1)), {"score": 0.1 * (step + 1)})
        c.wait()
        print(json.dumps(c.last_save))
    elif action == "refuse":
        other = like | {
            "params": like["params"] | {"w": jax.ShapeDtypeStruct((3, 64, 41), "float32")}
        }
        try:
            c.restore(other)
        except UserError as e:
            print(e)
        else:
            raise AssertionError("restored")
    elif action == "fail":
        if processes.index() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        began = time.monotonic()
        try:
            c.save(step, on_devices(definition(step)), {})
            c.wait()
        except checkpoints.SaveFailedError as e:
            print(f"after {time.monotonic() - began:.1f} s: {e}", file=sys.stderr)
            sys.exit(processes.leave(1))
        raise AssertionError("saved")
    c.close()
    processes.leave(0)


def run(
    action: str, folder, step: int, processes: int, devices: int, best: int = 2, code: int = 0
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "BEST": str(best),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [
        sys.executable,
        __file__,
        "--child",
        action,
        "--folder",
        str(folder),
        "--step",
        str(step),
    ]
    children = []
    for k in range(processes):
        place = {
            "CXR_COORDINATOR": f"127.0.0.1:{port}",
            "CXR_NUM_PROCESSES": str(processes),
            "CXR_PROCESS_ID": str(k),
        }
        env = base | (place if processes > 1 else {})
        children.append(
            subprocess.Popen(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    print(f"{action} step {step} on {processes} x {devices}", flush=True)
    try:
        done = [process.communicate(timeout=300) for process in children]
    finally:
        for process in children:
            process.kill()
    for k, (process, (out, err)) in enumerate(zip(children, done, strict=True)):
        lines = [
            x
            for x in (out + (err if code else "")).splitlines()
            if re.match(r"[{/]|checkpoint|after", x)
        ]
        print("".join(f"   {k}: {x}\n" for x in lines), end="", flush=True)
        if process.returncode != code:
            raise SystemExit(f"process {k}: exit code {process.returncode}\n{out}\n{err}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        run("save", folder, 2, 2, 2)
        for step, (processes, devices) in enumerate([(1, 1), (1, 4), (2, 1), (2, 2)], start=2):
            run("restore", folder, step, processes, devices)
        newest = folder / "checkpoints/last/6"
        biggest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        biggest.write_bytes(biggest.read_bytes()[:1000])
        run("restore", folder, 5, 2, 2)
        assert (folder / "checkpoints/damaged_last_6").is_dir()
        run("refuse", folder, 6, 2, 1)
        run("fail", folder, 7, 2, 2, code=1)
        run("restore", folder, 6, 1, 1)
    print("all equal, bit for bit")


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--child", help=argparse.SUPPRESS)
    flags.add_argument("--folder", help=argparse.SUPPRESS)
    flags.add_argument("--step", type=int, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        child(args.child, args.folder, args.step)
    else:
        main()
