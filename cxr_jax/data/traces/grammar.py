"""From the sentences of a report to a trace: sorted into the tour, in the report's words, nothing added.

What the sentences say is read before and after (`labels.sentences`): a wording is taken only where it claims exactly
what the sentence claims.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cxr_jax.data.report_rows import Report
from cxr_jax.data.traces import tour, wording
from cxr_jax.labels.sentences import Claim, Reading, Statement, read_statements

MAX_SENTENCE = 2000  # characters; nobody writes longer ones
# Why a sentence that says something cannot be told.
UNTOLD = _LONG, _BLANK, _COMPARISON, _OTHERWISE, CORRECTED = (
    f"a finding in a sentence of over {MAX_SENTENCE:,} characters",
    "a finding in a sentence with a de-identified blank",
    "a finding that is told only by comparison",
    "a finding in a sentence that reads otherwise by itself",
    "a finding behind an addendum or a correction, which may take back what was said before",
)
COLON, STOP = ":", "."  # what may stand behind the name of a part of the tour


class Material(NamedTuple):
    """A sentence that a trace may have.

    Attributes:
        text: as the trace has it.
        claims: what it says, read by itself.
        source: number of the report's sentence that it comes from.
        is_impression: it stands in the report's impression.
        is_aside: it speaks of technique, people, advice or history.
    """

    text: str
    claims: frozenset[Claim]
    source: int
    is_impression: bool = False
    is_aside: bool = False


class Draft(NamedTuple):
    """What a trace can be written from.

    Attributes:
        material: in the report's order.
        untold: why sentences that say something cannot be told, in words that hold no text.
    """

    material: tuple[Material, ...]
    untold: tuple[str, ...]


# ---- Sentences of reports -> material ------------------------------------------------------------------------------


def draft(
    reports: Sequence[Report],
    readings: Sequence[Reading],
    *,
    comparisons: str = wording.DROP,
    lexicon: str | None = None,
) -> list[Draft]:
    """Word the sentences of reports for traces.

    Args:
        reports: good rows.
        readings: of their texts.
        comparisons: what becomes of comparisons with other films, of `wording.COMPARISONS`.
        lexicon: as for `read_statements`.
    """
    choices = [
        [
            wording.wordings(statement.text, statement.claims, comparisons)
            if len(statement.text) <= MAX_SENTENCE
            else []
            for statement in reading.statements
        ]
        for reading in readings
    ]
    # All wordings of all reports are read at once.
    texts = sorted(
        {
            text
            for report_choices in choices
            for wordings in report_choices
            for worded in wordings
            for text in worded
        }
    )
    claims = dict(zip(texts, map(_all_claims, read_statements(texts, lexicon)), strict=True))
    return [
        _draft_one(report, reading, report_choices, claims)
        for report, reading, report_choices in zip(reports, readings, choices, strict=True)
    ]


def _all_claims(reading: Reading) -> frozenset[Claim]:
    return frozenset().union(*(statement.claims for statement in reading.statements))


def _draft_one(
    report: Report,
    reading: Reading,
    choices: Sequence[list[list[str]]],
    claims: dict[str, frozenset[Claim]],
) -> Draft:
    material: list[Material] = []
    untold: dict[str, None] = {}
    # Which sentences are of the impression is told by where they stand.
    starts = _starts(report, reading.statements)
    if _takes_back(report, reading.statements, starts):
        untold[CORRECTED] = None
    stands = False  # whether the sentence before is told
    for number, (statement, wordings, start) in enumerate(
        zip(reading.statements, choices, starts, strict=True)
    ):
        worded = _faithful(statement, wordings, claims)
        leans = wording.leans_on_another(statement.text)
        # Without the sentence that it leans on nobody knows what "this" is.
        if worded and leans and not stands:
            worded = None if statement.claims else []
        stands = bool(worded)
        if worded is None:
            untold[_why_untold(statement.text)] = None
            continue
        is_impression = report.impression is not None and start >= report.impression
        is_aside = wording.is_aside(statement.text)
        material += [
            Material(text, claims[text], number, is_impression, is_aside) for text in worded
        ]
    return Draft(tuple(material), tuple(untold))


def _faithful(
    statement: Statement, choices: Sequence[list[str]], claims: dict[str, frozenset[Claim]]
) -> list[str] | None:
    """The first wording that claims what the sentence claims; [] where nothing is lost without it; None for none."""
    for worded in choices:
        said = frozenset().union(*(claims[text] for text in worded))
        if said != statement.claims:
            continue
        # A comparison that was left out may leave a subject of which nothing is said.
        is_bare = not said and worded != [wording.carried_over(statement.text)]
        return [] if is_bare else worded
    # Nothing fits: a loss where the sentence says something, and none where it does not.
    return None if statement.claims else []


def _takes_back(report: Report, statements: Sequence[Statement], starts: Sequence[int]) -> bool:
    """Whether a report corrects itself by more than who was told."""
    text = report.text or ""
    correction = wording.CORRECTS.search(text)
    if correction is None:
        return False
    # Which of two findings holds, the parser cannot say: it reads both, or nothing where one is called an artefact.
    return not wording.is_aside(text[correction.end() :] or "addendum") or any(
        statement.claims and start + len(statement.text) > correction.start()
        for statement, start in zip(statements, starts, strict=True)
    )


def _why_untold(text: str) -> str:
    """Why a sentence cannot be told, one of `UNTOLD`: it holds none of its words."""
    # The first cause that applies.
    if len(text) > MAX_SENTENCE:
        return _LONG
    if wording.BLANK.search(text):
        return _BLANK
    if wording.COMPARES.search(text):
        return _COMPARISON
    return _OTHERWISE


def _starts(report: Report, statements: Sequence[Statement]) -> list[int]:
    """Where the sentences stand in the report's text."""
    starts, place = [], 0
    for statement in statements:
        place = max((report.text or "").find(statement.text, place), place)
        starts.append(place)
        place += len(statement.text)
    return starts


