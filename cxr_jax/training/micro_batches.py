"""A batch worked through in parts, whose sums are those of the whole."""

import jax
import jax.numpy as jnp

from cxr_jax.runtime.trees import float32


def accumulate(grad_fn, params, parts, total=None):
    """Gradients of a batch in parts: grad_fn(params, part) -> (grads, aux), for the parts stacked on axis 0.

    Returns the sum of the gradients, in float32 if there is more than one part, and aux stacked on axis 0. One part
    is in memory at a time. total: gradients to add them to.
    """
    part = lambda i: jax.tree.map(lambda x: x[i], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        grads, aux = grad_fn(params, part(0))
        grads = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return grads, jax.tree.map(lambda x: x[None], aux)
    if total is None:
        shapes = jax.eval_shape(grad_fn, params, part(0))[0]
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def add(total, part):
        grads, aux = grad_fn(params, part)
        return jax.tree.map(jnp.add, total, float32(grads)), aux

    return jax.lax.scan(add, float32(total), parts)


def cut(batch: dict, parts: int) -> dict:
    """The rows of a batch in equal parts, stacked on a new axis 0. Rows lie on axis 0, but for the prompts' positions
    [3, B, T]. Part i has rows i, i + parts, ...: of rows that are spread over devices, each device has some in each.
    """

    def one(x, axis=0):
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.reshape(x, shape), axis + 1, 0)

    out = {k: jax.tree.map(one, v) for k, v in batch.items() if k != "prompts"}
    if "prompts" in batch:
        out["prompts"] = {k: one(v, int(k == "positions")) for k, v in batch["prompts"].items()}
    return out


def joined(parts):
    """The rows of a tree of parts in the order before `cut`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def in_turns(fn, parts: dict):
    """fn of each part of `cut`, one at a time, the rows of its results joined again."""
    one = lambda i: jax.tree.map(lambda x: x[i], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return fn(one(0))
    return joined(jax.lax.map(fn, parts))
