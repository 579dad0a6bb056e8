"""The sections of a report, by the headings of its text or by the labels of its XML: what the film shows.

An indication ("rule out pneumonia") or a comparison mentions findings that the film need not have. Headings are
those of MIMIC-CXR, CheXpert Plus and NIH reports.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.parsers import expat

SECTIONS = ("findings", "impression")

_FINDINGS = r"FINDINGS?"
_IMPRESSION = r"IMPRESSIONS?|OPINION|CONCLUSIONS?|FINDINGS? ?(?:/|AND|&) ?IMPRESSIONS?"
# These end a section: they do not say what the film shows.
_OTHER = (
    r"(?:(?:CLINICAL|PATIENT|MEDICAL) )?(?:INDICATIONS?|HISTORY|INFORMATION|DETAILS?)|QUERY|"
    r"REASON FOR (?:THIS )?(?:EXAM(?:INATION)?|STUDY)|COMPARISONS?(?: EXAMS?| FILMS?)?|"
    r"(?:TYPE OF )?EXAM(?:INATION)?|TECHNIQUE|PROCEDURE(?: COMMENTS)?|NOTIFICATIONS?|RECOMMENDATION(?:S|\(S\))?|"
    r"ADDENDUM|WET ?READ|NARRATIVE|END OF IMPRESSION|SUMMARY|ACCESSION NUMBER|DICTATED BY|"
    r"SIGNED BY|FINAL REPORT"
)
_KNOWN = f"(?:{_FINDINGS}|{_IMPRESSION}|{_OTHER})"
_HEADING = re.compile(
    rf"^[ \t]*(?i:{_KNOWN})[ \t]*:"  # a known heading where a line starts
    rf"|^[ \t]*{_KNOWN}[ \t]*$"  # ... or alone on its line, in capitals
    rf"|(?<![A-Za-z]){_KNOWN}[ \t]*:"  # ... or anywhere, in capitals: many tables keep no line ends
    rf"|(?<=[.!?] )(?i:{_KNOWN}):"
    r"|^[ \t]*[A-Z][A-Z _()/,&'-]{1,78}:",  # an unknown one
    re.MULTILINE,
)
_KINDS = (
    ("impression", re.compile(_IMPRESSION)),
    ("findings", re.compile(_FINDINGS)),
    ("other", re.compile(_OTHER)),
)
# An unknown heading with an organ or a view in it says what the film shows.
_SHOWS = re.compile(
    r"\b(?:CHEST|PORTABLE|LATERAL|FRONTAL|VIEWS?|RIBS?|BONES?|OSSEOUS|LUNGS?|AIRWAYS?|PLEURAL?|HEART|CARDIAC|HILA|"
    r"CARDIOMEDIASTINUM|CARDIOMEDIASTINAL|MEDIASTINUM|DIAPHRAGM|DEVICES|LINES|TUBES|SOFT TISSUES?|ABDOMEN)\b"
)
# What a longer heading is by one of its words, the first of these that it has.
_MAIN_WORDS = (
    ("IMPRESSION", "impression"),
    ("FINDINGS", "findings"),
    ("HISTORY", "other"),
    ("COMPARISON", "other"),
    ("INDICATION", "other"),
)
_BETWEEN = "\n\n"  # two sections
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


class _Start(NamedTuple):
    """Where a section starts. Places in the text."""

    kind: str
    heading: int
    body: int  # of its text: behind the heading, or at it where its words are the subject of what follows
    words: int  # of the words after the heading


def _section_kind(name: str) -> str | None:
    """The kind of a known heading, in capitals; None for an unknown one."""
    for kind, pattern in _KINDS:
        if pattern.fullmatch(name):
            return kind
    return next((kind for word, kind in _MAIN_WORDS if word in name), None)


def split_sections(text: str) -> list[tuple[str, str]]:
    """Split a report at its headings.

    An unknown heading inside findings or impression ("LUNGS:") belongs to it. Sections without a letter are left out.

    Returns:
        (kind, text of the section) in order, kind one of findings, impression, other; [] without headings.
    """
    starts: list[_Start] = []
    for match in _HEADING.finditer(text):
        name = match[0].strip(" \t\n:").upper()
        kind, body = _section_kind(name), match.end()
        if kind is None:
            if starts and starts[-1].kind != "other":
                continue
            kind = "findings" if _SHOWS.search(name) else "other"
            body = match.start()  # its words are the subject of what follows
        starts.append(_Start(kind, heading=match.start(), body=body, words=match.end()))
    ends = [*(start.heading for start in starts), len(text)][1:]
    return [
        (start.kind, text[start.body : end].strip())
        for start, end in zip(starts, ends, strict=True)
        if any(map(str.isalpha, text[start.words : end]))
    ]


class Cut(NamedTuple):
    """A report, cut to its sections.

    Attributes:
        text: what is read.
        without_headings: it had none of those sections.
        impression: where in the text the impression begins; None where no heading says so.
    """

    text: str
    without_headings: bool = False
    impression: int | None = None


def join_sections(bodies: Sequence[tuple[str, str]]) -> Cut:
    """Join sections, (kind, text) in the order in which they are read; the first impression is the one."""
    impression = None
    length = 0
    for kind, body in bodies:
        if kind == "impression" and impression is None:
            impression = length
        length += len(body) + len(_BETWEEN)
    return Cut(_BETWEEN.join(body for _, body in bodies), impression=impression)


def cut(text: str, wanted: tuple[str, ...] = SECTIONS) -> Cut:
    """Cut a report to the wanted sections.

    Without any wanted one: findings or impression, whichever there is; else what follows the first blank line of the
    last section that has one (a history, then the report without a heading); else the whole text.

    Args:
        text: a report.
        wanted: of SECTIONS, in the order in which they are joined; () is the whole text.
    """
    if not wanted:
        return Cut(text)
    sections = split_sections(text)
    for names in (wanted, SECTIONS):
        bodies = [(kind, body) for name in names for kind, body in sections if kind == name]
        if bodies:
            return join_sections(bodies)
    for _, body in reversed(sections):
        paragraphs = _BLANK_LINE.split(body, maxsplit=1)
        if len(paragraphs) == 2 and any(map(str.isalpha, paragraphs[1])):
            return Cut(paragraphs[1].strip(), without_headings=True)
    return Cut(text, without_headings=True)


class _DoctypeError(Exception):
    """The document has a document type, or declares an entity."""


def read_openi(data: bytes) -> dict[str, str]:
    """Read the texts of an Open-i XML file.

    A document type is refused, and with it every entity that could grow or reach for another file.

    Returns:
        Label of an AbstractText in lower case -> its text.

    Raises:
        ValueError: with a reason.
    """
    parts_by_label: dict[str, list[str]] = {}
    open_texts: list[list[str]] = []  # the AbstractText elements that are open now

    def refuse(*_: object) -> None:
        raise _DoctypeError

    def start_element(tag: str, attributes: dict[str, str]) -> None:
        if tag == "AbstractText":
            label = attributes.get("Label", "").strip().lower()
            parts = parts_by_label.setdefault(label, [])
            # Texts with one label are paragraphs of one.
            parts.append("\n\n" if parts else "")
            open_texts.append(parts)

    def end_element(tag: str) -> None:
        if tag == "AbstractText":
            open_texts.pop()

    def add_characters(text: str) -> None:
        if open_texts:
            open_texts[-1].append(text)

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start_element, end_element
    parser.CharacterDataHandler = add_characters
    try:
        parser.Parse(data, True)
    except _DoctypeError:
        raise ValueError("has a document type, which is not read") from None
    except (expat.ExpatError, ValueError, LookupError):  # the last two: an encoding that is unknown
        raise ValueError("not well-formed XML") from None
    if not parts_by_label:
        raise ValueError("has no AbstractText: not an Open-i report")
    return {label: "".join(parts).strip() for label, parts in parts_by_label.items()}
