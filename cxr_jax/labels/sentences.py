"""The sentences of a reasoning trace, one by one, held against what is so: the same reading as `trace_false`.

`trace_false` (rewards/terms.py) counts, on the device, the sentences that claim what is not so. A reader of the report
wants to see which ones. So a text is cut where the parser of reports ends a sentence (docs/report_parser.md, section
3), every sentence is read by itself, and what it claims is held against the same truth. What a byte is, and the
language, are those of the whole text; but no phrase that the parser takes reaches over a sentence end, and nothing is
carried over one.

`read_statements` gives the sentences of a report in the same way, each with all that it says.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cxr_jax.labels import phrase_reading, report_text
from cxr_jax.labels.answers import extract_trace
from cxr_jax.labels.byte_codes import code_bytes
from cxr_jax.labels.lexicon import LABELS
from cxr_jax.labels.phrase_bank import (
    AFFIRMED,
    DENIED,
    FOUND_ITEM_BITS,
    FOUND_ITEM_MASK,
    HEDGED,
    PhraseBank,
    device_phrase_bank,
    ends_sentence,
    load_phrase_bank,
)
from cxr_jax.labels.phrase_search import Evidence, find_phrases
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
_THINK_TAG = re.compile(r"</?think>")
_NAMES = np.array(CHEXPERT_14)
_NO_FINDING = INDEX["No Finding"]
_IS_FINDING = np.arange(len(CHEXPERT_14)) != _NO_FINDING


class Sentence(NamedTuple):
    """A sentence of a trace, and what is to be said of it.

    Attributes:
        text: one line, without tags.
        verdict: of VERDICTS; `OPEN` where the truth decides none of the sentence's claims (a subtle finding, a label
            that the manifest does not know, an abnormality that is none of the 14).
        why: what is wrong with a sentence that contradicts, in words.
    """

    text: str
    verdict: str
    why: list[str]


def sentence_verdicts(
    texts: Sequence[str],
    present: ArrayLike,
    hedged: ArrayLike,
    sides: ArrayLike,
    lexicon: str | None = None,
) -> list[list[Sentence]]:
    """Judge the sentences of each completion's trace, in order. Runs on the host.

    Args:
        texts: N completions.
        present: bool [N, 14], as for `Truth.from_arrays`.
        hedged: bool [N, 14].
        sides: bool [N, 14, 2].
        lexicon: a file of words beyond labels/lexicon.toml, as in `load_phrase_bank(None, lexicon)`.

    Returns:
        The sentences of each text. Those that contradict are as many as `trace_false` of the text.

    Raises:
        UserError: for a bad lexicon.
        ValueError: where texts and truths differ in number.
    """
    present, hedged, sides = (np.asarray(truth, bool) for truth in (present, hedged, sides))
    if not len(present) == len(hedged) == len(sides) == len(texts):
        raise ValueError(f"{len(texts)} texts with {len(present)} truths")
    bank = load_phrase_bank(None, lexicon)
    # A lone surrogate, which JSON can hold, passes as bytes that match nothing.
    traces = [extract_trace(text).encode("utf-8", "surrogatepass") for text in texts]
    judged: list[list[Sentence]] = [[] for _ in texts]
    if not traces:
        return judged

    # Cut every trace where the parser ends a sentence ..
    whole = _search(traces, bank, _find)
    pieces, owners, spans = _cut(traces, whole["ends"], bank)

    # .. and read each piece by itself, against the truth of its trace.
    rows = np.array(owners)
    readings = _read(whole, rows, spans, bank, (present[rows], hedged[rows], sides[rows]))
    for index, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
        said = {name: values[index] for name, values in readings.items()}
        verdict = _verdict(said, present[owner], hedged[owner])
        line = " ".join(_THINK_TAG.sub(" ", piece.decode("utf-8", "replace")).split())
        if not line.strip(".,;:!?-*/ ") and verdict == NOTHING:
            continue  # punctuation between two sentences
        is_wrong = verdict == CONTRADICTS
        why = _explain(said, present[owner], hedged[owner], sides[owner]) if is_wrong else []
        judged[owner].append(Sentence(line, verdict, why))
    return judged


@jax.jit
def _find(stream: jax.Array, lengths: jax.Array, bank: PhraseBank) -> dict[str, jax.Array]:
    """Where phrases can end, int16 [B, L + 1], and whether the text is in another language, bool [B]."""
    inside = jnp.arange(stream.shape[1])[:, None] < lengths
    ends, evidence = find_phrases(bank, code_bytes(stream.T, inside), jnp.max(lengths))
    foreign = report_text.read_ends(ends, evidence, bank)["foreign"]
    return {"ends": ends.T, "foreign": foreign}


@jax.jit
def _read_parts(
    ends: jax.Array,
    spans: jax.Array,
    bank: PhraseBank,
    present: jax.Array,
    hedged: jax.Array,
    sides: jax.Array,
) -> dict[str, jax.Array]:
    """`report_text.read_ends` of the places from spans[:, 0] up to spans[:, 1]."""
    place = jnp.arange(ends.shape[1])
    inside = (place >= spans[:, :1]) & (place < spans[:, 1:])
    zero = jnp.zeros(len(ends), jnp.int32)
    truth = phrase_reading.Truth.from_arrays(present, hedged, sides)
    part = jnp.where(inside, ends, 0).T
    return report_text.read_ends(part, Evidence(zero, zero, zero), bank, truth)


def _search(
    texts: Sequence[bytes], bank: PhraseBank, find: Callable[..., dict[str, jax.Array]]
) -> dict[str, np.ndarray]:
    """A program as `_find` is of texts, in batches of one shape."""
    # Widths are powers of two from the usual one on.
    width = max(_WIDTH, 1 << (max(map(len, texts)) - 1).bit_length())
    parts = []
    for start in range(0, len(texts), _ROWS):
        batch = texts[start : start + _ROWS]
        stream, lengths = np.zeros((_ROWS, width), np.uint8), np.zeros(_ROWS, np.int32)
        for row, text in enumerate(batch):
            stream[row, : len(text)] = np.frombuffer(text, np.uint8)
            lengths[row] = len(text)
        outputs = jax.device_get(find(stream, lengths, bank))
        parts.append({name: values[: len(batch)] for name, values in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(
    whole: dict[str, np.ndarray],
    rows: np.ndarray,
    spans: Sequence[tuple[int, int]],
    bank: PhraseBank,
    truth: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    """`_read_parts` of texts rows[i] at spans[i], in batches of one shape; of a foreign text nothing is claimed."""
    parts = []
    for start in range(0, len(rows), _ROWS):
        # Parts past the last one are that again; what they give is dropped.
        filled = np.minimum(np.arange(start, start + _ROWS), len(rows) - 1)
        count = min(_ROWS, len(rows) - start)
        span = np.array(spans, np.int32)[filled]
        span[whole["foreign"][rows[filled]]] = 0
        outputs = _read_parts(
            whole["ends"][rows[filled]], span, bank, *(values[filled] for values in truth)
        )
        outputs = jax.device_get(outputs)
        parts.append({name: values[:count] for name, values in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Parts(NamedTuple):
    """The sentences of texts: their bytes, which text each is of, and the places of that text that it takes."""

    pieces: list[bytes]
    owners: list[int]
    spans: list[tuple[int, int]]


def _cut(texts: Sequence[bytes], ends_of_texts: np.ndarray, bank: PhraseBank) -> _Parts:
    """Cut texts where the parser ends a sentence; ends_of_texts int16 [N, L + 1], of `find_phrases`."""
    parts = _Parts([], [], [])
    for owner, (text, ends) in enumerate(zip(texts, ends_of_texts, strict=True)):
        stops = [*_sentence_ends(ends, bank), len(ends)]
        # A tag opens the sentence behind it; every other sign ends the one before.
        opens = [stop <= len(text) and text[stop - 1] == ord("<") for stop in stops]
        cuts = [stop - is_tag for stop, is_tag in zip(stops, opens, strict=True)]
        parts.pieces.extend(text[start:stop] for start, stop in itertools.pairwise([0, *cuts]))
        parts.spans.extend(itertools.pairwise([0, *stops]))
        parts.owners.extend([owner] * len(stops))
    return parts


def _sentence_ends(ends: np.ndarray, bank: PhraseBank) -> list[int]:
    """The places behind the sentence ends inside one text, in order. ends int16 [L + 1], of `find_phrases`."""
    hidden, places = 0, []
    # Phrases are taken from the right, and hide what they cover, as in `take_phrases`. The last is the end of the text.
    for place in np.flatnonzero(ends)[::-1]:
        phrase = int(bank.found[ends[place] - 1])
        width = phrase >> FOUND_ITEM_BITS
        if hidden:
            hidden -= 1
        elif width:
            hidden = width - 1
            if ends_sentence(int(bank.items[phrase & FOUND_ITEM_MASK])):
                places.append(int(place) + 1)
    return places[:0:-1]


def _verdict(said: dict[str, np.ndarray], present: np.ndarray, hedged: np.ndarray) -> str:
    if not said["claims"]:
        return NOTHING
    if said["wrong"]:
        return CONTRADICTS
    # Not all claims are about what the truth decides.
    named = (said["state"] != NOT_MENTIONED) & _IS_FINDING
    if named.any() or said["other"] != NOT_MENTIONED:
        return AGREES if (named & ~hedged).any() else OPEN
    return AGREES if present[_NO_FINDING] else OPEN  # it calls the film normal


def _explain(
    said: dict[str, np.ndarray], present: np.ndarray, hedged: np.ndarray, sides: np.ndarray
) -> list[str]:
    """What is wrong with a sentence, as far as its reading alone says so."""
    state, said_sides = said["state"], np.stack([said["right"], said["left"]], -1)
    claimed = ((state == POSITIVE) | (state == UNCERTAIN)) & _IS_FINDING
    # What is affirmed or hedged, and is not there.
    absent = claimed & ~(present | hedged)
    # What is there, but where its side is known, not on the side that is said.
    on_wrong_side = (said_sides & ~sides & sides.any(-1, keepdims=True)).any(-1)
    elsewhere = claimed & ~absent & on_wrong_side
    # What is denied, though it is there: on the denied side, if a side is said.
    on_its_side = ~said_sides.any(-1) | (said_sides & sides).any(-1)
    denied = (state == NEGATIVE) & present & on_its_side & _IS_FINDING
    reasons = [f"no {name}" for name in _NAMES[absent]]
    for index in np.flatnonzero(elsewhere):
        reasons.append(
            f"{_NAMES[index]} is on the {side_name(*sides[index], both='both sides')} only"
        )
    reasons += [f"{name} is there" for name in _NAMES[denied]]
    is_sick = (present & np.array(PATHOLOGY)).any()
    if not reasons and is_sick and not (claimed & present).any():
        reasons.append("the film is not normal")  # nothing else can be wrong with it
    return reasons


# ---- What each sentence of a report says -----------------------------------------------------------------------------


class Claim(NamedTuple):
    """One thing that a sentence says.

    Attributes:
        label: one of the 14, or "Other".
        state: POSITIVE, NEGATIVE or UNCERTAIN.
        side: "right", "left" or "" where no side is said.
    """

    label: str
    state: int
    side: str = ""


class Statement(NamedTuple):
    """A sentence of a text as it stands there, and what it says there."""

    text: str
    claims: frozenset[Claim]


class Reading(NamedTuple):
    """A text as `report_text.read_reports` reads it, and its sentences.

    Attributes:
        states: of the 14 labels, as in `report_text.read_reports`.
        sides: of the 14: "right", "left", "both" or "".
        is_foreign: the text is in another language.
        unread: words that look like findings and are not known.
        statements: its sentences in their order, those without a letter or digit left out.
    """

    states: tuple[int, ...]
    sides: tuple[str, ...]
    is_foreign: bool
    unread: int
    statements: tuple[Statement, ...]


_STATES = {AFFIRMED: POSITIVE, DENIED: NEGATIVE, HEDGED: UNCERTAIN}


def read_statements(
    texts: Sequence[str], lexicon: str | None = None, more: str | None = None
) -> list[Reading]:
    """Read texts as `report_text.read_reports` does, and each of their sentences where it stands. Runs on the host.

    Args:
        texts: N reports, of any length.
        lexicon: a file to use instead of labels/lexicon.toml.
        more: a file of words beyond these, as in `load_phrase_bank(None, more)`.

    Raises:
        UserError: for a bad lexicon.
    """
    if not texts:
        return []
    bank = device_phrase_bank(lexicon, more)
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    whole = _search(encoded, bank, _find_and_read)
    # Looked up one by one, so on the host.
    pieces, owners, spans = _cut(encoded, whole["ends"], load_phrase_bank(lexicon, more))
    said = _read_claims(whole["ends"], np.array(owners), spans, bank)

    statements: list[list[Statement]] = [[] for _ in texts]
    for index, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
        text = piece.decode("utf-8", "replace").strip()
        if any(map(str.isalnum, text)):
            claims = _claims(said["report"][:, index], said["with_side"][:, index])
            statements[owner].append(Statement(text, claims))
    return [
        Reading(
            tuple(whole["state"][row].tolist()),
            tuple(map(side_name, whole["right"][row].tolist(), whole["left"][row].tolist())),
            bool(whole["foreign"][row]),
            int(whole["unread"][row]),
            tuple(statements[row]),
        )
        for row in range(len(texts))
    ]


@jax.jit
def _find_and_read(stream: jax.Array, lengths: jax.Array, bank: PhraseBank) -> dict[str, jax.Array]:
    """Where phrases can end, int16 [B, L + 1], and what `report_text.read_bytes` gives."""
    inside = jnp.arange(stream.shape[1])[:, None] < lengths
    ends, evidence = find_phrases(bank, code_bytes(stream.T, inside), jnp.max(lengths))
    return report_text.read_ends(ends, evidence, bank) | {"ends": ends.T}


@jax.jit
def _claims_of_parts(ends: jax.Array, spans: jax.Array, bank: PhraseBank) -> dict[str, jax.Array]:
    """Masks by state, int32 [B, 3], and pairs with sides likewise, of the places from spans[:, 0] up to spans[:, 1]."""
    place = jnp.arange(ends.shape[1])
    inside = (place >= spans[:, :1]) & (place < spans[:, 1:])
    claims = phrase_reading.read_phrases(bank, jnp.where(inside, ends, 0).T, None)
    return {"report": claims.report.T, "with_side": claims.with_side.T}


def _read_claims(
    ends: np.ndarray, rows: np.ndarray, spans: Sequence[tuple[int, int]], bank: PhraseBank
) -> dict[str, np.ndarray]:
    """`_claims_of_parts` of texts rows[i] at spans[i], in batches of one shape; int32 [3, N]."""
    parts = []
    for start in range(0, len(rows), _ROWS):
        filled = np.minimum(np.arange(start, start + _ROWS), len(rows) - 1)
        outputs = _claims_of_parts(ends[rows[filled]], np.array(spans, np.int32)[filled], bank)
        count = min(_ROWS, len(rows) - start)
        parts.append({name: values[:count] for name, values in jax.device_get(outputs).items()})
    return {name: np.concatenate([part[name] for part in parts]).T for name in parts[0]}


def _claims(masks: np.ndarray, pairs: np.ndarray) -> frozenset[Claim]:
    """What the masks of one sentence say, int32 [3] each, by state."""
    claims: set[Claim] = set()
    for row, state in _STATES.items():
        right, left = (int(mask) for mask in phrase_reading.split_pair(pairs[row]))
        for index, label in enumerate(LABELS):
            if not int(masks[row]) >> index & 1:
                continue
            sides = [side for side, mask in (("right", right), ("left", left)) if mask >> index & 1]
            claims.update(Claim(label, state, side) for side in sides or [""])
    return frozenset(claims)
