"""A label table (CSV with the 14 CheXpert columns) -> manifest rows in the `grpo.jsonl` format.

    cxr-jax manifest LABELS.csv OUT.jsonl [--image_column=file] [--prompt=TEXT] [--blank=unknown|negative]
                     [--uncertain=unknown|negative|positive] [--views=frontal|any] [--empty=leave_out|keep]

`python -m cxr_jax.data.sources.label_table` is the same command. docs/inputs.md says what is read and what is refused.

A row is written if at least one label is positive ("No Finding" counts); its `solution` lists the positives, `labels`
every state that is not blank, `policy` what blank and uncertain cells counted as. Left out and counted: rows without a
positive, rows that say both "No Finding" and a finding, films that are not frontal, rows that repeat another.
--empty=keep writes rows, too, of which only absent labels are known: their solution is empty.
Cells: 1, 0, -1 or U (uncertain), blank or nan.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.prompts import FIND_PROMPT, check_prompt
from cxr_jax.data.sources import patients, policy, views
from cxr_jax.data.sources.image_files import BadNameError, split_name
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.data.sources.table import DELIMITERS, Record, Table, read_state
from cxr_jax.data.studies import order, subjects
from cxr_jax.errors import UserError, exit_code
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.runtime import whole_files

# In the order in which they are asked.
IMAGE_COLUMNS = (
    *(
        "file",
        "image",
        "path",
        "filename",
        "image_path",
        "image index",
        "path_to_image",
        "file_path",
    ),
    *("img_path", "png_path", "jpg_path", "dicom_path", "image_id", "image_name", "img"),
)
# What may stand beside No Finding.
NOT_PATHOLOGY = ("No Finding", "Support Devices")
VIEWS = ("frontal", "any")
EMPTY = ("leave_out", "keep")

# Why rows are left out.
_NO_POSITIVE = "no label known to be positive"
_REPEATED = "repeated: the film of a row before it, with the same patient and labels"
_CONTRADICTION = "No Finding together with a finding"
_LATERAL = "a lateral view, by its column or path"
_NOT_FRONTAL = "no frontal film of the chest, by its view"


class LabelRow(NamedTuple):
    """A row of a label table."""

    line: int  # of the file
    image: str
    patient: str | None
    states: dict[str, int | None]  # label -> 1, 0, -1 or None
    view: str | None = None  # of sources.views
    # Keys of a row that say which study, and when, and who is on the film.
    study: Mapping[str, Any] = MappingProxyType({})


class _Header(NamedTuple):
    """The names of the columns that are read, as the file spells them."""

    image: str
    labels: dict[str, str]  # by label


def read_table(path: str | Path, image_column: str | None = None) -> Iterator[LabelRow]:
    """Read a table with the 14 label columns; columns are found by name, whatever their case, spaces and signs.

    Args:
        path: the file.
        image_column: the column of the image path; by default the first of IMAGE_COLUMNS.

    Yields:
        A row a record.

    Raises:
        UserError: naming the file, the line and the reason.
    """
    table = Table(path, CHEXPERT_14)
    header = _find_columns(table, image_column)
    first_rows: dict[str, list[LabelRow]] = {}
    for record in table:
        row = _read_row(path, record, header)
        _check_repeated(path, row, first_rows.setdefault(row.image, []))
        yield row
    if not first_rows:
        raise UserError(f"{path}: has a header and no rows")


def _find_columns(table: Table, image_column: str | None) -> _Header:
    labels = {}
    for label in CHEXPERT_14:
        found = table.columns([label])
        if not found:
            separator = DELIMITERS[table.delimiter]
            raise UserError(
                f"{table.path}: no column {label!r} (all 14 labels are needed; cells are separated by {separator})"
            )
        labels[label] = found[0]
    wanted = (image_column,) if image_column else IMAGE_COLUMNS
    # One by one: a column after the one that is read may stand there twice.
    images = next(filter(None, (table.columns([name]) for name in wanted)), None)
    if images is None:
        raise UserError(f"{table.path}: no image column (looked for {', '.join(wanted)})")
    return _Header(images[0], labels)


def _read_row(path: str | Path, record: Record, header: _Header) -> LabelRow:
    image = record.cells[header.image].strip()
    if not image:
        raise UserError(f"{path}:{record.line}: no image name")
    states = {}
    for label, column in header.labels.items():
        try:
            states[label] = read_state(record.cells[column])
        except ValueError:
            # What stands there is not shown: of a shifted column it may be a name.
            raise UserError(
                f"{path}:{record.line}: {label} is not one of 1, 0, -1, U, blank"
            ) from None
    try:
        split_name(image)
        patient = patients.find_patient(record.cells, [image])
    except (BadNameError, patients.LostDigitsError) as reason:
        raise UserError(f"{path}:{record.line}: {reason}") from None
    return LabelRow(
        record.line,
        image,
        patient,
        states,
        views.find_view(record.cells, [image]),
        {**_read_study(record.cells), **subjects.as_fields(subjects.find_subject(record.cells))},
    )


def _read_study(cells: Mapping[str, str]) -> dict[str, str]:
    """What columns say of a film's study and its order, under keys that rows are read by; paths still stand there."""
    taken = order.find_taken(cells, [])
    found = {
        "study_id": order.find_study(cells, []),
        "StudyDate": taken.date,
        # With colons, since bare digits may be another time (1430).
        "StudyTime": ":".join(textwrap.wrap(taken.time, 2)),
        "study_number": None if taken.number is None else str(taken.number),
    }
    return {key: text for key, text in found.items() if text}


