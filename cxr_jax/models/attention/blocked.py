"""Attention by blocks of queries and keys in plain XLA, its scores never whole in memory.

A softmax over many keys is made of sums over some of them, each relative to the largest score so far (arXiv
1805.02867); the output and the log of the whole sum are kept, and the backward pass computes the scores again (arXiv
2205.14135). Nothing is approximated. A pair of blocks none of whose queries may see any of its keys is not computed.

Axes: R sequences; T queries, S keys; K key heads, G query heads of each; d features. A part of the keys may be shared:
it has B sequences of keys, and R / B adjacent rows ask each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.models.attention.masks import NEG, Mask, key_bias

KeysAndValues = tuple[jax.Array, jax.Array]

LEAST_BLOCK = 128
"""Queries and keys of the smallest block: a register of TPUs has 128 numbers in a row."""
LARGEST_BLOCK = 1024
SCORES_IN_BLOCK = 2**24
"""Scores of a block on one device, in all its rows and heads: 64 MiB in float32."""
CAUSAL_BLOCKS = 16
"""Blocks of a causal sequence, about: of the half that is not seen, 1/16 is computed all the same."""

# Products of narrow types are summed in float32, as everything a softmax is made of.
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


# ---- Sizes of blocks ---------------------------------------------------------------------------------------


def block_size(tokens: int, most: float) -> int:
    """Choose how many of so many queries or keys are a block: all, or a multiple of LEAST_BLOCK up to about `most`."""
    if tokens <= max(most, LEAST_BLOCK):
        return tokens
    sizes = range(LEAST_BLOCK, max(int(most), LEAST_BLOCK) + 1, LEAST_BLOCK)
    # The largest of those that fill up little: the smallest block never fills up more than another.
    allowed = 1.05 * _filled_up(tokens, LEAST_BLOCK)
    return max(size for size in sizes if _filled_up(tokens, size) <= allowed)


def _filled_up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


class _Blocks(NamedTuple):
    """Sizes of the blocks of queries, and of each part's keys."""

    queries: int
    keys: tuple[int, ...]


def _choose_blocks(rows: int, queries: int, keys: list[int], masks: tuple[Mask, ...]) -> _Blocks:
    """Choose the sizes of all blocks.

    Args:
        rows: sequences times query heads, on one device.
        queries: T.
        keys: S of each part.
        masks: of each part.
    """
    # A square of so many scores in all rows; with few rows its side is bounded by what fills a device anyway.
    side = min(LARGEST_BLOCK, (SCORES_IN_BLOCK / rows) ** 0.5)
    # Small blocks where they spare what is not seen; those of queries serve all parts.
    if any(mask.skips_later_keys for mask in masks):
        side = min(side, queries / CAUSAL_BLOCKS)
    of_queries = block_size(queries, side)
    # What queries leave of the scores goes to keys that all are seen: a whole prompt is one block, mostly.
    room = min(LARGEST_BLOCK, SCORES_IN_BLOCK / rows / of_queries)
    of_keys = (
        of_queries if mask.skips_later_keys else block_size(count, room)
        for count, mask in zip(keys, masks, strict=True)
    )
    return _Blocks(of_queries, tuple(of_keys))


def _pairs(mask: Mask, blocks: _Blocks, part: int, counts: tuple[int, int]) -> np.ndarray:
    """Which (block of queries, block of keys) must be computed: int32 [pairs, 2]."""
    # All of them first; what no query of a block may see is left out below, before there are data.
    grid = np.indices(counts).reshape(2, -1).T
    if not mask.skips_later_keys:
        return grid.astype(np.int32)
    last_query = (grid[:, 0] + 1) * blocks.queries - 1
    return grid[grid[:, 1] * blocks.keys[part] <= last_query].astype(np.int32)


# ---- Arrays in blocks --------------------------------------------------------------------------------------


