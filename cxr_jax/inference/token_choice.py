"""One token a row from logits: the whole choice, so that the decode loop is about rows and caches only; and
which branches of a tree of tokens are kept."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from cxr_jax.models.attention import NEG
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import Array


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How one token is drawn, as far as it makes another program; hashable, so static under jit."""

    greedy: bool
    stop_ids: tuple[int, ...]
    suppress_ids: tuple[int, ...]
    dtype: DTypeLike  # of the computation
    logs_kept: bool = False  # log-probs are of what is left to draw from, not of all tokens


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn by `generate`.

    Attributes:
        n: completions of each prompt.
        temperature: 0 is greedy. May be a traced array; greedy is then left out.
        stop_ids: tokens that end a completion; None: the config's.
        suppress_ids: tokens that are never drawn; None: the config's media tokens.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the smallest set of tokens of probability >= p only.
        min_p: draw from tokens at least so many times as likely as the likeliest only.
        repetition_penalty: of tokens that are in the prompt or were drawn, see `token_choice.penalize_repeats`.
        logs_kept: log-probs are of the distribution that tokens are drawn from, after all of these.
        prompts_kept: the computed prompts come back, too, for what reads on from them.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float | jax.Array = 1.0
    stop_ids: Iterable[int] | None = None
    suppress_ids: Iterable[int] | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logs_kept: bool = False
    prompts_kept: bool = False

    def of_a_step(self, model_config: Config, *, greedy: bool, dtype: DTypeLike) -> StepSettings:
        """Give what one step of the loop needs of them; ids that are None are the config's."""
        return StepSettings(
            greedy=greedy,
            stop_ids=_ids(self.stop_ids, model_config.eos_token_id),
            suppress_ids=_ids(self.suppress_ids, model_config.media_token_ids),
            dtype=dtype,
            logs_kept=self.logs_kept,
        )


def _ids(given: Iterable[int] | None, default: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(token) for token in (default if given is None else given))


class Distribution(NamedTuple):
    """What a token is drawn from, as far as one program serves all values. Ints and floats are part of the program,
    arrays are not."""

    temperature: Any  # float32
    top_k: Any = None  # int, int32 array, or None for all tokens
    top_p: Any = None  # float, float32 array, or None for all tokens
    min_p: Any = None  # float, float32 array, or None for all tokens


class RowChoice(NamedTuple):
    """How each of R rows draws its tokens, all of it data: one program serves rows of all settings side by side."""

    temperature: Any  # float32 [R]: 0 is greedy
    top_k: Any  # int32 [R]: the vocabulary's size for all tokens
    top_p: Any  # float32 [R]: above 1 for all tokens


def keep_top_k(logits: jax.Array, count: int | jax.Array) -> jax.Array:
    """Rule out all but the `count` largest logits of each row. A traced int32, or int32 [R], makes one program for
    any count."""
    # A number known now needs no sort of the whole vocabulary; one that is data does.
    if isinstance(count, int):
        smallest = jax.lax.top_k(logits, min(count, logits.shape[-1]))[0][..., -1:]
    else:
        ordered = jnp.sort(logits, -1, descending=True)
        if count.ndim:
            smallest = jnp.take_along_axis(ordered, count[:, None] - 1, -1, mode="clip")
        else:
            smallest = jax.lax.dynamic_index_in_dim(ordered, count - 1, -1)
    # Equal logits at the border all stay: which of them is meant nobody can say.
    return jnp.where(logits < smallest, NEG, logits)


def keep_top_p(logits: jax.Array, mass: float | jax.Array) -> jax.Array:
    """Rule out everything outside the smallest set of probability >= mass; the largest logit stays."""
    ordered = jnp.sort(logits, -1, descending=True)
    probabilities = jax.nn.softmax(ordered, -1)
    # Up to, and not including, the token itself: so the first is always inside.
    inside = jnp.cumsum(probabilities, -1) - probabilities < mass
    # As a threshold on logits, which saves the way back from sorted places.
    smallest = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < smallest, NEG, logits)


