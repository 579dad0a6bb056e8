"""Reward terms from parser outputs: of the answer, of the reasoning trace, of the length; and alarms for exploits.

The five terms of the reference recipe (accuracy, format, tag_count, accuracy_hard, overshort) are computed on
the device from token ids and equal Python's string semantics on every text. The trace is what stands before the first
<answer>; docs/report_parser.md says how it is read, docs/rewards.md what each term is worth against each exploit.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels import answers as labels_answers
from cxr_jax.labels import report_text
from cxr_jax.labels.phrase_bank import PhraseBank
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, NOT_MENTIONED, PARENTS, PATHOLOGY

TRACE_TERMS = (
    "trace_answer",
    "trace_findings",
    "trace_coverage",
    "trace_truth",
    "trace_false",
    "repetition",
)
BYTES_PER_TOKEN = (
    12  # byte budget of the reward parser; a longer text is cut there and counted as overflow
)


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
PUBLISHED = {"accuracy_hard": 1.0, "overshort": 1.0}  # the reference run's sum
CHECKED = {  # the trace has to say what the answer says, and what is so
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

# Quotients come from tables made on the host: compilers turn a division by a constant into a product with its
# rounded reciprocal, and some accelerators divide inexactly; either would differ from Python in the last bit.
_JACCARD = np.array(
    [[min(1.0, i / u) if u else 1.0 for u in range(15)] for i in range(15)], np.float32
)


def read_bytes(
    stream, sizes, bank: PhraseBank, truth: report_text.Truth | None = None
) -> labels_answers.Parsed:
    """`parser.parse_bytes`, and under "trace" what `labels.reports.read_bytes` makes of the text before the answer."""
    parsed = labels_answers.parse_bytes(stream, sizes)
    trace = report_text.read_bytes(stream, parsed["trace_length"], bank, truth)
    return parsed | {"trace": trace if truth is None else trace | {"truth": truth}}


def read_tokens(
    tokens, lengths, table: labels_answers.TokenBytes, max_bytes: int, bank, truth=None
) -> labels_answers.Parsed:
    """`read_bytes` of the decoded tokens int [B, N], of which the first lengths [B] count, and "repeated" float32 [B],
    see `repeated`. max_bytes is static."""
    parsed = read_bytes(
        *labels_answers.tokens_to_bytes(tokens, lengths, table, max_bytes), bank, truth
    )
    return parsed | {"repeated": repeated(tokens, lengths)}


def reward_terms(
    parsed: labels_answers.Parsed,
    solution,
    lengths=None,
    *,
    known=None,
    min_length: int = MIN_LENGTH,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, jax.Array]:
    """Every term as float32 [B]. Pure; runs inside jit.

    parsed: from `read_tokens` or `read_bytes`, or from `parser.parse_bytes` to leave out the terms of the trace;
    solution bool [B, 14]; lengths int [B] in tokens, or None to leave out overshort and overlong; known bool [B, 14]:
    labels that are not known (uncertain and blank ones of a manifest) are neither right nor wrong in an answer, so they
    leave it and the solution; max_length, limit: tokens, see overlong, which is left out without them.
      accuracy: |gold & answer| / |gold | answer|; 1 if both are empty; 0 without an answer element.
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
        is not; 1/2 hedged. Needs a truth.
      trace_coverage: share of the 13 findings whose state is certain that the trace affirms or denies rightly.
      trace_truth: share of the trace's sentences with a claim that claim nothing false; 0 if none claims anything.
      trace_false: how many claim something false. A metric, as trace_truth: see docs/rewards.md.
    Raises UserError for min_length < 1, or a limit not above max_length.
    """
    if min_length < 1:
        raise UserError(f"min_length must be at least 1 token, got {min_length}")
    f32 = jnp.float32
    answer = parsed["answer"]
    if known is not None:
        answer, solution = answer & known, solution & known
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
    if "trace" in parsed:
        terms |= _trace_terms(parsed)
    if "repeated" in parsed:
        terms["repetition"] = parsed["repeated"]
    if lengths is not None and max_length is not None and limit is not None:
        if limit <= max_length:
            raise UserError(
                f"max_length must be below the limit of {limit} tokens, got {max_length}"
            )
        terms["overlong"] = -jnp.clip(
            (lengths - max_length) / f32(limit - max_length), 0, 1
        ).astype(f32)
    if lengths is not None:
        short = np.float32((np.arange(min_length + 1) - min_length) / min_length)
        terms["overshort"] = jnp.asarray(short)[jnp.clip(lengths, 0, min_length)]
    return terms


_NO_FINDING = np.arange(len(CHEXPERT_14)) == INDEX["No Finding"]
_IS_PARENT = np.array(
    [[c in PARENTS.get(p, ()) for p in CHEXPERT_14] for c in CHEXPERT_14], np.int32
)


def _trace_terms(parsed) -> dict[str, jax.Array]:
    trace, answer = parsed["trace"], parsed["answer"]
    state, f32 = trace["state"], jnp.float32
    affirmed = (
        state == 1
    )  # No Finding is affirmed by the report's rule: nothing else is affirmed or hedged
    said = (affirmed | (state == -1)) & ~_NO_FINDING
    sound = ~jnp.any(affirmed & np.array(PATHOLOGY), axis=-1, keepdims=True)
    supported = jnp.where(_NO_FINDING, sound, said | (said.astype(jnp.int32) @ _IS_PARENT > 0))
    both, either = jnp.sum(answer & supported, axis=-1), jnp.sum(answer | affirmed, axis=-1)
    speaks = jnp.any(state != NOT_MENTIONED, axis=-1) | (trace["other"] != NOT_MENTIONED)
    terms = {
        "trace_answer": jnp.where(
            parsed["has_answer"] & speaks, jnp.asarray(_JACCARD)[both, either], f32(0)
        )
    }
    if "truth" in trace:
        terms |= _against(trace["truth"], trace, affirmed)
        claims, wrong = trace["claims"].astype(f32), trace["wrong"].astype(f32)
        terms |= {"trace_truth": (claims - wrong) / jnp.maximum(claims, 1), "trace_false": wrong}
    return terms


def _against(truth: report_text.Truth, trace, affirmed) -> dict[str, jax.Array]:
    """trace_findings and trace_coverage, float32 [B]."""
    bits = report_text.to_bits
    present, absent = bits(truth.present), ~bits(truth.present | truth.hedged)
    right, left = bits(truth.sides >> 16), bits(truth.sides)
    # A parent is named in summaries, and placed by its children.
    placed = (
        ~(right | left)
        | np.any(_IS_PARENT, axis=0)
        | ((trace["right"] == right) & (trace["left"] == left))
    )
    elsewhere = (trace["right"] & ~right) | (trace["left"] & ~left)
    hedged = (trace["state"] == -1) & ~_NO_FINDING
    where = jnp.where(placed, 1.0, jnp.where(elsewhere, -0.25, 0.25))
    credit = jnp.where(affirmed, where, jnp.where(hedged, 0.5, 0.0))
    false = jnp.where(affirmed, 1.0, jnp.where(hedged, 0.5, 0.0))
    total = jnp.sum(present, axis=1) + jnp.sum(jnp.where(absent, false, 0), axis=1)
    earned = jnp.sum(jnp.where(present, credit, 0), axis=1)
    said = (present & affirmed) | (absent & (trace["state"] == 0))
    sure = (present | absent) & ~_NO_FINDING
    return {
        "trace_findings": jnp.where(total > 0, earned / jnp.maximum(total, 0.5), 1.0).astype(
            jnp.float32
        ),
        "trace_coverage": jnp.sum(said & sure, axis=1)
        / jnp.maximum(jnp.sum(sure, axis=1), 1).astype(jnp.float32),
    }


def repeated(tokens, lengths, n: int = NGRAM) -> jax.Array:
    """float32 [B]: of the n-grams in tokens int [B, N], of which the first lengths [B] count, the share that has stood
    there before; 0 for a text with none. Exact: n-grams are sorted, not hashed."""
    windows = tokens.shape[1] - n + 1
    if windows < 1:
        return jnp.zeros(tokens.shape[0], jnp.float32)
    count = jnp.maximum(lengths - n + 1, 0)
    inside = jnp.arange(windows) < count[:, None]
    keys = [jnp.where(inside, tokens[:, i : windows + i], -1) for i in range(n)]
    keys = jax.lax.sort(keys, dimension=1, num_keys=n)
    same = functools.reduce(jnp.logical_and, [k[:, 1:] == k[:, :-1] for k in keys]) & (
        keys[0][:, 1:] >= 0
    )
    return jnp.sum(same, axis=1) / jnp.maximum(count, 1).astype(jnp.float32)


def weights(chosen: Mapping[str, float]) -> dict[str, float]:
    """A weight for every term, 0 for those not chosen: what a config holds, so that each can be set by a flag."""
    return {term: float(chosen.get(term, 0.0)) for term in TERMS}


def combine(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The weighted sum of the named terms, [B]. Raises UserError, at trace time, for an unknown term."""
    if not weights:
        raise UserError(f"no reward terms are weighted; choose from {', '.join(sorted(terms))}")
    for name in weights:
        if name not in terms:
            raise UserError(f"unknown reward term {name!r}; choose from {', '.join(sorted(terms))}")
    return sum(terms[name] * jnp.float32(weight) for name, weight in sorted(weights.items()))


def modal_share(answers) -> jax.Array:
    """The share of rows of bool [N, 14] that are the most frequent row: 1 for a policy that always says the same."""
    codes = jnp.sort(report_text.to_mask(answers))
    last = jnp.searchsorted(codes, codes, side="right")
    return jnp.max(last - jnp.searchsorted(codes, codes, side="left")) / codes.shape[0]
