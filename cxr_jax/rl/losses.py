"""Losses as pure functions: chunked-vocabulary log-probs and entropy, cross-entropy, advantages, policy losses.

Nothing here knows of models or data. Shapes: B rows, T tokens, D width, V vocabulary. docs/rl.md has the formulas.
"""

import jax
import jax.numpy as jnp

from cxr_jax.config import schema

MAX_LOG_RATIO = 20.0  # e^20 is still far from float32's limit


def group_advantages(rewards, *, scale: str = "group", batch=slice(None), eps: float = 1e-4):
    """GRPO advantages. rewards [P, G] -> [P, G].

    (r - mean of the group) / (std + eps), std with ddof 1 and eps 1e-4 as in TRL (0.22 and now). scale: "group"
    divides by the group's std, "batch" by the std of all rewards, "none" not at all (Dr. GRPO, arXiv 2503.20783).
    batch: the groups that make up the batch (all). A group whose rewards are all the same has advantages of exactly 0,
    whatever the mean rounds to.
    """
    centred = _centred(rewards)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (jnp.std(rewards[batch], ddof=1) + eps)
    if scale == "group":
        return centred / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + eps)
    raise ValueError(f"scale_rewards must be group, batch or none, got {scale!r}")


def gdpo_advantages(terms: dict, weights: dict, *, batch=slice(None), eps: float = 1e-4):
    """GDPO advantages (arXiv 2601.05242): every reward term normalised in its group before the weighted sum.

    terms {name: [P, G]}; weights {name: float}, of which 0 leaves a term out -> [P, G]. The sum is divided by its std
    over the groups of the batch (all), so that its scale does not grow with the number of terms. Equal to TRL's
    `normalize_then_sum`,
    which subtracts the mean of the batch too: it is 0, as every group's is, and only its rounding would reach groups
    without variance, whose advantages are exactly 0 here.
    """
    total = sum(w * group_advantages(terms[name], eps=eps) for name, w in weights.items() if w)
    return total / (jnp.std(total[batch], ddof=1) + eps)


def _centred(rewards):
    same = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
    return jnp.where(same, 0.0, rewards - rewards.mean(axis=1, keepdims=True))


def divisors(mask, train_mask, *, aggregation: str, denominator: str) -> dict:
    """What `policy_loss` divides by: {"rows", "tokens"} of a whole batch, of which it may see only a part.

    mask [R, N]: all completion tokens; train_mask [R, N]: those that train. denominator: "trained" counts what trains;
    "all" every completion, truncated or not, so that truncated ones make the rest of the batch count less (TRL 0.22;
    for rows, TRL to this day). "token_local" and "constant" always count all rows: their divisor is no count of what
    trains.
    """
    _one_of("denominator", denominator, ("trained", "all"))
    counted = train_mask if denominator == "trained" else mask
    trained_rows = denominator == "trained" and aggregation == "sequence"
    rows = jnp.sum(jnp.any(train_mask > 0, axis=1)) if trained_rows else jnp.array(len(mask))
    return {"rows": rows.astype(jnp.float32), "tokens": jnp.sum(counted > 0).astype(jnp.float32)}


