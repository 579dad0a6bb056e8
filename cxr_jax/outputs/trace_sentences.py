"""A trace as numbered sentences, each with what it claims: of a whole text, or while the text is still coming.

The reading is that of the project's own parser of reports (docs/report_parser.md), sentence by sentence, so that what a
page shows beside a sentence is what rewards and metrics have read there. It computes with JAX: in a server the caller
hands these functions to the thread that owns it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax import phantom
from cxr_jax.errors import UserError
from cxr_jax.labels.answers import reasoning_of
from cxr_jax.labels.lexicon import OTHER
from cxr_jax.labels.sentences import Reading, read_statements
from cxr_jax.labels.taxonomy import NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

# The words of the world that a model was made in: phantom reports name causes, which claim nothing there.
WORDS: dict[str, str | None] = {"films": None, "phantom": phantom.LEXICON}
STATES = {
    POSITIVE: "present",
    UNCERTAIN: "uncertain",
    NEGATIVE: "absent",
    NOT_MENTIONED: "not_mentioned",
}
# Words that a page marks. What a sentence claims is the parser's to say; these only show where to look.
_HEDGES = re.compile(
    r"\b(?:possibl[ey]|possibility|may|might|could|probabl[ey]|likely|suspect\w*|suspicious|suggest\w*|questionabl[ey]|"
    r"equivocal|cannot (?:be )?(?:exclude|rule out)\w*|can(?:no|')t exclude|not excluded|borderline|"
    r"appears?|perhaps|versus|consider|concerning for|worrisome for|uncertain|unclear)\b",
    re.IGNORECASE,
)
_SIDE_WORDS = re.compile(
    r"\b(?:(?P<right>right(?:ward)?|rt|rul|rml|rll)|(?P<left>left(?:ward)?|lt|lul|lll|lingula\w*)|"
    r"(?P<bilateral>bilateral\w*|both|bi-?basilar|bibasal|biapical))\b",
    re.IGNORECASE,
)
# Only behind one of these can a sentence have ended: without one, nothing is read again.
_MAY_END = re.compile(r"[.?!\n;]")


class TraceClaim(NamedTuple):
    """What a sentence says of a label.

    Attributes:
        label: one of the 14, or "Other" for an abnormality that is none of them.
        state: "present", "uncertain" or "absent".
        side: "right", "left", "bilateral" or None.
    """

    label: str
    state: str
    side: str | None


@dataclass(frozen=True, kw_only=True)
class TraceSentence:
    """A sentence of a trace.

    Attributes:
        n: its number, from 1.
        text: as it stands there.
        claims: what it says, in the order of the labels.
        hedged: [start, end] of words that hedge, in characters of `text`.
        sides: [start, end, side] of words that name a side.
    """

    n: int
    text: str
    claims: tuple[TraceClaim, ...] = ()
    hedged: tuple[tuple[int, int], ...] = ()
    sides: tuple[tuple[int, int, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Give the sentence as the document and the events of a page hold it."""
        return {
            "n": self.n,
            "text": self.text,
            "claims": [claim._asdict() for claim in self.claims],
            "hedged": [list(span_pair) for span_pair in self.hedged],
            "sides": [list(span_pair) for span_pair in self.sides],
        }


@dataclass(frozen=True, kw_only=True)
class TraceReading:
    """A trace as a whole.

    Attributes:
        text: word for word.
        sentences: in their order.
        states: of the 14 labels, in their order: one of the values of STATES.
        sides: of the 14: "right", "left", "bilateral" or None; only of what is present or uncertain.
    """

    text: str
    sentences: tuple[TraceSentence, ...]
    states: tuple[str, ...]
    sides: tuple[str | None, ...]


def find_words(folder: str | Path | None) -> str:
    """Say in which words a model writes, a key of WORDS: those of the phantom, or those of films.

    Args:
        folder: of the model's weights, as `Model.folder`; None: it has none.
    """
    if folder is None:
        return "films"
    # The embedded model, wherever the package is installed.
    place = Path(folder).resolve()
    if place == Path(phantom.LEXICON).parents[1] / "assets" / "phantom":
        return "phantom"
    # An export lies in the folder of its run, whose config says what it was trained on.
    config_file = place.parent / "config.json"
    try:
        text = config_file.read_text(errors="replace") if place.name == "hf" else ""
    except OSError:
        return "films"
    return "phantom" if re.search(r'"source":\s*"phantom"', text) else "films"


