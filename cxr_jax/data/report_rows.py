"""One report of a file as a `Report`: cleaned, cut to its sections, or bad with a reason.

No reason and no error holds anything that was read from a file, not even a column name: without a header the first line
of a table is a report, and reports are patient data.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

from cxr_jax.data.report_sections import SECTIONS, cut, join_sections
from cxr_jax.errors import UserError

MAX_BYTES = 1_000_000  # of one report, as UTF-8
MAX_RECORD = 1 << 24  # characters of one CSV record or one line; what is longer is skipped

TABLES = (".csv", ".tsv", ".jsonl", ".json")  # each also with .gz
TEXT_COLUMNS = ("report", "reports", "text", "report_text", "full_report")
SECTION_COLUMNS = {
    "findings": ("findings", "section_findings"),
    "impression": ("impression", "section_impression"),
}
ID_COLUMNS = (
    "study_id",
    "study",
    "report_id",
    "uid",
    "id",
    "path",
    "path_to_image",
    "image_id",
    "dicom_id",
    "image",
    "file",
    "filename",
    "file_name",
)


class Options(NamedTuple):
    """How files of reports are read."""

    text_column: str | None = None  # a name; a number from 1 where the table has no header
    id_column: str | None = None
    header: bool = True
    # Those to read, in the order in which they are joined; () is the whole text.
    sections: tuple[str, ...] = SECTIONS
    one_report: bool = False  # a .txt file that is given is one report, as in a folder
    prefix: str = ""  # of an id that is a row number
    with_cells: bool = False  # rows of tables keep all their cells


class Report(NamedTuple):
    """A row of a file of reports."""

    source: str
    row: int  # from 1: the record of a table (header and blank lines not counted), the line of other files
    id: str
    text: str | None  # None for a bad row
    reason: str = ""  # why a row is bad
    replaced: bool = False  # it held bytes that are not UTF-8; each stands as U+FFFD in the text
    without_headings: bool = False  # no heading says which section is which
    impression: int | None = (
        None  # where in the text the impression begins, if a heading or column says so
    )
    cells: Mapping[str, Any] = MappingProxyType(
        {}
    )  # of a table's row, by column, if they were asked for


class BadReportError(Exception):
    """A bad row; the message is its reason."""


# ---- One report ------------------------------------------------------------------------------------------------------

_SURROGATES = re.compile("[\ud800-\udfff]+")


def clean_text(text: str) -> tuple[str, bool]:
    """Return a text that UTF-8 can hold, with line ends of one kind, and whether bytes were replaced."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    clean = _SURROGATES.sub(lambda match: "\ufffd" * len(match[0]), text)
    return clean, clean != text


