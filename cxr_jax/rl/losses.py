"""Advantages and policy losses of RL as pure functions of arrays.

Nothing here knows of models or data. Shapes: P prompts, G completions each; R rows (completions) of N tokens.

The policy loss has three independent switches, aggregation, ratio level and clip, and some more knobs; docs/rl.md gives
every formula and its source. r is the ratio of a token, A its row's advantage, p its probability:

ratio_level   "token" | "sequence" (GSPO: exp of the mean log-ratio of the row's trained tokens) |
              "sequence_token" (GSPO-token: that value, the gradient of the token)
delta         > 0: the ratio is at most this (INTELLECT-2's two-sided clipping, for negative advantages)
clip          "ppo": min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) |
              "cispo": stop_gradient(min(r, 1 + epsilon_high)) A log p (TRL's epsilon_high is 1 more) | "none": r A
beta, kl      beta times the k1, k2 or k3 estimate of KL(policy || reference) a token, added to the loss
sampler_correction  weight a token by w = old / sampler: "tis" min(w, cap) | "icepop" w where 1 / cap <= w <= cap,
              else 0
aggregation   "sequence": mean over rows of each row's token mean (GRPO) | "token": mean over tokens (DAPO) |
              "constant": sum / (rows * max_tokens) (Dr. GRPO) | "token_local": mean over the tokens of this call
              (BNPO)

On-policy, old_log_probs = stop_gradient(log_probs): the ratio is then 1 by construction and clipping never acts.

For a part of a batch, what divides the whole divides it (`Divisors`), so that the parts sum to its loss. "token_local"
is the exception: each part is divided by its own tokens and weighs by its share of the rows, so the sum, the mean over
parts, depends on the split.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cxr_jax.config import schema
from cxr_jax.config.sections import PolicyLossConfig

MAX_LOG_RATIO = 20.0  # e^20 is still far from float32's limit

_CHOICES = ("aggregation", "ratio_level", "clip", "kl", "sampler_correction")


# ---- Advantages ------------------------------------------------------------------------------------------


def group_advantages(
    rewards: jax.Array,
    *,
    scale: str = "group",
    batch: slice | jax.Array = slice(None),
    eps: float = 1e-4,
) -> jax.Array:
    """Compute GRPO advantages: (r - mean of the group) / (std + eps), std with ddof 1 as in TRL (0.22 and now).

    Args:
        rewards: [P, G].
        scale: "group" divides by the group's std, "batch" by the std of all rewards, "none" not at all
            (Dr. GRPO, arXiv 2503.20783).
        batch: the groups that make up the batch; all without it.
        eps: 1e-4 as in TRL.

    Returns:
        [P, G]; exactly 0 for a group whose rewards are all the same, whatever the mean rounds to.

    Raises:
        ValueError: if `scale` is none of these.
    """
    centred = _centred(rewards)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (jnp.std(rewards[batch], ddof=1) + eps)
    if scale == "group":
        return centred / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + eps)
    raise ValueError(f"scale_rewards must be group, batch or none, got {scale!r}")


def gdpo_advantages(
    terms: Mapping[str, jax.Array],
    weights: Mapping[str, float],
    *,
    batch: slice | jax.Array = slice(None),
    eps: float = 1e-4,
) -> jax.Array:
    """Compute GDPO advantages (arXiv 2601.05242): every term is normalised in its group before the weighted sum.

    The sum is divided by its std over the groups of the batch, so that its scale does not grow with the number of
    terms. Equal to TRL's `normalize_then_sum`, which subtracts the mean of the batch too: it is 0, as every group's is,
    and only its rounding would reach groups without variance, whose advantages are exactly 0 here.

    Args:
        terms: name -> reward term [P, G].
        weights: name -> weight; 0 leaves a term out.
        batch: the groups that make up the batch; all without it.
        eps: as in `group_advantages`.

    Returns:
        [P, G].
    """
    total: Any = sum(
        weight * group_advantages(terms[name], eps=eps)
        for name, weight in weights.items()
        if weight
    )
    return total / (jnp.std(total[batch], ddof=1) + eps)


def _centred(rewards: jax.Array) -> jax.Array:
    is_flat = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
    return jnp.where(is_flat, 0.0, rewards - rewards.mean(axis=1, keepdims=True))


def varies(advantages: jax.Array) -> jax.Array:
    """Mark the groups of advantages [P, G] that teach something, bool [P]; a flat group's are exactly 0."""
    return jnp.any(advantages != 0, axis=1)


def has_flat_gradients(settings: PolicyLossConfig) -> bool:
    """Tell whether groups without an advantage have a gradient, or a say in how others are divided."""
    return bool(settings.beta) or settings.aggregation == "token_local"


# ---- What a loss is divided by ---------------------------------------------------------------------------


