"""Rows and heads of a batch on a mesh that `jax.set_mesh` has set, if any: over how many devices, and what is where."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from cxr_jax.runtime.trees import Tree

# The `tensor` axis is not here: its devices hold the same rows and share the work of each.
BATCH_AXES = ("data", "fsdp")
"""Mesh axes that divide the rows of a batch."""

HEAD_AXES = ("tensor", "key_copies")
"""Mesh axes that divide heads, hidden units and the vocabulary; the second is there where key heads are fewer."""


def row_shards() -> int:
    """Count the parts of the mesh that `jax.set_mesh` has set, if any, over which the rows of a batch are divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in row_axes(mesh))


def row_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Pick the BATCH_AXES that the compiler divides; inside `shard_map` it divides none of them any more."""
    return _divided_by_compiler(mesh, BATCH_AXES)


def _divided_by_compiler(mesh: AbstractMesh, mesh_axes: tuple[str, ...]) -> tuple[str, ...]:
    axis_types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(
        mesh_axis
        for mesh_axis in mesh_axes
        if axis_types.get(mesh_axis) == jax.sharding.AxisType.Auto
    )


def head_axes() -> tuple[str, ...]:
    """Pick the HEAD_AXES of the mesh that `jax.set_mesh` has set, if any, that the compiler divides."""
    return _divided_by_compiler(jax.sharding.get_abstract_mesh(), HEAD_AXES)


def head_shards() -> int:
    """Count the parts of the mesh over which heads are divided."""
    mesh = jax.sharding.get_abstract_mesh()
    # Without a mesh there are no axes, and the product is 1.
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in head_axes())


def key_copies() -> int:
    """Count the devices of the mesh that need the same key head; 1 where there are as many heads as devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["key_copies"] if "key_copies" in head_axes() else 1


def gather_key_kernel(kernel: jax.Array) -> jax.Array:
    """Gather the kernel [width, K * d] of keys or values, whole but for what divides key heads, where they are copied.

    Said outright: the compiler would take the copies as a choice of where to fetch from, and move parts first.
    """
    # Elsewhere the compiler does it right by itself.
    if key_copies() == 1:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, "tensor"))


def copy_key_heads(array: jax.Array) -> jax.Array:
    """Repeat keys or values [B, T, K, d] as [B, T, K * key_copies(), d], so that heads divide over all HEAD_AXES.

    Each device has its copy already: the axis that divides the copies divides no key head.
    """
    copies = key_copies()
    # Each device along `tensor` has key heads of its own.
    if copies == 1:
        return array
    # Rows and tokens stay where they are, whatever the pass.
    anywhere = PartitionSpec.UNCONSTRAINED
    by_head = PartitionSpec(anywhere, anywhere, head_axes(), anywhere)
    return jax.lax.with_sharding_constraint(jnp.repeat(array, copies, axis=2), by_head)


def by_shard(array: jax.Array, shards: int) -> jax.Array:
    """Split [R, ..] into [shards, R / shards, ..]: the rows of each device."""
    return array.reshape(shards, -1, *array.shape[1:])


# Rows are taken and put on each device alone: an index into the whole batch would make the compiler gather it first.


def take_rows(array: jax.Array, row_index: jax.Array) -> jax.Array:
    """Take some rows of each device.

    Args:
        array: [R, ..].
        row_index: int [shards, m], counted from the device's first row.

    Returns:
        [shards * m, ..].
    """
    # Over the device axis by vmap: each row of indices meets the rows of its own device alone.
    taken_rows = jax.vmap(lambda rows, chosen: rows[chosen])(
        by_shard(array, len(row_index)), row_index
    )
    return taken_rows.reshape(-1, *array.shape[1:])


def put_rows(array: jax.Array, row_index: jax.Array, replacement: jax.Array) -> jax.Array:
    """Replace the rows that `take_rows` would give by `replacement` [shards * m, ..]; no index twice."""

    def put(rows: jax.Array, chosen: jax.Array, new_rows: jax.Array) -> jax.Array:
        return rows.at[chosen].set(new_rows, unique_indices=True)

    shards = len(row_index)
    result = jax.vmap(put)(by_shard(array, shards), row_index, by_shard(replacement, shards))
    return result.reshape(array.shape)


def divide_rows(tree: Tree | jax.Array, rest: Any = None) -> Any:
    """Divide arrays, rows on axis 0, by rows over the batch axes of the mesh.

    Said between layers, so that the compiler gathers weights (FSDP) and does not divide activations by features.

    Args:
        rest: how all other axes are, as in a PartitionSpec; None: not divided.
    """
    # What the program is being compiled for, and not the devices that there are.
    mesh = jax.sharding.get_abstract_mesh()
    batch_axes = row_axes(mesh)
    if not batch_axes:
        return tree

    def divide(array: jax.Array) -> jax.Array:
        # Rows on the batch axes; what `rest` says for every axis behind them.
        spec = PartitionSpec(batch_axes, *[rest] * (array.ndim - 1))
        return jax.lax.with_sharding_constraint(array, spec)

    return jax.tree.map(divide, tree)
