"""A table of cells with a header: commas, semicolons, tabs or bars between them, found out by the header.

Reading is strict, and the first problem is a UserError that names file, line and reason: cells that are missing or too
many would shift or drop what follows them without a word.
"""

import csv
import functools
import io
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cxr_jax.data import json_rows
from cxr_jax.errors import UserError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
MAX_CELL = 1 << 17  # characters
# How programs write that a cell is empty, in lower case.
BLANK_WORDS = ("", "nan", "na", "n/a", "none", "null", "<na>", "nat")


class CsvReader:
    """`csv.reader`, strict, with a limit of its own for a cell: csv's is one for the whole process.

    Attributes:
        max_cell: characters that a cell may have.
    """

    _one_at_a_time = threading.Lock()

    def __init__(
        self, lines: Iterable[str], delimiter: str = ",", max_cell: int = MAX_CELL
    ) -> None:
        """Read from lines as a file opened with `newline=""` gives them."""
        self.max_cell = max_cell
        self._reader = csv.reader(lines, delimiter=delimiter, strict=True)

    def __iter__(self) -> "CsvReader":
        return self

    def __next__(self) -> list[str]:
        """Give the cells of the next record; after a csv.Error the one after it."""
        with self._one_at_a_time:
            others = csv.field_size_limit(self.max_cell)
            try:
                return next(self._reader)
            finally:
                csv.field_size_limit(others)

    @property
    def line_num(self) -> int:
        """Lines that were read."""
        return self._reader.line_num


class Record(NamedTuple):
    """A row of a table.

    Attributes:
        line: of the file, where the row begins.
        cells: by the column's name, as the file spells it; with a column that stands twice none is lost unsaid, since
            `Table.column` refuses it.
    """

    line: int
    cells: Mapping[str, str]


class Table:
    """A table whose header is read; iterate it for its rows, blank lines left out.

    Attributes:
        path: as given.
        names: of the columns, as the file spells them.
        delimiter: what stands between cells.
    """

    def __init__(self, path: str | Path, needed: Sequence[str]) -> None:
        """Read the header, of a gzip file too, with the delimiter that finds most of the columns in `needed`.

        Raises:
            UserError: for a file that is no text in UTF-8, or no table.
        """
        self.path = path
        self._text = _read_text(path)
        keys = {column_key(name) for name in needed}

        # Of equally good ones the first: a table of one column has no delimiter at all.
        def count_needed(delimiter: str) -> int:
            self.delimiter = delimiter
            try:
                _, header = next(self._records(), (1, []))
            except UserError:
                # Quotes that close before another delimiter than this one.
                return -1
            return len(keys & {column_key(name) for name in header})

        self.delimiter = max(DELIMITERS, key=count_needed)
        _, self.names = next(self._records(), (1, []))
        if not self.names:
            raise UserError(f"{path}: is empty")

    def columns(self, keys: Sequence[str]) -> list[str]:
        """List the columns that `keys` name, in the order of `keys`; case, spaces and signs do not count.

        Raises:
            UserError: for a column that stands there twice.
        """
        found = []
        for key in keys:
            names = [name for name in self.names if column_key(name) == column_key(key)]
            if len(names) > 1:
                raise UserError(f"{self.path}: column {names[0].strip()!r} stands there twice")
            found += names
        return found

    def __iter__(self) -> Iterator[Record]:
        """Yield the rows.

        Raises:
            UserError: naming the line of a row that has other cells than the header.
        """
        for line, cells in self.rows():
            yield Record(line, dict(zip(self.names, cells, strict=True)))

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line and the cells of each row. Raises as iterating does."""
        records = self._records()
        next(records)
        width = len(self.names)
        for line, cells in records:
            # Spreadsheets write blank cells, and blank rows, beyond the table.
            while len(cells) > width and not cells[-1].strip():
                cells.pop()
            # The first cell that is not blank ends the search.
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != width:
                raise UserError(f"{self.path}:{line}: {len(cells)} cells, {width} columns")
            yield line, cells

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield each record that is not a blank line, with the line on which it begins."""
        reader = CsvReader(io.StringIO(self._text, newline=""), self.delimiter)
        line = 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            reason = "not valid CSV (is a quote not closed?)"
            if "field limit" in str(error):
                reason = f"a cell of more than {reader.max_cell:,} characters"
            raise UserError(f"{self.path}:{line}: {reason}") from None


def _read_text(path: str | Path) -> str:
    try:
        text = json_rows.read_content(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    # What a disk leaves of a torn file, and text in UTF-16.
    if (place := text.find("\0")) >= 0:
        raise UserError(f"{path}:{1 + text.count(chr(10), 0, place)}: a NUL character")
    return text


@functools.lru_cache(maxsize=4096)
def column_key(name: str) -> str:
    """Give what spellings of a column's name have in common: "Patient ID", patient_id and PatientID are one."""
    return re.sub(r"[\W_]+", "", name).lower()


def read_state(cell: str) -> int | None:
    """Read the state of a label: 1, 0, -1 or U, also as 1.0 or 1,0; None for a blank cell, of which nothing is known.

    Raises:
        ValueError: for anything else.
    """
    text = cell.strip().lower()
    if is_blank(text):
        return None
    if text == "u":
        return -1
    # 1.0 as pandas writes numbers, 1,0 as some spreadsheets do.
    # 0_1 is a number to Python.
    if "_" in text:
        raise ValueError
    number = float(text.replace(",", "."))
    if number not in (1, 0, -1):
        raise ValueError
    return int(number)


def is_blank(cell: str) -> bool:
    """Tell whether a cell is empty, or says so as a program would: nan, NA, None, null."""
    return cell.strip().lower() in BLANK_WORDS
