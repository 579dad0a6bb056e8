"""Reward terms of texts, as a caller has them: strings in, one number a text and term out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import phrase_reading
from cxr_jax.labels.answers import Parsed
from cxr_jax.labels.phrase_bank import PhraseBank, device_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, find_label
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.rewards.terms import MIN_LENGTH, NGRAM, read_bytes, reward_terms


def score(
    texts: Sequence[str],
    solutions: Sequence[str | Sequence[str]],
    lengths: Sequence[int] | None = None,
    min_length: int = MIN_LENGTH,
    max_length: int | None = None,
    limit: int | None = None,
    opened: str = "",
) -> dict[str, np.ndarray]:
    """Compute the terms of `reward_terms` for Python strings.

    Args:
        texts: N completions.
        solutions: comma-separated labels, or lists of labels; names that are none of the 14 are dropped, as in the
            reference. The trace is held against them, without sides.
        lengths: completion tokens, whole numbers; without them there is no "overshort", and no "overlong" without
            max_length and limit.
        min_length: tokens, as in `reward_terms`.
        max_length: tokens, as in `reward_terms`.
        limit: tokens, as in `reward_terms`.
        opened: what the chat template has said before every text (`<think>` and a line end), if the texts come from a
            program that leaves it out; those of `Model.generate` have it.

    Returns:
        Term -> np.float32 [N]. "repetition" is that of words.

    Raises:
        UserError: if the numbers of rows differ, or lengths are no whole numbers.
    """
    # A str is a sequence of texts of one letter, and would be scored as such.
    if isinstance(texts, str) or isinstance(solutions, str):
        raise UserError("score: expected lists of texts and of solutions, not one str")
    if len(texts) != len(solutions) or (lengths is not None and len(lengths) != len(texts)):
        counts = f"{len(texts)} texts, {len(solutions)} solutions"
        if lengths is not None:
            counts += f", {len(lengths)} lengths"
        raise UserError(f"score: {counts}")
    # Lengths are checked before anything is compiled.
    tokens = None if lengths is None else jnp.asarray(_check_lengths(lengths))

    # The same mask serves as solution and as truth of the trace.
    mask = solution_mask(solutions)
    bank = device_phrase_bank()
    parsed = map_texts(
        lambda stream, sizes, solution: _read_for_score(stream, sizes, solution, bank),
        [opened + text for text in texts] if opened else texts,
        mask,
    )
    terms: dict[str, Any] = reward_terms(
        parsed, mask, tokens, min_length=min_length, max_length=max_length, limit=limit
    )
    terms["repetition"] = _repeated_words(texts)
    return {name: np.asarray(value, np.float32) for name, value in terms.items()}


def _check_lengths(lengths: Sequence[int]) -> np.ndarray:
    """int32 [N]; UserError for what is no whole number of tokens."""
    tokens = np.asarray(lengths)
    is_whole = tokens.ndim == 1 and tokens.dtype.kind in "iu"
    if not is_whole or not ((tokens >= 0) & (tokens < 2**31)).all():
        raise UserError(
            "score: lengths are not whole numbers of tokens, from 0 to 2^31 - 1, one a text"
        )
    return tokens.astype(np.int32)


@jax.jit
def _read_for_score(
    stream: jax.Array, sizes: jax.Array, solution: jax.Array, bank: PhraseBank
) -> Parsed:
    """`read_bytes` with a solution of which no side is known."""
    # A solution names labels only: a trace is right on whichever side it says.
    no_sides = jnp.zeros((*solution.shape, 2), bool)
    truth = phrase_reading.Truth.from_arrays(solution, jnp.zeros_like(solution), no_sides)
    return read_bytes(stream, sizes, bank, truth)


def _repeated_words(texts: Sequence[str]) -> np.ndarray:
    """`repeated` of the words of texts, on the host."""
    shares = np.zeros(len(texts), np.float32)
    for row, text in enumerate(texts):
        # Texts come without a tokenizer, so words stand in for tokens.
        words = text.split()
        # Sets count what is new: the rest stood there before, as in `repeated`.
        ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
        shares[row] = (len(ngrams) - len(set(ngrams))) / max(len(ngrams), 1)
    return shares


def solution_mask(solutions: Sequence[str | Sequence[str]]) -> np.ndarray:
    """Read comma-separated solutions as the reference does: bool [N, 14], unknown names are dropped.

    A list of names is read as the same names with commas between them, as in rows.

    Raises:
        UserError: for a solution that is neither.
    """
    # A name that is no label is dropped here, and counts as invented in answers only.
    mask = np.zeros((len(solutions), len(CHEXPERT_14)), bool)
    for number, (row, solution) in enumerate(zip(mask, solutions, strict=True), 1):
        if isinstance(solution, (list, tuple)) and all(isinstance(name, str) for name in solution):
            solution = ",".join(solution)
        if not isinstance(solution, str):
            raise UserError(f"score: solution {number} is neither a text nor a list of names")
        # As the reference reads an answer: split at commas, strip, lower.
        for item in solution.split(","):
            label = find_label(item)
            if label is not None:
                row[INDEX[label]] = True
    return mask
