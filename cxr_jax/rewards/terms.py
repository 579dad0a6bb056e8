"""Reward terms from parser outputs: of the answer, of the reasoning trace, of the length; and alarms for exploits.

The five terms of the reference recipe (accuracy, format, tag_count, accuracy_hard, overshort) are computed on
the device from token ids and equal Python's string semantics on every text. The trace is what stands before the first
<answer>; docs/report_parser.md says how it is read, docs/rewards.md what each term is worth against each exploit.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import answers, report_text
from cxr_jax.labels.answers import Parsed, TokenBytes
from cxr_jax.labels.automaton import Array
from cxr_jax.labels.phrase_bank import PhraseBank
from cxr_jax.labels.phrase_reading import Truth, to_bits, to_mask
from cxr_jax.labels.taxonomy import (
    BLANK_PRICE,
    CHEXPERT_14,
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    PARENTS,
    PATHOLOGY,
    POSITIVE,
    UNCERTAIN,
)

# ---- The terms and their weights -------------------------------------------------------------------------------------

TERMS = (
    "accuracy",
    "format",
    "tag_count",
    "accuracy_hard",
    "overshort",
    "invented",
    "no_finding_conflict",
    "overlong",
    "repetition",
    "trace_answer",
    "trace_findings",
    "trace_coverage",
    "trace_truth",
    "trace_false",
)
TRACE_TERMS = (
    "trace_answer",
    "trace_findings",
    "trace_coverage",
    "trace_truth",
    "trace_false",
    "repetition",
)
# The reference run's sum.
PUBLISHED = {"accuracy_hard": 1.0, "overshort": 1.0}
# Beyond it, the trace has to say what the answer says, and what is so.
CHECKED = {
    "accuracy_hard": 1.0,
    "trace_answer": 0.25,
    "trace_findings": 1.0,
    "trace_coverage": 0.1,
    "invented": -0.1,
    "no_finding_conflict": -0.25,
    "repetition": -0.5,
    "overshort": 1.0,
    "overlong": 1.0,
}
MIN_LENGTH = 400  # tokens, as in the reference run
NGRAM = 8  # tokens: shorter ones repeat in honest reports ("in the lower zone")
# Byte budget of the reward parser; a longer text is cut there and counted as overflow.
BYTES_PER_TOKEN = 12

# Quotients come from tables made on the host: compilers turn a division by a constant into a product with its
# rounded reciprocal, and some accelerators divide inexactly; either would differ from Python in the last bit.
_COUNTS = range(len(CHEXPERT_14) + 1)
_JACCARD = np.array(
    [[min(1.0, both / either) if either else 1.0 for either in _COUNTS] for both in _COUNTS],
    np.float32,
)

# The same by halves of the union: a label that is named where the truth is blank adds half a label to it.
_HALVES = round(1 / BLANK_PRICE)
_JACCARD_BY_HALVES = np.array(
    [
        [
            min(1.0, _HALVES * both / halves) if halves else 1.0
            for halves in range(_HALVES * len(CHEXPERT_14) + 1)
        ]
        for both in _COUNTS
    ],
    np.float32,
)

_NO_FINDING = np.arange(len(CHEXPERT_14)) == INDEX["No Finding"]
# int32 [14, 14]: is the label of the row a child of the label of the column?
_IS_PARENT = np.array(
    [[child in PARENTS.get(parent, ()) for parent in CHEXPERT_14] for child in CHEXPERT_14],
    np.int32,
)

# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_bytes(stream: Array, sizes: Array, bank: PhraseBank, truth: Truth | None = None) -> Parsed:
    """Parse completions in bytes: the answer, and the trace as a report.

    Args:
        stream: uint8 [B, L], UTF-8.
        sizes: int [B]: the first bytes of each row, which count.
        bank: the words of the trace.
        truth: what is so, to hold the trace against.

    Returns:
        What `answers.parse_bytes` gives, and under "trace" what `report_text.read_bytes` makes of the text before the
        answer, with the truth under "truth".
    """
    parsed = answers.parse_bytes(stream, sizes)
    trace = report_text.read_bytes(stream, parsed["trace_length"], bank, truth)
    if truth is not None:
        trace["truth"] = truth
    return parsed | {"trace": trace}


def read_tokens(
    tokens: Array,
    lengths: Array,
    table: TokenBytes,
    max_bytes: int,
    bank: PhraseBank,
    truth: Truth | None = None,
    opened: Array | None = None,
) -> Parsed:
    """Parse completions in tokens: `read_bytes` of what they decode to.

    Args:
        tokens: int [B, N].
        lengths: int [B]: the first tokens of each row, which count.
        table: the bytes of each id.
        max_bytes: static; what a text has beyond is not seen, and marked in "overflow".
        bank: the words of the trace.
        truth: what is so, to hold the trace against.
        opened: int [B, K], tokens that the prompt has said in the model's turn: part of the text, but in "repeated".

    Returns:
        What `read_bytes` gives, and "repeated" float32 [B], see `repeated`.
    """
    stream, sizes = answers.tokens_to_bytes(tokens, lengths, table, max_bytes, opened)
    parsed = read_bytes(stream, sizes, bank, truth)
    return parsed | {"repeated": repeated(tokens, lengths)}


# ---- Terms -----------------------------------------------------------------------------------------------------------


def reward_terms(
    parsed: Parsed,
    solution: Array,
    lengths: Array | None = None,
    *,
    known: Array | None = None,
    hedged: Array | None = None,
    min_length: int = MIN_LENGTH,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, jax.Array]:
    """Compute every term. Pure; runs inside jit.

      accuracy: |gold & answer| / (|gold | answer| + half of |blank & answer|); 1 if all are empty; 0 without an answer.
      format: 1 if the text is <think>..</think>, white space, <answer>..</answer>.
      tag_count: 0.25 for each of the four tags that occurs exactly once.
      accuracy_hard: accuracy * format * (tag_count == 1).
      overshort: 0 from min_length tokens on, else max(-1, (tokens - min_length) / min_length).
      invented: how many items of the answer are no label. A count: weigh it negatively.
      no_finding_conflict: 1 if No Finding stands beside a finding. Weigh it negatively.
      overlong: 0 up to max_length tokens, then down to -1 at the limit (DAPO's soft punishment, arXiv 2503.14476).
      repetition: share of the n-grams of tokens that stand there again. Weigh it negatively.
      trace_answer: |answer & supported| / |answer | affirmed|; 0 without an answer, or if the trace says nothing.
        Supported is what the trace affirms or hedges, and its parents.
      trace_findings: what the trace affirms against what is there, for certain: credits of the labels that are there /
        (how many they are + what is affirmed and not there + half of what is hedged and not there). Credit: 1 affirmed
        and, where the side is known, on just that side; 1/4 without a side or with one of two, -1/4 on a side where it
        is not; 1/2 hedged. What is blank in the truth counts as half not there. Needs a truth.
      trace_coverage: share of the 13 findings whose state is certain that the trace affirms or denies rightly.
      trace_truth: share of the trace's sentences with a claim that claim nothing false; 0 if none claims anything.
      trace_false: how many claim something false. A metric, as trace_truth: see docs/rewards.md.

    Args:
        parsed: from `read_tokens` or `read_bytes`, or from `answers.parse_bytes` to leave out the terms of the trace.
        solution: bool [B, 14].
        lengths: int [B], in tokens; without them overshort and overlong are left out.
        known: bool [B, 14]: labels that are not known (uncertain, blank) leave both the answer and the solution.
        hedged: bool [B, 14]: which of those that are not known may be there; the others are blank. Without it none is.
        min_length: tokens, see overshort.
        max_length, limit: tokens, see overlong, which is left out without one of them.

    Returns:
        Term -> float32 [B].

    Raises:
        UserError: for min_length < 1, or a limit not above max_length.
    """
    # Checked at trace time, so that a bad setting costs no step.
    if min_length < 1:
        raise UserError(f"min_length must be at least 1 token, got {min_length}")
    terms = _answer_terms(parsed, solution, known, hedged)
    if "trace" in parsed:  # not every caller has one
        terms |= _trace_terms(parsed)
    if "repeated" in parsed:
        terms["repetition"] = parsed["repeated"]
    if lengths is not None and max_length is not None and limit is not None:
        terms["overlong"] = _overlong(lengths, max_length, limit)
    if lengths is not None:
        terms["overshort"] = _overshort(lengths, min_length)
    return terms


def _answer_terms(
    parsed: Parsed, solution: Array, known: Array | None, hedged: Array | None
) -> dict[str, jax.Array]:
    # Labels that nobody knows leave both sides, so naming them neither helps nor harms.
    named = answer = parsed["answer"]
    if known is not None:
        answer, solution = answer & known, solution & known
    both = jnp.sum(answer & solution, axis=-1)
    either = jnp.sum(answer | solution, axis=-1)
    jaccard = jnp.asarray(_JACCARD)[both, either]
    if known is not None and hedged is not None:
        # But for what is blank: named for nothing, all 14 would be the best answer to a table with few negatives.
        halves = _HALVES * either + jnp.sum(named & ~known & ~hedged, axis=-1)
        jaccard = jnp.asarray(_JACCARD_BY_HALVES)[both, halves]
    # Without an answer element nothing was answered, which is not the same as an empty list.
    accuracy = jnp.where(parsed["has_answer"], jaccard, jnp.float32(0))
    has_format = parsed["format"].astype(jnp.float32)
    # Four tags that occur once are a tag_count of 1.
    tags_once = jnp.sum(parsed["tag_counts"] == 1, axis=-1)
    return {
        "accuracy": accuracy,
        "format": has_format,
        "tag_count": tags_once.astype(jnp.float32) * 0.25,
        "accuracy_hard": accuracy * has_format * (tags_once == 4),
        "invented": parsed["n_unknown"].astype(jnp.float32),
        "no_finding_conflict": parsed["no_finding_conflict"].astype(jnp.float32),
    }


def _overlong(lengths: Array, max_length: int, limit: int) -> jax.Array:
    if limit <= max_length:
        raise UserError(f"max_length must be below the limit of {limit} tokens, got {max_length}")
    # 0 at max_length, 1 at the limit.
    excess = (lengths - max_length) / jnp.float32(limit - max_length)
    return -jnp.clip(excess, 0, 1).astype(jnp.float32)


def _overshort(lengths: Array, min_length: int) -> jax.Array:
    # A table by length, as for the quotients above; lengths run from 0, so it never falls below -1.
    by_length = np.float32((np.arange(min_length + 1) - min_length) / min_length)
    return jnp.asarray(by_length)[jnp.clip(lengths, 0, min_length)]


def _trace_terms(parsed: Parsed) -> dict[str, jax.Array]:
    trace, answer = parsed["trace"], parsed["answer"]
    state = trace["state"]
    # No Finding is affirmed by the report's rule: nothing else is affirmed or hedged.
    affirmed = state == POSITIVE
    said = (affirmed | (state == UNCERTAIN)) & ~_NO_FINDING

    # trace_answer: does the trace support the answer?
    is_sound = ~jnp.any(affirmed & np.array(PATHOLOGY), axis=-1, keepdims=True)
    with_parents = said | (said.astype(jnp.int32) @ _IS_PARENT > 0)
    supported = jnp.where(_NO_FINDING, is_sound, with_parents)
    both = jnp.sum(answer & supported, axis=-1)
    either = jnp.sum(answer | affirmed, axis=-1)
    says_something = jnp.any(state != NOT_MENTIONED, axis=-1) | (trace["other"] != NOT_MENTIONED)
    jaccard = jnp.asarray(_JACCARD)[both, either]
    is_scored = parsed["has_answer"] & says_something
    terms = {"trace_answer": jnp.where(is_scored, jaccard, jnp.float32(0))}
    if "truth" not in trace:
        return terms

    # The others: is what the trace says so?
    # Float32 holds these counts exactly, so the share is that of whole numbers.
    claims, wrong = trace["claims"].astype(jnp.float32), trace["wrong"].astype(jnp.float32)
    return terms | {
        **_truth_terms(trace["truth"], trace, affirmed),
        "trace_truth": (claims - wrong) / jnp.maximum(claims, 1),
        "trace_false": wrong,
    }


def _truth_terms(truth: Truth, trace: Parsed, affirmed: jax.Array) -> dict[str, jax.Array]:
    """trace_findings and trace_coverage, float32 [B]."""
    present, absent = to_bits(truth.present), ~to_bits(truth.present | truth.hedged)
    hedged = (trace["state"] == UNCERTAIN) & ~_NO_FINDING

    # Credit for what is there: is it said on its side?
    right, left = to_bits(truth.sides >> 16), to_bits(truth.sides)
    side_known = right | left
    is_parent = np.any(_IS_PARENT, axis=0)  # named in summaries, and placed by its children
    same_sides = (trace["right"] == right) & (trace["left"] == left)
    placed = ~side_known | is_parent | same_sides
    elsewhere = (trace["right"] & ~right) | (trace["left"] & ~left)
    side_credit = jnp.where(placed, 1.0, jnp.where(elsewhere, -0.25, 0.25))
    # Half the credit of a finding that is affirmed: a hedge says less, and should earn less.
    hedge_credit = jnp.where(hedged, 0.5, 0.0)
    credit = jnp.where(affirmed, side_credit, hedge_credit)
    # What is claimed and is not there makes the total larger, half as much if hedged.
    false_weight = jnp.where(affirmed, 1.0, hedge_credit)
    earned = jnp.sum(jnp.where(present, credit, 0), axis=1)
    total = jnp.sum(present, axis=1) + jnp.sum(jnp.where(absent, false_weight, 0), axis=1)
    if truth.blank is not None:
        blank_weight = jnp.where(to_bits(truth.blank), BLANK_PRICE * false_weight, 0)
        total += jnp.sum(blank_weight, axis=1)
    # Nothing there and nothing claimed is as right as can be; half a blank hedge is the least total above zero.
    findings = jnp.where(total > 0, earned / jnp.maximum(total, 0.5 * BLANK_PRICE), 1.0)

    # Coverage: how much of what is certain is said at all, rightly?
    said_rightly = (present & affirmed) | (absent & (trace["state"] == NEGATIVE))
    is_certain = (present | absent) & ~_NO_FINDING
    covered = jnp.sum(said_rightly & is_certain, axis=1)
    certain = jnp.maximum(jnp.sum(is_certain, axis=1), 1).astype(jnp.float32)
    return {"trace_findings": findings.astype(jnp.float32), "trace_coverage": covered / certain}


def repeated(tokens: Array, lengths: Array, ngram: int = NGRAM) -> jax.Array:
    """Compute the share of n-grams that have stood there before. Exact: n-grams are sorted, not hashed.

    Args:
        tokens: int [B, N].
        lengths: int [B]: the first tokens of each row, which count.
        ngram: tokens of an n-gram.

    Returns:
        float32 [B]; 0 for a text with no n-gram.
    """
    # A window that slides over the tokens; a text shorter than one n-gram repeats nothing.
    width = tokens.shape[1] - ngram + 1
    if width < 1:
        return jnp.zeros(tokens.shape[0], jnp.float32)
    counts = jnp.maximum(lengths - ngram + 1, 0)
    inside = jnp.arange(width) < counts[:, None]
    # Sort n-grams by all their tokens; equal ones are neighbours then. Those past the end are -1, and sort first.
    keys = jax.lax.sort(
        [jnp.where(inside, tokens[:, start : width + start], -1) for start in range(ngram)],
        dimension=1,
        num_keys=ngram,
    )
    # Equal in all tokens to the neighbour before: that one stood there already.
    same = functools.reduce(jnp.logical_and, [key[:, 1:] == key[:, :-1] for key in keys])
    same &= keys[0][:, 1:] >= 0
    return jnp.sum(same, axis=1) / jnp.maximum(counts, 1).astype(jnp.float32)


# ---- Sums and alarms -------------------------------------------------------------------------------------------------


def weights(chosen: Mapping[str, float]) -> dict[str, float]:
    """Give a weight to every term, 0 to those not chosen: what a config holds, so that each can be set by a flag."""
    return {term: float(chosen.get(term, 0.0)) for term in TERMS}


def combine(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum the named terms with their weights, [B].

    Raises:
        UserError: at trace time, for no weights or an unknown term.
    """
    if not weights:
        raise UserError(f"no reward terms are weighted; choose from {', '.join(sorted(terms))}")
    for name in weights:
        if name not in terms:
            raise UserError(f"unknown reward term {name!r}; choose from {', '.join(sorted(terms))}")
    # In the order of the names: a sum of floats depends on its order.
    total: Any = sum(terms[name] * jnp.float32(weight) for name, weight in sorted(weights.items()))
    return total


def modal_share(answers: Array) -> jax.Array:
    """Compute the share of rows of bool [N, 14] that are the most frequent row.

    1 for a policy that always says the same.
    """
    # Each row as one number, so that equal rows are equal numbers, and neighbours once sorted.
    codes = jnp.sort(to_mask(answers))
    stop = jnp.searchsorted(codes, codes, side="right")
    start = jnp.searchsorted(codes, codes, side="left")
    return jnp.max(stop - start) / codes.shape[0]
