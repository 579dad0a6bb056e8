"""Reports -> rows to imitate, each verified, and records of what was rejected and why."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cxr_jax.data.json_rows import BadRowError, is_absent
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.report_rows import Report
from cxr_jax.data.sources import patients
from cxr_jax.data.sources.dialogue import parse_dialogue
from cxr_jax.data.sources.image_files import BadNameError, split_name
from cxr_jax.data.sources.label_table import IMAGE_COLUMNS
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.data.studies import order
from cxr_jax.data.traces import answers, grammar, verify, wording
from cxr_jax.data.traces.grammar import Draft
from cxr_jax.errors import UserError, as_utf8, printable
from cxr_jax.labels.sentences import Reading, read_statements
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

CHUNK = 256  # reports at a time: each is read in one of few programs, and held in memory with all its sentences
GRAMMAR = "grammar"  # who writes, where no endpoint does


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How rows are made.

    Attributes:
        prompt: what is asked of every film.
        policy: what blank and uncertain labels count as.
        comparisons: what becomes of comparisons with other films, of `wording.COMPARISONS`.
        image_column: of the film's path; None: the first usual name.
        lexicon: other phrases than the built-in ones.
        tries: how many traces of an endpoint are looked at for one report.
    """

    prompt: str = FIND_PROMPT
    policy: LabelPolicy = LabelPolicy()  # noqa: RUF009 - frozen
    comparisons: str = wording.DROP
    image_column: str | None = None
    lexicon: str | None = None
    tries: int = 1


@dataclass
class TraceCounts:
    """What `make_rows` has seen."""

    reports: int = 0
    kept: int = 0
    with_image: int = 0
    with_labels: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of rejected reports, by kind


class Made(NamedTuple):
    """A row, or the record of a report that gave none: one of the two is None."""

    row: dict[str, Any] | None
    rejected: dict[str, Any] | None


class Case(NamedTuple):
    """A report on its way to a row.

    Attributes:
        labels: of its table; None where it has none.
        states: of those, else of the report.
        names: the answer.
    """

    report: Report
    reading: Reading
    labels: answers.Labels | None
    states: dict[str, int | None]
    names: list[str]
    draft: Draft


# Writes traces of cases: one text, or a reason why there is none, for each.
Writer = Callable[[Sequence[Case]], Sequence["Written"]]


class Written(NamedTuple):
    """A trace, or why there is none."""

    text: str | None
    reason: str = ""


# ---- The whole way -------------------------------------------------------------------------------------------------


def make_rows(
    reports: Iterable[Report],
    options: TraceOptions,
    counts: TraceCounts,
    writer: Writer | None = None,
) -> Iterator[Made]:
    """Make rows of reports, in their order.

    Args:
        reports: rows as `report_files.read` gives them, with their cells.
        options: how.
        counts: filled on the way.
        writer: who writes the traces; None: the grammar.

    Yields:
        A row or a rejected record for each report.

    Raises:
        UserError: for the first bad row of the input, named by file and row.
    """
    chunk: list[tuple[Report, answers.Labels | None]] = []
    for report in reports:
        chunk.append((report, _labels_of(report, options)))
        if len(chunk) == CHUNK:
            yield from _make_chunk(chunk, options, counts, writer)
            chunk = []
    if chunk:
        yield from _make_chunk(chunk, options, counts, writer)


def _labels_of(report: Report, options: TraceOptions) -> answers.Labels | None:
    """The labels of a row, which is good as far as can be seen."""
    try:
        if report.text is None:
            raise BadRowError(report.reason)
        split_image(report, options)
        patients.find_patient(report.cells, [])
        return answers.find_labels(report.cells)
    except (BadRowError, BadNameError, patients.LostDigitsError) as reason:
        raise UserError(f"{report.source}: row {report.row}: {reason}") from None


