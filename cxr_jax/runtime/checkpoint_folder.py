"""The folder of one checkpoint: what is in it, whether it is what was written, and reading it onto a mesh.

    state/      Orbax: a flat dict, path of the leaf -> array; readable on any mesh
    meta/       JSON of whoever saved
    contents/   JSON: "about", facts of the run; "arrays", path -> [type, shape, hash (`array_hash`; "" of an empty
                array, which Orbax does not take)]; "crc32" of these and of meta

Nothing here waits for another process, so that one that cannot read a file does not leave the others waiting.
"""

import json
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cxr_jax.runtime import array_hash
from cxr_jax.runtime.trees import path_string


class DamagedError(ValueError):
    """A file of a checkpoint is not as it was written."""


def named(tree) -> dict:
    """{path: leaf}, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    out = {path_string(path): leaf for path, leaf in leaves}
    if len(out) < len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return out


def items(tree, meta: dict, about: dict) -> tuple[ocp.args.Composite, int]:
    """(what Orbax is to save, bytes of the arrays). Waits for the arrays, whose hashes it takes."""
    arrays = {k: x if isinstance(x, jax.Array) else jnp.asarray(x) for k, x in named(tree).items()}
    held = {k: x for k, x in arrays.items() if x.size}
    hashes = array_hash.of(held)
    table = {k: [str(x.dtype), list(x.shape), hashes.get(k, "")] for k, x in arrays.items()}
    meta, contents = json.loads(json.dumps([meta, {"about": about, "arrays": table}]))
    contents["crc32"] = _crc32(meta, contents)
    json_of = ocp.args.JsonSave
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(held), meta=json_of(meta), contents=json_of(contents)
    )
    return args, sum(x.nbytes for x in held.values())


def _crc32(meta, contents) -> int:
    return zlib.crc32(
        json.dumps([meta, contents["about"], contents["arrays"]], sort_keys=True).encode()
    )


def read_json(folder: str) -> tuple[dict, dict]:
    """(meta, {path: [type, shape, hash]}). Raises whatever it meets if they are not as they were written."""
    meta, contents = (
        ocp.JsonCheckpointHandler().restore(Path(folder) / item) for item in ("meta", "contents")
    )
    if contents["crc32"] != _crc32(meta, contents):
        raise DamagedError("meta and contents do not match their checksum")
    return meta, contents["arrays"]


def difference(table: dict, wanted: dict) -> str | None:
    """The first leaf by which a checkpoint differs from what is wanted, found and expected; None: it is the same."""
    found = {k: "{} {}".format(*entry) for k, entry in table.items()}
    expected = {k: f"{x.dtype} {list(np.shape(x))}" for k, x in wanted.items()}
    for k in [*expected, *found]:
        if found.get(k) != expected.get(k):
            return f"{k}: found {found.get(k, 'nothing')}, expected {expected.get(k, 'nothing')}"
    return None


def read_arrays(folder: str, wanted: dict) -> dict:
    """{path: array} where those wanted lie, in memory of their own. Raises whatever it meets in a damaged file.

    wanted: {path: array or jax.ShapeDtypeStruct}; without a sharding: on this process's first device.
    """
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = {k: getattr(x, "sharding", None) or first for k, x in wanted.items()}
    likes = {
        k: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place[k]) for k, x in wanted.items()
    }
    held = ocp.args.StandardRestore({k: like for k, like in likes.items() if like.size})
    got = ocp.StandardCheckpointHandler().restore(Path(folder) / "state", args=held)
    for k, like in likes.items():
        if not like.size:
            got[k] = jax.jit(
                lambda like=like: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding
            )()
        elif not getattr(wanted[k], "committed", getattr(wanted[k], "sharding", None) is not None):
            # Free to follow others to their devices, as a fresh one is.
            got[k] = jnp.array(np.asarray(got[k]))
        elif next(iter(like.sharding.device_set)).platform == "cpu":
            got[k] = jnp.copy(
                got[k]
            )  # it may share the reader's memory, which a donated step would write to
    return {k: got[k] for k in wanted}


def problem(folder: str) -> str | None:
    """What is wrong with a checkpoint as it lies on disk: its JSON, or one array, another from step to step."""
    try:
        _, table = read_json(folder)
        names = sorted(k for k, (_, _, hashed) in table.items() if hashed)
        name = names[zlib.crc32(os.path.basename(folder).encode()) % len(names)]
        args = ocp.args.PyTreeRestore(
            item={name: 0},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        got = ocp.PyTreeCheckpointHandler().restore(Path(folder) / "state", args=args)[name]
        if [str(got.dtype), list(got.shape), array_hash.of_host(got)] != table[name]:
            return f"{name} reads back as something else"
    except Exception as e:  # noqa: BLE001 - Orbax and TensorStore raise many kinds
        return f"it does not read back ({type(e).__name__})"
    return None