def keep_min_p(logits: jax.Array, share: float | jax.Array) -> jax.Array:
    """Rule out tokens less likely than `share` of the likeliest one of their row (arXiv 2407.01082)."""
    smallest = jnp.max(logits, -1, keepdims=True) + jnp.log(share)
    return jnp.where(logits < smallest, NEG, logits)


def penalize_repeats(
    logits: jax.Array, is_seen: jax.Array, penalty: float | jax.Array
) -> jax.Array:
    """Make tokens that were seen less likely, as transformers does: logits above 0 are divided, others multiplied.

    Args:
        logits: [R, V], before the temperature.
        is_seen: bool [R, V]: in the prompt, or drawn before (CTRL, arXiv 1909.05858, section 4.1).
        penalty: above 1; below it, repeats are made likelier.
    """
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(is_seen, penalized, logits)


def tokens_in(ids: Array, lengths: Array, vocab_size: int) -> jax.Array:
    """Mark which tokens are in each row of ids [B, T], the first `lengths` of them: bool [B, V]."""
    is_text = jnp.arange(ids.shape[1]) < lengths[:, None]
    none = jnp.zeros((len(ids), vocab_size), bool)
    return none.at[jnp.arange(len(ids))[:, None], ids].max(is_text)


def mark_seen(is_seen: jax.Array | None, token: jax.Array) -> jax.Array | None:
    """Mark one more token int32 [R] of each row in bool [R, V]; None stays None."""
    if is_seen is None:
        return None
    return is_seen.at[jnp.arange(len(token)), token].set(True)


def pick(
    logits: jax.Array,
    keys: jax.Array,
    step: ArrayLike,
    *,
    temperature: ArrayLike,
    greedy: bool,
    top_k: int | jax.Array | None,
    top_p: float | jax.Array | None,
    min_p: float | jax.Array | None = None,
    logs_kept: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row from float32 logits [R, V].

    Args:
        logs_kept: give log-probabilities of what top_k, top_p and min_p leave.

    Returns:
        token int32 [R], and its log-probability float32 [R] at the given temperature, under the distribution before
        top_k, top_p and min_p; or after them (`logs_kept`).
    """
    if greedy:
        token = jnp.argmax(logits, -1)
        scaled = logits
    else:
        # Scaled first: top_p counts probabilities at the temperature.
        scaled = logits / temperature
        kept = scaled
        if top_k is not None:
            kept = keep_top_k(kept, top_k)
        if top_p is not None:
            kept = keep_top_p(kept, top_p)
        if min_p is not None:
            kept = keep_min_p(kept, min_p)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = jax.vmap(
            # The noise of a row follows from its own key and the step alone.
            lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:])
        )(keys)
        token = jnp.argmax(kept + noise, -1)
        # Else what was cut off still counts in the log-probability.
        scaled = kept if logs_kept else scaled
    return _with_logprob(scaled, token)


def _with_logprob(scaled: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    chosen = jnp.take_along_axis(scaled, token[:, None], -1, mode="clip")[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, -1)


def choose(
    logits: jax.Array,
    keys: jax.Array,
    steps: jax.Array,
    distribution: Distribution | RowChoice,
    settings: StepSettings,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row with its log-probability: `pick`, or `pick_by_row` for settings of each row's own.

    Args:
        steps: int32, or int32 [R]: tokens of each row so far.
    """
    if isinstance(distribution, RowChoice):
        return pick_by_row(logits, keys, steps, distribution)
    is_greedy, logs_kept = settings.greedy, settings.logs_kept
    return pick(
        logits, keys, steps, greedy=is_greedy, logs_kept=logs_kept, **distribution._asdict()
    )


def pick_by_row(
    logits: jax.Array, keys: jax.Array, steps: jax.Array, choice: RowChoice
) -> tuple[jax.Array, jax.Array]:
    """`pick` where every row has settings of its own: the same token and log-probability as with these alone.

    Args:
        steps: int32 [R], of each row.
    """
    is_drawn = choice.temperature > 0
    # Divided by 1, a greedy row's logits stay as they are, to the last bit.
    scaled = logits / jnp.where(is_drawn, choice.temperature, 1)[:, None]

    def cut(scaled: jax.Array) -> jax.Array:
        kept = keep_top_k(scaled, choice.top_k)
        return keep_top_p(kept, choice.top_p[:, None])

    def draw(scaled: jax.Array) -> jax.Array:
        # Two sorts of the vocabulary, which most batches do not ask for.
        are_cut = is_drawn & ((choice.top_k < logits.shape[-1]) | (choice.top_p <= 1))
        kept = jax.lax.cond(are_cut.any(), cut, lambda scaled: scaled, scaled)
        noise = jax.vmap(
            lambda key, step: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:])
        )(keys, steps)
        return jnp.argmax(kept + jnp.where(is_drawn[:, None], noise, 0), -1)

    def choose_largest(scaled: jax.Array) -> jax.Array:
        return jnp.argmax(scaled, -1)

    # Without noise where nobody wants it: on a CPU it costs as much as a layer.
    token = jax.lax.cond(is_drawn.any(), draw, choose_largest, scaled)
    return _with_logprob(scaled, token)


