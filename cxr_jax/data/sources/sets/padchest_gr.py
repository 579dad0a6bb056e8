"""PadChest-GR (de Castro et al., 2025): master_table.csv, a row a finding of a film, with grounded_reports_*.json.

Every film is frontal, and every study is registered as a benchmark. Boxes are shares of the film's sides.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Box, Films, as_texts
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    find_table,
    find_tables,
    read_ages,
    read_json,
    read_sex,
)
from cxr_jax.data.sources.sets.padchest import (
    EXCLUDE,
    FOLDERS,
    describe_unknown,
    is_labelled,
    states_of,
)
from cxr_jax.errors import UserError

TABLES, _REPORTS = ("master_table*.csv",), ("grounded_reports*.json",)
_OPTIONAL = ("split", "PatientSex_DICOM", "PatientAge", "StudyDate_DICOM")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the master table, and the sentences where they are there."""
    table = find_table(data_root, TABLES, FOLDERS)
    columns = Columns(table, ("StudyID", "ImageID", "PatientID", "label"), _OPTIONAL)
    named = columns.ids("ImageID")
    # A film has a row for each of its findings; the first has its patient, too.
    first_row = _first_rows(columns, named)
    rows, films = list(first_row.values()), list(first_row)
    label_map = maps.load_map("padchest")
    reader = label_map.reader()
    # What no row of a film names is absent: the reports were read for all findings.
    labels_of: dict[str, list[str]] = {film: [] for film in films}
    for film, label in zip(named, columns["label"], strict=True):
        labels_of[film].append(label)
    states = np.array([states_of(tuple(filter(None, labels_of[film])), reader) for film in films])
    # ---- Sentences and boxes, by film ----
    found = find_tables(data_root if data_root.is_dir() else table.parent, _REPORTS, FOLDERS)[:1]
    reports, boxes = _read_reports(found[0], films) if found else (None, None)
    notes = []
    if reader.unknown:
        notes.append(describe_unknown(reader))

    def of_film(cells: list[str]) -> list[str]:
        return [cells[row] for row in rows]

    read_films = Films(
        name="padchest_gr",
        root=data_root,
        ids=as_texts(films),
        images=as_texts(films),
        patients=as_texts(of_film(columns.ids("PatientID"))),
        studies=as_texts(of_film(columns.ids("StudyID"))),
        views=as_texts(["FRONTAL"] * len(films)),
        splits=as_texts(of_film(columns["split"])),
        states=states,
        sexes=as_texts([read_sex(cell) for cell in of_film(columns["PatientSex_DICOM"])]),
        ages=read_ages(of_film(columns["PatientAge"])),
        reports=reports,
        dates=as_texts([cell.partition(".")[0] for cell in of_film(columns["StudyDate_DICOM"])]),
        boxes=boxes,
        tables=(table, *found),
        lines=np.array(columns.lines)[rows],
        basis="radiologists' labels",
        label_map=str(label_map),
        image_folders=("PadChest_GR*", "Padchest_GR*", "images", "*/images"),
        suffixes=(".jpg",),
        notes=(*notes, *count_contradictions(states)),
    )
    # As PadChest's: a film that its readers excluded is no row.
    is_excluded = np.array([is_labelled(tuple(labels_of[film]), EXCLUDE) for film in films])
    if not is_excluded.any():
        return read_films
    counts = {"label exclude": int(is_excluded.sum())}
    return replace(read_films.select(~is_excluded), left_out=counts)


def _first_rows(columns: Columns, named: list[str]) -> dict[str, int]:
    """The first row of each film; those after it must say the same of whose it is."""
    facts_of_film = [columns[name] for name in ("PatientID", "StudyID", "split")]
    first_row: dict[str, int] = {}
    for finding_row, film in enumerate(named):
        first_finding = first_row.setdefault(film, finding_row)
        if any(cells[finding_row] != cells[first_finding] for cells in facts_of_film):
            first_line = columns.lines[first_finding]
            raise columns.error(
                finding_row, f"the film of line {first_line} with another patient, study or split"
            )
    return first_row


def _read_reports(path: Path, films: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The English sentences and the boxes of each film."""
    # Every field may be missing of a sentence that says what is absent.
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no list of reports")
    reports: dict[str, str] = {}
    boxes: dict[str, tuple[Box, ...]] = {}
    for number, entry in enumerate(entries, 1):
        try:
            findings = entry["findings"]
            sentences = [finding.get("sentence_en") or "" for finding in findings]
            reports[entry["ImageID"]] = " ".join(filter(None, map(str.strip, sentences)))
            boxes[entry["ImageID"]] = tuple(
                Box(str(label), left, top, right - left, bottom - top)
                for finding in findings
                # A sentence of what is absent has no boxes.
                for label in finding.get("labels") or ()
                for left, top, right, bottom in finding.get("boxes") or ()
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path}: row {number}: not a film with its findings") from None
    return as_texts([reports.get(film, "") for film in films]), as_texts(
        [boxes.get(film, ()) for film in films]
    )
