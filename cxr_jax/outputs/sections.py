"""The structured report of a trace: each sentence in the field of the form where it belongs, none added, none changed.

The report is derived, not generated: reading it (`read`) gives the states and sides of the trace. A sentence that would
say something else under the heading of its field goes to the impression, where no heading is; a trace that cannot be
parted at all stands there whole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cxr_jax.data.traces import tour
from cxr_jax.labels.taxonomy import NEGATIVE, POSITIVE, UNCERTAIN

# What reads is loaded where something is read: pages need the form alone, and a server of them no JAX.
if TYPE_CHECKING:
    from cxr_jax.outputs.trace_sentences import TraceReading, TraceSentence

# The one form for reports of every origin, in its order: key -> what its field is called.
FIELDS = {
    "technique": "Technique",
    "devices": "Devices",
    "airways": "Airways",
    "lungs_right": "Right lung",
    "lungs_left": "Left lung",
    "pleura": "Pleura",
    "mediastinum": "Mediastinum",
    "heart": "Heart",
    "abdomen": "Abdomen",
    "bones": "Bones",
    "impression": "Impression",
}
# What the "normal" key of a form writes: words that the parser reads as denials, where there is a label to deny.
NORMAL = {
    "technique": "Adequate inspiration, no rotation.",
    "devices": "No support devices.",
    "airways": "Trachea midline.",
    "lungs_right": "Clear, no opacity.",
    "lungs_left": "Clear, no opacity.",
    "pleura": "No pleural effusion; no pneumothorax.",
    "mediastinum": "Normal width.",
    "heart": "Normal size.",
    "abdomen": "No free air.",
    "bones": "No fracture.",
    "impression": "No acute cardiopulmonary abnormality.",
}
LONGEST_FIELD = 20_000  # characters: a report, and no attack on whoever reads it
_OF_TOUR = {
    tour.QUALITY: "technique",
    tour.DEVICES: "devices",
    "Airways": "airways",
    tour.RIGHT_LUNG: "lungs_right",
    tour.LEFT_LUNG: "lungs_left",
    tour.PLEURA: "pleura",
    "Mediastinum": "mediastinum",
    "Hila": "mediastinum",
    "Heart": "heart",
    "Abdomen": "abdomen",
    "Bones": "bones",
    tour.SUMMARY: "impression",
}
_BOTH_LUNGS = ("lungs_right", "lungs_left")
# A sentence may bring the heading of its place: "Heart: normal size."
_HEADING = re.compile(r"^\s*(?:[-*#>]+\s*)?\**([A-Z][A-Za-z /]{2,30})\**\s*:\**\s*")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
_LETTER = re.compile(r"[^\W\d_]")
_STATES = {"present": POSITIVE, "uncertain": UNCERTAIN, "absent": NEGATIVE}


def from_trace(reading: "TraceReading", words: str = "films") -> dict[str, str]:
    """Put the sentences of a trace into the fields of a report.

    Args:
        reading: of `read_trace`.
        words: a key of `trace_sentences.WORDS`.

    Returns:
        Text of each field of FIELDS, "" where nothing is said. `read` of it gives the states and sides of `reading`.
    """
    from cxr_jax.outputs.trace_sentences import read_traces

    # The number of a point in a list is no sentence of a report.
    sentences = [sentence for sentence in reading.sentences if _LETTER.search(sentence.text)]
    candidates = [
        _by_field(_placed(sentence, with_heading=False) for sentence in sentences),
        # Each sentence with its own heading, should one have meant more than the field's.
        _by_field(_placed(sentence, with_heading=True) for sentence in sentences),
        _by_field([(("impression",), reading.text)]),
    ]
    # All in one call: what has to be compiled is compiled once, and most candidates are never needed.
    readings = read_traces([compose(fields) for fields in candidates], words)
    for fields, said_reading in zip(candidates, readings, strict=True):
        if said_reading.states == reading.states and said_reading.sides == reading.sides:
            return fields
    # Not reached: the last candidate is the trace itself, word for word.
    return candidates[-1]


def read(fields: Mapping[str, str], words: str = "films") -> "TraceReading":
    """Read a report by its fields: each sentence under the heading of its field."""
    from cxr_jax.outputs.trace_sentences import read_traces

    return read_traces([compose(fields)], words)[0]


def compose(fields: Mapping[str, str]) -> str:
    """Write the fields as one text for the parser: "normal size" in the field of the heart is "Heart: normal size"."""
    lines = []
    # In the order of the form, which is that of the tour.
    for key, name in FIELDS.items():
        text = fields.get(key, "").strip()
        # The impression stands by itself: no heading may change what it says.
        pieces = [text] if key == "impression" else _SENTENCE_END.split(text)
        lines += [_under(name, key, piece) for piece in pieces if piece.strip()]
    # A blank line ends every sentence, whatever it ends with.
    return "\n\n".join(lines)


def as_text(fields: Mapping[str, str]) -> str:
    """Write the fields for a reader: a line a field, empty ones left out."""
    return "\n".join(
        f"{name}: {' '.join(fields[key].split())}"
        for key, name in FIELDS.items()
        if fields.get(key, "").strip()
    )


def _under(name: str, key: str, piece: str) -> str:
    """A sentence under the heading of its field, unless it says by itself what it is about."""
    if key == "impression" or _HEADING.match(piece):
        return piece
    # A lung's heading gives its side to what has none; an organ's gives words without one their subject.
    is_lung = key in _BOTH_LUNGS
    names_itself = _names_side(piece) if is_lung else _OF_TOUR.get(tour.place(piece, ())) == key
    return piece if names_itself else f"{name}: {piece}"


def _names_side(piece: str) -> bool:
    return any(tour.has_side(piece, section) for section in (tour.RIGHT_LUNG, tour.LEFT_LUNG))


def _placed(sentence: "TraceSentence", with_heading: bool) -> tuple[Sequence[str], str]:
    """The fields that a sentence belongs in, and its text there."""
    # Its own heading says best where it belongs.
    found = _HEADING.match(sentence.text)
    key = _OF_TOUR.get(found.group(1).strip().capitalize()) if found else None
    if found and key:
        rest_text = sentence.text[found.end() :]
        is_same = FIELDS[key] == found.group(1).strip() or key in ("impression", "technique")
        may_go = is_same and not with_heading and bool(_LETTER.search(rest_text))
        return (key,), _capital(rest_text) if may_go else sentence.text
    return _by_words(sentence), sentence.text


def _by_words(sentence: "TraceSentence") -> Sequence[str]:
    from cxr_jax.labels.sentences import Claim

    # As the tour of traces asks for them: a claim for each side.
    claims = [
        Claim(claim.label, _STATES[claim.state], side)
        for claim in sentence.claims
        for side in _sides(claim.side)
    ]
    section = tour.place(sentence.text, claims)
    if section not in (tour.LUNGS, tour.ELSEWHERE):
        return (_OF_TOUR[section],)
    # Of both lungs: what is denied, or said of both in so many words, is said below each. What is there, and nobody
    # says where, must not get a side from a heading.
    is_placeless = any(claim.state != "absent" and claim.side is None for claim in sentence.claims)
    return ("impression",) if is_placeless else _BOTH_LUNGS


def _sides(side: str | None) -> Sequence[str]:
    return ("right", "left") if side == "bilateral" else (side or "",)


def _by_field(placed: Iterable[tuple[Sequence[str], str]]) -> dict[str, str]:
    # Sentences of one field stand in the order of the trace.
    texts: dict[str, list[str]] = {key: [] for key in FIELDS}
    for keys, text in placed:
        for key in keys:
            texts[key].append(text)
    return {key: " ".join(parts) for key, parts in texts.items()}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
