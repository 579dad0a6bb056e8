"""Attention with float32 statistics, and attention over two parts that share one softmax.

Axes: B sequences, or groups; R rows, n a group (R = B * n); T queries, S keys, N own keys of a row; H query heads that
share K key heads, G = H / K; d features of a head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.runtime.batch_rows import put_rows, take_rows

NEG = -1e30  # finite, so that a fully masked row gives no NaN

KeysAndValues = tuple[jax.Array, jax.Array]


# ---- One part ----------------------------------------------------------------------------------------------


@jax.custom_vjp
def _softmax_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array | None
) -> jax.Array:
    return _softmax_attention_fwd(queries, keys, values, bias)[0]


def _softmax_attention_fwd(
    queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
    """queries [B, K, G, T, d] already scaled, keys and values [B, K, S, d], bias float32 over [B, K, G, T, S]."""
    B, K, G, T, d = queries.shape
    # All queries of a key head are the rows of one product, so that keys are never repeated.
    folded_queries = queries.reshape(B, K, G * T, d)
    # Scores and softmax in float32, whatever the type of the computation.
    scores = jnp.einsum("bktd,bksd->bkts", folded_queries, keys, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = (scores.reshape(B, K, G, T, -1) + bias).reshape(scores.shape)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    output = jnp.einsum("bkts,bksd->bktd", probabilities, values)  # [B, K, G * T, d]
    return output.reshape(queries.shape), (queries, keys, values, probabilities, output)


def _softmax_attention_bwd(saved: tuple, gradient: jax.Array) -> tuple:
    # Written out: keeps only the probabilities, and takes the row sums from gradient * output, not over all keys.
    queries, keys, values, probabilities, output = saved
    gradient = gradient.reshape(output.shape)
    d_probabilities = jnp.einsum(
        "bktd,bksd->bkts", gradient, values, preferred_element_type=jnp.float32
    )
    # The sum over s of p * dp, by way of the output: d terms a query, however many keys.
    row_sums = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), -1, keepdims=True)
    # In float32 up to here, and rounded once, for the products that follow.
    d_scores = (probabilities.astype(jnp.float32) * (d_probabilities - row_sums)).astype(
        queries.dtype
    )
    d_queries = jnp.einsum("bkts,bksd->bktd", d_scores, keys).reshape(queries.shape)
    d_keys = jnp.einsum("bkts,bktd->bksd", d_scores, queries.reshape(output.shape))
    d_values = jnp.einsum("bkts,bktd->bksd", probabilities, gradient)
    # The bias is a mask, made of positions and lengths: nothing trains through it.
    return d_queries, d_keys, d_values, None


_softmax_attention.defvjp(_softmax_attention_fwd, _softmax_attention_bwd)


def attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Compute softmax attention in plain XLA, with the softmax in float32.

    Args:
        queries: [B, T, H, d].
        keys: [B, S, K, d], as values; H a multiple of K.
        bias: float32 added to the scores, broadcastable to [B, K, H/K, T, S]; no gradient flows to it.

    Returns:
        [B, T, H, d].
    """
    B, T, H, d = queries.shape
    K = keys.shape[2]
    G = H // K  # query heads that share a key head
    # Query heads of a key head side by side: [B, K, G, T, d].
    grouped = (queries * d**-0.5).reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4)
    output = _softmax_attention(
        grouped, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3), bias
    )
    return output.transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


# ---- Two parts ---------------------------------------------------------------------------------------------

# Products of narrow types are summed in float32, as everything a softmax is made of.
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_group(array: jax.Array, groups: int) -> jax.Array:
    """[B * n, K, G, T, d] -> [B, K, n * G * T, d]: all that asks the same keys as the rows of one product."""
    R, K, G, T, d = array.shape
    B, n = groups, R // groups
    folded = array.reshape(B, n, K, G * T, d).transpose(0, 2, 1, 3, 4)  # [B, K, n, G * T, d]
    return folded.reshape(B, K, n * G * T, d)


def _by_row(folded_rows: jax.Array, shape: tuple[int, int, int, int]) -> jax.Array:
    """The inverse of `_by_group`: back to [*shape, d] for a shape [B * n, K, G, T]."""
    R, K, G, T = shape
    B, n = len(folded_rows), R // len(folded_rows)
    return folded_rows.reshape(B, K, n, G * T, -1).transpose(0, 2, 1, 3, 4).reshape(R, K, G, T, -1)


class _Part(NamedTuple):
    """Attention over some of the keys, not yet normalised."""

    output: jax.Array  # float32 [B * n, K, G, T, d]
    total: jax.Array  # the sum of the exponentials [B * n, K, G, T, 1]
    largest: jax.Array  # the largest score [B * n, K, G, T, 1]
    exponentials: jax.Array | None  # [B, K, n * G * T, S]


def _part(queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array) -> _Part:
    """Attention of queries [B * n, K, G, T, d], scaled, over keys [B, K, S, d].

    bias: broadcastable to [B, K, n, G, T, S].
    """
    R, K, G, T, _ = queries.shape
    B = len(keys)
    n = R // B  # rows that ask the same keys
    scores = _dot("bkqd,bksd->bkqs", _by_group(queries, B), keys)
    scores = scores.reshape(B, K, n, G, T, -1) + bias  # float32 [B, K, n, G, T, S]
    # Each part by its own largest score for now; `_joined` brings both to one.
    largest = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - largest).reshape(B, K, n * G * T, -1)
    # The sum is of the float32 exponentials, before they are rounded for the product.
    total = _by_row(exponentials.sum(-1, keepdims=True), (R, K, G, T))
    exponentials = exponentials.astype(values.dtype)
    output = _by_row(_dot("bkqs,bksd->bkqd", exponentials, values), (R, K, G, T))
    return _Part(output, total, _by_row(largest.reshape(B, K, -1, 1), (R, K, G, T)), exponentials)


