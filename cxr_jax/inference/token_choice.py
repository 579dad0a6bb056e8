"""One token a row from logits: the whole choice, so that the decode loop is about rows and caches only."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from cxr_jax.models.attention import NEG


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How one token is drawn, as far as it makes another program; hashable, so static under jit."""

    greedy: bool
    stop_ids: tuple[int, ...]
    suppress_ids: tuple[int, ...]
    dtype: DTypeLike  # of the computation


class Distribution(NamedTuple):
    """What a token is drawn from, as far as one program serves all values. Ints and floats are part of the program,
    arrays are not."""

    temperature: Any  # float32
    top_k: Any = None  # int, int32 array, or None for all tokens
    top_p: Any = None  # float, float32 array, or None for all tokens


def keep_top_k(logits: jax.Array, count: int | jax.Array) -> jax.Array:
    """Rule out all but the `count` largest logits of each row. A traced int32 makes one program for any count."""
    # A number known now needs no sort of the whole vocabulary; one that is data does.
    if isinstance(count, int):
        smallest = jax.lax.top_k(logits, count)[0][..., -1:]
    else:
        ordered = jnp.sort(logits, -1, descending=True)
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


def pick(
    logits: jax.Array,
    keys: jax.Array,
    step: ArrayLike,
    *,
    temperature: ArrayLike,
    greedy: bool,
    top_k: int | jax.Array | None,
    top_p: float | jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row from float32 logits [R, V].

    Returns:
        token int32 [R], and its log-probability float32 [R] under the distribution before top_k and top_p, at the
        given temperature.
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
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = jax.vmap(
            # The noise of a row follows from its own key and the step alone.
            lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:])
        )(keys)
        token = jnp.argmax(kept + noise, -1)
    # Of `scaled`: what top_k and top_p cut off still counts in the log-probability.
    chosen = jnp.take_along_axis(scaled, token[:, None], -1, mode="clip")[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, -1)