def make_report(
    source: str, row: int, report_id: str, text: str, sections: tuple[str, ...]
) -> Report:
    """Make a row with a text: bad if it is too long, else cut to its sections."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return Report(source, row, report_id, None, f"the report is over {MAX_BYTES:,} bytes")
    text, replaced = clean_text(text)
    part = cut(text, sections)
    without_headings = part.without_headings and bool(part.text.strip())
    return Report(
        source, row, report_id, part.text, "", replaced, without_headings, part.impression
    )


# ---- Columns ---------------------------------------------------------------------------------------------------------


Key = Any  # of a JSON object: a str; of a CSV record: a position


class Columns(NamedTuple):
    """Where a row has its texts and its id: keys of a JSON object, or positions in a CSV record."""

    sections: dict[str, Key]  # findings, impression -> key
    last: Key  # the paragraph that the MIMIC section parser gives where there is neither; or None
    wholes: tuple[Key, ...]  # of whole reports: the first that is not blank is read
    id: Key  # or None

    def texts(self) -> list[Key]:
        """List the keys of all columns that hold text."""
        keys = (*self.sections.values(), self.last, *self.wholes)
        return [key for key in keys if key is not None]


def find_columns(names: Iterable[tuple[str, Key]], options: Options) -> Columns:
    """Find the columns of a table by their names, compared in lower case.

    Args:
        names: (name, key) pairs; of equal names the first counts.
        options: may name the columns of text and id.
    """
    keys: dict[str, Key] = {}
    for name, key in names:
        keys.setdefault(name.strip().lower(), key)

    def find_all(wanted: Iterable[str]) -> tuple[Key, ...]:
        return tuple(keys[name] for name in wanted if name in keys)

    def find_first(wanted: Iterable[str]) -> Key:
        return next(iter(find_all(wanted)), None)

    id_names = [options.id_column.strip().lower()] if options.id_column else ID_COLUMNS
    id_key = find_first(id_names)
    if options.text_column:
        return Columns({}, None, find_all([options.text_column.strip().lower()]), id_key)
    sections = {section: find_first(known) for section, known in SECTION_COLUMNS.items()}
    sections = {section: key for section, key in sections.items() if key is not None}
    return Columns(sections, find_first(["last_paragraph"]), find_all(TEXT_COLUMNS), id_key)


def report_from_columns(
    source: str,
    row: int,
    report_id: str,
    columns: Columns,
    read_cell: Callable[[Key], str],
    wanted: tuple[str, ...],
) -> Report:
    """Make the report of a row of a table.

    Args:
        source: the file.
        row: the number of the row, from 1.
        report_id: its id.
        columns: of the table.
        read_cell: key -> text; "" where there is none.
        wanted: sections to read; () is the whole text.
    """
    texts = {section: read_cell(key) for section, key in columns.sections.items()}
    whole = next((text for text in map(read_cell, columns.wholes) if text.strip()), "")
    if not wanted and whole.strip():
        texts = {}
    # The sections that were asked for; without any, those that there are.
    for names in (wanted, SECTIONS):
        present = [(section, texts[section]) for section in names if texts.get(section, "").strip()]
        if present:
            # Cleaned before they are joined, so that the place of the second is that in the clean text.
            joined = join_sections([(section, clean_text(text)[0]) for section, text in present])
            report = make_report(source, row, report_id, joined.text, ())
            replaced = any(clean_text(text)[1] for _, text in present)
            return report._replace(impression=joined.impression, replaced=replaced)
    last = read_cell(columns.last) if columns.last is not None else ""
    if last.strip():
        return make_report(source, row, report_id, last, ())
    return make_report(source, row, report_id, whole, wanted)


# ---- Lines of text ---------------------------------------------------------------------------------------------------

# What reading raises where compressed data is damaged.
TORN_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
TORN_REASON = "the compressed data is damaged; nothing after this row was read"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MARK = b"\x1f\x8b"


def read_line(file: TextIO) -> str | None:
    """Read the next line; "" at the end; None for one of over MAX_RECORD characters, which is skipped."""
    line = file.readline(MAX_RECORD)
    if len(line) < MAX_RECORD or line.endswith(("\n", "\r")):
        return line
    while line and not line.endswith(("\n", "\r")):
        line = file.readline(MAX_RECORD)
    return None


def number_lines(file: TextIO) -> Iterator[tuple[int, str | BadReportError]]:
    """Yield (number from 1, line, or why it is none) of a text file."""
    row = 0
    while True:
        row += 1
        try:
            line = read_line(file)
        except TORN_ERRORS:
            yield row, BadReportError(TORN_REASON)
            return
        if line == "":
            return
        if line is None:
            yield row, BadReportError(f"over {MAX_RECORD:,} characters")
        else:
            yield row, line


@contextlib.contextmanager
def open_text(path: str, newline: str = "") -> Iterator[TextIO]:
    """Open a text file, compressed or not; bytes that are not UTF-8 come as lone surrogates, which `clean_text` finds.

    Raises:
        UserError: for UTF-16, an empty file, or a name that does not say whether it is compressed.
    """
    with open(path, "rb") as raw:
        start = raw.peek(2)[:2]
        if start in UTF_16_MARKS:
            raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
        if not start:
            raise UserError(f"{path}: is empty")
        is_compressed = start == _GZIP_MARK
        if is_compressed != (Path(path).suffix.lower() == ".gz"):
            mismatch = "named .gz and not gzip data"
            if is_compressed:
                mismatch = "gzip data and not named .gz"
            raise UserError(f"{path}: is {mismatch}")
        data = gzip.GzipFile(fileobj=raw) if is_compressed else raw
        yield io.TextIOWrapper(
            data, encoding="utf-8-sig", errors="surrogateescape", newline=newline
        )


def file_kind(path: str | Path) -> str:
    """Tell the kind of a file by its name: .csv, .tsv, .jsonl, .json, .txt, .xml or ""."""
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in TABLES:
        return suffix
    # Single reports are not read compressed.
    return suffix if suffix in (".txt", ".xml") and not name.endswith(".gz") else ""
