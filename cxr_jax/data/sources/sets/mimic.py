"""MIMIC-CXR-JPG (and MIMIC-CXR) 2.x: tables mimic-cxr-2.*-{metadata,split,chexpert,negbio}.csv, compressed or not.

Metadata lists films, the other tables are joined by ids; labels are of studies. `label_kind`: chexpert (the default),
negbio, or test, the radiologists' labels of the 687 test studies. Where only the DICOM release is there,
cxr-record-list.csv lists films, without views.
"""

import re
from pathlib import Path

import numpy as np

from cxr_jax.data.sources.films import Films, as_texts, no_states
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    find_table,
    find_tables,
    read_view,
)
from cxr_jax.data.sources.image_files import film_key
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

LABELS = ("chexpert", "negbio", "test")
# As wget leaves PhysioNet's folders, too.
_FOLDERS = (
    "",
    "mimic-cxr-jpg*",
    "mimic-cxr*",
    "mimic-cxr*/[0-9]*",
    "physionet.org/files/mimic-cxr*/[0-9]*",
    "files/mimic-cxr*/[0-9]*",
)
_METADATA, _RECORDS = "mimic-cxr-2*-metadata.csv", "cxr-record-list.csv"
_SPLIT = "mimic-cxr-2*-split.csv"
_LABEL_TABLES = {
    "chexpert": "mimic-cxr-2*-chexpert.csv",
    "negbio": "mimic-cxr-2*-negbio.csv",
    "test": "mimic-cxr-2*-test-set-labeled.csv",
}
_BASIS = {
    "chexpert": "labels of reports by CheXpert's labeler",
    "negbio": "labels of reports by NegBio",
    "test": "radiologists' labels",
}
_AIRSPACE = "Airspace Opacity"
_LETTER = re.compile(r"^[ps](?=\d{8}$)")  # of folders


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the films and join splits and labels."""
    metadata = find_table(data_root, (_METADATA, _RECORDS), _FOLDERS)
    # The tables lie together; a root that is the metadata's file stands for its folder.
    folder = metadata.parent
    # The DICOM release lists records instead.
    is_jpg = metadata.name.lower().startswith("mimic")
    columns = Columns(
        metadata, ("dicom_id", "subject_id", "study_id"), ("ViewPosition", "StudyDate", "path")
    )
    films, patients, studies = (
        _read_ids(columns, name) for name in ("dicom_id", "subject_id", "study_id")
    )
    # Ids as texts: a program that took them for numbers has written 10000032.0.
    columns.check_once(films, "the film")
    tables, notes = [metadata], []
    if not is_jpg:
        notes.append("no metadata table is there: views are unknown")
    # ---- Joined by film ----
    splits = [""] * len(films)
    for path in find_tables(folder, (_SPLIT,))[:1]:
        splits = _read_splits(path, films)
        tables.append(path)
    # ---- Joined by study ----
    patient_of = dict(zip(studies, patients, strict=True))
    states, label_table = _read_labels(folder, studies, patient_of, label_kind, notes)
    tables += label_table
    if missing := sum(not split for split in splits):
        notes.append(f"{missing:,} films have no split: no split table lists them")
    which = label_kind or next((name for name in LABELS if _is_of(name, label_table)), "")
    return Films(
        name="mimic",
        root=data_root,
        ids=as_texts(films),
        images=as_texts(_paths(films, patients, studies, ".jpg" if is_jpg else ".dcm")),
        patients=as_texts(patients),
        studies=as_texts(studies),
        views=as_texts(columns.decode("ViewPosition", read_view, "")),
        splits=as_texts(splits),
        states=states,
        dates=as_texts([cell.partition(".")[0] for cell in columns["StudyDate"]]),
        tables=tuple(tables),
        lines=np.array(columns.lines),
        basis=_BASIS.get(which, "no labels"),
        label_map="chexpert 1",
        image_folders=("mimic-cxr*", "*/mimic-cxr*/[0-9]*", "mimic-cxr*/[0-9]*", "images"),
        suffixes=(".jpg", ".png", ".dcm"),
        notes=(*notes, *count_contradictions(states)),
    )


def _read_ids(columns: Columns, name: str) -> list[str]:
    """Ids as every table of the set has them: s50414267, p10000032 and a film's file name are said in numbers alone."""
    return [_LETTER.sub("", film_key(cell)) for cell in columns.ids(name)]


def _paths(films: list[str], patients: list[str], studies: list[str], suffix: str) -> list[str]:
    # The first two digits of the subject are a folder.
    return [
        f"files/p{patient[:2]}/p{patient}/s{study}/{film}{suffix}"
        for film, patient, study in zip(films, patients, studies, strict=True)
    ]


def _read_splits(path: Path, films: list[str]) -> list[str]:
    columns = Columns(path, ("dicom_id", "split"))
    # The film alone is the key: of a study films may stand on different sides.
    listed_ids = _read_ids(columns, "dicom_id")
    columns.check_once(listed_ids, "the film")
    split_of = dict(zip(listed_ids, columns["split"], strict=True))
    return [split_of.get(film, "") for film in films]


def _is_of(label_kind: str, tables: list[Path]) -> bool:
    return any(label_kind in path.name for path in tables)


def _read_labels(
    folder: Path, studies: list[str], patient_of: dict[str, str], label_kind: str, notes: list[str]
) -> tuple[np.ndarray, list[Path]]:
    """The states of each film by its study, and the table they are from, if one is there."""
    states = no_states(len(studies))
    # Both labelers are published; one of them is enough.
    wanted = [label_kind] if label_kind else ["chexpert", "negbio"]
    found_tables = find_tables(folder, [_LABEL_TABLES[name] for name in wanted])[:1]
    if not found_tables:
        if label_kind:
            raise UserError(f"{folder}: holds no {_LABEL_TABLES[label_kind]} (.gz or not)")
        notes.append("no table of labels is there: all labels are blank")
        return states, []
    columns = Columns(found_tables[0], ("study_id",), (_AIRSPACE,))
    # The radiologists' table calls it by its older name.
    names = [
        _AIRSPACE if label == "Lung Opacity" and _AIRSPACE in columns else label
        for label in CHEXPERT_14
    ]
    columns = Columns(found_tables[0], ("study_id", *names), ("subject_id",))
    listed_ids = _read_ids(columns, "study_id")
    columns.check_once(listed_ids, "the study")
    # Two tables of one fact: where they differ, labels would be another patient's.
    if "subject_id" in columns:
        for label_row, (study, patient) in enumerate(
            zip(listed_ids, _read_ids(columns, "subject_id"), strict=True)
        ):
            if patient_of.get(study, patient) != patient:
                raise columns.error(
                    label_row, "the study is another patient's in the table of films"
                )
    table_states = columns.states(names)
    # A study without a row is not a negative one.
    row_of = {study: row for row, study in enumerate(listed_ids)}
    rows = np.array([row_of.get(study, -1) for study in studies])
    states[rows >= 0] = table_states[rows[rows >= 0]]
    if missing := int((rows < 0).sum()):
        notes.append(f"{missing:,} films are of studies without a row of labels: blank")
    if unused := len(listed_ids) - len(set(rows[rows >= 0].tolist())):
        notes.append(f"{unused:,} rows of labels are of studies that no film is of")
    return states, found_tables
