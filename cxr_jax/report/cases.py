"""The report's cases: radiograph, reasoning and answer against the truth, worst first."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from markupsafe import Markup

from cxr_jax.labels.answers import FORMAT_PATTERN
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report.markup import muted, render, set_title
from cxr_jax.report.records import Case

# A gap, not an end: the marks of a sentence stay with it.
_SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+(?=\S)")
UNSCORED = 2.0  # sorts after every score


class Mark(NamedTuple):
    """A label of an answer or of the truth. kind: "correct", "missed", "false" or "open"."""

    kind: str
    label: str


class Trace(NamedTuple):
    """A completion of valid format, cut into sentences; answer: as written."""

    sentences: list[str]
    answer: str


@dataclass(frozen=True)
class Card:
    """What the page shows of a case. kinds, labels: what the script filters by."""

    case: Case
    uri: str
    marks: list[Mark]
    trace: Trace | None
    sort_by: float
    origin: str
    kinds: str
    labels: str


# ---- Answers against the truth ----


def compare_labels(
    answer: Collection[str], truth: Collection[str], known: Collection[str] | None
) -> list[Mark]:
    """Hold the labels of an answer against those that are true.

    Args:
        answer: the names that the answer has, also those that are none of the 14.
        truth: the labels that are there.
        known: the labels that the reference decides; None: all.

    Returns:
        A mark for each label that is named, or true and known: in the order of the 14, unknown names last.
    """
    decided = set(CHEXPERT_14 if known is None else known)
    # Names that are none of the 14 follow: a reader sees them in the answer, too.
    unknown_names = [label_name for label_name in answer if label_name not in CHEXPERT_14]
    marks = []
    for label in [*CHEXPERT_14, *unknown_names]:
        is_named, is_true = label in answer, label in truth
        # What the reference does not decide is neither right nor wrong.
        if is_named and label in CHEXPERT_14 and label not in decided:
            marks.append(Mark("open", label))
        elif is_named:
            marks.append(Mark("correct" if is_true else "false", label))
        elif is_true and label in decided:
            marks.append(Mark("missed", label))
    return marks


def case_marks(case: Case) -> list[Mark]:
    """Compare a case's answer with its truth.

    A completion of invalid format names nothing, as in the score, even if an answer can be made out in it.
    """
    has_valid_format = FORMAT_PATTERN.match(case.completion) is not None
    return compare_labels(case.answer if has_valid_format else [], case.truth, case.known)


def _trace(completion: str) -> Trace | None:
    """The parts of a completion, None where its format is invalid."""
    # The pattern of the reward: what it takes for invalid is shown raw.
    parts = FORMAT_PATTERN.match(completion)
    if parts is None:
        return None
    sentences = _SENTENCE_GAP.split(parts[1].strip())
    return Trace([sentence for sentence in sentences if sentence.strip()], parts[2].strip())


# ---- The section ----


def _score(case: Case) -> float:
    if case.score is None:
        return UNSCORED
    return float(case.score)


def _card(case: Case, image_uri: str) -> Card:
    marks, trace = case_marks(case), _trace(case.completion)
    # The script filters by what stands in the card's attributes.
    mark_kinds = [mark.kind for mark in marks]
    if trace is None:
        mark_kinds.append("invalid")
    # Both may be empty: a run of one model and one set has nothing to tell apart.
    origin_names = [
        origin_name for origin_name in (set_title(case.hospital), case.model) if origin_name
    ]
    return Card(
        case=case,
        uri=image_uri,
        marks=marks,
        trace=trace,
        sort_by=_score(case),
        origin=", ".join(origin_names),
        kinds=" ".join(dict.fromkeys(mark_kinds)),
        labels="|".join(dict.fromkeys(mark.label for mark in marks)),
    )


def section(cases: Sequence[tuple[Case, str]], *, shows_sides: bool = True) -> Markup:
    """Draw the cases. The section works without its script: all cases, worst first.

    Args:
        cases: each with the data URI of its PNG.
        shows_sides: mark the patient's right and left (the image is known to be in the usual orientation).
    """
    if not cases:
        return muted("No case was recorded.")
    # Worst first, in the file too: the order holds without the script.
    cards = sorted((_card(case, uri) for case, uri in cases), key=attrgetter("sort_by"))
    shown_cases = [card.case for card in cards]
    # Only labels that occur can be chosen.
    mentioned = {label for case in shown_cases for label in [*case.answer, *case.truth]}
    # One prompt for all is shown once, above the cases.
    prompts = {case.prompt for case in shown_cases}
    return render(
        "cases.html",
        cards=cards,
        labels={label_name: label_name for label_name in CHEXPERT_14 if label_name in mentioned},
        sets={case.hospital: set_title(case.hospital) for case in shown_cases},
        shared_prompt=prompts.pop() if len(prompts) == 1 else None,
        shows_sides=shows_sides,
    )
