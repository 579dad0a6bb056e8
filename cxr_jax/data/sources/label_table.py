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
from collections.abc import Sequence

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import radiograph
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.errors import UserError, exit_code
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime import whole_files

IMAGE_COLUMNS = ("file", "image", "path", "filename", "file_name", "image_path", "image index")
PATIENT_COLUMNS = ("patient_id", "subject_id", "patient id")
STATES = {"1": 1, "0": 0, "-1": -1, "u": -1, "": None, "nan": None}
NOT_PATHOLOGY = ("No Finding", "Support Devices")


def read_table(path, image_column=None):
    """Yield (line number, image name, patient id or None, {label: 1 / 0 / -1 / None}) for each row of a CSV
    file.

    Columns are found by name. Raises UserError naming the file, the line and the reason.
    """
    try:
        text = radiograph.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = {name.strip().lower(): name for name in reader.fieldnames or () if name}
        missing = [label for label in CHEXPERT_14 if label.lower() not in header]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r} (all 14 labels are needed)")
        wanted = (image_column.lower(),) if image_column else IMAGE_COLUMNS
        image = next((header[name] for name in wanted if name in header), None)
        if image is None:
            raise UserError(f"{path}: no image column (looked for {', '.join(wanted)})")
        patient = next((header[name] for name in PATIENT_COLUMNS if name in header), None)
        for row in reader:
            line = reader.line_num
            if not (row[image] or "").strip():
                raise UserError(f"{path}:{line}: no image name")
            states = {
                label: _state(row[header[label.lower()]], path, line, label)
                for label in CHEXPERT_14
            }
            yield (
                line,
                row[image].strip(),
                (row[patient] or "").strip() or None if patient else None,
                states,
            )
    except csv.Error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV") from None


def _state(cell, path, line, label):
    key = (cell or "").strip().lower().removesuffix(".0")
    if key not in STATES:
        raise UserError(f"{path}:{line}: {label} is {cell!r}, not one of 1, 0, -1, U, blank")
    return STATES[key]


def convert(table, prompt=FIND_PROMPT):
    """Rows of `read_table` -> (manifest rows, counts of what was left out by reason)."""
    rows, left_out = (
        [],
        {"no label known to be positive": 0, "No Finding together with a finding": 0},
    )
    for _, image, patient, states in table:
        positive = [label for label in CHEXPERT_14 if states[label] == 1]
        if not positive:
            left_out["no label known to be positive"] += 1
        elif "No Finding" in positive and any(label not in NOT_PATHOLOGY for label in positive):
            left_out["No Finding together with a finding"] += 1
        else:
            row = {
                "id": image,
                "image": image,
                "conversations": [{"from": "human", "value": prompt}],
            }
            row |= {"solution": ", ".join(positive)}
            row |= {
                "labels": {label: state for label, state in states.items() if state is not None}
            }
            rows.append(row | ({"patient_id": patient} if patient else {}))
    return rows, left_out


def write_rows(path, rows):
    """Write JSON Lines, all or nothing."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        whole_files.write_text(path, lines)
    except OSError as exc:
        raise UserError(f"{path}: cannot be written ({exc.strerror})") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


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


if __name__ == "__main__":
    sys.exit(main())
