"""Labels free-text chest X-ray reports: `cxr-jax label IN... -o OUT.csv` (or `python -m cxr_jax.label ..`).

IN, one or several:
  table    .csv, .tsv or .jsonl (also .gz): one report a row. Read are findings and impression (also section_findings,
           section_impression), else report or text (also reports, report_text, full_report), or --text_column.
  IN.txt   one report a line, a blank line is an empty report. With --one_report the file is one report, and so is one
           with a heading alone on a line, or with one line only that FINDINGS: or IMPRESSION: begins
  folder   one report a file, below it too: all *.xml (Open-i); without any, all *.txt (as in MIMIC-CXR)
  IN.xml   one Open-i report

OUT.csv has a row a report: id (file stem, --id_column or row number), then the 14 labels in CheXpert's order: 1
affirmed, 0 denied, -1 uncertain, blank not mentioned. Report text is patient data: it is never in a message, and in OUT
only with --with_text.

Of a text with headings, findings and impression are read, and not the indication or comparison: see --sections. Bytes
that are not UTF-8 are read as U+FFFD and counted. A bad row (no text, over 1,000,000 bytes, torn) costs that row only:
OUT has the others, OUT.errors.csv (beside OUT.csv) says which and why, and the exit code is 2.

Exit codes: 0 done; 1 the run failed (disk full, interrupted); 2 bad usage, bad input or bad rows. OUT appears whole or
not at all. How a report is read: docs/report_parser.md. Research use only. Not for diagnosis.
"""

import contextlib
import csv
import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import report_files
from cxr_jax.errors import UserError, exit_code
from cxr_jax.runtime import interrupts, whole_files
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

CHUNK = 4096  # reports labelled at a time,
CHUNK_BYTES = 1 << 23  # or fewer, if they are long
_CELLS = {1: "1", 0: "0", -1: "-1", -2: ""}


def parse_args(argv):
    parser = ArgumentParser("cxr_jax.label", description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="IN", help="table, .txt, .xml or folder")
    parser.add_argument("-o", "--out", required=True, metavar="OUT.csv")
    parser.add_argument(
        "--text_column",
        metavar="NAME",
        help="column of the report (with --no_header its number, from 1)",
    )
    parser.add_argument(
        "--id_column",
        metavar="NAME",
        help="column of the id, kept as text (default: study_id, study, "
        "report_id, uid, id, path, path_to_image, .. or the row number)",
    )
    parser.add_argument(
        "--no_header", action="store_true", help="the first line of a CSV is a report"
    )
    parser.add_argument(
        "--one_report", action="store_true", help="IN.txt is one report, as in a folder"
    )
    parser.add_argument(
        "--sections",
        type=_sections,
        default=report_files.SECTIONS,
        metavar="LIST",
        help="findings,impression (default), one of them, or all: the whole text. Where a report has "
        "none of those asked for, the other is read, else its last paragraphs, else all of it",
    )
    parser.add_argument(
        "--parents", action="store_true", help="a label also counts as a mention of its parent"
    )
    parser.add_argument(
        "--lexicon", metavar="FILE", help="other phrases than the built-in ones (TOML)"
    )
    parser.add_argument(
        "--sides", action="store_true", help="add '<Label> side': right, left, both or blank"
    )
    parser.add_argument(
        "--with_text", action="store_true", help="add the text that was read, as column Reports"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args(argv)
    for name in ("lexicon", "text_column", "id_column"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} is empty")
    return args


def _sections(text):
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    if names == ("all",):
        return ()
    if not set(names) <= set(report_files.SECTIONS):
        raise ValueError
    return names


_sections.__name__ = "list (findings, impression, or all)"  # argparse puts it in its message


def check_out(args) -> tuple[Path, Path]:
    """(OUT, its errors file), links resolved. Raises UserError for a pair that must not be written."""
    if not args.out.lower().endswith(".csv"):
        raise UserError(f"{args.out}: OUT must be named .csv")
    out = Path(os.path.realpath(args.out))
    errors = out.with_suffix(".errors.csv")
    try:
        _check_paths(args, out, errors)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{args.out}: cannot be written ({getattr(error, 'strerror', None) or 'a bad name'})"
        ) from None
    return out, errors


