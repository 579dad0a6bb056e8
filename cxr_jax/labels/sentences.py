"""The sentences of a reasoning trace, one by one, held against what is so: the same reading as `trace_false`.

`trace_false` (rewards/terms.py) counts, on the device, the sentences that claim what is not so. A reader of the report
wants to see which ones. So a text is cut where the parser of reports ends a sentence (docs/report_parser.md, section
3), every sentence is read alone, and what it claims is held against the same truth. A sentence means the same alone and
in its text: no phrase that the parser takes reaches over a sentence end, and nothing is carried over one.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cxr_jax.labels import report_text
from cxr_jax.labels.answer_text import extract_trace
from cxr_jax.labels.byte_codes import code_bytes
from cxr_jax.labels.phrase_bank import (
    FOUND_ITEM_BITS,
    FOUND_ITEM_MASK,
    PhraseBank,
    ends_sentence,
    load_phrase_bank,
)
from cxr_jax.labels.phrase_search import find_phrases
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
    ends = _read(traces, bank, present, hedged, sides)["ends"]
    pieces, owners = [], []
    for owner, (trace, trace_ends) in enumerate(zip(traces, ends, strict=True)):
        cuts = [0, *_sentence_ends(trace_ends, bank), len(trace)]
        pieces += [trace[start:stop] for start, stop in itertools.pairwise(cuts)]
        owners += [owner] * (len(cuts) - 1)

    # .. and read each piece alone, against the truth of its trace.
    rows = np.array(owners)
    readings = _read(pieces, bank, present[rows], hedged[rows], sides[rows])
    for index, (piece, owner) in enumerate(zip(pieces, owners, strict=True)):
        said = {name: values[index] for name, values in readings.items()}
        verdict = _verdict(said, present[owner], hedged[owner])
        line = " ".join(_THINK_TAG.sub(" ", piece.decode("utf-8", "replace")).split())
        if not line.strip(".,;:!?-*/ ") and verdict == NOTHING:
            continue  # punctuation between two sentences
        why: list[str] = []
        if verdict == CONTRADICTS:
            why = _explain(said, present[owner], hedged[owner], sides[owner])
        judged[owner].append(Sentence(line, verdict, why))
    return judged


@jax.jit
def _program(
    stream: jax.Array,
    lengths: jax.Array,
    bank: PhraseBank,
    present: jax.Array,
    hedged: jax.Array,
    sides: jax.Array,
) -> dict[str, jax.Array]:
    """`report_text.read_bytes`, and under "ends" where phrases can end, int16 [B, L]."""
    inside = jnp.arange(stream.shape[1])[:, None] < lengths
    ends, _ = find_phrases(bank, code_bytes(stream.T, inside), jnp.max(lengths))
    truth = report_text.Truth.from_arrays(present, hedged, sides)
    return report_text.read_bytes(stream, lengths, bank, truth) | {"ends": ends.T}


def _read(texts: Sequence[bytes], bank: PhraseBank, *truth: np.ndarray) -> dict[str, np.ndarray]:
    """`_program` of texts in batches of one shape, rows as texts."""
    # Widths are powers of two from the usual one on.
    width = max(_WIDTH, 1 << (max(map(len, texts)) - 1).bit_length())
    parts = []
    for start in range(0, len(texts), _ROWS):
        batch = texts[start : start + _ROWS]
        stream, lengths = np.zeros((_ROWS, width), np.uint8), np.zeros(_ROWS, np.int32)
        for row, text in enumerate(batch):
            stream[row, : len(text)] = np.frombuffer(text, np.uint8)
            lengths[row] = len(text)
        # Rows past the last text are empty, with the truth of the last one; what they give is dropped.
        filled = np.minimum(np.arange(start, start + _ROWS), len(texts) - 1)
        outputs = _program(stream, lengths, bank, *(values[filled] for values in truth))
        outputs = jax.device_get(outputs)
        parts.append({name: values[: len(batch)] for name, values in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
