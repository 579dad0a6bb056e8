"""Attention with float32 statistics, and attention over two parts that share one softmax.

Axes: B sequences, or groups; R rows, n a group (R = B * n); T queries, S keys, N own keys of a row; H query heads that
share K key heads, G = H / K; d features of a head.

Scores take T * S numbers a head: 100 GB for one film of 2,544 x 3,056 pixels. So where there are many keys, queries go
in blocks, one after the other (`query_block`); each row of scores is whole in its block, and nothing is approximated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.runtime.batch_rows import put_rows, take_rows
from cxr_jax.runtime.trees import Array

NEG = -1e30  # finite, so that a fully masked row gives no NaN

KeysAndValues = tuple[jax.Array, jax.Array]

ALL_AT_ONCE_UP_TO = 4096
"""Keys up to which all queries go at once: the sizes of the published recipes (476 px: 1,156 patches)."""
SCORES_AT_ONCE = 2**26
"""Scores that a block of queries may have beyond that, in all its rows and heads: 256 MiB in float32."""
LEAST_BLOCK = 64


# ---- Masks -------------------------------------------------------------------------------------------------


def key_bias(mask: Array) -> jax.Array:
    """Make a float32 bias: 0 where a key may be seen, else very negative; shape as mask."""
    return jnp.where(mask, 0.0, NEG).astype(jnp.float32)


def causal_bias(mask: Array) -> jax.Array:
    """Make a bias [B, 1, 1, T, T] from mask [B, T]: query t sees key s if s <= t and mask[b, s]."""
    T = mask.shape[1]
    # Padding is on the right: the mask matters for the padding's own queries only.
    seen = jnp.tril(jnp.ones((T, T), bool)) & mask.astype(bool)[:, None, :]
    return key_bias(seen)[:, None, None]


# ---- Blocks of queries -------------------------------------------------------------------------------------

_Attend = Callable[[jax.Array, Any, Any, Any], jax.Array]
"""(queries [.., T, d], keys and values, biases, number of the first query) -> [.., T, d], each row by itself."""


def query_block(rows: int, queries: int, keys: int) -> int:
    """Choose how many queries go at once: all of them, or a multiple of LEAST_BLOCK.

    Args:
        rows: sequences times query heads.
        queries: of a sequence.
        keys: that each query asks.
    """
    if keys <= ALL_AT_ONCE_UP_TO:
        return queries
    most = max(SCORES_AT_ONCE // (rows * keys) // LEAST_BLOCK, 1)  # in least blocks
    in_all = -(-queries // LEAST_BLOCK)
    # As many blocks as must be, all of about one size: the last one is filled up with zeros.
    count = -(-in_all // most)
    return min(queries, -(-in_all // count) * LEAST_BLOCK)


def _attend_in_blocks(
    attend: _Attend, block: int, queries: jax.Array, seen: Any, biases: tuple
) -> jax.Array:
    """attend(queries, seen, biases, 0), by blocks of queries where one does not hold them all.

    biases: None or arrays; those with a row a query are divided like the queries.
    """
    if block >= queries.shape[-2]:
        return attend(queries, seen, biases, 0)
    return _in_blocks(attend, block, queries, seen, biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(
    attend: _Attend, block: int, queries: jax.Array, seen: Any, biases: tuple
) -> jax.Array:
    def attend_block(part: tuple) -> jax.Array:
        first, some_queries, rows = part
        return attend(some_queries, seen, _with_rows(biases, rows), first)

    return _joined_blocks(jax.lax.map(attend_block, _parts(block, queries, biases)), queries)


def _in_blocks_fwd(
    attend: _Attend, block: int, queries: jax.Array, seen: Any, biases: tuple
) -> tuple[jax.Array, tuple]:
    # Neither scores nor probabilities are kept: the backward pass computes them again, block by block.
    return _in_blocks(attend, block, queries, seen, biases), (queries, seen, biases)


def _in_blocks_bwd(attend: _Attend, block: int, saved: tuple, gradient: jax.Array) -> tuple:
    queries, seen, biases = saved

    def pull_back(d_seen: Any, part: tuple) -> tuple[Any, jax.Array]:
        (first, some_queries, rows), some_gradient = part

        def attend_block(queries: jax.Array, seen: Any) -> jax.Array:
            return attend(queries, seen, _with_rows(biases, rows), first)

        d_queries, d_block = jax.vjp(attend_block, some_queries, seen)[1](some_gradient)
        return jax.tree.map(jnp.add, d_seen, d_block), d_queries

    # All queries ask the same keys, whose gradient is a sum over the blocks: in float32, whatever their type.
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), seen)
    parts = _parts(block, queries, biases), _blocks(gradient, block)
    d_seen, d_queries = jax.lax.scan(pull_back, zeros, parts)
    d_seen = jax.tree.map(lambda total, array: total.astype(array.dtype), d_seen, seen)
    return _joined_blocks(d_queries, queries), d_seen, None


_in_blocks.defvjp(_in_blocks_fwd, _in_blocks_bwd)


def _blocks(array: jax.Array, block: int) -> jax.Array:
    """[.., T, d] -> [blocks, .., block, d], the last one filled up with zeros."""
    *leading, T, d = array.shape
    count = -(-T // block)
    filled = jnp.pad(array, [(0, 0)] * len(leading) + [(0, count * block - T), (0, 0)])
    return jnp.moveaxis(filled.reshape(*leading, count, block, d), -3, 0)


def _joined_blocks(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_blocks`, for an array of the shape of `like`."""
    *leading, T, d = like.shape
    return jnp.moveaxis(blocks, 0, -3).reshape(*leading, -1, d)[..., :T, :]


