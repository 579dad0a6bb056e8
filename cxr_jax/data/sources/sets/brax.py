"""BRAX 1.1 (Reis et al., 2022): master_spreadsheet_update.csv, a row a film, labels of Portuguese reports by CheXpert's
labeler. Ages are bins of five years and "85 or more".
"""

from pathlib import Path

import numpy as np

from cxr_jax.data.sources.films import Films, as_texts
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    count_divided_studies,
    find_table,
    read_ages,
    read_sex,
    read_view,
)
from cxr_jax.labels.taxonomy import CHEXPERT_14

TABLES = ("master_spreadsheet_update.csv", "master_spreadsheet*.csv")
_FOLDERS = ("", "brax*", "BRAX*", "physionet.org/files/brax/[0-9]*")
_OPTIONAL = ("DicomPath", "PatientSex", "PatientAge", "StudyDate", "ViewPosition")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the spreadsheet."""
    table = find_table(data_root, TABLES, _FOLDERS)
    columns = Columns(table, ("PngPath", "PatientID", "AccessionNumber", *CHEXPERT_14), _OPTIONAL)
    # A DICOM stands beside each PNG, under the same name in another folder.
    images = columns.paths("PngPath")
    # As CheXpert's: four states, of the study on every film.
    states, studies = columns.states(), columns.ids("AccessionNumber")
    return Films(
        name="brax",
        root=data_root,
        ids=as_texts(images),
        images=as_texts(images),
        patients=as_texts(columns.ids("PatientID")),
        studies=as_texts(studies),
        views=as_texts(columns.decode("ViewPosition", read_view, "")),
        splits=as_texts([""] * len(images)),
        states=states,
        sexes=as_texts([read_sex(cell) for cell in columns["PatientSex"]]),
        ages=read_ages(columns["PatientAge"]),
        dates=as_texts([cell.partition(".")[0] for cell in columns["StudyDate"]]),
        tables=(table,),
        lines=np.array(columns.lines),
        basis="labels of reports by CheXpert's labeler, in Portuguese",
        label_map="chexpert 1",
        image_folders=("brax*", "BRAX*", "physionet.org/files/brax/[0-9]*"),
        # No split is published.
        suffixes=(".jpg", ".dcm"),
        notes=(*count_contradictions(states), *count_divided_studies(studies, states)),
    )
