"""Report files -> `Report` rows, as a stream: CSV, JSON Lines, text, Open-i XML, MIMIC-CXR folders.

`open_inputs(paths, options)` looks at every input first and raises UserError for one that is unusable as a whole;
`read(inputs)` then yields one `Report` a row, good or bad, in bounded memory. A bad row has a reason and no
text. `data/report_rows.py` says what a row is, `data/report_tables.py` reads tables.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cxr_jax.data.report_rows import (
    MAX_BYTES,
    UTF_16_MARKS,
    BadReportError,
    Columns,
    Options,
    Report,
    clean_text,
    file_kind,
    make_report,
    number_lines,
    open_text,
    report_from_columns,
)
from cxr_jax.data.report_sections import SECTIONS, read_openi
from cxr_jax.data.report_tables import CsvTable, JsonTable
from cxr_jax.errors import UserError

MAX_XML_BYTES = 8_000_000  # of one XML file: the coding and the figures come on top of the text
<<<<<<< ours
MAX_RECORD = 1 << 24  # characters of one CSV record or one line; what is longer is skipped
_REREAD = 1 << 26  # characters of torn CSV records that are read a second time, in each file

TABLES = (".csv", ".tsv", ".jsonl")  # each also with .gz
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
    text_column: str | None = None  # a name; a number from 1 where the table has no header
    id_column: str | None = None
    header: bool = True
    sections: tuple = (
        SECTIONS  # those to read, in the order in which they are joined; () is the whole text
    )
    one_report: bool = False  # a .txt file that is given is one report, as in a folder
    prefix: str = ""  # of an id that is a row number


class Report(NamedTuple):
    source: str
    row: int  # from 1: the record of a table (header and blank lines not counted), the line of other files
    id: str
    text: str | None  # None for a bad row
    reason: str = ""  # why a row is bad
    replaced: bool = False  # it held bytes that are not UTF-8; each stands as U+FFFD in the text
    whole: bool = False  # no heading says which section is which


class _BadReportError(Exception):
    """A bad row; the message is its reason."""


# --- one report ------------------------------------------------------------------------------------------

_SURROGATES = re.compile("[\ud800-\udfff]+")


def _clean(text):
    """(text that UTF-8 can hold, with line ends of one kind; whether bytes were replaced)."""
    text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    clean = _SURROGATES.sub(lambda match: "\ufffd" * len(match[0]), text)
    return clean, clean != text


def _report(source, row, name, text, wanted):
    """A row with a text: too long, or cut to its sections."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return Report(source, row, name, None, f"the report is over {MAX_BYTES:,} bytes")
    text, replaced = _clean(text)
    text, whole = cut(text, wanted)
    return Report(source, row, name, text, "", replaced, whole and bool(text.strip()))


class _Columns(NamedTuple):
    """Where a row has its texts and its id: keys of a JSON object, or positions in a CSV record."""

    sections: dict  # findings, impression -> key
    last: object  # the paragraph that the MIMIC section parser gives where there is neither
    wholes: tuple  # of whole reports: the first that is not blank is read
    id: object

    def texts(self):
        return [
            key for key in (*self.sections.values(), self.last, *self.wholes) if key is not None
        ]


def _find_columns(names, options) -> _Columns:
    """names: (name, key) pairs. Columns that are not there are None; names are compared in lower case."""
    keys = {}
    for name, key in names:
        keys.setdefault(name.strip().lower(), key)
    first = lambda wanted: next((keys[name] for name in wanted if name in keys), None)
    name = first([options.id_column.strip().lower()] if options.id_column else ID_COLUMNS)
    found = lambda wanted: tuple(keys[name] for name in wanted if name in keys)
    if options.text_column:
        return _Columns({}, None, found([options.text_column.strip().lower()]), name)
    sections = {section: first(known) for section, known in SECTION_COLUMNS.items()}
    sections = {section: key for section, key in sections.items() if key is not None}
    return _Columns(sections, first(["last_paragraph"]), found(TEXT_COLUMNS), name)