def _make_chunk(
    chunk: Sequence[tuple[Report, answers.Labels | None]],
    options: TraceOptions,
    counts: TraceCounts,
    writer: Writer | None,
) -> Iterator[Made]:
    # Read the reports, and word their sentences.
    reports = [report for report, _ in chunk]
    texts = [report.text or "" for report in reports]
    readings = read_statements(texts, options.lexicon)
    drafts = grammar.draft(
        reports, readings, comparisons=options.comparisons, lexicon=options.lexicon
    )
    # Settle what is to be answered: a table goes before the report.
    report_cases = []
    for (report, labels), reading, draft in zip(chunk, readings, drafts, strict=True):
        states = labels.states if labels else answers.states_of(reading)
        names = answers.positive(states, options.policy)
        report_cases.append(Case(report, reading, labels, states, names, draft))

    # What no trace could mend is not written at all.
    reasons = [_reasons_before(report_case) for report_case in report_cases]
    results: list[tuple[str, list[str]]] = [("", case_reasons) for case_reasons in reasons]
    open_cases = [number for number, case_reasons in enumerate(reasons) if not case_reasons]
    for attempt in range(options.tries):
        # The grammar would write the same again.
        if not open_cases or (attempt and writer is None):
            break
        judged = _write_and_judge([report_cases[number] for number in open_cases], options, writer)
        for number, result in zip(open_cases, judged, strict=True):
            results[number] = result
        open_cases = [number for number in open_cases if results[number][1]]
    for report_case, (trace, case_reasons) in zip(report_cases, results, strict=True):
        yield _finish(report_case, trace, case_reasons, options, counts)


def _reasons_before(report_case: Case) -> list[str]:
    """Why a report gives no row, whatever is written of it."""
    if not (report_case.report.text or "").strip():
        return ["the report is empty"]
    # Of another language only denials are read, so nothing could be held against it.
    if report_case.reading.is_foreign:
        return ["the report is in another language"]
    reasons = (
        answers.disagreements(report_case.labels, report_case.reading) if report_case.labels else []
    )
    if not report_case.names:
        reasons.append("no label is positive, so there is nothing to answer")
    return reasons


def _write_and_judge(
    report_cases: Sequence[Case], options: TraceOptions, writer: Writer | None
) -> list[tuple[str, list[str]]]:
    """Traces of cases, and why each is rejected; no reason: it is kept."""
    if writer is None:
        # A name with a colon reads best, and may join what its first sentence says; then a full stop parts them.
        judged = judge(
            report_cases, [write_by_grammar(report_case) for report_case in report_cases], options
        )
        # A second look only at those that need one.
        again = [number for number, (_, reasons) in enumerate(judged) if reasons]
        parted = [write_by_grammar(report_cases[number], grammar.STOP) for number in again]
        second = judge([report_cases[number] for number in again], parted, options)
        for number, result in zip(again, second, strict=True):
            if not result[1]:
                judged[number] = result
        return judged
    return judge(report_cases, writer(report_cases), options)


def write_by_grammar(report_case: Case, mark: str = grammar.COLON) -> Written:
    """Write a case's trace from its material."""
    sections = grammar.sort_into_tour(grammar.needed(report_case.draft.material))
    return Written(grammar.write(sections, mark))


def judge(
    report_cases: Sequence[Case], written: Sequence[Written], options: TraceOptions
) -> list[tuple[str, list[str]]]:
    """Read traces back.

    Returns:
        Each trace with the reasons why it is rejected; none: it is kept.
    """
    texts = [" ".join((answer.text or "").split()) for answer in written]
    # What has no good form is not read: it may be of any length.
    forms = [
        [answer.reason] if answer.text is None else verify.check_form(text)
        for answer, text in zip(written, texts, strict=True)
    ]
    readings = read_statements(
        ["" if form else text for form, text in zip(forms, texts, strict=True)], options.lexicon
    )
    judged = []
    for report_case, answer, text, form, reading in zip(
        report_cases, written, texts, forms, readings, strict=True
    ):
        reasons = list(form)
        if not form:
            reasons = verify.compare(report_case.reading, reading)
        # Why it could not be otherwise, where sentences could not be told; what is taken back, a writer may have told.
        untold = report_case.draft.untold
        if (reasons and answer.text is not None) or grammar.CORRECTED in untold:
            reasons += untold
        if not form:
            reasons += verify.unsupported(reading, report_case.draft.material)
        judged.append((text, reasons))
    return judged