class Divisors(NamedTuple):
    """What `policy_loss` divides by: counts of a whole batch, of which it may see only a part."""

    rows: jax.Array
    tokens: jax.Array


def divisors(
    mask: jax.Array, train_mask: jax.Array, *, aggregation: str, denominator: str
) -> Divisors:
    """Count what divides the loss of a whole batch.

    "token_local" and "constant" always count all rows: their divisor is no count of what trains.

    Args:
        mask: [R, N], all completion tokens.
        train_mask: [R, N], those that train.
        aggregation: as in `PolicyLossConfig`.
        denominator: "trained" counts what trains; "all" every completion, truncated or not, so that truncated ones
            make the rest of the batch count less (TRL 0.22; for rows, TRL to this day).

    Returns:
        float32 scalars.

    Raises:
        ValueError: if `denominator` is neither.
    """
    _require_one_of("denominator", denominator, ("trained", "all"))
    counted = train_mask if denominator == "trained" else mask
    if denominator == "trained" and aggregation == "sequence":
        rows = jnp.sum(jnp.any(train_mask > 0, axis=1))
    else:
        rows = jnp.array(len(mask))
    return Divisors(rows.astype(jnp.float32), jnp.sum(counted > 0).astype(jnp.float32))


# ---- The policy loss -------------------------------------------------------------------------------------


def policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    settings: PolicyLossConfig,
    *,
    reference_log_probs: jax.Array | None = None,
    sampler_log_probs: jax.Array | None = None,
    max_tokens: int | None = None,
    divisors: Divisors | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the policy-gradient loss by the switches at the head of this file; `denominator` is not read.

    Args:
        log_probs: [R, N], of the tokens under the policy that learns; nothing else gets a gradient.
        old_log_probs: [R, N], under the policy at the time of the rollout, as the learner computes it.
        advantages: [R].
        mask: [R, N], 1 on tokens that train: the only mask, of value, divisor and metrics; what stands elsewhere may
            be anything, NaN too.
        reference_log_probs: [R, N], under the reference; needed with beta.
        sampler_log_probs: [R, N], as the sampler recorded them; needed with a sampler correction.
        max_tokens: length that a completion may have; needed with aggregation "constant".
        divisors: for a part of a batch, those of the whole.

    Returns:
        The loss, 0 with zero gradient where nothing trains; and arrays [R, N] without gradient, 0 where mask is:
        "ratio"; "kl" with a reference; "correction" with a sampler correction; and those of `_clip_metrics`.

    Raises:
        ValueError: for an unknown choice, or a choice without the array that it needs.
    """
    _check(settings, reference_log_probs, sampler_log_probs, max_tokens)
    mask = mask > 0
    log_probs = _zero_outside(mask, log_probs)
    old_log_probs = _constant_inside(mask, old_log_probs)
    advantages, metrics = advantages[:, None], {}

    # How much likelier the policy makes each token, and what that gains.
    ratio = _ratio(log_probs, old_log_probs, mask, settings.ratio_level)
    bounded = jnp.minimum(ratio, settings.delta) if settings.delta else ratio
    gain = _clipped_gain(ratio, bounded, log_probs, advantages, settings)

    # The sampler is not quite the policy: weigh by how far they are apart.
    if sampler_log_probs is not None and settings.sampler_correction != "none":
        sampler_log_probs = _constant_inside(mask, sampler_log_probs)
        metrics["correction"] = _sampler_weight(old_log_probs - sampler_log_probs, settings)
        gain = gain * metrics["correction"]

    # The pull back to the reference.
    token_losses = -gain
    if reference_log_probs is not None:
        reference_log_probs = _constant_inside(mask, reference_log_probs)
        metrics["kl"] = _kl_estimate(log_probs, reference_log_probs, settings.kl)
        if settings.beta:
            token_losses = token_losses + settings.beta * metrics["kl"]
    loss = _aggregate(token_losses, mask, settings.aggregation, max_tokens, divisors)
    metrics["ratio"] = ratio
    metrics |= _clip_metrics(ratio, bounded, advantages, mask, settings)
    return loss, {name: _masked_constant(mask, values) for name, values in metrics.items()}


def _masked_constant(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.where(mask, values, jnp.zeros_like(values)))


def _zero_outside(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Zeros before anything is computed: a where() after it would still send 0 * NaN back."""
    return jnp.where(mask, values, 0.0)