def _check_paths(args, out, errors):
    if not out.parent.is_dir():
        raise UserError(f"{args.out}: there is no such folder")
    for path in (out, errors):
        if any(
            os.path.realpath(name) == str(path) or _same(name, path)
            for name in [*args.inputs, args.lexicon or ""]
        ):
            raise UserError(f"{path}: is an input, and would be overwritten")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: exists and is not a file")
        if path.exists() and not args.force:
            raise UserError(f"{path}: exists; --force replaces it")


def _same(a, b):
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(a, b)
    return False


# --- labelling -------------------------------------------------------------------------------------------


def chunks(rows, bad):
    """Gather good rows into lists of at most CHUNK reports and about CHUNK_BYTES; call bad(row) for each other one."""
    held, size = [], 0
    for row in rows:
        if row.text is None:
            bad(row)
            continue
        held.append(row)
        size += len(row.text)
        if len(held) == CHUNK or size >= CHUNK_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


class Table:
    """OUT and its errors file, written beside them under other names until `finish`."""

    def __init__(self, out, errors, columns, replace):
        self.out, self.errors, self.replace, self.finishing = out, errors, replace, False
        self.parts = [whole_files.partial_path(p) for p in (errors, out)]
        self.columns, self.files, self.writers = columns, [], []

    def open(self):
        try:
            for part, header in zip(
                self.parts, (("source", "row", "reason"), self.columns), strict=True
            ):
                # Names of files may hold bytes that are not UTF-8; they are written as they are.
                self.files.append(
                    open(part, "w", encoding="utf-8", errors="surrogateescape", newline="")
                )
                self.writers.append(csv.writer(self.files[-1], lineterminator="\n"))
                self.writers[-1].writerow(header)
        except OSError as error:
            if error.errno not in (
                errno.EACCES,
                errno.EPERM,
                errno.EROFS,
                errno.ENOENT,
                errno.ENAMETOOLONG,
            ):
                raise
            raise UserError(f"{self.out}: cannot be written ({error.strerror})") from None

    def finish(self, any_bad):
        self.finishing = True
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if any_bad:
            self._put(self.parts[0], self.errors)
        else:
            if self.replace:  # what an earlier run left there is not of this OUT
                self.errors.unlink(missing_ok=True)
            self.parts[0].unlink()
        try:
            self._put(self.parts[1], self.out)
        except BaseException:
            if any_bad:
                self.errors.unlink(missing_ok=True)
            raise

    def _put(self, part, path):
        """Give a whole file its name; one that has come there meanwhile is only replaced with --force."""
        try:
            whole_files.give_name(part, path, replace=self.replace)
        except FileExistsError:
            raise UserError(f"{path}: has been made meanwhile; --force replaces it") from None

    def discard(self):
        for file in self.files:
            with contextlib.suppress(OSError):
                file.close()
        self.unlink()

    def unlink(self):
        for part in self.parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def label_all(args, inputs, table, counts):
    """Write a row for each report of `inputs`. counts: filled on the way, keys (label, state) and kinds of rows."""
    from cxr_jax import labels
    from cxr_jax.labels.taxonomy import side_name

    error_rows, rows = table.writers
    start = shown = warm = time.monotonic()

    def bad(row):
        error_rows.writerow((row.source, row.row, row.reason))
        counts.setdefault("first bad", f"{row.source}: row {row.row}: {row.reason}")
        counts["bad"] += 1

    for chunk in chunks(report_files.read(inputs), bad):
        read = labels.read_reports(
            [row.text for row in chunk], lexicon=args.lexicon, parents=args.parents
        )
        states, right, left = (read[key].tolist() for key in ("state", "right", "left"))
        for i, row in enumerate(chunk):
            cells = [row.id, row.text] if args.with_text else [row.id]
            cells += [_CELLS[state] for state in states[i]]
            if args.sides:
                cells += [
                    side_name(*pair)
                    for pair in list(zip(right[i], left[i], strict=True))[_FIRST_SIDED:]
                ]
            rows.writerow(cells)
            counts.update(zip(labels.CHEXPERT_14, states[i], strict=True))
            counts["empty"] += not row.text.strip()
            counts["replaced"] += row.replaced
            counts["whole"] += row.whole
        if not counts["reports"]:  # the first chunk compiles
            counts["compiling"], warm = len(chunk), time.monotonic()
        counts["reports"] += len(chunk)
        if sys.stderr.isatty() and time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(
                f"{counts['reports']:,} reports, {counts['reports'] / (shown - start):,.0f}/s",
                file=sys.stderr,
            )
    counts["seconds"], counts["warm seconds"] = time.monotonic() - start, time.monotonic() - warm