# ---- Rows ----------------------------------------------------------------------------------------------------------


def split_image(report: Report, options: TraceOptions) -> str | None:
    """Find the film of a row; None where it names none.

    Raises:
        BadRowError: where the column that was asked for is not there.
        BadNameError: for what is no path relative to the folder of films.
    """
    by_name = {name.strip().lower(): value for name, value in report.cells.items()}
    wanted = (options.image_column.strip().lower(),) if options.image_column else IMAGE_COLUMNS
    if options.image_column and wanted[0] not in by_name:
        raise BadRowError(f"no column --image_column={options.image_column}")
    for name in wanted:
        value = by_name.get(name)
        if isinstance(value, str) and not is_absent(value.strip()):
            split_name(value.strip())
            return value.strip()
    return None


def _finish(
    report_case: Case, trace: str, reasons: list[str], options: TraceOptions, counts: TraceCounts
) -> Made:
    # Rows are checked by the reader that training uses, so that none is refused later.
    counts.reports += 1
    counts.with_labels += report_case.labels is not None
    row = None
    if not reasons:
        row = make_row(report_case, trace, options)
        try:
            if "image" in row:
                parse_dialogue(row)
        except BadRowError as reason:
            row, reasons = None, [f"no row to train on: {reason}"]
    if row is not None:
        counts.kept += 1
        counts.with_image += "image" in row
        return Made(row, None)
    counts.reasons[_kind(reasons)] += 1
    # No text of the report: this file may be looked at where reports may not.
    report = report_case.report
    return Made(
        None,
        {
            "id": as_utf8(report.id),
            "source": as_utf8(report.source),
            "row": report.row,
            "reasons": list(dict.fromkeys(reasons)),
        },
    )


def make_row(report_case: Case, trace: str, options: TraceOptions) -> dict[str, Any]:
    """Make a row in the published form of sft.jsonl, with the labels and their policy beside its solution."""
    report = report_case.report
    image = split_image(report, options)
    paths = [path for path in (image, report.id, report.source) if path]
    solution = ", ".join(report_case.names)
    row: dict[str, Any] = {"id": as_utf8(report.id)}
    if image:
        row["image"] = image
    # Keys by which splits keep patients apart and studies together.
    if patient := patients.find_patient(report.cells, paths):
        row["subject_id"] = patient
    if study := order.find_study(report.cells, paths):
        row["study_id"] = study
    # The film stands before the question, as in the published rows.
    question: list[dict[str, str]] = [{"type": "text", "text": options.prompt}]
    if image:
        question.insert(0, {"type": "image", "image": image})
    target = f"<think>{trace}</think><answer>{solution}</answer>"
    return row | {
        "solution": solution,
        "labels": {
            label: state for label, state in report_case.states.items() if state is not None
        },
        "policy": {"blank": options.policy.blank, "uncertain": options.policy.uncertain},
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": target}]},
        ],
    }


def _kind(reasons: Sequence[str]) -> str:
    """Why a report gave no row, in one line without what differs from row to row; what could not be told goes first."""
    for reason in reasons:
        if reason in grammar.UNTOLD:
            return reason
    first = reasons[0]
    name, colon, _ = first.partition(": ")
    if colon and name in CHEXPERT_14:
        if "by the labels" in first:
            return "labels and report differ"
        return "trace and report differ"
    if first.startswith("sentence "):
        return "a sentence of the trace stands on none of the report's, or comes again and again"
    return first


def summarise(out: str, counts: TraceCounts, options: TraceOptions) -> str:
    """Write for a terminal how many reports gave a row, and why the others did not."""
    share = counts.kept / counts.reports
    lines = [
        f"{printable(out)}: {counts.kept:,} of {counts.reports:,} reports gave a row ({share:.1%}); "
        f"{counts.with_image:,} rows name a film, {counts.with_labels:,} reports have labels of a table",
        f"labels: {options.policy}; comparisons={options.comparisons}",
    ]
    lines += [f"rejected, {reason}: {count:,}" for reason, count in counts.reasons.most_common()]
    return "\n".join([*lines, NOT_FOR_DIAGNOSIS])
