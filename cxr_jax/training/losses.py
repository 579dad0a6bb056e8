"""Log-probs of tokens in chunks, and the plain losses that SFT and RL share."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from cxr_jax.runtime.batch_rows import by_shard, divide_rows


def token_logprobs(
    hidden, head, targets, *, temperature: float = 1.0, suppress=None, chunk: int = 2048, shards=1
):
    """Log-probability of `targets` and the entropy of each next-token distribution.

    hidden [N, D]; head [D, V]; targets int [N] -> (logp float32 [N], entropy float32 [N]).
    Works through the N tokens in chunks of at most `chunk`; of a chunk's logits only the log-sum-exp is kept, the
    backward pass computes them again, so no [N, V] array ever lives. The gradient of head is summed in float32.
    `suppress` bool [V]: ids that the sampler never emits, excluded here too, or the two sides would disagree.
    shards: over how many devices the tokens are divided, evenly (`rows`). A chunk is `chunk` tokens of each, and each
    sums its own gradient of head, until the last chunk.
    """
    n = len(hidden) // shards
    fewest = -(-n // chunk)
    # A number that divides n needs no padding, which would be computed in vain.
    chunks = next((k for k in range(fewest, 2 * fewest) if n % k == 0), fewest)
    return _token_logprobs(hidden, head, targets, suppress, temperature, (shards, chunks))[:2]


def _to_chunks(x, shards: int, chunks: int):
    """[N, ..] -> [chunks, shards * m, ..], m = N / shards / chunks rounded up.

    Chunk i has tokens i, i + chunks, ... of every shard.
    """
    x = by_shard(x, shards)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunks)) + ((0, 0),) * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(shards, -1, chunks, *x.shape[2:]), 2, 0)
    return x.reshape(chunks, -1, *x.shape[3:])


def _from_chunks(x, shards: int, n: int):
    x = jnp.moveaxis(x.reshape(len(x), shards, -1, *x.shape[2:]), 0, 2)
    return x.reshape(shards, -1, *x.shape[3:])[:, : n // shards].reshape(n, *x.shape[3:])


def _logits(hidden, head, suppress, temperature):
    logits = (
        jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
    )
    return logits if suppress is None else jnp.where(suppress, -1e30, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_logprobs(hidden, head, targets, suppress, temperature, cut):
    """(logp, entropy, log-sum-exp), each float32 [N]."""

    def one(args):
        h, t = args
        logits = _logits(h, head, suppress, temperature)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1)
        entropy = jnp.log(total) - jnp.sum(weights * (logits - top), axis=-1) / total
        logz = top[:, 0] + jnp.log(total)
        return jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0] - logz, entropy, logz

    out = jax.lax.map(one, (_to_chunks(hidden, *cut), _to_chunks(targets, *cut)))
    return tuple(_from_chunks(x, cut[0], len(hidden)) for x in out)


def _token_logprobs_fwd(*args):
    hidden, head, targets, suppress = (None if x is None else x.value for x in args[:4])
    out = _token_logprobs(hidden, head, targets, suppress, *args[4:])
    return out, (hidden, head, targets, suppress, out[1], out[2])


def _token_logprobs_bwd(temperature, cut, saved, cotangents):
    """d logp / d logits = onehot - p and d entropy / d logits = -p (log p + entropy), a chunk at a time."""
    hidden, head, targets, suppress, entropy, logz = saved
    no_entropy = isinstance(cotangents[1], SymbolicZero)  # as in RL, where it is a metric only
    of_logp, of_entropy = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents[:2]
    )

    def one(d_head, args):
        h, t, ent, z, g_logp, g_ent = args
        logp = _logits(h, head, suppress, temperature) - z[:, None]
        slope = g_logp[:, None]
        if not no_entropy:
            slope = slope + g_ent[:, None] * (logp + ent[:, None])
        chosen = t[:, None] == jnp.arange(logp.shape[1])
        d = jnp.where(chosen, g_logp[:, None], 0.0) - jnp.exp(logp) * slope
        if suppress is not None:
            d = jnp.where(suppress, 0.0, d)
        d = (d / temperature).astype(h.dtype)
        of_shards = jnp.einsum(
            "smd,smv->sdv",
            by_shard(h, shards),
            by_shard(d, shards),
            preferred_element_type=jnp.float32,
        )
        return apart(d_head + of_shards), jnp.dot(d, head.astype(h.dtype).T)

    shards = cut[0]
    apart = (
        functools.partial(divide_rows, rest=PartitionSpec.UNCONSTRAINED)
        if shards > 1
        else lambda x: x
    )
    parts = [_to_chunks(x, *cut) for x in (hidden, targets, entropy, logz, of_logp, of_entropy)]
    d_head, d_hidden = jax.lax.scan(
        one, apart(jnp.zeros((shards, *head.shape), jnp.float32)), parts
    )
    return _from_chunks(d_hidden, shards, len(hidden)), d_head.sum(0).astype(head.dtype), None, None


_token_logprobs.defvjp(_token_logprobs_fwd, _token_logprobs_bwd, symbolic_zeros=True)


def masked_mean(x, mask):
    """Mean of x where mask (0 if the mask is empty)."""
    mask = mask.astype(x.dtype)
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def binary_cross_entropy(logits, targets, weight=None):
    """Mean sigmoid cross-entropy against soft targets in 0..1, optionally weighted."""
    per = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.mean(per if weight is None else per * weight)