_FIRST_SIDED = 3  # No Finding, Enlarged Cardiomediastinum and Cardiomegaly have no side


def columns_of(args):
    from cxr_jax.labels import CHEXPERT_14

    sides = [f"{label} side" for label in CHEXPERT_14[_FIRST_SIDED:]] if args.sides else []
    return ["id", *(["Reports"] if args.with_text else []), *CHEXPERT_14, *sides]


def summary(args, counts):
    """The table for stdout: counts of states, and what was unusual."""
    from cxr_jax.labels import CHEXPERT_14

    n, warm = counts["reports"], counts["reports"] - counts["compiling"]
    rate = (
        f" ({warm / counts['warm seconds']:,.0f}/s after the first {counts['compiling']:,})"
        if warm
        else ""
    )
    lines = [
        f"{args.out}: {n:,} reports in {counts['seconds']:.1f} s{rate}",
        f"{'label':<28}{'positive':>12}{'negative':>12}{'uncertain':>12}{'not mentioned':>16}",
    ]
    for label in CHEXPERT_14:
        positive, negative, uncertain, nothing = (counts[label, state] for state in (1, 0, -1, -2))
        lines.append(f"{label:<28}{positive:>12,}{negative:>12,}{uncertain:>12,}{nothing:>16,}")
    lines.append(f"empty reports: {counts['empty']:,}; bad rows: {counts['bad']:,}")
    if counts["empty"] == n:
        lines.append("Warning: every report is empty")
    if counts["replaced"]:
        lines.append(
            f"Warning: {counts['replaced']:,} reports hold bytes that are not UTF-8, read as U+FFFD"
        )
    if counts["whole"] and args.sections:
        lines.append(
            f"{counts['whole']:,} reports have no heading of these sections: {', '.join(args.sections)}"
        )
    return "\n".join([*lines, NOT_FOR_DIAGNOSIS])


def run(args) -> int:
    out, errors = check_out(args)
    options = report_files.Options(
        args.text_column, args.id_column, not args.no_header, args.sections, args.one_report
    )
    inputs = report_files.open_inputs(args.inputs, options)
    counts = Counter()
    table = Table(out, errors, columns_of(args), args.force)
    _running.append(
        table
    )  # before its files are there, so that a signal never finds them and nobody to remove them
    try:
        table.open()
        label_all(args, inputs, table, counts)
        if not counts["reports"] and not counts["bad"]:
            raise UserError(f"{args.inputs[0]}: no reports")
        if not counts["reports"]:
            raise UserError(f"{counts['first bad']} (none of {counts['bad']:,} rows can be used)")
        table.finish(counts["bad"])
    except BaseException:
        table.discard()
        raise
    finally:
        _running.clear()
    try:
        print(
            summary(args, counts).encode(errors="backslashreplace").decode(), flush=True
        )  # OUT may be an odd name
    except OSError:  # nobody reads it; OUT is there all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if counts["bad"]:
        total = counts["bad"] + counts["reports"]
        print(
            f"error: {counts['bad']:,} of {total:,} rows are bad and left out; {errors} lists them",
            file=sys.stderr,
        )
    return 2 if counts["bad"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. No traceback unless --debug.

    Returns:
        The exit code: 0 done, 2 bad usage, input or rows, 1 the run failed.
    """
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv), failure=_failure)


def _failure(error: BaseException) -> str:
    """Return one line for an error that is nobody's input; it could hold report text, so its message is not shown."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped before the end; OUT was not written"
    known = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    return f"the run failed ({type(error).__name__}){known}"


_running: list[Table] = []


def _stop() -> None:
    """Ends at once: an exception would be lost where libraries call back, and half an import is no place to go on."""
    if any(table.finishing for table in _running):
        return  # OUT is about to be whole
    for table in _running:
        table.unlink()
    os.write(2, b"error: stopped before the end; OUT was not written\n")
    os._exit(1)


def command() -> int:
    """Run as a program, which answers signals."""
    interrupts.on_interrupt(_stop, even_if_ignored=False)
    return main()


if __name__ == "__main__":
    sys.exit(command())
