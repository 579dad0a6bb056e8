"""CheXpert Plus (Chambon et al., 2024): df_chexpert_plus_*.csv, a row a film with its report and split.

Labels stand beside it, a JSON object a film, made of the report, its findings or its impression (`label_kind`). The
table names .jpg where the folders hold .png, or .dcm.
"""

from pathlib import Path

import numpy as np

from cxr_jax.data import json_rows
from cxr_jax.data.json_rows import BadRowError, is_absent
from cxr_jax.data.sources.films import Films, as_texts, no_states
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    find_table,
    find_tables,
    folder_of,
    read_ages,
    read_number,
    read_sex,
)
from cxr_jax.data.sources.image_files import film_key
from cxr_jax.data.sources.sets.chexpert import OF_STUDY, read_views, split_in_path, studies_in_paths
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, NOT_MENTIONED

LABELS = ("report", "findings", "impression")
TABLES = ("df_chexpert_plus*.csv",)
_FOLDERS = ("", "chexpert[-_]plus*", "CheXpert[-_ ]Plus*", "csv*", "tables")
_LABEL_FOLDERS = ("", "*labels*", "chexbert_labels", "*/chexbert_labels")
_OPTIONAL = ("frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order", "report")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the table and the labels made of `label_kind`: report (the default), findings or impression."""
    table = find_table(data_root, TABLES, _FOLDERS)
    columns = Columns(table, ("path_to_image",), (*_OPTIONAL, "age", "sex", "split"))
    film_names = columns.paths("path_to_image")
    patients, studies, numbers = studies_in_paths(columns, film_names)
    # Two sources of one fact: a table whose columns have slipped shows here.
    for row, (given, patient) in enumerate(zip(columns["deid_patient_id"], patients, strict=True)):
        if given and given != patient:
            raise columns.error(row, "deid_patient_id and the path name two patients")
    film_keys = [_key_of(name) for name in film_names]
    columns.check_once(film_keys, "the film")
    # Published beside the paths' .jpg: films are PNG.
    images = [
        name.removesuffix(".jpg") + ".png" if name.endswith(".jpg") else name for name in film_names
    ]
    label_file, states, notes = _read_labels(data_root, table, film_keys, label_kind)
    splits = [
        given or split_in_path(name, table)
        for given, name in zip(columns["split"], film_names, strict=True)
    ]
    # The order of a patient's reports; study numbers are one, too, where it is missing.
    if "patient_report_date_order" in columns:
        numbers = [read_number(cell) for cell in columns["patient_report_date_order"]]
    return Films(
        name="chexpert_plus",
        root=data_root,
        ids=as_texts(film_names),
        images=as_texts(images),
        patients=as_texts(patients),
        studies=as_texts(studies),
        views=as_texts(read_views(columns["frontal_lateral"], columns["ap_pa"], film_names)),
        splits=as_texts(splits),
        states=states,
        sexes=as_texts([read_sex(cell) for cell in columns["sex"]]),
        ages=read_ages(columns["age"]),
        reports=as_texts(columns["report"]),
        numbers=np.array(numbers),
        tables=(table, *label_file),
        lines=np.array(columns.lines),
        basis=f"labels of {label_file[0].name} (CheXbert)" if label_file else "no labels",
        label_map="chexpert 1",
        image_folders=("PNG*", "png*", "DICOM*", "dicom*", "images", "CheXpert*"),
        suffixes=(".jpg", ".dcm"),
        notes=(*notes, *count_contradictions(states)),
    )


def _key_of(name: str) -> str:
    """What a path says of a film, whatever stands before the patient and whatever suffix: labels are joined by it."""
    name = film_key(name.replace("\\", "/"))
    if found := OF_STUDY.search(name):
        return name[found.start("patient") :]
    return name


def _read_labels(
    data_root: Path, table: Path, film_keys: list[str], label_kind: str
) -> tuple[tuple[Path, ...], np.ndarray, list[str]]:
    """The file of labels, if there is one, the states of the films, what there is to say."""
    # The report says most; its parts are asked where it is not there.
    wanted = (label_kind,) if label_kind else LABELS
    names = [f"{part}_fixed.json*" for part in wanted]
    # Beside the table, too, where the root is that.
    found = find_tables(folder_of(data_root), names, _LABEL_FOLDERS)
    states = no_states(len(film_keys))
    if not found:
        if label_kind:
            raise UserError(f"{data_root}: holds no {names[0]}")
        return (), states, ["no file of labels (report_fixed.json) is there: all labels are blank"]
    place_of = {name: place for place, name in enumerate(film_keys)}
    seen: dict[str, int] = {}
    elsewhere = 0
    for number, _, record in json_rows.read_rows(found[0]):
        try:
            if isinstance(record, BadRowError):
                raise record
            name = record.get("path_to_image")
            if not isinstance(name, str):
                raise BadRowError("no path_to_image")
            name = _key_of(name)
            if seen.setdefault(name, number) != number:
                raise BadRowError(f"the film is that of line {seen[name]}")
            row_states = [_state(record, label) for label in CHEXPERT_14]
        except BadRowError as reason:
            raise UserError(f"{found[0]}:{number}: {reason}") from None
        # Part of the table may have been downloaded.
        if name in place_of:
            states[place_of[name]] = row_states
        else:
            elsewhere += 1
    # Counted: a table and labels of two releases would fit in part.
    notes = []
    if unlabelled := len(film_keys) - (len(seen) - elsewhere):
        notes.append(f"{unlabelled:,} films have no row of labels: blank")
    if elsewhere:
        notes.append(f"{elsewhere:,} rows of labels are of films that the table does not list")
    return (found[0],), states, notes


def _state(record: dict, label: str) -> int:
    if label not in record:
        raise BadRowError(f"no label {label!r}")
    # true would be a 1 to Python.
    state = record[label]
    if is_absent(state):
        return NOT_MENTIONED
    if isinstance(state, bool) or state not in (1, 0, -1):
        raise BadRowError(f"{label} is not one of 1, 0, -1, null")
    return int(state)
