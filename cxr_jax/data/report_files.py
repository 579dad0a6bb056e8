"""Report files -> `Report` rows, as a stream: CSV, JSON, text, Open-i XML, MIMIC-CXR folders.

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
    file_kind,
    make_report,
    number_lines,
    open_text,
    report_from_columns,
)
from cxr_jax.data.report_sections import SECTIONS, read_openi
from cxr_jax.data.report_tables import CsvTable, JsonTable
from cxr_jax.errors import UserError, as_utf8

MAX_XML_BYTES = 8_000_000  # of one XML file: the coding and the figures come on top of the text

# ---- A report a line -------------------------------------------------------------------------------------------------

_LONE_HEADING = re.compile(r"^[ \t]*(?:FINAL REPORT|FINDINGS:|IMPRESSION:)[ \t]*\r?$", re.MULTILINE)
_HEADED_LINE = re.compile(r"^[ \t]*(FINDINGS|IMPRESSION):", re.MULTILINE)


def _is_one_report(path: str) -> bool:
    """A heading alone on a line, or just one line that FINDINGS: or IMPRESSION: begins: no line is a whole report."""
    with open_text(path) as file:
        # The first 64 Ki characters decide: reports are shorter.
        start = file.read(1 << 16)
    if _LONE_HEADING.search(start):
        return True
    # Two lines with the same heading are two reports.
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
            # Escaped and not U+FFFD, so that two files never get one id.
            report_id = as_utf8(Path(path).stem)
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
        # One byte more than may be tells a file that is too large, without reading it all.
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
                f"{path}: not a folder, .csv, .tsv, .jsonl, .json (or these with .gz), .txt or .xml"
            )
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: not a regular file")
        open(path, "rb").close()  # raises where it cannot be read
        if kind in (".jsonl", ".json"):
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