def _from_columns(source, row, name, columns, get, wanted):
    """The report of a row of a table. get: key -> text; "" where there is none."""
    texts = {section: get(key) for section, key in columns.sections.items()}
    whole = next((text for text in map(get, columns.wholes) if text.strip()), "")
    if not wanted and whole.strip():
        texts = {}
    for names in (wanted, SECTIONS):
        found = [texts[section] for section in names if texts.get(section, "").strip()]
        if found:
            return _report(source, row, name, "\n\n".join(found), ())
    last = get(columns.last) if columns.last is not None else ""
    return (
        _report(source, row, name, last, ())
        if last.strip()
        else _report(source, row, name, whole, wanted)
    )


# --- tables ----------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file for csv.reader. `record` holds the present record's, so that a torn one can be left."""

    def __init__(self, file):
        self.file, self.record, self.back, self.size, self.spare = file, [], [], 0, _REREAD

    def __iter__(self):
        return self

    def __next__(self):
        line = self.back.pop() if self.back else read_line(self.file)
        if line == "":
            raise StopIteration
        self.record.append(line or "")
        self.size += len(line or "")
        if line is None or self.size > MAX_RECORD:
            raise csv.Error
        return line

    def next_record(self):
        self.record, self.size = [], 0

    def leave_torn(self):
        """Go on at the second line of the record: a quote that is never closed costs one line, not the file."""
        if len(self.record) > 1 and self.size <= self.spare:
            self.spare -= self.size
            self.back += reversed(self.record[1:])


def read_line(file):
    """The next line of a text file; "" at its end; None for one of over MAX_RECORD characters, which is skipped."""
    line = file.readline(MAX_RECORD)
    if len(line) < MAX_RECORD or line.endswith(("\n", "\r")):
        return line
    while line and not line.endswith(("\n", "\r")):
        line = file.readline(MAX_RECORD)
    return None


@contextlib.contextmanager
def _open_text(path, newline=""):
    """A text stream; bytes that are not UTF-8 come as lone surrogates, which `_clean` finds."""
    with open(path, "rb") as raw:
        start = raw.peek(2)[:2]
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
        if not start:
            raise UserError(f"{path}: is empty")
        compressed = start == b"\x1f\x8b"
        if compressed != (Path(path).suffix.lower() == ".gz"):
            is_not = "gzip data and not named .gz" if compressed else "named .gz and not gzip data"
            raise UserError(f"{path}: is {is_not}")
        raw = gzip.GzipFile(fileobj=raw) if compressed else raw
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


_TORN = (EOFError, zlib.error, gzip.BadGzipFile)
_TORN_REASON = "the compressed data is damaged; nothing after this row was read"


def _kind(path):
    """.csv, .tsv, .jsonl, .txt, .xml or "" by the name of a file."""
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return (
        suffix
        if suffix in TABLES or (suffix in (".txt", ".xml") and not name.endswith(".gz"))
        else ""
    )


