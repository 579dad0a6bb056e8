"""Labels free-text chest X-ray reports: `cxr-jax label IN... -o OUT.csv` (or `python -m cxr_jax.label ..`).

IN, one or several:
  table    .csv, .tsv, .jsonl or .json (also .gz): one report a row. Read are findings and impression (also
           section_findings, section_impression), else report or text (also reports, report_text, full_report), or
           --text_column.
  IN.txt   one report a line, a blank line is an empty report. With --one_report the file is one report, and so is one
           with a heading alone on a line, or with one line only that FINDINGS: or IMPRESSION: begins
  folder   one report a file, below it too: all *.xml (Open-i); without any, all *.txt (as in MIMIC-CXR)
  IN.xml   one Open-i report

OUT.csv has a row a report: id (file stem, --id_column or row number), then the 14 labels in CheXpert's order: 1
affirmed, 0 denied, -1 uncertain, blank not mentioned; and Unread: "another language" where the report is not in
English (nothing is affirmed in it), or how many of its words look like findings and are not known. Report text is
patient data: it is never in a message, and in OUT only with --with_text.

Of a text with headings, findings and impression are read, and not the indication or comparison: see --sections. Bytes
that are not UTF-8 are read as U+FFFD and counted. A bad row (no text, over 1,000,000 bytes, torn) costs that row only:
OUT has the others, OUT.errors.csv (beside OUT.csv) says which and why, and the exit code is 2.

Exit codes: 0 done; 1 the run failed (disk full, interrupted); 2 bad usage, bad input, bad rows, or all reports in
another language. OUT appears whole or not at all. How a report is read: docs/report_parser.md. Research use only. Not
for diagnosis.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import report_files, report_labels
from cxr_jax.data.report_sections import SECTIONS
from cxr_jax.errors import UserError, exit_code, failure_without_text, printable
from cxr_jax.runtime import interrupts

# ---- Flags -----------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        UserError: for bad usage.
    """
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
        type=_parse_sections,
        default=SECTIONS,
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


def _parse_sections(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    if names == ("all",):
        return ()
    if not set(names) <= set(SECTIONS):
        raise ValueError
    return names


# argparse puts the name of the function in its message.
_parse_sections.__name__ = "list (findings, impression, or all)"


def check_out(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the paths of OUT and of its errors file, links resolved.

    Raises:
        UserError: for a pair that must not be written.
    """
    if not args.out.lower().endswith(".csv"):
        raise UserError(f"{args.out}: OUT must be named .csv")
    out = Path(os.path.realpath(args.out))
    # Links are resolved first, so that both files stand in one folder, which is written to.
    errors = out.with_suffix(".errors.csv")
    try:
        _check_paths(args, out, errors)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "a bad name"
        raise UserError(f"{args.out}: cannot be written ({reason})") from None
    return out, errors


def _check_paths(args: argparse.Namespace, out: Path, errors: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"{args.out}: there is no such folder")
    # The lexicon is an input, too.
    inputs = [*args.inputs, args.lexicon or ""]
    for path in (out, errors):
        if any(os.path.realpath(name) == str(path) or _is_same(name, path) for name in inputs):
            raise UserError(f"{path}: is an input, and would be overwritten")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: exists and is not a file")
        if path.exists() and not args.force:
            raise UserError(f"{path}: exists; --force replaces it")


def _is_same(name: str, path: Path) -> bool:
    """Whether both are there and are one file, by whatever links."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(name, path)
    return False


# ---- The command -----------------------------------------------------------------------------------------------------

_running: list[report_labels.LabelTable] = []


def run(args: argparse.Namespace) -> int:
    """Label the reports of all inputs; print the summary.

    Returns:
        The exit code: 0, or 2 where rows were bad and left out.

    Raises:
        UserError: for bad usage or bad input; nothing is written then.
    """
    out, errors = check_out(args)
    options = report_files.Options(
        args.text_column, args.id_column, not args.no_header, args.sections, args.one_report
    )
    # Every input is looked at before anything is written.
    inputs = report_files.open_inputs(args.inputs, options)
    labelling = report_labels.LabelOptions(
        lexicon=args.lexicon, parents=args.parents, sides=args.sides, with_text=args.with_text
    )
    counts = report_labels.LabelCounts()
    # JAX is imported here at the latest: after all that could be wrong with the flags.
    columns = report_labels.table_columns(labelling)
    table = report_labels.LabelTable(out, errors, columns, replace=args.force)
    # Before its files are there, so that a signal never finds them and nobody to remove them.
    _running.append(table)
    try:
        table.open()
        report_labels.label_reports(report_files.read(inputs), table, labelling, counts)
        if not counts.reports and not counts.bad:
            raise UserError(f"{args.inputs[0]}: no reports")
        if not counts.reports:
            raise UserError(f"{counts.first_bad} (none of {counts.bad:,} rows can be used)")
        table.finish(any_bad=counts.bad > 0)
    except BaseException:
        table.discard()
        raise
    finally:
        _running.clear()
    _print_if_read(report_labels.summarise(args.out, counts, args.sections))
    if counts.foreign == counts.reports:
        print("error: all reports are in another language; only English is read", file=sys.stderr)
        return 2
    if counts.foreign:
        message = f"{counts.foreign:,} of {counts.reports:,} reports are in another language"
        print(f"warning: {message}; only English is read", file=sys.stderr)
    if counts.bad:
        total = counts.bad + counts.reports
        print(
            f"error: {counts.bad:,} of {total:,} rows are bad and left out; {printable(errors)} lists them",
            file=sys.stderr,
        )
        return 2
    return 0


def _print_if_read(text: str) -> None:
    """Print a text to whoever still reads it."""
    try:
        print(text, flush=True)
    except OSError:  # nobody reads it; OUT is there all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. No traceback unless --debug.

    Returns:
        The exit code: 0 done, 2 bad usage, input or rows, 1 the run failed.
    """
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv), failure=_failure)


def _failure(error: BaseException) -> str:
    """One line for an error that is nobody's input."""
    return failure_without_text(error, "OUT was not written")


def _stop() -> None:
    """End at once: an exception would be lost where libraries call back, and half an import is no place to go on."""
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
