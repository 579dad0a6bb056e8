"""Log-probs of tokens in chunks, and the plain losses that SFT and RL share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from cxr_jax.runtime.batch_rows import by_shard, divide_rows

# ---- Log-probs without an array of all logits ------------------------------------------------------------


class _Cut(NamedTuple):
    """How N tokens are cut: over how many devices, and into how many chunks on each."""

    shards: int
    chunks: int


def token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    suppress: ArrayLike | None = None,
    chunk: int = 2048,
    shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Compute the log-probability of `targets` and the entropy of each next-token distribution.

    Works through the N tokens in chunks; of a chunk's logits only the log-sum-exp is kept, the backward pass computes
    them again, so no [N, V] array ever lives. The gradient of head is summed in float32.

    Args:
        hidden: [N, D].
        head: [D, V].
        targets: int [N].
        suppress: bool [V], ids that the sampler never emits, excluded here too, or the two sides would disagree.
        chunk: most tokens of a chunk on each device.
        shards: over how many devices the tokens are divided, evenly (`batch_rows`); each sums its own gradient of
            head, until the last chunk.

    Returns:
        (log-probs, entropies), float32 [N].
    """
    count = len(hidden) // shards
    fewest = -(-count // chunk)
    # A number of chunks that divides the tokens needs no padding, which would be computed in vain.
    even = (chunks for chunks in range(fewest, 2 * fewest) if count % chunks == 0)
    cut = _Cut(shards, next(even, fewest))
    return _token_log_probs(hidden, head, targets, suppress, temperature, cut)[:2]


def _to_chunks(values: jax.Array, shards: int, chunks: int) -> jax.Array:
    """[N, ..] -> [chunks, shards * m, ..], m = N / shards / chunks rounded up.

    Chunk i has tokens i, i + chunks, ... of every shard.
    """
    # The tokens of a shard stay with it: a chunk has a part of every shard's.
    values = by_shard(values, shards)
    padding = ((0, 0), (0, -values.shape[1] % chunks)) + ((0, 0),) * (values.ndim - 2)
    values = jnp.pad(values, padding)
    values = jnp.moveaxis(values.reshape(shards, -1, chunks, *values.shape[2:]), 2, 0)
    return values.reshape(chunks, -1, *values.shape[3:])


def _from_chunks(values: jax.Array, shards: int, count: int) -> jax.Array:
    """[chunks, shards * m, ..] -> [N, ..]: what `_to_chunks` made of `count` tokens, its padding left out."""
    values = jnp.moveaxis(values.reshape(len(values), shards, -1, *values.shape[2:]), 0, 2)
    values = values.reshape(shards, -1, *values.shape[3:])
    return values[:, : count // shards].reshape(count, *values.shape[2:])


def _logits(
    hidden: jax.Array, head: jax.Array, suppress: ArrayLike | None, temperature: float
) -> jax.Array:
    """float32 [m, V]."""
    logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # As the sampler has it: first the temperature, then what cannot be drawn.
    logits = logits / temperature
    if suppress is None:
        return logits
    return jnp.where(suppress, -1e30, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    suppress: ArrayLike | None,
    temperature: float,
    cut: _Cut,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-probs, entropies, log-sum-exps), each float32 [N]."""

    def read_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        chunk_hidden, chunk_targets = chunk
        logits = _logits(chunk_hidden, head, suppress, temperature)
        # The largest is taken out, or exp would overflow.
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1)
        entropy = jnp.log(total) - jnp.sum(weights * (logits - top), axis=-1) / total
        log_sum = top[:, 0] + jnp.log(total)
        chosen = jnp.take_along_axis(logits, chunk_targets[:, None], axis=-1)[:, 0]
        return chosen - log_sum, entropy, log_sum

    results = jax.lax.map(read_chunk, (_to_chunks(hidden, *cut), _to_chunks(targets, *cut)))
    log_probs, entropy, log_sum = (
        _from_chunks(values, cut.shards, len(hidden)) for values in results
    )
    return log_probs, entropy, log_sum


def _token_log_probs_fwd(*args: Any) -> tuple:
    # With symbolic zeros, an argument comes wrapped, with a mark whether it is differentiated.
    hidden, head, targets, suppress = (
        None if argument is None else argument.value for argument in args[:4]
    )
    results = _token_log_probs(hidden, head, targets, suppress, *args[4:])
    _, entropy, log_sum = results
    return results, (hidden, head, targets, suppress, entropy, log_sum)


def _token_log_probs_bwd(temperature: float, cut: _Cut, saved: tuple, cotangents: tuple) -> tuple:
    """d logp / d logits = onehot - p and d entropy / d logits = -p (log p + entropy), a chunk at a time."""
    hidden, head, targets, suppress, entropy, log_sum = saved
    shards = cut.shards
    has_entropy = not isinstance(cotangents[1], SymbolicZero)  # in RL it is a metric only
    slopes = [_dense(cotangent) for cotangent in cotangents[:2]]

    def apart(by_device: jax.Array) -> jax.Array:
        """Keep each device's own sum of the gradient of head on that device."""
        if shards == 1:
            return by_device
        return divide_rows(by_device, rest=PartitionSpec.UNCONSTRAINED)

    def add_chunk(d_head: jax.Array, chunk: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk_hidden, chunk_targets, chunk_entropy, chunk_log_sum, d_log_probs, d_entropy = chunk
        logits = _logits(chunk_hidden, head, suppress, temperature)
        log_probs = logits - chunk_log_sum[:, None]
        slope = d_log_probs[:, None]
        if has_entropy:
            slope = slope + d_entropy[:, None] * (log_probs + chunk_entropy[:, None])
        is_chosen = chunk_targets[:, None] == jnp.arange(log_probs.shape[1])
        d_logits = jnp.where(is_chosen, d_log_probs[:, None], 0.0) - jnp.exp(log_probs) * slope
        if suppress is not None:
            d_logits = jnp.where(suppress, 0.0, d_logits)
        d_logits = (d_logits / temperature).astype(chunk_hidden.dtype)
        d_head = d_head + jnp.einsum(
            "smd,smv->sdv",
            by_shard(chunk_hidden, shards),
            by_shard(d_logits, shards),
            preferred_element_type=jnp.float32,
        )
        return apart(d_head), jnp.dot(d_logits, head.astype(chunk_hidden.dtype).T)

    chunks = [_to_chunks(values, *cut) for values in (hidden, targets, entropy, log_sum, *slopes)]
    nothing = apart(jnp.zeros((shards, *head.shape), jnp.float32))
    d_head, d_hidden = jax.lax.scan(add_chunk, nothing, chunks)
    d_hidden = _from_chunks(d_hidden, shards, len(hidden))
    return d_hidden, d_head.sum(0).astype(head.dtype), None, None


def _dense(cotangent: Any) -> jax.Array:
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


_token_log_probs.defvjp(_token_log_probs_fwd, _token_log_probs_bwd, symbolic_zeros=True)


# ---- Plain losses ----------------------------------------------------------------------------------------


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Average the values where mask is; 0 if it is empty."""
    mask = mask.astype(values.dtype)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
    """Average the sigmoid cross-entropy against soft targets in 0..1, optionally weighted."""
    losses = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.mean(losses if weight is None else losses * weight)
