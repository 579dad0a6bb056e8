"""The sections of a report, by the headings of its text or by the labels of its XML: what the film shows.

An indication ("rule out pneumonia") or a comparison mentions findings that the film need not have. Headings are
those of MIMIC-CXR, CheXpert Plus and NIH reports.
"""

import re
from xml.parsers import expat

SECTIONS = ("findings", "impression")

_FINDINGS = r"FINDINGS?"
_IMPRESSION = r"IMPRESSIONS?|OPINION|CONCLUSIONS?|FINDINGS? ?(?:/|AND|&) ?IMPRESSIONS?"
_OTHER = (  # these end a section: they do not say what the film shows
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
_MAIN_WORDS = (
    ("IMPRESSION", "impression"),
    ("FINDINGS", "findings"),
    ("HISTORY", "other"),
    ("COMPARISON", "other"),
    ("INDICATION", "other"),
)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


def split_sections(text):
    """A report -> list of (kind, text of the section), kind one of findings, impression, other; [] without headings.

    An unknown heading inside findings or impression ("LUNGS:") belongs to it. Sections without a letter are left out.
    """
    starts = []  # (kind, where its text starts, where the words after the heading start, where the heading starts)
    for match in _HEADING.finditer(text):
        name = match[0].strip(" \t\n:").upper()
        begin = match.end()
        kind = next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), None)
        kind = kind or next((kind for word, kind in _MAIN_WORDS if word in name), None)
        if kind is None:
            if starts and starts[-1][0] != "other":
                continue
            kind = "findings" if _SHOWS.search(name) else "other"
            begin = match.start()  # its words are the subject of what follows
        starts.append((kind, begin, match.end(), match.start()))
    ends = [*(start[3] for start in starts), len(text)][1:]
    return [
        (kind, text[begin:end].strip())
        for (kind, begin, words, _), end in zip(starts, ends, strict=True)
        if any(map(str.isalpha, text[words:end]))
    ]


def cut(text, wanted=SECTIONS):
    """(the text of the wanted sections, whether it had none of them).

    Without any wanted one: findings or impression, whichever there is; else what follows the first blank line of the
    last section that has one (a history, then the report without a heading); else the whole text.
    """
    if not wanted:
        return text, False
    sections = split_sections(text)
    for names in (wanted, SECTIONS):
        found = [body for name in names for kind, body in sections if kind == name]
        if found:
            return "\n\n".join(found), False
    for _, body in reversed(sections):
        paragraphs = _BLANK_LINE.split(body, maxsplit=1)
        if len(paragraphs) == 2 and any(map(str.isalpha, paragraphs[1])):
            return paragraphs[1].strip(), True
    return text, True


class _Refused(Exception):
    pass


def read_openi(data: bytes):
    """Bytes of an Open-i XML file -> {label of an AbstractText in lower case: its text}; ValueError with a reason.

    A document type is refused, and with it every entity that could grow or reach for another file.
    """
    found, texts = {}, []

    def refuse(*_):
        raise _Refused

    def start(tag, attributes):
        if tag == "AbstractText":
            texts.append(found.setdefault(attributes.get("Label", "").strip().lower(), []))
            texts[-1].append("\n\n" if texts[-1] else "")

    def end(tag):
        if tag == "AbstractText":
            texts.pop()

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = lambda text: texts and texts[-1].append(text)
    try:
        parser.Parse(data, True)
    except _Refused:
        raise ValueError("has a document type, which is not read") from None
    except (expat.ExpatError, ValueError, LookupError):  # the last two: an encoding that is unknown
        raise ValueError("not well-formed XML") from None
    if not found:
        raise ValueError("has no AbstractText: not an Open-i report")
    return {label: "".join(parts).strip() for label, parts in found.items()}
