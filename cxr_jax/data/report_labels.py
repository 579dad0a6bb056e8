"""Reports -> a table of their labels: a row a report, and beside it a table of the rows that could not be read.

Report text is patient data: it is in no message, and in the table only where `LabelOptions.with_text` asks for it. JAX
is imported where it is first used, so that bad usage is told at once.
"""

import contextlib
import csv
import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from cxr_jax.data.report_rows import Report
from cxr_jax.errors import UserError, as_utf8, printable
from cxr_jax.runtime import whole_files
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

CHUNK = 4096  # reports labelled at a time,
CHUNK_BYTES = 1 << 23  # or fewer, if they are long
# As in CheXpert's tables.
_CELLS = {1: "1", 0: "0", -1: "-1", -2: ""}
UNREAD = "Unread"  # the last column: what of the report was not read
_ANOTHER_LANGUAGE = "another language"
_FIRST_SIDED = 3  # No Finding, Enlarged Cardiomediastinum and Cardiomegaly have no side
_SECONDS_BETWEEN_NEWS = 10
# Reasons for which a folder takes no file of ours; others (a full disk) are a failed run.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG)


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How reports are labelled, and what the table has beside the 14 labels."""

    lexicon: str | None = None  # other phrases than the built-in ones
    parents: bool = False  # a label also counts as a mention of its parent
    sides: bool = False  # add "<Label> side"
    with_text: bool = False  # add the text that was read


@dataclass
class LabelCounts:
    """What `label_reports` has seen."""

    reports: int = 0
    bad: int = 0
    empty: int = 0
    replaced: int = 0  # held bytes that are not UTF-8
    without_headings: int = 0
    foreign: int = 0  # in another language
    unread: int = 0  # with words that look like findings and are not known
    states: Counter[tuple[str, int]] = field(default_factory=Counter)  # by (label, state)
    first_bad: str = ""  # the first bad row and its reason
    first_chunk: int = 0  # reports in the chunk that compiled
    seconds: float = 0.0
    warm_seconds: float = 0.0  # after that chunk


# ---- The files -------------------------------------------------------------------------------------------------------


class LabelTable:
    """OUT and its errors file, written beside them under other names until `finish`.

    Attributes:
        parts: the paths of those other names: the errors file's, then OUT's.
        finishing: whether the files are about to have their names.
    """

    def __init__(self, out: Path, errors: Path, columns: Sequence[str], *, replace: bool) -> None:
        """Name the files; nothing is written before `open`.

        Args:
            out: where the table will stand.
            errors: where the list of bad rows will stand, if there are any.
            columns: the header of the table.
            replace: whether files that stand there may be replaced.
        """
        self.out, self.errors, self.replace = out, errors, replace
        self.finishing = False
        self.parts = [whole_files.partial_path(path) for path in (errors, out)]
        self._headers = (("source", "row", "reason"), columns)
        self._files: list[TextIO] = []
        self._writers: list[Any] = []

    def open(self) -> None:
        """Open both files and write their headers.

        Raises:
            UserError: where the folder takes no such file.
        """
        try:
            for part, header in zip(self.parts, self._headers, strict=True):
                # Names of files may hold bytes that are not UTF-8, which a table in UTF-8 may not.
                file = open(part, "w", encoding="utf-8", errors="backslashreplace", newline="")
                self._files.append(file)
                self._writers.append(csv.writer(file, lineterminator="\n"))
                self._writers[-1].writerow(header)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            raise UserError(f"{self.out}: cannot be written ({error.strerror})") from None

    def write_bad_row(self, cells: Sequence[object]) -> None:
        """Write a row of the errors file: source, row, reason."""
        self._writers[0].writerow(cells)

    def write_row(self, cells: Sequence[object]) -> None:
        """Write a row of the table."""
        self._writers[1].writerow(cells)

    def finish(self, *, any_bad: bool) -> None:
        """Give the files their names, the table last: where it stands, all is done."""
        self.finishing = True
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        errors_part, out_part = self.parts
        if any_bad:
            self._put(errors_part, self.errors)
        else:
            if self.replace:  # what an earlier run left there is not of this OUT
                self.errors.unlink(missing_ok=True)
            errors_part.unlink()
        try:
            self._put(out_part, self.out)
        except BaseException:
            if any_bad:
                self.errors.unlink(missing_ok=True)
            raise

    def _put(self, part: Path, path: Path) -> None:
        """Give a whole file its name; one that has come there meanwhile is only replaced if `replace` says so."""
        try:
            whole_files.give_name(part, path, replace=self.replace)
        except FileExistsError:
            raise UserError(f"{path}: has been made meanwhile; --force replaces it") from None

    def discard(self) -> None:
        """Close and remove what has been written."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self.unlink()

    def unlink(self) -> None:
        """Remove what has been written, open or not: all that a signal handler may do."""
        for part in self.parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def table_columns(options: LabelOptions) -> list[str]:
    """Name the columns of the table: id, perhaps the text, the 14 labels, perhaps their sides, what was not read."""
    from cxr_jax.labels import CHEXPERT_14

    columns = ["id"]
    if options.with_text:
        columns.append("Reports")
    columns += CHEXPERT_14
    if options.sides:
        columns += [f"{label} side" for label in CHEXPERT_14[_FIRST_SIDED:]]
    return [*columns, UNREAD]


# ---- Labelling -------------------------------------------------------------------------------------------------------