def _parts(block: int, queries: jax.Array, biases: tuple) -> tuple:
    """What each block takes of its own: the number of its first query, its queries, its rows of biases (or None)."""
    query_blocks = _blocks(queries, block)
    rows = [
        _blocks(bias, block)
        if bias is not None and jnp.shape(bias)[-2:-1] == queries.shape[-2:-1]
        else None
        for bias in biases
    ]
    return jnp.arange(len(query_blocks)) * block, query_blocks, rows


def _with_rows(biases: tuple, rows: list) -> tuple:
    """The biases of a block: its own rows where they have been divided, and else the whole."""
    pairs = zip(biases, rows, strict=True)
    return tuple(bias if part is None else part for bias, part in pairs)


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


def _attend_all(queries: jax.Array, seen: KeysAndValues, biases: tuple, first: Any) -> jax.Array:
    del first
    return _softmax_attention(queries, *seen, *biases)


def _attend_before(queries: jax.Array, seen: KeysAndValues, biases: tuple, first: Any) -> jax.Array:
    """Attention to keys up to the query's own number only; the bias [B, 1, 1, 1, S] is that of all queries."""
    places = first + jnp.arange(queries.shape[-2])
    is_before = jnp.arange(seen[0].shape[2]) <= places[:, None]
    return _softmax_attention(queries, *seen, jnp.where(is_before, biases[0], NEG))


def _attend_nearby(queries: jax.Array, seen: KeysAndValues, biases: tuple, first: Any) -> jax.Array:
    """Attention to keys before the query, within a window, and behind it in the query's own image.

    biases: that of the keys as for `_attend_before`, images of the queries [B, 1, 1, T, 1] and of the keys
    [B, 1, 1, 1, S] or None, and the window or None.
    """
    key_bias, query_images, key_images, window = biases
    places = first + jnp.arange(queries.shape[-2])[:, None]
    keys = jnp.arange(seen[0].shape[2])
    # Behind itself a token sees its own image alone, and no window is in the way there.
    is_seen = keys <= places
    if query_images is not None:
        is_seen = is_seen | ((query_images == key_images) & (key_images > 0))
    if window is not None:
        is_seen = is_seen & (keys > places - window)
    return _softmax_attention(queries, *seen, jnp.where(is_seen, key_bias, NEG))