def _in_blocks(array: jax.Array, block: int) -> jax.Array:
    """[.., T, d] -> [blocks, .., block, d], the last one filled up with zeros."""
    *leading, T, d = array.shape
    count = -(-T // block)
    filled = jnp.pad(array, [(0, 0)] * len(leading) + [(0, count * block - T), (0, 0)])
    return jnp.moveaxis(filled.reshape(*leading, count, block, d), -3, 0)


def _joined(blocks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_in_blocks`."""
    _, *leading, _, d = blocks.shape
    return jnp.moveaxis(blocks, 0, -3).reshape(*leading, -1, d)[..., :length, :]


def _by_group(blocks: jax.Array, groups: int) -> jax.Array:
    """[blocks, B * n, K, G, t, d] -> [blocks, B, K, n * G * t, d]: all that asks the same keys, as rows."""
    count, R, K, G, t, d = blocks.shape
    n = R // groups
    folded = blocks.reshape(count, groups, n, K, G * t, d).swapaxes(2, 3)
    return folded.reshape(count, groups, K, n * G * t, d)


def _by_row(folded: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_by_group`, for blocks of shape [blocks, B * n, K, G, t]."""
    count, R, K, G, t = shape
    groups, d = folded.shape[1], folded.shape[-1]
    apart = folded.reshape(count, groups, K, R // groups, G * t, d).swapaxes(2, 3)
    return apart.reshape(count, R, K, G, t, d)


class _Part(NamedTuple):
    """What a loop over the pairs of one part reads."""

    keys: jax.Array  # [blocks, B, K, s, d]
    values: jax.Array
    bias_of: Callable[[jax.Array, jax.Array], jax.Array | None]  # (i, j) -> [B or 1, 1, 1, 1, t, s]
    pairs: jax.Array


def _part(blocks: _Blocks, number: int, T: int, seen: KeysAndValues, mask: Mask) -> _Part:
    t, s = blocks.queries, blocks.keys[number]
    keys, values = (_in_blocks(array, s) for array in seen)
    S = seen[0].shape[2]
    counts = -(-T // t), len(keys)
    # The last blocks are filled up, and nobody sees what fills them.
    whole = mask.filled_up(S, counts[0] * t - T, counts[1] * s - S)

    def bias_of(query_block: jax.Array, key_block: jax.Array) -> jax.Array | None:
        is_seen = whole.seen(t, s, query_block * t, key_block * s)
        return None if is_seen is None else key_bias(is_seen)[:, None, None, None]

    return _Part(keys, values, bias_of, jnp.asarray(_pairs(mask, blocks, number, counts)))


def _scores(
    part: _Part, shape: tuple[int, ...], queries: jax.Array, pair: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(float32 scores [B, K, n * G * t, s], keys, values) of one pair of blocks."""
    query_block, key_block = pair[0], pair[1]
    # Slices of the blocks by a number that the loop brings: one program for all pairs.
    keys, values = part.keys[key_block], part.values[key_block]
    scores = _dot("bkqd,bksd->bkqs", queries, keys)
    bias = part.bias_of(query_block, key_block)
    if bias is not None:
        _, R, K, G, t = shape
        B = len(keys)
        scores = (scores.reshape(B, K, R // B, G, t, -1) + bias).reshape(scores.shape)
    return scores, keys, values


def _put(array: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, value, index, 0)


# ---- Forward -----------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Of each query over the keys so far, relative to its largest score: float32 [blocks, .., t, d or 1]."""

    output: jax.Array
    total: jax.Array
    largest: jax.Array


def _forward(
    blocks: _Blocks, queries: jax.Array, parts: tuple[KeysAndValues, ...], masks: tuple[Mask, ...]
) -> tuple[jax.Array, jax.Array]:
    """(output in float32, logs of the sums of the exponentials), both in blocks [blocks, R, K, G, t, d or 1]."""
    T = queries.shape[3]
    query_blocks = _in_blocks(queries, blocks.queries)
    shape = query_blocks.shape[:-1]
    zeros = jnp.zeros_like(query_blocks, jnp.float32)
    # Before the first key: nothing, relative to less than any score.
    sums = _Sums(zeros, zeros[..., :1], zeros[..., :1] + NEG)
    for number, (seen, mask) in enumerate(zip(parts, masks, strict=True)):
        part, groups = _part(blocks, number, T, seen, mask), len(seen[0])
        # Folded once for all pairs of a part.
        folded_queries = _by_group(query_blocks, groups)
        folded_sums = jax.tree.map(functools.partial(_by_group, groups=groups), sums)

        def add(
            sums: _Sums, pair: jax.Array, part: _Part = part, queries: jax.Array = folded_queries
        ) -> tuple[_Sums, None]:
            before = jax.tree.map(lambda array: array[pair[0]], sums)
            scores, _, values = _scores(part, shape, queries[pair[0]], pair)
            largest = jnp.maximum(before.largest, scores.max(-1, keepdims=True))
            exponentials = jnp.exp(scores - largest)
            # What came before was relative to a smaller score: both factors are at most 1.
            shrink = jnp.exp(before.largest - largest)
            # The sum is of the float32 exponentials, before they are rounded for the product.
            total = shrink * before.total + exponentials.sum(-1, keepdims=True)
            product = _dot("bkqs,bksd->bkqd", exponentials.astype(values.dtype), values)
            # Only these queries have changed; the rest of the sums stays where it is.
            after = _Sums(shrink * before.output + product, total, largest)
            return jax.tree.map(lambda all_, new: _put(all_, new, pair[0]), sums, after), None

        # The sums go on from part to part: one softmax over all keys.
        folded_sums, _ = jax.lax.scan(add, folded_sums, part.pairs)
        sums = jax.tree.map(lambda array: _by_row(array, shape), folded_sums)
    log_totals = sums.largest + jnp.log(sums.total)
    # A query that sees no key has the mean of some values, which nobody reads, and no gradient.
    log_totals = jnp.where(sums.largest > NEG / 2, log_totals, -NEG)
    return sums.output / sums.total, log_totals


# ---- Backward ----------------------------------------------------------------------------------------------


def _backward(blocks: _Blocks, saved: tuple, gradient: jax.Array) -> tuple:
    queries, parts, masks, output, log_totals = saved
    T = queries.shape[3]
    query_blocks, gradients = (
        _in_blocks(array, blocks.queries) for array in (queries, gradient.astype(queries.dtype))
    )
    shape = query_blocks.shape[:-1]
    # The sum over all keys of p * dp, by way of the output: d terms a query, however many keys.
    row_sums = (gradient.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1, keepdims=True)
    rows = query_blocks, gradients, _in_blocks(row_sums, blocks.queries), log_totals
    # Summed over all parts, like the output.
    d_queries = jnp.zeros_like(query_blocks, jnp.float32)
    d_parts = []
    for number, (seen, mask) in enumerate(zip(parts, masks, strict=True)):
        part, groups = _part(blocks, number, T, seen, mask), len(seen[0])
        folded_rows = tuple(_by_group(array, groups) for array in rows)

        def add(
            sums: tuple, pair: jax.Array, part: _Part = part, rows: tuple = folded_rows
        ) -> tuple[tuple, None]:
            d_queries, d_keys, d_values = sums
            queries, gradient, row_sums, log_totals = (array[pair[0]] for array in rows)
            scores, keys, values = _scores(part, shape, queries, pair)
            # Normalised at once, since the sum over all keys is known by now.
            probabilities = jnp.exp(scores - log_totals)
            d_probabilities = _dot("bkqd,bksd->bkqs", gradient, values)
            # In float32 up to here, and rounded once, for the products that follow.
            d_scores = (probabilities * (d_probabilities - row_sums)).astype(queries.dtype)
            probabilities = probabilities.astype(values.dtype)
            # The three products of the chain rule, of which the first sums over keys and the others over queries.
            of_queries = _dot("bkqs,bksd->bkqd", d_scores, keys)
            of_keys = _dot("bkqs,bkqd->bksd", d_scores, queries)
            of_values = _dot("bkqs,bkqd->bksd", probabilities, gradient)
            d_queries = _put(d_queries, d_queries[pair[0]] + of_queries, pair[0])
            d_keys = _put(d_keys, d_keys[pair[1]] + of_keys, pair[1])
            d_values = _put(d_values, d_values[pair[1]] + of_values, pair[1])
            return (d_queries, d_keys, d_values), None

        # Sums over many blocks, in float32 whatever the type of the arrays.
        d_seen = (jnp.zeros_like(part.keys, jnp.float32), jnp.zeros_like(part.values, jnp.float32))
        sums = (_by_group(d_queries, groups), *d_seen)
        (folded, *d_totals), _ = jax.lax.scan(add, sums, part.pairs)
        # Back in rows, because the next part may be shared by other rows.
        d_queries = _by_row(folded, shape)
        S = seen[0].shape[2]
        d_parts.append(tuple(_joined(total, S).astype(seen[0].dtype) for total in d_totals))
    return _joined(d_queries, T).astype(queries.dtype), tuple(d_parts), None


# ---- The function ------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    blocks: _Blocks, queries: jax.Array, parts: tuple[KeysAndValues, ...], masks: tuple[Mask, ...]
) -> jax.Array:
    return _attend_fwd(blocks, queries, parts, masks)[0]


def _attend_fwd(
    blocks: _Blocks, queries: jax.Array, parts: tuple[KeysAndValues, ...], masks: tuple[Mask, ...]
) -> tuple[jax.Array, tuple[Any, ...]]:
    output, log_totals = _forward(blocks, queries, parts, masks)
    output = _joined(output, queries.shape[3]).astype(queries.dtype)
    # Neither scores nor probabilities: the output, and one number a query.
    return output, (queries, parts, masks, output, log_totals)


_attend.defvjp(_attend_fwd, _backward)


def blocked_attention(
    queries: jax.Array,
    parts: tuple[KeysAndValues, ...],
    masks: tuple[Mask, ...],
    *,
    shards: int = 1,
) -> jax.Array:
    """Compute softmax attention over the keys of all parts in one softmax, block by block.

    Args:
        queries: [R, K, G, T, d], already scaled.
        parts: (keys, values) [B, K, S, d] each, R a multiple of B.
        masks: of each part; no gradient flows to them.
        shards: devices over which the rows are divided.

    Returns:
        [R, K, G, T, d].
    """
    return _attend(_blocks_of(queries, parts, masks, shards), queries, parts, masks)


# ---- Some of the keys of a softmax -------------------------------------------------------------------------


def _blocks_of(queries: jax.Array, parts: tuple, masks: tuple[Mask, ...], shards: int) -> _Blocks:
    R, K, G, T, _ = queries.shape
    lengths = [keys.shape[2] for keys, _ in parts]
    return _choose_blocks(max(R * K * G // shards, 1), T, lengths, masks)


def part_sums(
    queries: jax.Array, parts: tuple[KeysAndValues, ...], masks: tuple[Mask, ...], shards: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Compute `blocked_attention` in float32, and the log of each query's sum of exponentials [R, K, G, T, 1].

    By that log another part can join the softmax; it is very negative where no key is seen. Not differentiable.
    """
    blocks = _blocks_of(queries, parts, masks, shards)
    output, log_totals = (
        _joined(array, queries.shape[3]) for array in _forward(blocks, queries, parts, masks)
    )
    return output, jnp.where(log_totals > -NEG / 2, NEG, log_totals)


def part_gradients(
    queries: jax.Array,
    parts: tuple[KeysAndValues, ...],
    masks: tuple[Mask, ...],
    output: jax.Array,
    log_totals: jax.Array,
    gradient: jax.Array,
    shards: int = 1,
) -> tuple[jax.Array, tuple[KeysAndValues, ...]]:
    """Compute what these parts add to the gradient of the queries, and the gradients of their keys and values.

    Args:
        queries: as for `blocked_attention`, and parts and masks, too.
        parts: some of the parts of the softmax.
        masks: of each part.
        output: of the whole softmax [R, K, G, T, d].
        log_totals: of the whole softmax [R, K, G, T, 1].
        gradient: of the output.
        shards: devices over which the rows are divided.
    """
    blocks = _blocks_of(queries, parts, masks, shards)
    saved = queries, parts, masks, output, _in_blocks(log_totals, blocks.queries)
    d_queries, d_parts, _ = _backward(blocks, saved, gradient)
    return d_queries, d_parts