def _joined(first: _Part, second: _Part) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(output, w1, w2) of two parts in one softmax: output = w1 * output1 + w2 * output2, normalised."""
    # Both parts relative to the larger of their largest scores, so that no exponential overflows.
    largest = jnp.maximum(first.largest, second.largest)
    weight1, weight2 = jnp.exp(first.largest - largest), jnp.exp(second.largest - largest)
    total = weight1 * first.total + weight2 * second.total
    weight1, weight2 = weight1 / total, weight2 / total
    return weight1 * first.output + weight2 * second.output, weight1, weight2


@jax.custom_vjp
def _two_part_softmax(
    queries: jax.Array,
    first: KeysAndValues,
    second: KeysAndValues,
    first_bias: jax.Array,
    second_bias: jax.Array,
) -> jax.Array:
    return _two_part_softmax_fwd(queries, first, second, first_bias, second_bias)[0]


def _two_part_softmax_fwd(
    queries: jax.Array,
    first: KeysAndValues,
    second: KeysAndValues,
    first_bias: jax.Array,
    second_bias: jax.Array,
) -> tuple[jax.Array, tuple]:
    # The parts keep their keys apart: a prompt's are never copied to its rows.
    parts = _part(queries, *first, first_bias), _part(queries, *second, second_bias)
    output, *weights = _joined(*parts)
    output = output.astype(queries.dtype)
    exponentials = [part.exponentials for part in parts]
    return output, (queries, (first, second), exponentials, weights, output)


def _two_part_softmax_bwd(saved: tuple, gradient: jax.Array) -> tuple:
    # Written out: keeps only the exponentials, and takes the row sums from gradient * output, not over all keys.
    queries, parts, exponentials, weights, output = saved
    shape, gradient = queries.shape[:-1], gradient.astype(jnp.float32)
    row_sums = jnp.sum(gradient * output.astype(jnp.float32), -1, keepdims=True)
    d_queries: Any = 0.0
    d_parts = []
    for (keys, values), part_exponentials, weight in zip(parts, exponentials, weights, strict=True):
        # Everything in the rows of this part's products.
        part_gradient, part_sums, part_weight, part_queries = (
            _by_group(array, len(keys))
            for array in (gradient.astype(queries.dtype), row_sums, weight, queries)
        )
        # Through the scores: the softmax's gradient, with the sum over both parts.
        d_probabilities = _dot("bkqd,bksd->bkqs", part_gradient, values)
        d_scores = part_exponentials * (part_weight * (d_probabilities - part_sums))
        d_scores = d_scores.astype(queries.dtype)
        d_queries = d_queries + _by_row(jnp.einsum("bkqs,bksd->bkqd", d_scores, keys), shape)
        # Through the values: each part's share of the output.
        weighted = (part_weight * part_gradient).astype(queries.dtype)
        d_keys = jnp.einsum("bkqs,bkqd->bksd", d_scores, part_queries)
        d_values = jnp.einsum("bkqs,bkqd->bksd", part_exponentials, weighted)
        d_parts.append((d_keys, d_values))
    return d_queries, *d_parts, None, None


_two_part_softmax.defvjp(_two_part_softmax_fwd, _two_part_softmax_bwd)


def two_part_attention(
    queries: jax.Array,
    first: KeysAndValues,
    second: KeysAndValues,
    first_bias: jax.Array,
    second_bias: jax.Array,
    place: tuple[jax.Array, int] | None = None,
) -> jax.Array:
    """Compute attention of each row over keys shared by its group and keys of its own, in a single softmax.

    Args:
        queries: [R, T, H, d], R = B * n rows in group order.
        first: (keys, values) [B, K, S, d], stored once a group.
        second: (keys, values) [R, K, N, d].
        first_bias: float32, without gradient, broadcastable to [B, K, n, G, T, S], with G = H / K.
        second_bias: float32, without gradient, broadcastable to [R, K, 1, G, T, N].
        place: (index, rows) where only some of the `rows` = B * n rows in group order are left, those at `index`
            (see `take_rows`); not differentiable then.

    Returns:
        [R, T, H, d].
    """
    R, T, H, d = queries.shape
    K = first[0].shape[1]
    # [R, K, G, T, d], as in `attention`.
    grouped = (queries * d**-0.5).reshape(R, T, K, H // K, d).transpose(0, 2, 3, 1, 4)
    if place is None:
        output = _two_part_softmax(grouped, first, second, first_bias, second_bias)
    else:
        # The shared keys are asked by all rows, with zeros for those that have left; own keys by those that are left.
        index, rows = place
        all_queries = put_rows(jnp.zeros((rows, *grouped.shape[1:]), grouped.dtype), index, grouped)
        shared_part = _part(all_queries, *first, first_bias)
        shared_of_left = _Part(
            take_rows(shared_part.output, index),
            take_rows(shared_part.total, index),
            take_rows(shared_part.largest, index),
            None,
        )
        output = _joined(shared_of_left, _part(grouped, *second, second_bias))[0].astype(
            grouped.dtype
        )
    return output.transpose(0, 3, 1, 2, 4).reshape(R, T, H, d)
