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


def leaves_by_path(state_tree: Any) -> dict[str, Any]:
    """Collect {path: leaf}, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state_tree)
    by_path = {path_string(leaf_path): leaf for leaf_path, leaf in leaves}
    # Keys of another kind may print alike, and one array would replace the other in silence.
    if len(by_path) < len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return by_path


class Items(NamedTuple):
    """What Orbax is to save, and the bytes of its arrays."""

    args: ocp.args.Composite
    nbytes: int


def make_items(state_tree: Any, metadata: dict, run_facts: dict) -> Items:
    """Put together what Orbax is to save. Waits for the arrays, whose hashes it takes."""
    arrays = {
        leaf_path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        for leaf_path, leaf in leaves_by_path(state_tree).items()
    }
    # Orbax does not take empty arrays: they are in the table alone.
    stored = {leaf_path: leaf_array for leaf_path, leaf_array in arrays.items() if leaf_array.size}
    hashes = array_hash.hash_arrays(stored)
    array_table = {
        leaf_path: [str(leaf_array.dtype), list(leaf_array.shape), hashes.get(leaf_path, "")]
        for leaf_path, leaf_array in arrays.items()
    }
    # As JSON gives it back: the checksum is over what a reader will see.
    metadata, contents = json.loads(
        json.dumps([metadata, {"about": run_facts, "arrays": array_table}])
    )
    contents["crc32"] = _crc32(metadata, contents)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(stored),
        meta=ocp.args.JsonSave(metadata),
        contents=ocp.args.JsonSave(contents),
    )
    return Items(args, sum(leaf_array.nbytes for leaf_array in stored.values()))


def _crc32(metadata: dict, contents: dict) -> int:
    checked = [metadata, contents["about"], contents["arrays"]]
    return zlib.crc32(json.dumps(checked, sort_keys=True).encode())


def read_json(folder: str) -> tuple[dict, ArrayTable]:
    """Read (meta, table of the arrays). Raises whatever it meets if they are not as they were written."""
    handler = ocp.JsonCheckpointHandler()
    metadata, contents = (
        handler.restore(Path(folder) / item_name) for item_name in ("meta", "contents")
    )
    if contents["crc32"] != _crc32(metadata, contents):
        raise DamagedError("meta and contents do not match their checksum")
    return metadata, contents["arrays"]


def first_difference(array_table: ArrayTable, wanted: Mapping[str, Any]) -> str | None:
    """Name the first leaf by which a checkpoint differs from what is wanted, as it is and as it should be, if any."""
    # Type and shape as text, so that what differs can be shown as it is.
    found = {leaf_path: "{} {}".format(*entry) for leaf_path, entry in array_table.items()}
    expected = {
        leaf_path: f"{leaf.dtype} {list(np.shape(leaf))}" for leaf_path, leaf in wanted.items()
    }
    # What is expected comes first: a missing parameter says more than one that is too many.
    for leaf_path in [*expected, *found]:
        if found.get(leaf_path) != expected.get(leaf_path):
            there, here = found.get(leaf_path, "nothing"), expected.get(leaf_path, "nothing")
            return f"{leaf_path}: found {there}, expected {here}"
    return None


def read_arrays(folder: str, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Read {path: array} where those wanted lie, in memory of their own. Raises whatever it meets in a damaged file.

    Args:
        wanted: {path: array or jax.ShapeDtypeStruct}; without a sharding: on this process's first device.
    """
    # For leaves that say nothing of where they belong, such as plain arrays of tests and tools.
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    templates = {
        leaf_path: jax.ShapeDtypeStruct(
            np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device
        )
        for leaf_path, leaf in wanted.items()
    }
    # The empty ones were never stored, and are made anew below.
    stored = ocp.args.StandardRestore(
        {leaf_path: template for leaf_path, template in templates.items() if template.size}
    )
    arrays = ocp.StandardCheckpointHandler().restore(Path(folder) / "state", args=stored)
    # Taken out one by one, so that no more than one array is there twice.
    return {
        leaf_path: _own(arrays.pop(leaf_path, None), templates[leaf_path], leaf)
        for leaf_path, leaf in wanted.items()
    }


def _own(leaf_array: Any, template: jax.ShapeDtypeStruct, wanted: Any) -> jax.Array:
    """An array that was read, as one like `wanted` that nothing else refers to."""
    if not template.size:
        # Compiled for its place: an empty array, too, must lie where the next step expects it.
        make = jax.jit(
            lambda: jnp.zeros(template.shape, template.dtype), out_shardings=template.sharding
        )
        return make()
    has_sharding = getattr(wanted, "sharding", None) is not None
    if not getattr(wanted, "committed", has_sharding):
        # Free to follow others to their devices, as a fresh one is.
        return jnp.array(np.asarray(leaf_array))
    if next(iter(template.sharding.device_set)).platform == "cpu":
        # It may share the reader's memory, which a donated step would write to.
        return jnp.copy(leaf_array)
    return leaf_array


def find_problem(folder: str) -> str | None:
    """Say what is wrong with a checkpoint as it lies on disk: its JSON, or one array, another from step to step."""
    try:
        _, array_table = read_json(folder)
        leaf_paths = sorted(
            leaf_path for leaf_path, (_, _, hashed) in array_table.items() if hashed
        )
        # By the step's number: in the course of a run every array has its turn, at the price of one.
        leaf_path = leaf_paths[zlib.crc32(os.path.basename(folder).encode()) % len(leaf_paths)]
        args = ocp.args.PyTreeRestore(
            item={leaf_path: 0},
            restore_args={leaf_path: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        leaf_array = ocp.PyTreeCheckpointHandler().restore(Path(folder) / "state", args=args)[
            leaf_path
        ]
        # The hash on the host, without a device: the accelerator belongs to the run meanwhile.
        if [
            str(leaf_array.dtype),
            list(leaf_array.shape),
            array_hash.hash_host_array(leaf_array),
        ] != array_table[leaf_path]:
            return f"{leaf_path} reads back as something else"
    except Exception as error:  # noqa: BLE001 - Orbax and TensorStore raise many kinds
        return f"it does not read back ({type(error).__name__})"
    return None