def _csv_records(path, delimiter):
    """Yield the records of a CSV file: a list of cells, or _Bad for one that is none. Blank lines are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
    with _open_text(path) as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            lines.next_record()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                long = lines.size > MAX_RECORD or lines.record[-1:] == [""]
                lines.leave_torn()
                yield _BadReportError(
                    f"over {MAX_RECORD:,} characters"
                    if long
                    else "not valid CSV (is a quote not closed?)"
                )
            except _TORN:
                yield _BadReportError(_TORN_REASON)
                return
            else:
                if cells:
                    yield cells


class _Csv:
    """A CSV or TSV table: the delimiter is the one with which the header has a text column."""

    def __init__(self, path, options):
        self.path, self.options = path, options
        tried = "\t" if _kind(path) == ".tsv" else ",;\t"
        for self.delimiter in tried if options.header else tried[0]:
            records = _csv_records(path, self.delimiter)
            with contextlib.closing(records):
                header = next(records, None)
                if header is None:
                    raise UserError(f"{path}: is empty")
                if isinstance(header, _BadReportError):
                    raise UserError(f"{path}: the first record: {header}")
                self.width = len(header)
                numbers = [(str(i + 1), i) for i in range(self.width)]
                self.columns = _find_columns(
                    zip(header, range(self.width), strict=True) if options.header else numbers,
                    self._named(),
                )
                if self.columns.texts():
                    break
        self._check(options)
        if options.header:
            with contextlib.closing(_csv_records(path, self.delimiter)) as records:
                next(records)
                if next(records, None) is None:
                    raise UserError(f"{path}: has a header and no rows")

    def _named(self):
        """The options; the only column of a table without a header needs no number."""
        options = self.options
        alone = not options.header and options.text_column is None and self.width == 1
        return options._replace(text_column="1") if alone else options

    def _check(self, options):
        if not self.columns.texts() and options.text_column:
            raise UserError(f"{self.path}: has no column --text_column={options.text_column}")
        if not self.columns.texts() and not options.header:
            raise UserError(
                f"{self.path}: has {self.width} columns; --text_column=NUMBER says which one is the text"
            )
        if not self.columns.texts():
            known = ", ".join([*TEXT_COLUMNS, *SECTIONS])
            raise UserError(
                f"{self.path}: has no text column (looked for {known}); give --text_column=NAME, "
                "or --no_header if its first line is a report"
            )
        if options.id_column and self.columns.id is None:
            raise UserError(f"{self.path}: has no column --id_column={options.id_column}")
        if self.columns.id in self.columns.texts():  # report text is only written with --with_text
            raise UserError(f"{self.path}: --id_column={options.id_column} is the text")

    def __iter__(self):
        records = _csv_records(self.path, self.delimiter)
        if self.options.header:
            next(records)
        for row, cells in enumerate(records, 1):
            name = f"{self.options.prefix}{row}"
            if isinstance(cells, _BadReportError):
                yield Report(self.path, row, name, None, str(cells))
                continue
            # Too many: a comma in an unquoted report. Too few: the middle of a torn one. Both would give half a text.
            if len(cells) != self.width:
                yield Report(
                    self.path, row, name, None, f"{len(cells)} cells, {self.width} columns"
                )
                continue
            if self.columns.id is not None:
                name = _clean(cells[self.columns.id])[0]
            yield _from_columns(
                self.path, row, name, self.columns, cells.__getitem__, self.options.sections
            )


_BLANK = "\n\r\t \x00\ufeff"


class _Jsonl:
    """JSON Lines: an object a line, with the columns of a CSV table as keys. Blank lines are left out."""

    def __init__(self, path, options):
        self.path, self.options = path, options
        with _open_text(path, "\n") as file:
            try:
                while (line := read_line(file)) is not None and line and not line.strip(_BLANK):
                    pass
            except _TORN:
                raise UserError(f"{path}: the compressed data is damaged") from None
            if line == "":
                raise UserError(f"{path}: is empty")

    def __iter__(self):
        known = {}
        with _open_text(self.path, "\n") as file:
            for row, line in _numbered(file):
                if isinstance(line, str) and not line.strip(_BLANK):
                    continue
                try:
                    yield self._report(row, line, known)
                except _BadReportError as bad:
                    yield Report(self.path, row, f"{self.options.prefix}{row}", None, str(bad))

    def _report(self, row, line, known):
        if isinstance(line, _BadReportError):
            raise line
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise _BadReportError("not valid JSON") from None
        if not isinstance(item, dict):
            raise _BadReportError("not a JSON object")
        keys = tuple(item)
        if keys not in known:
            if len(known) > 1000:  # keys that differ from row to row must not fill the memory
                known.clear()
            known[keys] = _find_columns(zip(keys, keys, strict=True), self.options)
        columns = known[keys]
        texts = {key: item[key] for key in columns.texts()}
        if all(_is_null(value) for value in texts.values()):
            raise _BadReportError("no text")
        if any(not isinstance(value, str) and not _is_null(value) for value in texts.values()):
            raise _BadReportError("the text is not a string")
        name = f"{self.options.prefix}{row}" if columns.id is None else item[columns.id]
        if self.options.id_column and columns.id is None:
            raise _BadReportError(f"no key --id_column={self.options.id_column}")
        if columns.id in columns.texts():
            raise _BadReportError(f"--id_column={self.options.id_column} is the text")
        if isinstance(name, bool) or not isinstance(name, str | int | float | None):
            raise _BadReportError("the id is not a string or number")
        get = lambda key: "" if _is_null(texts[key]) else texts[key]
        name = "" if _is_null(name) else _clean(str(name))[0]
        return _from_columns(self.path, row, name, columns, get, self.options.sections)


def _is_null(value):
    return value is None or value != value  # NaN, as pandas writes a missing text


def _numbered(file):
    """Yield (number from 1, line or _Bad) of a text file."""
    row = 0
    while True:
        row += 1
        try:
            line = read_line(file)
        except _TORN:
            yield row, _BadReportError(_TORN_REASON)
            return
        if line == "":
            return
        yield row, _BadReportError(f"over {MAX_RECORD:,} characters") if line is None else line
=======
>>>>>>> theirs

# ---- A report a line -------------------------------------------------------------------------------------------------

_LONE_HEADING = re.compile(r"^[ \t]*(?:FINAL REPORT|FINDINGS:|IMPRESSION:)[ \t]*\r?$", re.MULTILINE)
_HEADED_LINE = re.compile(r"^[ \t]*(FINDINGS|IMPRESSION):", re.MULTILINE)


def _is_one_report(path: str) -> bool:
    """A heading alone on a line, or just one line that FINDINGS: or IMPRESSION: begins: no line is a whole report."""
    with open_text(path) as file:
        start = file.read(1 << 16)
    if _LONE_HEADING.search(start):
        return True
    headed = _HEADED_LINE.findall(start)
    return len(headed) == len(set(headed)) > 0 and "\n" in start.strip()


class TextLines:
    """A .txt file: a report a line; blank lines are empty reports, so that rows and lines keep in step."""

    def __init__(self, path: str, options: Options) -> None:
        """Nothing is read before rows are asked for."""
        self.path, self.options = path, options

    def __iter__(self) -> Iterator[Report]:
        """Yield a report a line."""
        with open_text(self.path) as file:
            for row, line in number_lines(file):
                report_id = f"{self.options.prefix}{row}"
                if isinstance(line, BadReportError):
                    yield Report(self.path, row, report_id, None, str(line))
                else:
                    text = line.rstrip("\r\n")
                    yield make_report(self.path, row, report_id, text, self.options.sections)


# ---- A report a file -------------------------------------------------------------------------------------------------


class ReportFiles:
    """One report a file, id: its stem. Open-i XML, or a text with headings as in MIMIC-CXR."""

    def __init__(self, paths: Iterable[str], options: Options) -> None:
        """Nothing is read before rows are asked for."""
        self.paths, self.options = paths, options

    def __iter__(self) -> Iterator[Report]:
        """Yield a report a file."""
        for path in self.paths:
            report_id = clean_text(Path(path).stem)[0]
            read = self._read_xml if file_kind(path) == ".xml" else self._read_text
            try:
                yield read(path, report_id)
            except BadReportError as bad:
                yield Report(path, 1, report_id, None, str(bad))
            except OSError as error:  # one of many files: the others are read all the same
                yield Report(path, 1, report_id, None, f"cannot be read ({error.strerror})")

    def _read_text(self, path: str, report_id: str) -> Report:
        data = _read_bytes(path, MAX_BYTES)
        if data[:2] in UTF_16_MARKS:
            raise BadReportError("is UTF-16 text; save it as UTF-8")
        text = data.decode("utf-8-sig", "surrogateescape")
        return make_report(path, 1, report_id, text, self.options.sections)

    def _read_xml(self, path: str, report_id: str) -> Report:
        try:
            texts = read_openi(_read_bytes(path, MAX_XML_BYTES))
        except ValueError as error:
            raise BadReportError(str(error)) from None
        # Never the indication beside them: it says what was asked. The whole text is both sections.
        columns = Columns({section: section for section in SECTIONS}, None, (), None)
        wanted = self.options.sections or SECTIONS
        return report_from_columns(
            path, 1, report_id, columns, lambda section: texts.get(section, ""), wanted
        )


def _read_bytes(path: str, limit: int) -> bytes:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise BadReportError("a folder that cannot be read")
    if not stat.S_ISREG(mode):
        raise BadReportError("not a regular file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadReportError(f"over {limit:,} bytes")
    return data


def _walk_folder(folder: str, suffix: str) -> Iterator[str]:
    """Yield the paths of the files of a folder with this suffix, sorted, those of its own before those below.

    Also those of folders that cannot be read: each is a bad row.
    """
    locked: list[str] = []

    def note_locked(error: OSError) -> None:
        locked.append(error.filename)

    for parent, folders, files in os.walk(folder, onerror=note_locked):
        folders.sort()  # in place: this is the order in which they are walked
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(suffix):
                yield os.path.join(parent, name)
    yield from locked


class ReportFolder:
    """A folder: all its .xml files, below it too; without any, all its .txt files."""

    def __init__(self, path: str, options: Options) -> None:
        """Look for a file.

        Raises:
            UserError: for a folder without one.
        """
        self.path, self.options = path, options
        # Raises where the folder is locked; `_walk_folder` passes over what it cannot enter.
        os.scandir(path).close()
        suffix = next((kind for kind in (".xml", ".txt") if _has_file(path, kind)), None)
        if suffix is None:
            raise UserError(f"{path}: a folder with no .xml and no .txt file in it")
        self.suffix = suffix

    def __iter__(self) -> Iterator[Report]:
        """Yield a report a file."""
        return iter(ReportFiles(_walk_folder(self.path, self.suffix), self.options))


def _has_file(folder: str, suffix: str) -> bool:
    return any(path.lower().endswith(suffix) for path in _walk_folder(folder, suffix))


# ---- All inputs ------------------------------------------------------------------------------------------------------


def open_inputs(
    paths: Sequence[str | Path], options: Options | None = None
) -> list[Iterable[Report]]:
    """Check every input, in the order given.

    Args:
        paths: tables, texts, XML files or folders.
        options: how to read them.

    Returns:
        What `read` takes.

    Raises:
        UserError: naming the first unusable input.
    """
    options = options or Options()
    inputs = []
    for path in paths:
        # Of several inputs, a row number alone would not say which row.
        prefix = f"{Path(path).name}:" if len(paths) > 1 else options.prefix
        inputs.append(_open_input(str(path), options._replace(prefix=prefix)))
    return inputs


def _open_input(path: str, options: Options) -> Iterable[Report]:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return ReportFolder(path, options)
        kind = file_kind(path)
        if not kind:
            raise UserError(
                f"{path}: not a folder, .csv, .tsv, .jsonl (or these with .gz), .txt or .xml"
            )
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: not a regular file")
        open(path, "rb").close()  # raises where it cannot be read
        if kind == ".jsonl":
            return JsonTable(path, options)
        if kind in (".csv", ".tsv"):
            return CsvTable(path, options)
        if kind == ".xml" or options.one_report or _is_one_report(path):
            return ReportFiles([path], options)
        return TextLines(path, options)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def read(inputs: Iterable[Iterable[Report]]) -> Iterator[Report]:
    """Yield the reports of all inputs, in order."""
    for reports in inputs:
        yield from reports
