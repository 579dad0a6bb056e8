"""Where each array of a run lies on a mesh: ordered tables, paths to logical axes; one map, those to mesh axes.

The rules name the last axes of an array; those before (stacked layers) are never divided. Optimizer moments, masters
and what is fixed have the paths of their parameters in their own, so they follow. FSDP: every large matrix is divided
over `fsdp` along the model's width, and gathered where it is used; `tensor` divides heads, hidden units and the
vocabulary. Where it is more than there are key heads, the mesh has two axes for it (`layout.make_mesh`): keys and
values are divided by the first alone. Each model family brings the table of its own parameters (`register_rules`).
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.runtime.batch_rows import BATCH_AXES, HEAD_AXES, row_axes
from cxr_jax.runtime.trees import Tree, path_string

LOGICAL_TO_MESH: dict[str | None, str] = {
    "width": "fsdp",
    "heads": "tensor",
    "key_heads": "tensor",
    "hidden": "tensor",
    "vocab": "tensor",
}

MeshAxes = str | tuple[str, ...] | None
"""Of one dimension."""

# What a run keeps beside a family's parameters: (pattern of a path, logical axes of the last dimensions).
_STATE_RULES = (
    (r"/lora/|^lora/|/locate/|^locate/", ()),  # small: everywhere
    (r"(^|/)\.?(step|skipped|count)$", ()),
)
_FAMILY_RULES: dict[str, tuple] = {}  # family -> its table; filled by `register_rules`


def register_rules(family: str, sharding_rules: tuple) -> None:
    """Make a model family's table known; its package does so when it is imported.

    Args:
        family: the family's `model_type`.
        sharding_rules: (pattern of a path, logical axes of the last dimensions), of which the first that matches holds.
    """
    _FAMILY_RULES[family] = sharding_rules


def _logical_axes(leaf_path: str) -> tuple[str | None, ...] | None:
    """The logical axes of the last dimensions of the array at `leaf_path`; None if no rule covers it."""
    # A run's own leaves first: adapters have the paths of their modules in theirs, too.
    for sharding_rules in (_STATE_RULES, *_FAMILY_RULES.values()):
        for pattern, axes in sharding_rules:
            if re.search(pattern, leaf_path):
                return axes
    return None


def partition_spec(
    leaf_path: str, shape: tuple[int, ...], axis_sizes: dict[str, int]
) -> PartitionSpec:
    """Find the partition of the array at `leaf_path`.

    Args:
        axis_sizes: devices along each mesh axis.

    Raises:
        UserError: for a path that no rule covers, and for a dimension that does not divide.
    """
    logical = _logical_axes(leaf_path)
    if logical is None:
        raise UserError(f"sharding: no rule covers the parameter {leaf_path}")
    # The axes before the last are those of stacked layers.
    logical = (None,) * (len(shape) - len(logical)) + logical
    mesh_axes = [_mesh_axes(logical_axis, axis_sizes) for logical_axis in logical]
    # JAX would refuse it too, without the name of the parameter.
    used = [mesh_axis for mesh_axis in mesh_axes if mesh_axis]
    if len(used) != len(set(used)):
        raise UserError(
            f"sharding: {leaf_path} would be divided over the same mesh axis twice: {mesh_axes}"
        )
    # JAX divides evenly or not at all; only here the message can name the parameter.
    for dimension, mesh_axis in zip(shape, mesh_axes, strict=True):
        parts = 1 if mesh_axis is None else _parts(mesh_axis, axis_sizes)
        if dimension % parts:
            name = mesh_axis if isinstance(mesh_axis, str) else "tensor"
            raise UserError(
                f"sharding: {leaf_path} {list(shape)}: {dimension} does not divide by {name}={parts}"
            )
    return PartitionSpec(*mesh_axes)


def _mesh_axes(logical_axis: str | None, axis_sizes: dict[str, int]) -> MeshAxes:
    """What divides a logical axis on a mesh; all of `tensor`, where it is two axes, but for key heads."""
    mesh_axis = LOGICAL_TO_MESH.get(logical_axis)
    # Most meshes have no second axis, and their arrays lie as the table says.
    if mesh_axis == "tensor" and logical_axis != "key_heads" and "key_copies" in axis_sizes:
        return HEAD_AXES
    return mesh_axis


def _parts(mesh_axes: str | tuple[str, ...], axis_sizes: dict[str, int]) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(axis_sizes[name] for name in names)


def gather_weights(params: Tree, dtype: DTypeLike) -> Tree:
    """Gather a model's parameters in the type of the computation, whole on every device but for `tensor`.

    For loops that use them at every turn. Left to itself, the compiler divides the products of a decode loop by the
    weights' features and adds up all rows' parts on every device, for every token. Where `fsdp` divides none, they are
    returned as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # On one device along `fsdp` every weight is whole already.
    if "fsdp" not in row_axes(mesh) or mesh.shape["fsdp"] == 1:
        return params
    axis_sizes = dict(mesh.shape)

    def gather(leaf_path: tuple, leaf: jax.Array) -> jax.Array:
        leaf_name = path_string(leaf_path)
        axes: list[MeshAxes] = []
        if "/lora_" not in leaf_name:  # adapters are whole everywhere
            partition = partition_spec(leaf_name, leaf.shape, axis_sizes)
            axes = [None if mesh_axis == "fsdp" else mesh_axis for mesh_axis in partition]
        return jax.lax.with_sharding_constraint(leaf.astype(dtype), PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(gather, params)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Find the NamedSharding of every leaf of a train state, of parameters, or of what is frozen."""
    axis_sizes = dict(mesh.shape)

    def sharding(leaf_path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(
            mesh, partition_spec(path_string(leaf_path), np.shape(leaf), axis_sizes)
        )

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_shardings(batch: Tree, mesh: Mesh) -> Tree:
    """Find the NamedSharding of every leaf of a batch: rows over data and fsdp.

    Rows are axis 0; of the prompts' positions [axes, rows, tokens] axis 1.
    """

    def sharding(leaf_path: tuple, leaf: Any) -> NamedSharding:
        # A scalar, such as the number of the step, is the same everywhere.
        if not leaf.ndim:
            return NamedSharding(mesh, PartitionSpec())
        # Positions have their axes in front.
        row_axis = 1 if path_string(leaf_path).endswith("prompts/positions") else 0
        return NamedSharding(mesh, PartitionSpec(*[None] * row_axis, BATCH_AXES))

    return jax.tree_util.tree_map_with_path(sharding, batch)


def lay_out(tree: Tree) -> Tree:
    """Lay out a train state, or gradients, as the rules say, on the mesh that `jax.set_mesh` has set, if any.

    Said of what a step gives out, so that it goes into the next one as it came.
    """
    # One device: everything lies where it is.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    axis_sizes = dict(mesh.shape)

    def place(leaf_path: tuple, leaf: jax.Array) -> jax.Array:
        partition = partition_spec(path_string(leaf_path), leaf.shape, axis_sizes)
        return jax.lax.with_sharding_constraint(leaf, partition)

    return jax.tree_util.tree_map_with_path(place, tree)
