"""Attention with all scores at once and float32 statistics, and over two parts that share one softmax.

The plain path, by which every other one is judged.

Axes: B sequences, or groups; R rows, n a group (R = B * n); T queries, S keys, N own keys of a row; H query heads that
share K key heads, G = H / K; d features of a head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.runtime.batch_rows import put_rows, take_rows

KeysAndValues = tuple[jax.Array, jax.Array]

# ---- One part ----------------------------------------------------------------------------------------------


@jax.custom_vjp
def softmax_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Compute softmax attention, scores and softmax in float32 whatever the type of the arrays.

    Args:
        queries: [B, K, G, T, d], already scaled.
        keys: [B, K, S, d], as values.
        bias: float32 over [B, K, G, T, S], broadcast; no gradient flows to it.

    Returns:
        [B, K, G, T, d].
    """
    return _softmax_attention_fwd(queries, keys, values, bias)[0]


def _softmax_attention_fwd(
    queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
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


softmax_attention.defvjp(_softmax_attention_fwd, _softmax_attention_bwd)


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
def two_part_softmax(
    queries: jax.Array,
    first: KeysAndValues,
    second: KeysAndValues,
    first_bias: jax.Array,
    second_bias: jax.Array,
) -> jax.Array:
    """Compute attention of each row over keys shared by its group and keys of its own, in a single softmax.

    Args:
        queries: [B * n, K, G, T, d], already scaled.
        first: (keys, values) [B, K, S, d].
        second: (keys, values) [B * n, K, N, d].
        first_bias: float32, without gradient, broadcastable to [B, K, n, G, T, S].
        second_bias: float32, without gradient, broadcastable to [B * n, K, 1, G, T, N].

    Returns:
        [B * n, K, G, T, d].
    """
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


two_part_softmax.defvjp(_two_part_softmax_fwd, _two_part_softmax_bwd)


def two_part_softmax_of_left(
    queries: jax.Array,
    first: KeysAndValues,
    second: KeysAndValues,
    first_bias: jax.Array,
    second_bias: jax.Array,
    place: tuple[jax.Array, int],
) -> jax.Array:
    """Compute `two_part_softmax` where only some of the rows are left; not differentiable.

    Args:
        queries: of the rows that are left; second and second_bias, too.
        first: keys of all groups.
        second: as for `two_part_softmax`.
        first_bias: of all groups.
        second_bias: as for `two_part_softmax`.
        place: (index, rows): those at `index` of `rows` rows in group order are left (see `take_rows`).
    """
    # The shared keys are asked by all rows, with zeros for those that have left; own keys by those that are left.
    index, rows = place
    all_queries = put_rows(jnp.zeros((rows, *queries.shape[1:]), queries.dtype), index, queries)
    shared_part = _part(all_queries, *first, first_bias)
    shared_of_left = _Part(
        take_rows(shared_part.output, index),
        take_rows(shared_part.total, index),
        take_rows(shared_part.largest, index),
        None,
    )
    return _joined(shared_of_left, _part(queries, *second, second_bias))[0].astype(queries.dtype)
