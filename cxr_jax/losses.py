"""Losses as pure functions: chunked-vocabulary log-probs and entropy, cross-entropy, advantages, policy losses.

Nothing here knows of models or data. Shapes: B rows, T tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp


def token_logprobs(hidden, head, targets, *, temperature=1.0, suppress=None, chunk: int = 2048):
    """Log-probability of `targets` and the entropy of each next-token distribution.

    hidden [N, D]; head [D, V]; targets int [N] -> (logp float32 [N], entropy float32 [N]).
    Works through the N tokens in chunks; if there are several, a chunk's logits are recomputed in the backward pass, so
    no [N, V] array outlives a chunk. `suppress` bool [V]: ids that the sampler never emits, excluded here too, or the
    two sides would disagree.
    """
    n, d = hidden.shape
    pad = -n % chunk if n > chunk else 0
    size = min(chunk, n)

    def one(args):
        h, t = args
        logits = jnp.dot(h, head.astype(h.dtype), preferred_element_type=jnp.float32) / temperature
        if suppress is not None:
            logits = jnp.where(suppress, -1e30, logits)
        logz = jax.nn.logsumexp(logits, axis=-1)
        logp = jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0] - logz
        p = jnp.exp(logits - logz[:, None])
        entropy = logz - jnp.sum(p * jnp.where(p > 0, logits, 0.0), axis=-1)
        return logp, entropy

    if n <= chunk:
        return one((hidden, targets))
    # Chunk i has tokens i, i + chunks, ...: where rows are spread over devices, each device has some in every chunk.
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(size, -1, d).swapaxes(0, 1)
    targets = jnp.pad(targets, (0, pad)).reshape(size, -1).T
    logp, entropy = jax.lax.map(jax.checkpoint(one), (hidden, targets))
    return logp.T.reshape(-1)[:n], entropy.T.reshape(-1)[:n]


def masked_mean(x, mask):
    """Mean of x where mask (0 if the mask is empty)."""
    mask = mask.astype(x.dtype)
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def group_advantages(rewards, *, scale: str = "group", eps: float = 1e-4):
    """GRPO advantages. rewards [P, G] -> [P, G].

    (r - mean of the group) / (std + eps), std with ddof 1 as TRL 0.22 computes it. scale: "group" divides by the
    group's std, "batch" by the std of all rewards, "none" not at all (Dr. GRPO).
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (jnp.std(rewards, ddof=1) + eps)
    if scale == "group":
        return centred / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + eps)
    raise ValueError(f"scale_rewards must be group, batch or none, got {scale!r}")


def policy_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    loss_type: str = "dapo",
    epsilon=0.2,
    epsilon_high=None,
    max_tokens=None,
    rows=None,
    tokens=None,
):
    """Clipped policy-gradient loss over completions.

    logp, old_logp [R, N]; advantages [R]; mask [R, N] (1 on tokens that train). On-policy, pass
    old_logp = stop_gradient(logp): the ratio is then 1 by construction and clipping never acts (as in TRL 0.22
    when sampling and update alternate). Aggregation:
      grpo     mean over rows of each row's token mean
      dapo     sum over tokens / tokens in the batch
      dr_grpo  sum over tokens / (rows * max_tokens)
    For a part of a batch, rows and tokens (where mask is 1) are those of the whole batch: the parts then sum to its
    loss. Returns (loss, bool [R, N]: where the clip acts).
    """
    log_ratio = jnp.clip(logp - old_logp, -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    low, high = 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    a = advantages[:, None]
    per_token = -jnp.minimum(ratio * a, jnp.clip(ratio, low, high) * a)
    mask = mask.astype(jnp.float32)
    per_token = jnp.where(mask > 0, per_token, 0.0)
    rows = len(mask) if rows is None else rows
    tokens = jnp.sum(mask) if tokens is None else tokens
    if loss_type == "grpo":
        loss = jnp.sum(jnp.sum(per_token, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)) / rows
    elif loss_type == "dapo":
        loss = jnp.sum(per_token) / jnp.maximum(tokens, 1.0)
    elif loss_type == "dr_grpo":
        loss = jnp.sum(per_token) / (rows * max_tokens)
    else:
        raise ValueError(f"loss_type must be grpo, dapo or dr_grpo, got {loss_type!r}")
    return loss, jnp.logical_or((ratio < low) & (a < 0), (ratio > high) & (a > 0))


def binary_cross_entropy(logits, targets, weight=None):
    """Mean sigmoid cross-entropy against soft targets in 0..1, optionally weighted."""
    per = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.mean(per if weight is None else per * weight)