def _attend_own_part(
    queries: jax.Array, seen: KeysAndValues, biases: tuple, first: Any
) -> jax.Array:
    """Attention to keys of the query's own part; the parts [B, 1, 1, T, 1] and [B, 1, 1, 1, S] stand for biases."""
    del first
    query_parts, key_parts = biases
    return _softmax_attention(queries, *seen, key_bias(query_parts == key_parts))


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
    return _attention(_attend_all, queries, keys, values, bias)


def causal_attention(
    mask: Array,
    *,
    images: Array | None = None,
    window: Array | int | None = None,
    scale: float | None = None,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Make `attention` of (queries, keys, values) for sequences in which a token sees itself and those before it.

    Args:
        mask: bool [B, T], False at padding, which is on the right.
        images: int [B, T], of each token its image, 0 for none: tokens of one image see each other both ways.
        window: a token sees itself and the window - 1 tokens before it, and no others of those before it.
        scale: of the scores; None: d ** -0.5.
    """
    # Compared in the layer, because its window may be traced, and with it the mask.
    biases: tuple
    if images is not None or window is not None:
        parts: tuple = (None, None)
        if images is not None:
            parts = images[:, None, None, :, None], images[:, None, None, None, :]
        attend, biases = _attend_nearby, (key_bias(mask)[:, None, None, None], *parts, window)
    # Made once for all layers, but for long sequences, whose bias would be as large as a head's scores.
    elif mask.shape[1] <= ALL_AT_ONCE_UP_TO:
        attend, biases = _attend_all, (causal_bias(mask),)
    else:
        attend, biases = _attend_before, (key_bias(mask)[:, None, None, None],)

    def attend_causally(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return _attention(attend, queries, keys, values, *biases, scale=scale)

    return attend_causally


def part_attention(
    parts: jax.Array, queries: jax.Array, keys: jax.Array, values: jax.Array
) -> jax.Array:
    """Compute `attention` within each part of a sequence: parts int [B, T], of queries and keys alike."""
    # Compared block by block: a bias made once would be as large as a head's scores.
    query_parts, key_parts = parts[:, None, None, :, None], parts[:, None, None, None, :]
    return _attention(_attend_own_part, queries, keys, values, query_parts, key_parts)


# As a factor of the queries, which are fewer than the scores.
def _scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def _attention(
    attend: _Attend,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *biases: Any,
    scale: float | None = None,
) -> jax.Array:
    B, T, H, d = queries.shape
    S, K = keys.shape[1:3]
    G = H // K  # query heads that share a key head
    # Query heads of a key head side by side: [B, K, G, T, d].
    grouped = (queries * _scale(scale, d)).reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4)
    seen = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    output = _attend_in_blocks(attend, query_block(B * H, T, S), grouped, seen, biases)
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


def _attend_both(
    queries: jax.Array, seen: tuple[KeysAndValues, KeysAndValues], biases: tuple, first: Any
) -> jax.Array:
    del first
    return _two_part_softmax(queries, *seen, *biases)


def two_part_attention(
    queries: jax.Array,
    first: KeysAndValues,
    second: KeysAndValues,
    first_bias: jax.Array,
    second_bias: jax.Array,
    place: tuple[jax.Array, int] | None = None,
    scale: float | None = None,
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
        scale: of the scores; None: d ** -0.5.

    Returns:
        [R, T, H, d].
    """
    R, T, H, d = queries.shape
    K = first[0].shape[1]
    # [R, K, G, T, d], as in `attention`.
    grouped = (queries * _scale(scale, d)).reshape(R, T, K, H // K, d).transpose(0, 2, 3, 1, 4)
    if place is None:
        block = query_block(R * H, T, max(first[0].shape[2], second[0].shape[2]))
        biases = first_bias, second_bias
        output = _attend_in_blocks(_attend_both, block, grouped, (first, second), biases)
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