# ---- Material -> trace ---------------------------------------------------------------------------------------------


def needed(material: Sequence[Material]) -> list[Material]:
    """Leave out asides that say nothing, or nothing that the rest does not say as well, and what says it again."""
    rest = frozenset().union(
        *(material_part.claims for material_part in material if not material_part.is_aside)
    )
    # Once in the findings and once in the impression is how reports are written.
    kept: list[Material] = []
    seen: set[tuple[str, bool]] = set()
    for material_part in material:
        if material_part.is_aside and material_part.claims <= rest:
            continue
        key = (material_part.text.casefold(), material_part.is_impression)
        if key not in seen:
            seen.add(key)
            kept.append(material_part)
    return kept


def sort_into_tour(material: Sequence[Material]) -> dict[str, list[str]]:
    """Sort sentences into the parts of the tour; each keeps its words, and sentences of one part the report's order.

    Those of an impression are the summary, where there are findings before it; else they are sorted like findings.
    """
    # An impression alone is all there is of the report: sorted, it is a tour.
    has_findings = not all(material_part.is_impression for material_part in material)
    sections: dict[str, list[str]] = {section: [] for section in tour.TOUR}
    before = ""  # where the sentence before stands
    source = -1
    for material_part in material:
        # Nothing is said of an organ, a label or an abnormality: a remark on the film.
        section = tour.place(material_part.text, material_part.claims)
        if material_part.is_impression and has_findings:
            if section == tour.QUALITY and not material_part.claims:
                continue
            section = tour.SUMMARY
        elif (
            wording.leans_on_another(material_part.text)
            and before
            and material_part.source != source
        ):
            section = before
        elif section == tour.SUMMARY and not material_part.claims:
            continue
        sections[section].append(material_part.text)
        before, source = section, material_part.source
    return {section: texts for section, texts in sections.items() if texts}


def write(sections: dict[str, list[str]], mark: str = COLON) -> str:
    """Write a trace: the name of each part of the tour, and its sentences.

    Args:
        sections: of `sort_into_tour`.
        mark: what stands behind the names. With a colon a name can join what the first sentence says; a full stop parts
            them.
    """
    parts = []
    for section, texts in sections.items():
        # "Devices." would say that there are some.
        behind = COLON if section == tour.DEVICES else mark
        parts.append(f"{section}{behind} {' '.join(texts)}")
    return " ".join(parts)
