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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cxr_jax.runtime import array_hash
from cxr_jax.runtime.trees import path_string

ArrayTable = dict[str, list]
"""What contents/ says of the arrays: path -> [type, shape, hash]."""


class DamagedError(ValueError):
    """A file of a checkpoint is not as it was written."""


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Collect {path: leaf}, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_path = {path_string(path): leaf for path, leaf in leaves}
    if len(by_path) < len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return by_path


class Items(NamedTuple):
    """What Orbax is to save, and the bytes of its arrays."""

    args: ocp.args.Composite
    nbytes: int


def make_items(tree: Any, meta: dict, about: dict) -> Items:
    """Put together what Orbax is to save. Waits for the arrays, whose hashes it takes."""
    arrays = {
        path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        for path, leaf in leaves_by_path(tree).items()
    }
    # Orbax does not take empty arrays: they are in the table alone.
    stored = {path: array for path, array in arrays.items() if array.size}
    hashes = array_hash.hash_arrays(stored)
    table = {
        path: [str(array.dtype), list(array.shape), hashes.get(path, "")]
        for path, array in arrays.items()
    }
    # As JSON gives it back: the checksum is over what a reader will see.
    meta, contents = json.loads(json.dumps([meta, {"about": about, "arrays": table}]))
    contents["crc32"] = _crc32(meta, contents)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(stored),
        meta=ocp.args.JsonSave(meta),
        contents=ocp.args.JsonSave(contents),
    )
    return Items(args, sum(array.nbytes for array in stored.values()))


def _crc32(meta: dict, contents: dict) -> int:
    checked = [meta, contents["about"], contents["arrays"]]
    return zlib.crc32(json.dumps(checked, sort_keys=True).encode())


def read_json(folder: str) -> tuple[dict, ArrayTable]:
    """Read (meta, table of the arrays). Raises whatever it meets if they are not as they were written."""
    handler = ocp.JsonCheckpointHandler()
    meta, contents = (handler.restore(Path(folder) / item) for item in ("meta", "contents"))
    if contents["crc32"] != _crc32(meta, contents):
        raise DamagedError("meta and contents do not match their checksum")
    return meta, contents["arrays"]


def first_difference(table: ArrayTable, wanted: Mapping[str, Any]) -> str | None:
    """Name the first leaf by which a checkpoint differs from what is wanted, as it is and as it should be, if any."""
    found = {path: "{} {}".format(*entry) for path, entry in table.items()}
    expected = {path: f"{leaf.dtype} {list(np.shape(leaf))}" for path, leaf in wanted.items()}
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            there, here = found.get(path, "nothing"), expected.get(path, "nothing")
            return f"{path}: found {there}, expected {here}"
    return None


def read_arrays(folder: str, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Read {path: array} where those wanted lie, in memory of their own. Raises whatever it meets in a damaged file.

    Args:
        wanted: {path: array or jax.ShapeDtypeStruct}; without a sharding: on this process's first device.
    """
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    likes = {
        path: jax.ShapeDtypeStruct(
            np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device
        )
        for path, leaf in wanted.items()
    }
    stored = ocp.args.StandardRestore({path: like for path, like in likes.items() if like.size})
    arrays = ocp.StandardCheckpointHandler().restore(Path(folder) / "state", args=stored)
    # Taken out one by one, so that no more than one array is there twice.
    return {path: _own(arrays.pop(path, None), likes[path], leaf) for path, leaf in wanted.items()}


def _own(array: jax.Array | None, like: jax.ShapeDtypeStruct, wanted: Any) -> jax.Array:
    """An array that was read, as one like `wanted` that nothing else refers to."""
    if not like.size:
        make = jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)
        return make()
    has_sharding = getattr(wanted, "sharding", None) is not None
    if not getattr(wanted, "committed", has_sharding):
        # Free to follow others to their devices, as a fresh one is.
        return jnp.array(np.asarray(array))
    if next(iter(like.sharding.device_set)).platform == "cpu":
        # It may share the reader's memory, which a donated step would write to.
        return jnp.copy(array)
    return array


def find_problem(folder: str) -> str | None:
    """Say what is wrong with a checkpoint as it lies on disk: its JSON, or one array, another from step to step."""
    try:
        _, table = read_json(folder)
        paths = sorted(path for path, (_, _, hashed) in table.items() if hashed)
        path = paths[zlib.crc32(os.path.basename(folder).encode()) % len(paths)]
        args = ocp.args.PyTreeRestore(
            item={path: 0},
            restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        array = ocp.PyTreeCheckpointHandler().restore(Path(folder) / "state", args=args)[path]
        if [str(array.dtype), list(array.shape), array_hash.hash_host_array(array)] != table[path]:
            return f"{path} reads back as something else"
    except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many kinds
        return f"it does not read back ({type(error).__name__})"
    return None
