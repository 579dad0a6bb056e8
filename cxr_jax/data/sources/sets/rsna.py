"""RSNA Pneumonia Detection Challenge 2018: stage_2_train_labels.csv, a row a box, stage_2_detailed_class_info.csv.

Films are NIH's under other names, as DICOM; the view is read from their headers. patientId names a film, so the set
has no patients. Only Lung Opacity is annotated; a film of class Normal has none of the findings. What the challenge
calls pneumonia is an opacity: Pneumonia stays blank.
"""

import math
from pathlib import Path

import numpy as np

from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Box, Films, as_texts, no_states
from cxr_jax.data.sources.films.header_views import find_files, read_views
from cxr_jax.data.sources.films.tables import Columns, find_table, find_tables
from cxr_jax.data.sources.table import column_key, is_blank
from cxr_jax.labels.taxonomy import INDEX, NEGATIVE, PATHOLOGY, POSITIVE

TABLES, CLASSES = ("stage_2_train_labels*.csv",), ("stage_2_detailed_class_info*.csv",)
_FOLDERS = ("", "rsna*", "RSNA*")
IMAGES = "stage_2_train_images"
_NORMAL, _OPACITY = "normal", "lungopacity"
_SIDE = 1024  # pixels of the published films
_BOX = ("x", "y", "width", "height")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the boxes and, where they are there, the classes."""
    table = find_table(data_root, TABLES, _FOLDERS)
    columns = Columns(table, ("patientId", "Target"), _BOX)
    named = columns.ids("patientId")
    targets = columns.decode("Target", _read_target, "Target is neither 0 nor 1")
    sides = [columns.decode(name, _read_side, f"{name} is no number of pixels") for name in _BOX]
    # ---- Films, each with its boxes ----
    target_of: dict[str, int] = {}
    boxes: dict[str, list[Box]] = {}
    first_lines: dict[str, int] = {}
    for row, (film, target) in enumerate(zip(named, targets, strict=True)):
        if target_of.setdefault(film, target) != target:
            raise columns.error(row, "the film has Target 0 and 1")
        first_lines.setdefault(film, columns.lines[row])
        box = [side[row] for side in sides]
        if target and None not in box:
            boxes.setdefault(film, []).append(Box("Lung Opacity", *box))
    films = list(target_of)
    # ---- What those without an opacity are ----
    found = find_tables(data_root, CLASSES, _FOLDERS)[:1] if data_root.is_dir() else []
    views, note = read_views(find_files(data_root, _FOLDERS, IMAGES, films))
    notes = [note]
    if not found:
        notes.append("no table of classes is there: No Finding is unknown where Target is 0")
    label_map = maps.load_map("rsna")
    class_of = _read_classes(found[0], target_of, label_map) if found else {}
    return Films(
        name="rsna",
        root=data_root,
        ids=as_texts(films),
        images=as_texts([f"{IMAGES}/{film}.dcm" for film in films]),
        patients=as_texts(films),
        studies=as_texts(films),
        views=as_texts(views),
        splits=as_texts([""] * len(films)),
        states=np.array([_states_of(target_of[film], class_of.get(film)) for film in films]),
        boxes=as_texts([tuple(boxes.get(film, ())) for film in films]),
        tables=(table, *found),
        lines=np.array(list(first_lines.values())),
        basis="radiologists' labels of opacities",
        label_map=str(label_map),
        has_patients=False,
        image_folders=("rsna*", "RSNA*"),
        suffixes=(".dicom", ".png", ".jpg"),
        notes=tuple(notes),
    )


def _read_target(cell: str) -> int:
    # 1.0 as pandas writes it.
    number = float(cell)
    if number not in (0, 1):
        raise ValueError
    return int(number)


def _read_side(cell: str) -> float | None:
    # Blank in rows without an opacity.
    if is_blank(cell):
        return None
    side = float(cell)
    if not 0 <= side < math.inf:
        raise ValueError
    return side / _SIDE


def _read_classes(
    path: Path, target_of: dict[str, int], label_map: maps.LabelMap
) -> dict[str, str]:
    columns = Columns(path, ("patientId", "class"))
    classes = {column_key(row.source) for row in label_map.rows}
    # As many rows as boxes there, too.
    class_of: dict[str, str] = {}
    for row, (film, name) in enumerate(
        zip(columns.ids("patientId"), columns["class"], strict=True)
    ):
        name = column_key(name)
        # A film of a class that nobody knows is not one without a finding.
        if name not in classes:
            raise columns.error(row, f"class is no class of the map {label_map}")
        if class_of.setdefault(film, name) != name:
            raise columns.error(row, "the film has two classes")
        # Two tables of one reading.
        if film in target_of and (name == _OPACITY) != bool(target_of[film]):
            raise columns.error(row, "the class and the film's Target contradict each other")
    return class_of


def _states_of(target: int, class_name: str | None) -> np.ndarray:
    states = no_states(1)[0]
    states[INDEX["Lung Opacity"]] = POSITIVE if target else NEGATIVE
    # Devices were nobody's question.
    if class_name == _NORMAL:
        states[np.array(PATHOLOGY)] = NEGATIVE
        states[INDEX["No Finding"]] = POSITIVE
    elif target or class_name is not None:
        states[INDEX["No Finding"]] = NEGATIVE
    return states