def _good_chunks(
    reports: Iterable[Report], handle_bad: Callable[[Report], None]
) -> Iterator[list[Report]]:
    """Gather good rows into lists of at most CHUNK reports and about CHUNK_BYTES; `handle_bad` gets the others."""
    chunk: list[Report] = []
    size = 0
    for report in reports:
        if report.text is None:
            handle_bad(report)
            continue
        chunk.append(report)
        size += len(report.text)
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def label_reports(
    reports: Iterable[Report], table: LabelTable, options: LabelOptions, counts: LabelCounts
) -> None:
    """Label reports and write a row for each, in bounded memory. Tells a terminal now and then how far it is.

    Args:
        reports: good and bad rows, as `report_files.read` gives them.
        table: an open table.
        options: how to label.
        counts: filled on the way.

    Raises:
        UserError: for a bad lexicon.
    """
    from cxr_jax import labels

    def list_bad(report: Report) -> None:
        table.write_bad_row((as_utf8(report.source), report.row, report.reason))
        counts.first_bad = counts.first_bad or f"{report.source}: row {report.row}: {report.reason}"
        counts.bad += 1

    start = last_news = warm_start = time.monotonic()
    for chunk in _good_chunks(reports, list_bad):
        texts = [cast(str, report.text) for report in chunk]  # good rows have one
        reading = labels.read_reports(texts, lexicon=options.lexicon, parents=options.parents)
        names = ("state", "right", "left", "foreign", "unread")
        columns = (reading[name].tolist() for name in names)
        for report, states, right, left, is_foreign, unread in zip(chunk, *columns, strict=True):
            cells = _row_cells(report, states, right, left, options)
            table.write_row([*cells, _unread_cell(is_foreign, unread)])
            counts.foreign += is_foreign
            counts.unread += unread > 0 and not is_foreign
            counts.states.update(zip(labels.CHEXPERT_14, states, strict=True))
            counts.empty += not report.text.strip()
            counts.replaced += report.replaced
            counts.without_headings += report.without_headings
        if not counts.reports:  # the first chunk compiles
            counts.first_chunk, warm_start = len(chunk), time.monotonic()
        counts.reports += len(chunk)
        # A person who waits is told how far it is; a log is not filled.
        if sys.stderr.isatty() and time.monotonic() - last_news > _SECONDS_BETWEEN_NEWS:
            last_news = time.monotonic()
            rate = counts.reports / (last_news - start)
            print(f"{counts.reports:,} reports, {rate:,.0f}/s", file=sys.stderr)
    counts.seconds = time.monotonic() - start
    counts.warm_seconds = time.monotonic() - warm_start


def _row_cells(
    report: Report, states: list[int], right: list[bool], left: list[bool], options: LabelOptions
) -> list[str]:
    from cxr_jax.labels.taxonomy import side_name

    cells = [report.id]
    if options.with_text:
        cells.append(cast(str, report.text))
    cells += [_CELLS[state] for state in states]
    if options.sides:
        cells += map(side_name, right[_FIRST_SIDED:], left[_FIRST_SIDED:])
    return cells


def _unread_cell(is_foreign: bool, unread: int) -> str:
    """What of a report was not read: all of it, or how many words that look like findings."""
    if is_foreign:
        return _ANOTHER_LANGUAGE
    if unread:
        return f"{unread} word{'s' if unread > 1 else ''}"
    return ""


def summarise(out: str, counts: LabelCounts, sections: Sequence[str]) -> str:
    """Write the table for a terminal: counts of states, and what was unusual.

    Args:
        out: the name of the table.
        counts: of `label_reports`.
        sections: those that were asked for; none for the whole text.
    """
    from cxr_jax.labels import CHEXPERT_14

    total = counts.reports
    rate = ""
    if warm := total - counts.first_chunk:
        per_second = warm / counts.warm_seconds
        rate = f" ({per_second:,.0f}/s after the first {counts.first_chunk:,})"
    lines = [
        f"{printable(out)}: {total:,} reports in {counts.seconds:.1f} s{rate}",
        f"{'label':<28}{'positive':>12}{'negative':>12}{'uncertain':>12}{'not mentioned':>16}",
    ]
    for label in CHEXPERT_14:
        positive, negative, uncertain, nothing = (
            counts.states[label, state] for state in (1, 0, -1, -2)
        )
        lines.append(f"{label:<28}{positive:>12,}{negative:>12,}{uncertain:>12,}{nothing:>16,}")
    lines.append(f"empty reports: {counts.empty:,}; bad rows: {counts.bad:,}")
    if counts.empty == total:
        lines.append("Warning: every report is empty")
    if counts.replaced:
        lines.append(
            f"Warning: {counts.replaced:,} reports hold bytes that are not UTF-8, read as U+FFFD"
        )
    if counts.foreign:
        lines.append(
            f"Warning: {counts.foreign:,} of {total:,} reports are in another language; nothing is affirmed in them "
            f"(column {UNREAD})"
        )
    if counts.unread:
        lines.append(
            f"{counts.unread:,} reports hold abbreviations or foreign words that are not known: No Finding is left "
            f"blank in them (column {UNREAD})"
        )
    if counts.without_headings and sections:
        lines.append(
            f"{counts.without_headings:,} reports have no heading of these sections: {', '.join(sections)}"
        )
    return "\n".join([*lines, NOT_FOR_DIAGNOSIS])