def check_words(words: str) -> str | None:
    """Give the file of a key of WORDS. Raises UserError for another."""
    if words not in WORDS:
        raise UserError(f"words: {words!r} is unknown, use one of {', '.join(WORDS)}")
    return WORDS[words]


def read_trace(text: str, words: str = "films") -> TraceReading:
    """Read a trace, or a report.

    Args:
        text: without tags.
        words: a key of WORDS.

    Raises:
        UserError: for other words.
    """
    return read_traces([text], words)[0]


def read_traces(texts: list[str], words: str = "films") -> list[TraceReading]:
    """Read several at once, as `read_trace` does each."""
    readings = read_statements(texts, more=check_words(words))
    return [_trace_reading(text, reading) for text, reading in zip(texts, readings, strict=True)]


def _trace_reading(text: str, reading: Reading) -> TraceReading:
    states = tuple(STATES[state] for state in reading.states)
    # On which side nothing is, is no property of a finding: sides of denials stay with their sentences.
    sides = tuple(
        _side(side) if state in ("present", "uncertain") else None
        for state, side in zip(states, reading.sides, strict=True)
    )
    # Numbered as they stand: a page, a flag and a report name them so.
    sentences = tuple(
        _sentence(number, statement.text, statement.claims)
        for number, statement in enumerate(reading.statements, 1)
    )
    return TraceReading(text=text, sentences=sentences, states=states, sides=sides)


def _side(name: str) -> str | None:
    return {"both": "bilateral", "": None}.get(name, name)


def _sentence(number: int, text: str, claims: frozenset) -> TraceSentence:
    one_line = " ".join(text.split())
    # A label that is claimed on both sides is one claim.
    sides_of: dict[tuple[str, int], set[str]] = {}
    for claim in claims:
        sides_of.setdefault((claim.label, claim.state), set()).add(claim.side)
    # Sides of a claim become one word.
    merged = [
        TraceClaim(
            label, STATES[state], "bilateral" if len(sides) > 1 else _side(next(iter(sides)))
        )
        for (label, state), sides in sides_of.items()
    ]
    return TraceSentence(
        n=number,
        text=one_line,
        claims=tuple(sorted(merged, key=_claim_order)),
        hedged=tuple(match.span() for match in _HEDGES.finditer(one_line)),
        sides=tuple(
            (*match.span(), str(match.lastgroup)) for match in _SIDE_WORDS.finditer(one_line)
        ),
    )


def _claim_order(claim: TraceClaim) -> tuple[bool, str, str]:
    return claim.label == OTHER, claim.label, claim.state


# ---- While it streams ----


@dataclass
class SentenceStream:
    """Cuts a completion into sentences while it comes.

    A sentence is given once another has ended behind it: then no word that is still to come changes what it says. What
    a whole text decides (its language) is decided by `read_trace` of the whole.

    Attributes:
        words: a key of WORDS.
        text: all that has come so far, tags included.
    """

    words: str = "films"
    text: str = ""
    _given: int = field(default=0, repr=False)

    def feed(self, piece: str) -> list[TraceSentence]:
        """Take the next piece of the completion, and give the sentences that have ended."""
        # Cheap: most pieces end no sentence, and nothing is read for them.
        self.text += piece
        # A closing tag ends the trace, and with it its last sentence.
        if "</think>" in self.text or "<answer>" in self.text:
            return self.finish()
        if not _MAY_END.search(piece):
            return []
        # The last sentence may be cut anywhere, and the one before may still be hidden by it.
        return self._give(keep=1)

    def finish(self) -> list[TraceSentence]:
        """Give the sentences that are left, at the end of the trace. Safe to call again."""
        return self._give(keep=0)

    def _give(self, keep: int) -> list[TraceSentence]:
        # Tags are no words of a sentence.
        trace = reasoning_of(self.text)
        if not trace:
            return []
        sentences = read_trace(trace, self.words).sentences
        # A later piece can only add to these: sentences are given once each.
        ready = sentences[self._given : max(self._given, len(sentences) - keep)]
        self._given += len(ready)
        return list(ready)
