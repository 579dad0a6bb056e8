"""A label table (CSV with the 14 CheXpert columns) -> manifest rows in the `grpo.jsonl` format.

    cxr-jax manifest LABELS.csv OUT.jsonl [--image_column=file] [--prompt=TEXT]

`python -m cxr_jax.data.sources.label_table` is the same command.

A row is written if at least one label is known to be positive ("No Finding" counts); its `solution` lists the
positives and `labels` every known state. Rows without a positive, and rows that say both "No Finding" and a
finding, are left out and counted. Cells: 1, 0, -1 or U (uncertain), blank or nan (unknown).
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import radiograph
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.errors import UserError, exit_code
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime import whole_files

IMAGE_COLUMNS = ("file", "image", "path", "filename", "file_name", "image_path", "image index")
PATIENT_COLUMNS = ("patient_id", "subject_id", "patient id")
# Cells in lower case. Blank is not the same as 0: nothing is known.
STATES = {"1": 1, "0": 0, "-1": -1, "u": -1, "": None, "nan": None}
# What may stand beside No Finding.
NOT_PATHOLOGY = ("No Finding", "Support Devices")

# Why rows are left out.
_NO_POSITIVE = "no label known to be positive"
_CONTRADICTION = "No Finding together with a finding"


class LabelRow(NamedTuple):
    """A row of a label table."""

    line: int  # of the file
    image: str
    patient: str | None
    states: dict[str, int | None]  # label -> 1, 0, -1 or None


class _Header(NamedTuple):
    """The names of the columns that are read, as the file spells them."""

    image: str
    patient: str | None
    labels: dict[str, str]  # by label


def read_table(path: str | Path, image_column: str | None = None) -> Iterator[LabelRow]:
    """Read a CSV file with the 14 label columns; columns are found by name, in lower case.

    Args:
        path: the file.
        image_column: the column of the image path; by default the first of IMAGE_COLUMNS.

    Yields:
        A row a record.

    Raises:
        UserError: naming the file, the line and the reason.
    """
    try:
        # With or without a byte order mark.
        text = radiograph.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = _find_columns(path, reader.fieldnames or (), image_column)
        for cells in reader:
            yield _read_row(path, reader.line_num, cells, header)
    except csv.Error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV") from None


def _find_columns(path: str | Path, names: Sequence[str], image_column: str | None) -> _Header:
    # Of columns with one name the last counts, as for csv.DictReader.
    columns = {name.strip().lower(): name for name in names if name}
    for label in CHEXPERT_14:
        if label.lower() not in columns:
            raise UserError(f"{path}: no column {label!r} (all 14 labels are needed)")
    wanted = (image_column.lower(),) if image_column else IMAGE_COLUMNS
    image = next((columns[name] for name in wanted if name in columns), None)
    if image is None:
        raise UserError(f"{path}: no image column (looked for {', '.join(wanted)})")
    patient = next((columns[name] for name in PATIENT_COLUMNS if name in columns), None)
    return _Header(image, patient, {label: columns[label.lower()] for label in CHEXPERT_14})


def _read_row(
    path: str | Path, line: int, cells: Mapping[str, str | None], header: _Header
) -> LabelRow:
    image = (cells[header.image] or "").strip()
    if not image:
        raise UserError(f"{path}:{line}: no image name")
    states = {}
    for label, column in header.labels.items():
        cell = cells[column]
        key = (cell or "").strip().lower().removesuffix(".0")  # 1.0: as pandas writes numbers
        if key not in STATES:
            raise UserError(f"{path}:{line}: {label} is {cell!r}, not one of 1, 0, -1, U, blank")
        states[label] = STATES[key]
    patient = None
    if header.patient is not None:
        patient = (cells[header.patient] or "").strip() or None
    return LabelRow(line, image, patient, states)


def convert(
    table: Iterable[LabelRow], prompt: str = FIND_PROMPT
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Make manifest rows of `read_table`.

    Args:
        table: the rows of a table.
        prompt: what is asked of every image.

    Returns:
        The manifest rows, and counts of what was left out by reason.
    """
    rows = []
    left_out = {_NO_POSITIVE: 0, _CONTRADICTION: 0}
    for _, image, patient, states in table:
        positive = [label for label in CHEXPERT_14 if states[label] == 1]
        if not positive:
            left_out[_NO_POSITIVE] += 1
            continue
        if "No Finding" in positive and any(label not in NOT_PATHOLOGY for label in positive):
            left_out[_CONTRADICTION] += 1
            continue
        row = {
            "id": image,
            "image": image,
            "conversations": [{"from": "human", "value": prompt}],
            "solution": ", ".join(positive),
            "labels": {label: state for label, state in states.items() if state is not None},
        }
        if patient:
            row["patient_id"] = patient
        rows.append(row)
    return rows, left_out


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines, whole or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        whole_files.write_text(path, lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.data.sources.label_table", description=__doc__.split("\n")[0])
    parser.add_argument("table", metavar="LABELS.csv")
    parser.add_argument("out", metavar="OUT.jsonl")
    parser.add_argument(
        "--image_column", help="column of the image path (default: the first usual name)"
    )
    parser.add_argument("--prompt", default=FIND_PROMPT)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the manifest and print what it has and what was left out."""
    rows, left_out = convert(read_table(args.table, args.image_column), args.prompt)
    if not rows:
        raise UserError(f"{args.table}: no row has a label known to be positive")
    write_rows(args.out, rows)
    print(f"{len(rows)} rows written to {args.out}")
    for reason, count in left_out.items():
        if count:
            print(f"{count} left out: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
