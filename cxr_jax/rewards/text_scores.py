"""Reward terms of texts, as a caller has them: strings in, one number a text and term out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import report_text
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, find_label
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.rewards.terms import MIN_LENGTH, NGRAM, read_bytes, reward_terms


def score(
    texts: Sequence[str],
    solutions: Sequence[str],
    lengths: Sequence[int] | None = None,
    min_length: int = MIN_LENGTH,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """The terms of `reward_terms` for Python strings, as np.float32 [N].

    solutions: comma-separated labels; names that are none of the 14 are dropped, as in the reference. The trace is held
    against them, without sides. lengths: completion tokens, whole numbers; without them there is no "overshort", and no
    "overlong" without max_length and limit. "repetition" is that of words. Raises UserError if the numbers of rows
    differ.
    """
    if isinstance(texts, str) or isinstance(solutions, str):
        raise UserError("score: expected lists of texts and of solutions, not one str")
    if len(texts) != len(solutions) or (lengths is not None and len(lengths) != len(texts)):
        counts = f"{len(texts)} texts, {len(solutions)} solutions"
        raise UserError(
            f"score: {counts}" + (f", {len(lengths)} lengths" if lengths is not None else "")
        )
    if lengths is not None:
        lengths = np.asarray(lengths)
        if (
            lengths.ndim != 1
            or lengths.dtype.kind not in "iu"
            or not ((lengths >= 0) & (lengths < 2**31)).all()
        ):
            raise UserError(
                "score: lengths are not whole numbers of tokens, from 0 to 2^31 - 1, one a text"
            )
    mask = solution_mask(solutions)
    bank = jax.device_put(load_phrase_bank())
    parsed = map_texts(
        lambda stream, sizes, solution: _read_for_score(stream, sizes, solution, bank), texts, mask
    )
    tokens = None if lengths is None else jnp.asarray(np.asarray(lengths, np.int32))
    longest = dict(max_length=max_length, limit=limit)
    terms = reward_terms(parsed, mask, tokens, min_length=min_length, **longest)
    terms["repetition"] = _repeated_words(texts)
    return {name: np.asarray(value, np.float32) for name, value in terms.items()}


@jax.jit
def _read_for_score(stream, sizes, solution, bank):
    """`read_bytes` with a solution of which no side is known."""
    truth = report_text.Truth.from_arrays(
        solution, jnp.zeros_like(solution), jnp.zeros((*solution.shape, 2), bool)
    )
    return read_bytes(stream, sizes, bank, truth)


def _repeated_words(texts: Sequence[str], n: int = NGRAM) -> np.ndarray:
    """`repeated` of the words of texts, on the host."""
    shares = np.zeros(len(texts), np.float32)
    for i, text in enumerate(texts):
        words = text.split()
        grams = [tuple(words[j : j + n]) for j in range(len(words) - n + 1)]
        shares[i] = (len(grams) - len(set(grams))) / max(len(grams), 1)
    return shares


def solution_mask(solutions: Sequence[str]) -> np.ndarray:
    """bool [N, 14] of comma-separated solutions, read as the reference does: unknown names are dropped."""
    mask = np.zeros((len(solutions), len(CHEXPERT_14)), bool)
    for row, solution in zip(mask, solutions, strict=True):
        for item in solution.split(","):
            label = find_label(item)
            if label is not None:
                row[INDEX[label]] = True
    return mask
