"""Tables of reports, a report a row: CSV, TSV and JSON (lines or an array), each also compressed by gzip."""

import contextlib
import csv
from collections.abc import Generator, Iterator
from typing import Any, TextIO

from cxr_jax.data import json_rows, report_rows
from cxr_jax.data.json_rows import BadRowError, is_null
from cxr_jax.data.report_rows import (
    TEXT_COLUMNS,
    TORN_ERRORS,
    TORN_REASON,
    BadReportError,
    Columns,
    Options,
    Report,
    clean_text,
    file_kind,
    find_columns,
    number_lines,
    open_text,
    read_line,
    report_from_columns,
)
from cxr_jax.data.report_sections import SECTIONS
from cxr_jax.data.sources.table import CsvReader
from cxr_jax.errors import UserError

_REREAD = 1 << 26  # characters of torn CSV records that are read a second time, in each file
_MAX_KEY_SETS = 1000  # of JSON objects: those that differ from row to row must not fill the memory
_BLANK = "\n\r\t \x00\ufeff"

# ---- CSV -------------------------------------------------------------------------------------------------------------


class _RecordLines:
    """The lines of a file for CsvReader. `record` holds the present record's, so that a torn one can be left."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.record: list[str] = []
        self.size = 0  # characters of the record
        # Lines to be read a second time, the next one last.
        self._put_back: list[str] = []
        self._spare = _REREAD

    def __iter__(self) -> "_RecordLines":
        return self

    def __next__(self) -> str:
        line = self._put_back.pop() if self._put_back else read_line(self.file)
        if line == "":
            raise StopIteration
        self.record.append(line or "")
        self.size += len(line or "")
        if line is None or self.size > report_rows.MAX_RECORD:
            raise csv.Error
        return line

    def next_record(self) -> None:
        self.record, self.size = [], 0

    def leave_torn(self) -> None:
        """Go on at the second line of the record: a quote that is never closed costs one line, not the file."""
        if len(self.record) > 1 and self.size <= self._spare:
            self._spare -= self.size
            self._put_back += reversed(self.record[1:])


def _csv_records(path: str, delimiter: str) -> Generator[list[str] | BadReportError, None, None]:
    """Yield the records of a CSV file: a list of cells, or why it is none. Blank lines are left out."""
    with open_text(path) as file:
        lines = _RecordLines(file)
        reader = CsvReader(lines, delimiter, report_rows.MAX_RECORD)
        while True:
            lines.next_record()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                # `read_line` gives None for a line that is too long, which stands in the record as "".
                is_long = lines.size > report_rows.MAX_RECORD or lines.record[-1:] == [""]
                lines.leave_torn()
                if is_long:
                    yield BadReportError(f"over {report_rows.MAX_RECORD:,} characters")
                else:
                    yield BadReportError("not valid CSV (is a quote not closed?)")
            except TORN_ERRORS:
                yield BadReportError(TORN_REASON)
                return
            else:
                if cells:
                    yield cells


class CsvTable:
    """A CSV or TSV table: the delimiter is the one with which the header has a text column."""

    def __init__(self, path: str, options: Options) -> None:
        """Read the header.

        Raises:
            UserError: for a table that cannot be used as a whole.
        """
        self.path, self.options = path, options
        delimiters = "\t" if file_kind(path) == ".tsv" else ",;\t"
        if not options.header:
            delimiters = delimiters[0]
        for delimiter in delimiters:
            self.delimiter = delimiter
            self.names, self.columns = self._read_header()
            self.width = len(self.names)
            if self.columns.texts():
                break
        self._check_columns()
        if options.header:
            with contextlib.closing(_csv_records(path, self.delimiter)) as records:
                next(records)
                if next(records, None) is None:
                    raise UserError(f"{path}: has a header and no rows")

    def _read_header(self) -> tuple[list[str], Columns]:
        """What the columns are called, by their numbers without a header, and which is which."""
        with contextlib.closing(_csv_records(self.path, self.delimiter)) as records:
            header = next(records, None)
            if header is None:
                raise UserError(f"{self.path}: is empty")
            if isinstance(header, BadReportError):
                raise UserError(f"{self.path}: the first record: {header}")
        width = len(header)
        if self.options.header:
            return header, find_columns(zip(header, range(width), strict=True), self.options)
        # Without a header columns have numbers; the only column needs none.
        options = self.options
        if options.text_column is None and width == 1:
            options = options._replace(text_column="1")
        numbers = [str(index + 1) for index in range(width)]
        return numbers, find_columns(zip(numbers, range(width), strict=True), options)

    def _check_columns(self) -> None:
        options, texts = self.options, self.columns.texts()
        if not texts and options.text_column:
            raise UserError(f"{self.path}: has no column --text_column={options.text_column}")
        if not texts and not options.header:
            raise UserError(
                f"{self.path}: has {self.width} columns; --text_column=NUMBER says which one is the text"
            )
        if not texts:
            known = ", ".join([*TEXT_COLUMNS, *SECTIONS])
            raise UserError(
                f"{self.path}: has no text column (looked for {known}); give --text_column=NAME, "
                "or --no_header if its first line is a report"
            )
        if options.id_column and self.columns.id is None:
            raise UserError(f"{self.path}: has no column --id_column={options.id_column}")
        if self.columns.id in texts:  # report text is only written with --with_text
            raise UserError(f"{self.path}: --id_column={options.id_column} is the text")

    def __iter__(self) -> Iterator[Report]:
        """Yield a report a record."""
        records = _csv_records(self.path, self.delimiter)
        if self.options.header:
            next(records)
        for row, cells in enumerate(records, 1):
            report_id = f"{self.options.prefix}{row}"
            if isinstance(cells, BadReportError):
                yield Report(self.path, row, report_id, None, str(cells))
                continue
            # Too many: a comma in an unquoted report. Too few: the middle of a torn one. Both would give half a text.
            if len(cells) != self.width:
                reason = f"{len(cells)} cells, {self.width} columns"
                yield Report(self.path, row, report_id, None, reason)
                continue
            if self.columns.id is not None:
                report_id = clean_text(cells[self.columns.id])[0]
            report = report_from_columns(
                self.path, row, report_id, self.columns, cells.__getitem__, self.options.sections
            )
            if self.options.with_cells:
                report = report._replace(cells=dict(zip(self.names, cells, strict=True)))
            yield report


# ---- JSON ------------------------------------------------------------------------------------------------------------

_START = 4096  # characters that tell an array from lines


class JsonTable:
    """An object a line, or an array of them, with the columns of a CSV table as keys. Blank lines are left out.

    Lines are read as a stream; an array is held in memory, and has the size limit of `json_rows`.
    """

    def __init__(self, path: str, options: Options) -> None:
        """Look for a row.

        Raises:
            UserError: for a file without one, or an array that cannot be read at all.
        """
        self.path, self.options = path, options
        with open_text(path, "\n") as file:
            try:
                start = file.read(_START)
                while start and not start.strip(_BLANK):
                    start = file.read(_START)
            except TORN_ERRORS:
                raise UserError(f"{path}: the compressed data is damaged") from None
            if start == "":
                raise UserError(f"{path}: is empty")
        # By its first bytes: an array on one line may be longer than any line that is read.
        self.is_array = json_rows.is_array(start)
        if self.is_array and next(json_rows.read_rows(path), None) is None:
            raise UserError(f"{path}: is an array without rows")

    def __iter__(self) -> Iterator[Report]:
        """Yield a report a row."""
        columns_by_keys: dict[tuple[str, ...], Columns] = {}
        rows = self._array_rows() if self.is_array else self._line_rows()
        for row, item in rows:
            try:
                yield self._read_report(row, item, columns_by_keys)
            except (BadReportError, BadRowError) as bad:
                report_id = f"{self.options.prefix}{row}"
                yield Report(self.path, row, report_id, None, str(bad))

    def _array_rows(self) -> Iterator[tuple[int, Any]]:
        for row in json_rows.read_rows(self.path, "surrogateescape"):
            yield row.number, row.record

    def _line_rows(self) -> Iterator[tuple[int, Any]]:
        with open_text(self.path, "\n") as file:
            for row, line in number_lines(file):
                if isinstance(line, str) and not line.strip(_BLANK):
                    continue
                if isinstance(line, BadReportError):
                    yield row, line
                    continue
                try:
                    yield row, json_rows.parse_object(line)
                except BadRowError as bad:
                    yield row, bad

    def _read_report(
        self, row: int, item: Any, columns_by_keys: dict[tuple[str, ...], Columns]
    ) -> Report:
        if isinstance(item, (BadReportError, BadRowError)):
            raise item
        # Columns are found once for all rows with the same keys.
        keys = tuple(item)
        if keys not in columns_by_keys:
            if len(columns_by_keys) > _MAX_KEY_SETS:
                columns_by_keys.clear()
            columns_by_keys[keys] = find_columns(zip(keys, keys, strict=True), self.options)
        columns = columns_by_keys[keys]

        # The texts: strings or nothing, and not all nothing.
        texts = {key: item[key] for key in columns.texts()}
        if all(is_null(value) for value in texts.values()):
            raise BadReportError("no text")
        if any(not isinstance(value, str) and not is_null(value) for value in texts.values()):
            raise BadReportError("the text is not a string")

        # The id.
        id_column = self.options.id_column
        value = f"{self.options.prefix}{row}" if columns.id is None else item[columns.id]
        if id_column and columns.id is None:
            raise BadReportError(f"no key --id_column={id_column}")
        if columns.id in texts:
            raise BadReportError(f"--id_column={id_column} is the text")
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise BadReportError("the id is not a string or number")
        report_id = "" if is_null(value) else clean_text(str(value))[0]

        def read_cell(key: Any) -> str:
            return "" if is_null(texts[key]) else texts[key]

        sections = self.options.sections
        report = report_from_columns(self.path, row, report_id, columns, read_cell, sections)
        return report._replace(cells=item) if self.options.with_cells else report
