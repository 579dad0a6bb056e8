"""Where each array of a run lies on a mesh: ordered tables, paths to logical axes; one map, those to mesh axes.

The rules name the last axes of an array; those before (stacked layers) are never divided. Optimizer moments, masters
and what is fixed have the paths of their parameters in their own, so they follow. FSDP: every large matrix is divided
over `fsdp` along the model's width, and gathered where it is used; `tensor` divides heads, hidden units and the
vocabulary. Each model family brings the table of its own parameters (`register_rules`).
"""

import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cxr_jax.errors import UserError
from cxr_jax.runtime.batch_rows import BATCH_AXES, row_axes
from cxr_jax.runtime.trees import path_string

LOGICAL_TO_MESH = {"width": "fsdp", "heads": "tensor", "hidden": "tensor", "vocab": "tensor"}

# What a run keeps beside a family's parameters: (pattern of a path, logical axes of the last dimensions).
_STATE_RULES = (
    (r"/lora/|^lora/|/locate/|^locate/", ()),  # small: everywhere
    (r"(^|/)\.?(step|skipped|count)$", ()),
)
_FAMILY_RULES: dict[str, tuple] = {}  # family -> its table; filled by `register_rules`


def register_rules(family: str, rules: tuple) -> None:
    """Make a model family's table known; its package does so when it is imported.

    Args:
        family: the family's `model_type`.
        rules: (pattern of a path, logical axes of the last dimensions), of which the first that matches holds.
    """
    _FAMILY_RULES[family] = rules


def _logical_axes(path: str) -> tuple | None:
    """The logical axes of the last dimensions of the array at `path`; None if no rule covers it."""
    for rules in (_STATE_RULES, *_FAMILY_RULES.values()):
        for pattern, axes in rules:
            if re.search(pattern, path):
                return axes
    return None


def spec(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The partition of the array at `path`. sizes: devices along each mesh axis.

    Raises UserError for a path that no rule covers, and for a dimension that does not divide.
    """
    logical = _logical_axes(path)
    if logical is None:
        raise UserError(f"sharding: no rule covers the parameter {path}")
    logical = (None,) * (len(shape) - len(logical)) + logical
    mesh_axes = [LOGICAL_TO_MESH.get(a) for a in logical]
    used = [a for a in mesh_axes if a]
    if len(used) != len(set(used)):
        raise UserError(
            f"sharding: {path} would be divided over the same mesh axis twice: {mesh_axes}"
        )
    for size, axis in zip(shape, mesh_axes, strict=True):
        if axis and size % sizes[axis]:
            raise UserError(
                f"sharding: {path} {list(shape)}: {size} does not divide by {axis}={sizes[axis]}"
            )
    return PartitionSpec(*mesh_axes)


def gathered(params: dict, dtype) -> dict:
    """Parameters of the model in the type of the computation, whole on every device but for `tensor`; as they are where
    `fsdp` divides none.

    For loops that use them at every turn. Left to itself, the compiler divides the products of a decode loop by the
    weights' features and adds up all rows' parts on every device, for every token.
    """
    on = jax.sharding.get_abstract_mesh()
    if "fsdp" not in row_axes(on) or on.shape["fsdp"] == 1:
        return params

    def whole(path, x):
        path = path_string(path)
        axes = (
            ()
            if "/lora_" in path
            else [a if a == "tensor" else None for a in spec(path, x.shape, dict(on.shape))]
        )
        return jax.lax.with_sharding_constraint(x.astype(dtype), PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(whole, params)


def shardings(tree, on: jax.sharding.Mesh):
    """NamedSharding of every leaf of a train state, of parameters, or of what is fixed."""
    sizes = dict(on.shape)
    return jax.tree_util.tree_map_with_path(
        lambda p, x: NamedSharding(on, spec(path_string(p), np.shape(x), sizes)), tree
    )


def batch_shardings(batch, on: jax.sharding.Mesh):
    """NamedSharding of every leaf of a batch: rows (axis 0; axis 1 of the prompts' positions) over data and fsdp."""

    def one(path, x):
        rows_on = 1 if path_string(path).endswith("prompts/positions") else 0
        return NamedSharding(
            on, PartitionSpec(*[None] * rows_on, BATCH_AXES) if x.ndim else PartitionSpec()
        )

    return jax.tree_util.tree_map_with_path(one, batch)


def laid_out(tree):
    """A train state, or gradients, where the rules say, on the mesh that `jax.set_mesh` has set, if any.

    Said of what a step gives out, so that it goes into the next one as it came.
    """
    on = jax.sharding.get_abstract_mesh()
    if on.empty:
        return tree
    place = lambda p, x: jax.lax.with_sharding_constraint(
        x, spec(path_string(p), x.shape, dict(on.shape))
    )
    return jax.tree_util.tree_map_with_path(place, tree)
