"""The sentences of a reasoning trace, one by one, held against what is so: the same reading as `trace_false`.

`trace_false` (rewards.py) counts, on the device, the sentences that claim what is not so. A reader of the report wants
to see which ones. So a text is cut where the parser of reports ends a sentence (docs/report_parser.md, section 3),
every sentence is read alone, and what it claims is held against the same truth. A sentence means the same alone and in
its text: no phrase that the parser takes reaches over a sentence end, and nothing is carried over one.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.labels import report_text
from cxr_jax.labels.answer_text import extract_trace
from cxr_jax.labels.taxonomy import (
    CHEXPERT_14,
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    PATHOLOGY,
    POSITIVE,
    UNCERTAIN,
    side_name,
)

AGREES, CONTRADICTS, OPEN, NOTHING = VERDICTS = ("agrees", "contradicts", "open", "nothing claimed")

# Texts and sentences go through one program in one shape (wider for long texts): later looks of a run compile nothing.
_ROWS, _WIDTH = 64, 2048
_TAG = re.compile(r"</?think>")
_NAMES = np.array(CHEXPERT_14)
_NO_FINDING, _FINDING = INDEX["No Finding"], np.arange(len(CHEXPERT_14)) != INDEX["No Finding"]


class Sentence(NamedTuple):
    """text: one line, without tags. verdict: of VERDICTS; `open` where the truth decides none of the sentence's claims
    (a subtle finding, a label that the manifest does not know, an abnormality that is none of the 14). why: what is
    wrong with a sentence that contradicts, in words."""

    text: str
    verdict: str
    why: list[str]


@jax.jit
def _program(stream, sizes, bank, present, hedged, sides) -> dict:
    """`reports.read_bytes`, and under "ends" where phrases can end, int16 [B, L]."""
    inside = jnp.arange(stream.shape[1])[:, None] < sizes
    ends = report_text._find_phrases(
        bank, report_text._in_context(stream.T, inside), jnp.max(sizes)
    )
    return report_text.read_bytes(
        stream, sizes, bank, report_text.Truth.of(present, hedged, sides)
    ) | {"ends": ends.T}


def _read(texts: Sequence[bytes], bank, *truth) -> dict[str, np.ndarray]:
    """`_program` of texts in batches of one shape, rows as texts."""
    width = max(_WIDTH, 1 << (max(map(len, texts)) - 1).bit_length())
    parts = []
    for at in range(0, len(texts), _ROWS):
        some = texts[at : at + _ROWS]
        stream, sizes = np.zeros((_ROWS, width), np.uint8), np.zeros(_ROWS, np.int32)
        for i, text in enumerate(some):
            stream[i, : len(text)], sizes[i] = np.frombuffer(text, np.uint8), len(text)
        filled = np.minimum(np.arange(at, at + _ROWS), len(texts) - 1)
        got = jax.device_get(_program(stream, sizes, bank, *(x[filled] for x in truth)))
        parts.append({k: v[: len(some)] for k, v in got.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _cuts(ends: np.ndarray, bank: report_text.Bank) -> list[int]:
    """The places behind the sentence ends of one text, in order. ends int16 [L]: 1 + the phrase state at each token."""
    hidden, out = 0, []
    for at in np.flatnonzero(ends)[
        ::-1
    ]:  # phrases are taken from the right, and hide what they cover
        phrase = int(bank.found[ends[at] - 1])
        if hidden:
            hidden -= 1
        elif words := phrase >> 16:
            hidden = words - 1
            if int(bank.items[phrase & 0xFFFF]) >> report_text._SHIFT["sentence"] & 1:
                out.append(int(at) + 1)
    return out[::-1]


def sentence_verdicts(
    texts: Sequence[str], present, hedged, sides, lexicon: str | None = None
) -> list[list[Sentence]]:
    """The sentences of each completion's trace, in order, with their verdicts. Runs on the host.

    present, hedged bool [N, 14], sides bool [N, 14, 2]: as for `labels.reports.Truth.of`, a row a text. lexicon: a file
    of words beyond labels/lexicon.toml, as in `reports.bank(None, lexicon)`. The sentences that contradict are as many
    as `trace_false` of the text. Raises UserError for a bad lexicon.
    """
    present, hedged, sides = (np.asarray(x, bool) for x in (present, hedged, sides))
    if not len(present) == len(hedged) == len(sides) == len(texts):
        raise ValueError(f"{len(texts)} texts with {len(present)} truths")
    bank = report_text.bank(None, lexicon)
    traces = [extract_trace(t).encode("utf-8", "surrogatepass") for t in texts]
    out = [[] for _ in texts]
    if not traces:
        return out
    ends = _read(traces, bank, present, hedged, sides)["ends"]
    pieces, rows = [], []
    for row, (trace, found) in enumerate(zip(traces, ends, strict=True)):
        at = [0, *_cuts(found, bank), len(trace)]
        pieces += [trace[a:b] for a, b in zip(at, at[1:], strict=False)]
        rows += [row] * (len(at) - 1)
    rows = np.array(rows)
    said = _read(pieces, bank, present[rows], hedged[rows], sides[rows])
    for i, (piece, row) in enumerate(zip(pieces, rows, strict=True)):
        one = {k: v[i] for k, v in said.items()}
        verdict = _verdict(one, present[row], hedged[row])
        words = " ".join(_TAG.sub(" ", piece.decode("utf-8", "replace")).split())
        if words.strip(".,;:!?-*/ ") or verdict != NOTHING:
            why = _why(one, present[row], hedged[row], sides[row]) if verdict == CONTRADICTS else []
            out[row].append(Sentence(words, verdict, why))
    return out


def _verdict(said, present, hedged) -> str:
    if not said["claims"]:
        return NOTHING
    if said["wrong"]:
        return CONTRADICTS
    named = (said["state"] != NOT_MENTIONED) & _FINDING
    if named.any() or said["other"] != NOT_MENTIONED:
        return AGREES if (named & ~hedged).any() else OPEN
    return AGREES if present[_NO_FINDING] else OPEN  # it calls the film normal


def _why(said, present, hedged, sides) -> list[str]:
    """What is wrong with a sentence, as far as its reading alone says so."""
    state, where = said["state"], np.stack([said["right"], said["left"]], -1)
    claimed = ((state == POSITIVE) | (state == UNCERTAIN)) & _FINDING
    absent = claimed & ~(present | hedged)
    elsewhere = claimed & ~absent & (where & ~sides & sides.any(-1, keepdims=True)).any(-1)
    here = ~where.any(-1) | (where & sides).any(-1)
    denied = (state == NEGATIVE) & present & here & _FINDING
    out = [f"no {name}" for name in _NAMES[absent]]
    out += [
        f"{_NAMES[i]} is on the {side_name(*sides[i], both='both sides')} only"
        for i in np.flatnonzero(elsewhere)
    ]
    out += [f"{name} is there" for name in _NAMES[denied]]
    if not out and (present & np.array(PATHOLOGY)).any() and not (claimed & present).any():
        out.append("the film is not normal")  # nothing else can be wrong with it
    return out
