"""A softmax over a row's own keys, by a kernel, and over keys that its group shares, by blocks in plain XLA.

A kernel gives the log of its sum of exponentials; by that its output joins that of the other part. Its gradient takes
any such log and any output: given those of both parts, it is that of the one softmax.

Axes as in `blocked`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cxr_jax.models.attention import blocked
from cxr_jax.models.attention.blocked import KeysAndValues
from cxr_jax.models.attention.masks import Mask
from cxr_jax.runtime.batch_rows import head_axes, head_shards, row_axes

NO_WEIGHTS = 1e30
"""Log of the sum of a query that is none: beside it every exponential is 0, and so is all that its gradient gives."""


class Kernel(NamedTuple):
    """What a kernel computes of one part.

    Attributes:
        forward: (queries [R, K, G, T, d], own (keys, values) [R, K, S, d], mask) -> (output [R, K, G, T, d], log of the
            sums of exponentials float32 [R, K, G, T, 1]).
        backward: (queries, own, mask, output, log of the sums, gradient [R, K, G, T, d]) -> gradients of queries, keys,
            values, where output and log are those of the whole softmax.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    kernel: Kernel,
    queries: jax.Array,
    own: KeysAndValues,
    mask: Mask,
    kept: KeysAndValues | None,
    kept_mask: Mask | None,
) -> jax.Array:
    return _attend_fwd(kernel, queries, own, mask, kept, kept_mask)[0]


def _attend_fwd(
    kernel: Kernel,
    queries: jax.Array,
    own: KeysAndValues,
    mask: Mask,
    kept: KeysAndValues | None,
    kept_mask: Mask | None,
) -> tuple[jax.Array, tuple]:
    output, log_totals = kernel.forward(queries, own, mask)
    # Two softmaxes are one, each weighted by its share of the sum of exponentials.
    if kept is not None and kept_mask is not None:
        kept_output, kept_totals = blocked.part_sums(queries, (kept,), (kept_mask,), 1)
        joint = jnp.logaddexp(log_totals, kept_totals)
        own_weight, kept_weight = jnp.exp(log_totals - joint), jnp.exp(kept_totals - joint)
        output = own_weight * output + kept_weight * kept_output
        log_totals = joint
    # What a kernel's gradient takes: of all keys, not of its own.
    output = output.astype(queries.dtype)
    return output, (queries, own, mask, kept, kept_mask, output, log_totals)


def _attend_bwd(kernel: Kernel, saved: tuple, gradient: jax.Array) -> tuple:
    queries, own, mask, kept, kept_mask, output, log_totals = saved
    # Of the whole softmax, so that each part's gradient is its share.
    d_queries, *d_own = kernel.backward(queries, own, mask, output, log_totals, gradient)
    d_own = [array.astype(part.dtype) for array, part in zip(d_own, own, strict=True)]
    d_kept = None
    # Keys that a group shares, by blocks, from the same sums.
    if kept is not None:
        results = (output, log_totals, gradient)
        of_kept, (d_kept,) = blocked.part_gradients(queries, (kept,), (kept_mask,), *results, 1)
        d_queries = d_queries.astype(jnp.float32) + of_kept
    return d_queries.astype(queries.dtype), tuple(d_own), None, d_kept, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def kernel_attention(
    kernel: Kernel,
    queries: jax.Array,
    own: KeysAndValues,
    mask: Mask,
    kept: KeysAndValues | None = None,
    kept_mask: Mask | None = None,
) -> jax.Array:
    """Compute attention over own keys by a kernel, and over kept ones, if any, in the same softmax.

    On a mesh each device runs the kernel on its rows and heads: the compiler cannot divide it.

    Args:
        queries: [R, K, G, T, d], already scaled.
        own: (keys, values) [R, K, S, d].
        mask: of own keys.
        kept: (keys, values) [B, K, S, d], R a multiple of B.
        kept_mask: of kept keys.

    Returns:
        [R, K, G, T, d].
    """
    rows = row_axes(jax.sharding.get_abstract_mesh())
    # Heads that do not divide are computed on every device of the axis.
    has_heads = queries.shape[1] % head_shards() == 0
    # One device, or none that the compiler divides over.
    if not rows:
        return _attend(kernel, queries, own, mask, kept, kept_mask)
    # Rows lie as a batch does, heads as the projections leave them.
    by_head = PartitionSpec(rows, head_axes() if has_heads else None)
    by_row = PartitionSpec(rows)

    def of_device(
        queries: jax.Array, own: Any, mask: Mask, kept: Any, kept_mask: Mask | None
    ) -> jax.Array:
        return _attend(kernel, queries, own, mask, kept, kept_mask)

    masks = (jax.tree.map(lambda _: by_row, each) for each in (mask, kept_mask))
    mask_specs, kept_mask_specs = masks
    in_specs = (by_head, by_head, mask_specs, None if kept is None else by_head, kept_mask_specs)
    on_devices = jax.shard_map(of_device, in_specs=in_specs, out_specs=by_head, check_vma=False)
    return on_devices(queries, own, mask, kept, kept_mask)