# ---- Branches of a tree of tokens --------------------------------------------------------------------------


def softmax_of(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    """Compute the softmax over the last axis of the entries that are allowed; all zero if there are none."""
    scores = jnp.where(allowed, scores, NEG)
    exponentials = jnp.where(allowed, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    return exponentials / jnp.maximum(exponentials.sum(-1, keepdims=True), 1e-30)


def resample(
    weights: jax.Array, width: int, uniform: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keep at most `width` of the weights of each row, unbiased.

    A weight of at least c is kept as it is, a smaller one becomes c with probability w / c, else 0; c is such that
    the sum stays the same.

    Args:
        weights: float32 [R, K], K >= width.
        uniform: float32 [R], uniform in [0, 1): one draw a row (systematic).

    Returns:
        (index [R, W], weight [R, W], whether the weight was kept as it is [R, W]).
    """
    # ---- The threshold c: the first at which what is smaller shares the places that are left ----
    # The `width` largest are all that can be kept.
    ordered = jnp.sort(weights, -1, descending=True)[:, :width]
    remainder = weights.sum(-1, keepdims=True) - jnp.cumsum(ordered, -1) + ordered
    remainder = jnp.maximum(remainder, ordered)
    thresholds = remainder / (width - jnp.arange(width))
    first_small = jnp.argmax(ordered <= thresholds, -1)[:, None]
    threshold = jnp.take_along_axis(thresholds, first_small, -1)
    # Few enough weights are all kept, exactly, whatever the rounding.
    are_few = (weights > 0).sum(-1, keepdims=True) <= width
    threshold = jnp.where(are_few, 0, threshold)
    is_kept = weights >= threshold

    # ---- One draw decides for all smaller weights: each takes its share of a line, cut at 1 - u, 2 - u, .. ----
    shares = jnp.where(is_kept, 0, weights / jnp.maximum(threshold, 1e-37))
    cut_line = jnp.cumsum(shares, -1)
    # Its length is a whole number, but for rounding: made one, or a survivor may go missing.
    line_length = cut_line[:, -1:]
    cut_line = jnp.floor(
        cut_line * (jnp.round(line_length) / jnp.maximum(line_length, 0.5)) + uniform[:, None]
    )
    is_drawn = jnp.diff(cut_line, axis=-1, prepend=0) >= 1
    drawn = jnp.where(is_drawn, threshold, 0)
    weight, index = jax.lax.top_k(jnp.where(is_kept, weights, drawn), width)
    return index, weight, jnp.take_along_axis(is_kept, index, 1)
