"""Reward terms from parser outputs, and the baselines every reward is read against.

The five terms of the reference recipe (accuracy, format, tag_count, accuracy_hard, overshort) are computed on
the device from token ids and equal Python's string semantics on every text.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import parser
from cxr_jax.labels.taxonomy import CHEXPERT_14

TERMS = (
    "accuracy",
    "format",
    "tag_count",
    "accuracy_hard",
    "overshort",
    "invented",
    "no_finding_conflict",
)
MIN_LENGTH = 400  # tokens, as in the reference run

# Quotients come from tables made on the host: compilers turn a division by a constant into a product with its
# rounded reciprocal, and some accelerators divide inexactly; either would differ from Python in the last bit.
_JACCARD = np.array([[min(1.0, i / u) if u else 1.0 for u in range(15)] for i in range(15)], np.float32)

_LOWER = {name.lower(): i for i, name in enumerate(CHEXPERT_14)}


def reward_terms(
    parsed: parser.Parsed, solution, lengths=None, *, min_length: int = MIN_LENGTH
) -> dict[str, jax.Array]:
    """Every term as float32 [B]. Pure; runs inside jit.

    parsed: from `parse_tokens` or `parse_bytes`; solution bool [B, 14]; lengths int [B] in tokens, or None to
    leave out overshort.
      accuracy: |gold & answer| / |gold | answer|; 1 if both are empty; 0 without an answer element.
      format: 1 if the text is <think>..</think>, white space, <answer>..</answer>.
      tag_count: 0.25 for each of the four tags that occurs exactly once.
      accuracy_hard: accuracy * format * (tag_count == 1).
      overshort: 0 from min_length tokens on, else max(-1, (tokens - min_length) / min_length).
      invented: how many items of the answer are no label. A count: weigh it negatively.
      no_finding_conflict: 1 if No Finding stands beside a finding. Weigh it negatively.
    Raises UserError for min_length < 1.
    """
    if min_length < 1:
        raise UserError(f"min_length must be at least 1 token, got {min_length}")
    f32 = jnp.float32
    answer = parsed["answer"]
    both = jnp.sum(answer & solution, axis=-1)
    either = jnp.sum(answer | solution, axis=-1)
    accuracy = jnp.where(parsed["has_answer"], jnp.asarray(_JACCARD)[both, either], f32(0))
    once = jnp.sum(parsed["tag_counts"] == 1, axis=-1)
    form = parsed["format"].astype(f32)
    terms = {
        "accuracy": accuracy,
        "format": form,
        "tag_count": once.astype(f32) * 0.25,
        "accuracy_hard": accuracy * form * (once == 4),
        "invented": parsed["n_unknown"].astype(f32),
        "no_finding_conflict": parsed["no_finding_conflict"].astype(f32),
    }
    if lengths is not None:
        short = np.float32((np.arange(min_length + 1) - min_length) / min_length)
        terms["overshort"] = jnp.asarray(short)[jnp.clip(lengths, 0, min_length)]
    return terms


def combine(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The weighted sum of the named terms, [B]. Raises UserError, at trace time, for an unknown term."""
    if not weights:
        raise UserError(f"no reward terms are weighted; choose from {', '.join(sorted(terms))}")
    for name in weights:
        if name not in terms:
            raise UserError(f"unknown reward term {name!r}; choose from {', '.join(sorted(terms))}")
    return sum(terms[name] * jnp.float32(weight) for name, weight in sorted(weights.items()))


def score(
    texts: Sequence[str],
    solutions: Sequence[str],
    lengths: Sequence[int] | None = None,
    min_length: int = MIN_LENGTH,
) -> dict[str, np.ndarray]:
    """The terms of `reward_terms` for Python strings, as np.float32 [N].

    solutions: comma-separated labels; names that are none of the 14 are dropped, as in the reference.
    lengths: completion tokens; without it there is no "overshort". Raises UserError if the numbers of rows
    differ.
    """
    if len(texts) != len(solutions) or (lengths is not None and len(lengths) != len(texts)):
        counts = f"{len(texts)} texts, {len(solutions)} solutions"
        raise UserError(f"score: {counts}" + (f", {len(lengths)} lengths" if lengths is not None else ""))
    tokens = None if lengths is None else jnp.asarray(np.asarray(lengths, np.int32))
    terms = reward_terms(parser.parse_texts(texts), solution_mask(solutions), tokens, min_length=min_length)
    return {name: np.asarray(value, np.float32) for name, value in terms.items()}


def solution_mask(solutions: Sequence[str]) -> np.ndarray:
    """bool [N, 14] of comma-separated solutions, read as the reference does: unknown names are dropped."""
    mask = np.zeros((len(solutions), len(CHEXPERT_14)), bool)
    for row, solution in zip(mask, solutions, strict=True):
        for item in solution.split(","):
            index = _LOWER.get(item.strip().lower())
            if index is not None:
                row[index] = True
    return mask


def strict_solution_mask(solutions: Sequence[str]) -> np.ndarray:
    """`solution_mask`, but a name that is none of the 14 (an empty one too) raises UserError naming it."""
    for number, solution in enumerate(solutions):
        for item in solution.split(","):
            if item.strip().lower() not in _LOWER:
                raise UserError(f"solution {number}: {item.strip()!r} is none of the 14 labels")
    return solution_mask(solutions)