def policy_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    aggregation: str = "token",
    ratio_level: str = "token",
    clip: str = "ppo",
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float = 0.0,
    beta: float = 0.0,
    kl: str = "k3",
    ref_logp=None,
    sampler_logp=None,
    sampler_correction: str = "none",
    sampler_cap: float = 2.0,
    max_tokens=None,
    rows=None,
    tokens=None,
):
    """Policy-gradient loss over completions, by three independent switches: aggregation, ratio level, clip.

    logp, old_logp, ref_logp, sampler_logp [R, N]: log-probabilities of the tokens under the policy that learns, the
    policy at the time of the rollout (as the learner computes it), the reference, and the sampler; advantages [R];
    mask [R, N], 1 on tokens that train: the only mask, of value, divisor and metrics; what stands elsewhere may be
    anything, NaN too. On-policy, pass old_logp = stop_gradient(logp): the ratio is then 1 by construction and clipping
    never acts. Only logp gets a gradient. docs/rl.md gives every formula and its source.

    ratio_level   "token" | "sequence" (GSPO: exp of the mean log-ratio of the row's trained tokens) |
                  "sequence_token" (GSPO-token: that value, the gradient of the token)
    delta         > 0: the ratio is at most this (INTELLECT-2's two-sided clipping, for negative advantages)
    clip          "ppo": min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) |
                  "cispo": stop_gradient(min(r, 1 + epsilon_high)) A logp (TRL's epsilon_high is 1 more) | "none": r A
    beta, kl      beta times the k1, k2 or k3 estimate of KL(policy || reference) a token, added to the loss
    sampler_correction  weight a token by w = old / sampler: "tis" min(w, cap) | "icepop" w where 1 / cap <= w <= cap,
                  else 0
    aggregation   "sequence": mean over rows of each row's token mean (GRPO) | "token": mean over tokens (DAPO) |
                  "constant": sum / (rows * max_tokens) (Dr. GRPO) | "token_local": mean over the tokens of this call
                  (BNPO)

    For a part of a batch, rows and tokens are what divides the whole batch (`divisors`): the parts then sum to its
    loss. "token_local" is the exception: each part is divided by its own tokens and weighs by its share of the rows, so
    the sum, the mean over parts, depends on the split. Nothing to train: 0, with zero gradient.

    Returns (loss, metrics), arrays [R, N] without gradient, 0 where mask is: "ratio"; bool "clip_low", "clip_high",
    "clip_region" (either; TRL's clip_ratio/*) and "clip_delta", where the clip takes the gradient away ("cispo": where
    the weight is cut); "kl" with a reference; "correction" with a sampler correction. Raises ValueError.
    """
    _one_of("aggregation", aggregation, schema.choices("rl.aggregation"))
    _one_of("ratio_level", ratio_level, schema.choices("rl.ratio_level"))
    _one_of("clip", clip, schema.choices("rl.clip"))
    _one_of("kl", kl, schema.choices("rl.kl"))
    _one_of("sampler_correction", sampler_correction, schema.choices("rl.sampler_correction"))
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp")
    if sampler_correction != "none" and sampler_logp is None:
        raise ValueError(f"sampler_correction={sampler_correction!r} needs sampler_logp")
    if aggregation == "constant" and max_tokens is None:
        raise ValueError("aggregation='constant' needs max_tokens")

    mask = mask > 0
    # Zeros before anything is computed: a where() after it would still send 0 * NaN back.
    trained = lambda x: jnp.where(mask, x, 0.0)
    fixed = lambda x: jax.lax.stop_gradient(trained(x))
    logp, old_logp = trained(logp), fixed(old_logp)
    a = advantages[:, None]
    metrics = {}

    ratio = _ratio(logp, old_logp, mask, ratio_level)
    bounded = jnp.minimum(ratio, delta) if delta else ratio
    low, high = 1.0 - epsilon, 1.0 + epsilon_high
    if clip == "ppo":
        gain = jnp.minimum(bounded * a, jnp.clip(ratio, low, high) * a)
    elif clip == "cispo":
        gain = jax.lax.stop_gradient(jnp.minimum(bounded, high)) * a * logp
    else:
        gain = bounded * a
    if sampler_correction != "none":
        weight = _exp(old_logp - fixed(sampler_logp))
        if sampler_correction == "tis":
            weight = jnp.minimum(weight, sampler_cap)
        else:
            weight = jnp.where((weight >= 1.0 / sampler_cap) & (weight <= sampler_cap), weight, 0.0)
        gain = gain * weight
        metrics["correction"] = weight
    per_token = -gain
    if ref_logp is not None:
        estimate = _kl(logp, fixed(ref_logp), kl)
        if beta:
            per_token = per_token + beta * estimate
        metrics["kl"] = estimate
    loss = _aggregate(jnp.where(mask, per_token, 0.0), mask, aggregation, max_tokens, rows, tokens)

    never = jnp.zeros_like(mask)
    metrics["ratio"] = ratio
    metrics["clip_low"] = (bounded < low) & (a < 0) if clip == "ppo" else never
    metrics["clip_high"] = (bounded > high) & (a > 0) if clip != "none" else never
    metrics["clip_region"] = metrics["clip_low"] | metrics["clip_high"]
    metrics["clip_delta"] = (
        (ratio > delta) & (a < 0 if clip == "ppo" else a != 0) if delta else never
    )
    return loss, {
        k: jax.lax.stop_gradient(jnp.where(mask, v, jnp.zeros_like(v))) for k, v in metrics.items()
    }


def _exp(log_ratio):
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _ratio(logp, old_logp, mask, level):
    """[R, N]. logp and old_logp are 0 where mask is False."""
    log_ratio = logp - old_logp
    if level == "token":
        return _exp(log_ratio)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    of_row = jnp.sum(log_ratio, axis=1, keepdims=True) / count
    if level == "sequence_token":
        of_row = jax.lax.stop_gradient(of_row) + logp - jax.lax.stop_gradient(logp)
    return jnp.broadcast_to(_exp(of_row), logp.shape)


def _kl(logp, ref_logp, kind):
    """Per-token estimates of KL(policy || reference) from its own samples (Schulman 2020)."""
    d = jnp.clip(ref_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {"k1": lambda: -d, "k2": lambda: 0.5 * d**2, "k3": lambda: jnp.exp(d) - d - 1.0}[kind]()


def _aggregate(per_token, mask, how, max_tokens, rows, tokens):
    own_rows, own_tokens = len(mask), jnp.sum(mask).astype(per_token.dtype)
    rows = jnp.maximum(own_rows if rows is None else rows, 1.0)
    if how == "sequence":
        return jnp.sum(jnp.sum(per_token, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)) / rows
    if how == "token":
        return jnp.sum(per_token) / jnp.maximum(own_tokens if tokens is None else tokens, 1.0)
    if how == "token_local":
        return jnp.sum(per_token) / jnp.maximum(own_tokens, 1.0) * (own_rows / rows)
    return jnp.sum(per_token) / (rows * max_tokens)


def _one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