def _check_repeated(path: str | Path, row: LabelRow, before: list[LabelRow]) -> None:
    """Refuse a film that is listed again with other labels, or another view; see `convert` for one that is the same."""
    for first in before:
        place = f"{path}:{row.line}: the film is that of line {first.line}"
        if row.states != first.states:
            raise UserError(f"{place}, with other labels")
        if row.view != first.view:
            raise UserError(f"{place}, with another view")
    before.append(row)


def convert(
    table: Iterable[LabelRow],
    prompt: str = FIND_PROMPT,
    label_policy: LabelPolicy = LabelPolicy(),  # noqa: B008 - frozen
    only_frontal: bool = True,
    keep_empty: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Make manifest rows of `read_table`.

    Args:
        table: the rows of a table.
        prompt: what is asked of every image.
        label_policy: what blank and uncertain cells count as.
        only_frontal: leave out films whose column or path says another view; else the view is written with the row.
        keep_empty: make rows, too, of which only absent labels are known.

    Returns:
        The manifest rows, and counts of what was left out by reason.
    """
    rows = []
    left_out = dict.fromkeys((_NO_POSITIVE, _CONTRADICTION, _LATERAL, _NOT_FRONTAL, _REPEATED), 0)
    seen: set[str] = set()
    patients_of_films: set[tuple[str, str | None]] = set()
    for line, image, patient, table_states, view, study in table:
        states = label_policy.apply(table_states)
        positive = [label for label in CHEXPERT_14 if states[label] == 1]
        if (image, patient) in patients_of_films:
            left_out[_REPEATED] += 1
            continue
        patients_of_films.add((image, patient))
        if only_frontal and view in (views.LATERAL, views.OTHER):
            left_out[_LATERAL if view == views.LATERAL else _NOT_FRONTAL] += 1
            continue
        # Of a film that nobody has said anything of there is nothing to learn, either way.
        if not positive and not (keep_empty and 0 in states.values()):
            left_out[_NO_POSITIVE] += 1
            continue
        if "No Finding" in positive and any(label not in NOT_PATHOLOGY for label in positive):
            left_out[_CONTRADICTION] += 1
            continue
        row = {
            # A film that is listed under two patients still has an id of its own in each row.
            "id": f"{image}#{line}" if image in seen else image,
            "image": image,
            "conversations": [{"from": "human", "value": prompt}],
            "solution": ", ".join(positive),
            "labels": {label: state for label, state in states.items() if state is not None},
            "policy": {"blank": label_policy.blank, "uncertain": label_policy.uncertain},
        }
        if patient:
            row["patient_id"] = patient
        if view:
            row["view"] = view
        row.update(study)
        seen.add(image)
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
    parser.add_argument(
        "--blank",
        choices=policy.BLANK_CHOICES,
        default=policy.BLANK_CHOICES[0],
        help="what a blank cell counts as (default: unknown)",
    )
    parser.add_argument(
        "--uncertain",
        choices=policy.UNCERTAIN_CHOICES,
        default=policy.UNCERTAIN_CHOICES[0],
        help="what an uncertain cell (-1, U) counts as (default: unknown)",
    )
    parser.add_argument(
        "--views",
        choices=VIEWS,
        default=VIEWS[0],
        help="leave out films that a column or path calls lateral or other, or write their view (default: frontal)",
    )
    parser.add_argument(
        "--empty",
        choices=EMPTY,
        default=EMPTY[0],
        help="what becomes of rows without a positive label but with known absent ones (default: leave_out)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the manifest and print what it has and what was left out."""
    label_policy = LabelPolicy(args.blank, args.uncertain)
    # A row with a question that cannot be asked would be refused when it trains.
    prompt = check_prompt(args.prompt)
    whole_files.check_output(args.out, [args.table])
    table = read_table(args.table, args.image_column)
    only_frontal, keep_empty = args.views == VIEWS[0], args.empty == EMPTY[1]
    rows, left_out = convert(table, prompt, label_policy, only_frontal, keep_empty)
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not rows:
        reasons = "; ".join(f"{count} left out: {reason}" for reason, count in left_out.items())
        raise UserError(f"{args.table}: no row has a label known to be positive ({reasons})")
    write_rows(args.out, rows)
    known = sum(state in (0, 1) for row in rows for state in row["labels"].values())
    known_share = known / (len(rows) * len(CHEXPERT_14))
    print(f"{len(rows)} rows written to {args.out}; {_count_patients(rows)}")
    print(f"labels: {policy.describe([label_policy], known_share)}")
    for reason, count in left_out.items():
        print(f"{count} left out: {reason}")
    for warning in _warnings(args.table, rows, known_share):
        print(warning, file=sys.stderr)


def _count_patients(rows: Sequence[dict[str, Any]]) -> str:
    known = [row["patient_id"] for row in rows if "patient_id" in row]
    count = len(set(map(patients.same_patient_key, known)))
    if len(known) == len(rows):
        return f"{count} patients"
    return f"{count} patients, {len(rows) - len(known)} rows of no known patient"


def _warnings(
    name: str | Path, rows: Sequence[dict[str, Any]], known_share: float
) -> Iterator[str]:
    """What no number of these rows may be read without, a line each."""
    if all("patient_id" not in row for row in rows):
        yield (
            f"warning: {name}: no column and no path names a patient: a split will count every film as a patient"
        )
    if repeated := len(rows) - len({row["image"] for row in rows}):
        yield (
            f"warning: {name}: {repeated} rows list a film that another patient's row lists, too: whose is it?"
        )
    if few := policy.warn_few_known(str(name), known_share):
        yield few


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
