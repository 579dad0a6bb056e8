"""A batch worked through in parts, whose sums are those of the whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cxr_jax.runtime.trees import Tree, float32


def accumulate(
    compute_gradients: Callable[[Tree, Tree], tuple[Tree, Any]],
    params: Tree,
    parts: Tree,
    total: Tree | None = None,
) -> tuple[Tree, Any]:
    """Sum the gradients of a batch over its parts, one part in memory at a time.

    Args:
        compute_gradients: (params, part) -> (gradients, extra).
        parts: the parts, stacked on axis 0.
        total: gradients to add them to.

    Returns:
        The sum of the gradients, in float32 if there is more than one part; and extra, stacked on axis 0.
    """
    if _count(parts) == 1:
        gradients, extra = compute_gradients(params, _part(parts, 0))
        if total is not None:
            gradients = jax.tree.map(jnp.add, total, gradients)
        return gradients, jax.tree.map(lambda leaf: leaf[None], extra)
    if total is None:
        shapes = jax.eval_shape(compute_gradients, params, _part(parts, 0))[0]
        total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

    def add(total: Tree, part: Tree) -> tuple[Tree, Any]:
        gradients, extra = compute_gradients(params, part)
        return jax.tree.map(jnp.add, total, float32(gradients)), extra

    return jax.lax.scan(add, float32(total), parts)


def cut(batch: Tree, parts: int) -> Tree:
    """Cut the rows of a batch into equal parts, stacked on a new axis 0.

    Rows lie on axis 0, but for the prompts' positions [axes, B, T]. Part i has rows i, i + parts, ...: of rows that are
    spread over devices, each device has some in each part.
    """

    def cut_axis(array: jax.Array, axis: int = 0) -> jax.Array:
        shape = (*array.shape[:axis], array.shape[axis] // parts, parts, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.reshape(array, shape), axis + 1, 0)

    stacked = {
        name: jax.tree.map(cut_axis, value) for name, value in batch.items() if name != "prompts"
    }
    if "prompts" in batch:
        stacked["prompts"] = {
            name: cut_axis(value, 1 if name == "positions" else 0)
            for name, value in batch["prompts"].items()
        }
    return stacked


def join(parts: Any) -> Any:
    """Put the rows of a tree of parts back into the order before `cut`."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), parts)


def map_in_turns(function: Callable[[Tree], Any], parts: Tree) -> Any:
    """Apply a function to each part of `cut`, one at a time, and join the rows of its results again."""
    if _count(parts) == 1:
        return function(_part(parts, 0))
    return join(jax.lax.map(function, parts))


def _count(parts: Tree) -> int:
    return jax.tree.leaves(parts)[0].shape[0]


def _part(parts: Tree, index: int) -> Tree:
    return jax.tree.map(lambda leaf: leaf[index], parts)
