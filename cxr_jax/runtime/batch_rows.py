"""The rows of a batch on a mesh that `jax.set_mesh` has set, if any: over how many devices, and what lies on which."""

import math

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that divide the rows of a batch."""


def row_shards() -> int:
    """Over how many parts of the mesh that `jax.set_mesh` has set, if any, the rows of a batch are divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in row_axes(mesh))


def row_axes(mesh) -> tuple[str, ...]:
    """BATCH_AXES that the compiler divides; inside `shard_map` it divides none of them any more."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(a for a in BATCH_AXES if types.get(a) == jax.sharding.AxisType.Auto)


def by_shard(x, shards: int):
    """[R, ..] -> [shards, R / shards, ..]: the rows of each device."""
    return x.reshape(shards, -1, *x.shape[1:])


def take_rows(x, index):
    """Some rows of x [R, ..], of each device its own: index int [shards, m], counted from the device's first row.
    Returns [shards * m, ..]."""
    taken = jax.vmap(lambda rows, i: rows[i])(by_shard(x, len(index)), index)
    return taken.reshape(-1, *x.shape[1:])


def put_rows(x, index, new):
    """x with the rows that `take_rows` would give replaced by new [shards * m, ..]; no index twice."""
    put = jax.vmap(lambda rows, i, new: rows.at[i].set(new, unique_indices=True))
    return put(by_shard(x, len(index)), index, by_shard(new, len(index))).reshape(x.shape)


def rows_apart(x, rest=None):
    """x, rows on axis 0, divided by rows over the batch axes of the mesh. rest: how all other axes are; None: not
    divided.

    Said between layers, so that the compiler gathers weights (FSDP) and does not divide activations by features.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = row_axes(mesh)
    if not axes:
        return x
    at = lambda a: PartitionSpec(axes, *[rest] * (a.ndim - 1))
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, at(a)), x)