def _constant_inside(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(_zero_outside(mask, values))


def _bounded_exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _ratio(
    log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array, level: str
) -> jax.Array:
    """[R, N]: new over old probability. Both log-probs are 0 where mask is False."""
    log_ratio = log_probs - old_log_probs
    if level == "token":
        return _bounded_exp(log_ratio)
    token_counts = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    row_log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / token_counts
    if level == "sequence_token":
        # The value of the row, the gradient of the token.
        row_log_ratio = (
            jax.lax.stop_gradient(row_log_ratio) + log_probs - jax.lax.stop_gradient(log_probs)
        )
    return jnp.broadcast_to(_bounded_exp(row_log_ratio), log_probs.shape)


def _clipped_gain(
    ratio: jax.Array,
    bounded: jax.Array,
    log_probs: jax.Array,
    advantages: jax.Array,
    settings: PolicyLossConfig,
) -> jax.Array:
    """[R, N], what is maximised; `bounded` is the ratio, at most `delta` if that is set."""
    low, high = 1.0 - settings.epsilon, 1.0 + settings.epsilon_high
    if settings.clip == "ppo":
        return jnp.minimum(bounded * advantages, jnp.clip(ratio, low, high) * advantages)
    if settings.clip == "cispo":
        # The weight is cut, but the token keeps its gradient.
        weight = jax.lax.stop_gradient(jnp.minimum(bounded, high))
        return weight * advantages * log_probs
    return bounded * advantages


def _sampler_weight(log_weight: jax.Array, settings: PolicyLossConfig) -> jax.Array:
    """[R, N], old over sampler probability: cut at the cap ("tis"), or 0 outside 1 / cap .. cap ("icepop")."""
    weight, cap = _bounded_exp(log_weight), settings.sampler_cap
    if settings.sampler_correction == "tis":
        return jnp.minimum(weight, cap)
    return jnp.where((weight >= 1.0 / cap) & (weight <= cap), weight, 0.0)


def _kl_estimate(log_probs: jax.Array, reference_log_probs: jax.Array, kind: str) -> jax.Array:
    """Per-token estimates of KL(policy || reference) from its own samples (Schulman 2020)."""
    log_ratio = jnp.clip(reference_log_probs - log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return jnp.exp(log_ratio) - log_ratio - 1.0


def _aggregate(
    token_losses: jax.Array,
    mask: jax.Array,
    aggregation: str,
    max_tokens: int | None,
    divisors: Divisors | None,
) -> jax.Array:
    """One number from the losses of all tokens where mask is."""
    token_losses = jnp.where(mask, token_losses, 0.0)
    own_rows, own_tokens = len(mask), jnp.sum(mask).astype(token_losses.dtype)
    rows, tokens = (own_rows, own_tokens) if divisors is None else divisors
    rows = jnp.maximum(rows, 1.0)
    if aggregation == "sequence":
        row_sums = jnp.sum(token_losses, axis=1)
        return jnp.sum(row_sums / jnp.maximum(jnp.sum(mask, axis=1), 1.0)) / rows
    if aggregation == "token":
        return jnp.sum(token_losses) / jnp.maximum(tokens, 1.0)
    if aggregation == "token_local":
        return jnp.sum(token_losses) / jnp.maximum(own_tokens, 1.0) * (own_rows / rows)
    assert max_tokens is not None
    return jnp.sum(token_losses) / (rows * max_tokens)


def _clip_metrics(
    ratio: jax.Array,
    bounded: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    settings: PolicyLossConfig,
) -> dict[str, jax.Array]:
    """bool [R, N]: where each bound takes the gradient away; clip "cispo": where it cuts the weight."""
    low, high = 1.0 - settings.epsilon, 1.0 + settings.epsilon_high
    is_ppo = settings.clip == "ppo"
    never = jnp.zeros_like(mask)
    clips = {"clip_low": never, "clip_high": never}
    if is_ppo:
        clips["clip_low"] = (bounded < low) & (advantages < 0)
    if settings.clip != "none":
        clips["clip_high"] = (bounded > high) & (advantages > 0)
    clips["clip_region"] = clips["clip_low"] | clips["clip_high"]
    clips["clip_delta"] = never
    if settings.delta:
        # PPO clips a positive advantage at 1 + epsilon_high before this bound, which is higher, can act.
        is_above = ratio > settings.delta
        clips["clip_delta"] = is_above & (advantages < 0 if is_ppo else advantages != 0)
    return clips


# ---- Checks ----------------------------------------------------------------------------------------------


def _check(
    settings: PolicyLossConfig,
    reference_log_probs: jax.Array | None,
    sampler_log_probs: jax.Array | None,
    max_tokens: int | None,
) -> None:
    """Refuse unknown choices, and choices without the array that they need."""
    for name in _CHOICES:
        _require_one_of(name, getattr(settings, name), schema.choices(f"rl.{name}"))
    if settings.beta and reference_log_probs is None:
        raise ValueError("beta > 0 needs reference_log_probs")
    if settings.sampler_correction != "none" and sampler_log_probs is None:
        raise ValueError(
            f"sampler_correction={settings.sampler_correction!r} needs sampler_log_probs"
        )
    if settings.aggregation == "constant" and max_tokens is None:
        raise ValueError("aggregation='constant' needs max_tokens")


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
