"""NIH ChestX-ray14 (Wang et al., CVPR 2017): Data_Entry_2017*.csv, a row a film; labels mined from reports, all of a
film in one cell. What is not named counts as absent. `label_kind`: text (the default), or google, the films on which
radiologists settled four findings (Majkowska et al., Radiology 2020).

BBox_List_2017.csv has boxes of some films, train_val_list.txt and test_list.txt the official split.
"""

import csv
import math
from pathlib import Path

import numpy as np

from cxr_jax.data import json_rows
from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Box, Films, as_texts, no_states
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    find_table,
    find_tables,
    read_ages,
    read_sex,
    read_view,
)
from cxr_jax.data.sources.table import CsvReader, Table, column_key, is_blank
from cxr_jax.errors import UserError, shown

LABELS = ("text", "google")
# The later file corrects ages of the first, which go up to 414.
TABLES = ("Data_Entry_2017_v2020*.csv", "Data_Entry_2017*.csv")
GOOGLE_TABLES = ("google2019_nih-chest-xray-labels*.csv",)
_FOLDERS = ("", "*[Nn][Ii][Hh]*", "[Cc]hest[Xx]-ray*", "*labels*")
_BOXES, _LISTS = ("BBox_List_2017*.csv",), ("train_val_list*.txt", "test_list*.txt")
_OPTIONAL = ("Follow-up #", "Patient Age", "Patient Gender", "View Position")
_SIDE = 1024  # pixels of the published films, in which boxes are measured
_YES_NO = {"yes": 1, "no": 0}


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the films of the table, or those of Google's."""
    # A file may be either table: Google's has NIH's columns, too.
    is_google = label_kind == "google" or (not label_kind and _is_google(data_root))
    table = find_table(data_root, GOOGLE_TABLES if is_google else TABLES, _FOLDERS)
    label_map = maps.load_map("google_nih" if is_google else "nih")
    # ---- The films ----
    named = tuple(label_map.labels) if is_google else ("Finding Labels",)
    columns = Columns(table, ("Image Index", "Patient ID", *named), (*_OPTIONAL, "Set Id"))
    images = columns.paths("Image Index")
    patients = columns.ids("Patient ID")
    # ---- Their labels and split ----
    tables, notes = [table], list[str]()
    if is_google:
        states = _google_states(columns, label_map)
        splits = columns["Set Id"]
    else:
        states, notes = _text_states(columns, label_map)
        splits, lists = _read_lists(data_root, images)
        tables += lists
    # ---- Boxes ----
    boxes = None
    for path in find_tables(data_root, _BOXES, _FOLDERS)[:1] if data_root.is_dir() else ():
        boxes, elsewhere = _read_boxes(path, images)
        tables.append(path)
        notes.append(f"{sum(map(bool, boxes)):,} films have boxes")
        if elsewhere:
            notes.append(f"{elsewhere:,} films with boxes are not in the table")
    numbers = [int(cell) if cell.isdecimal() else -1 for cell in columns["Follow-up #"]]
    return Films(
        name="nih",
        root=data_root,
        ids=as_texts(images),
        images=as_texts(images),
        patients=as_texts(patients),
        # A row says nothing of its study but whose it is.
        studies=as_texts(patients),
        views=as_texts(columns.decode("View Position", read_view, "")),
        splits=as_texts(splits),
        states=states,
        sexes=as_texts([read_sex(cell) for cell in columns["Patient Gender"]]),
        ages=read_ages(columns["Patient Age"]),
        numbers=np.array(numbers),
        boxes=boxes,
        tables=tuple(tables),
        lines=np.array(columns.lines),
        basis="radiologists' labels (Google)" if is_google else "labels mined from reports",
        label_map=str(label_map),
        image_folders=("images", "images_*/images", "images_*", "images-224*"),
        suffixes=(".jpg", ".jpeg"),
        notes=(*notes, *count_contradictions(states)),
    )


def _is_google(path: Path) -> bool:
    return path.is_file() and bool(Table(path, ("Set Id",)).columns(("Set Id",)))


def _text_states(columns: Columns, label_map: maps.LabelMap) -> tuple[np.ndarray, list[str]]:
    reader = label_map.reader()

    def read_labels(cell: str) -> np.ndarray:
        # A blank cell says nothing, not even that nothing was found.
        if is_blank(cell):
            return no_states(1)[0]
        names = [name.strip() for name in cell.split("|") if name.strip()]
        # The set has 15 labels: a film would be without the finding that another spelling means.
        if not names or not all(map(reader.knows, names)):
            raise ValueError
        return reader.states(names)

    reason = f"Finding Labels names what is no label of the map {label_map} (| between labels)"
    states = np.array(columns.decode("Finding Labels", read_labels, reason))
    return states, ["what a report does not name counts as absent"]


def _google_states(columns: Columns, label_map: maps.LabelMap) -> np.ndarray:
    states = no_states(len(columns))
    # Four findings were settled; of the others these radiologists say nothing.
    for source, target in label_map.labels.items():
        place = maps.INDEX[target]
        states[:, place] = columns.decode(source, _read_yes_no, f"{source} is neither YES nor NO")
    return states


def _read_yes_no(cell: str) -> int:
    try:
        return _YES_NO[cell.lower()]
    except KeyError:
        raise ValueError from None


def _read_lists(data_root: Path, images: list[str]) -> tuple[list[str], list[Path]]:
    """The official split: "train" and "test"; "" of films that no list has."""
    # A name a line, in copies of the set with a folder or without its suffix.
    lists = find_tables(data_root, _LISTS, _FOLDERS) if data_root.is_dir() else []
    split_of: dict[str, str] = {}
    for path in lists:
        split = "test" if path.name.lower().startswith("test") else "train"
        for name in json_rows.read_content(path).decode("utf-8", "replace").split():
            if split_of.setdefault(_film_of(name), split) != split:
                raise UserError(f"{path}: lists {shown(name)}, which the other list has, too")
    return [split_of.get(_film_of(image), "") for image in images], lists


def _film_of(name: str) -> str:
    """What a film is called in every table: no folder, no suffix."""
    return name.replace("\\", "/").rpartition("/")[2].partition(".")[0]


def _read_boxes(path: Path, images: list[str]) -> tuple[np.ndarray, int]:
    """The boxes of each film, and how many other films have some.

    The header has commas within brackets and three at its end: read by place.
    """
    text = json_rows.read_content(path).decode("utf-8-sig", "replace")
    found: dict[str, list[Box]] = {}
    reader = CsvReader(text.splitlines(keepends=True))
    try:
        for line, cells in enumerate(reader, 1):
            if line == 1 and tuple(map(column_key, cells[:2])) != ("imageindex", "findinglabel"):
                raise UserError(f"{path}:1: does not begin with Image Index, Finding Label")
            if line == 1 or not any(map(str.strip, cells)):
                continue
            # Rows have six cells or nine, as the file was saved.
            try:
                sizes = [float(cell) / _SIDE for cell in cells[2:6]]
            except ValueError:
                sizes = []
            if len(sizes) != 4 or not all(0 <= size < math.inf for size in sizes):
                raise UserError(f"{path}:{line}: not a film, a finding and four numbers")
            found.setdefault(_film_of(cells[0].strip()), []).append(Box(cells[1].strip(), *sizes))
    except csv.Error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV") from None
    boxes = as_texts([tuple(found.pop(_film_of(image), ())) for image in images])
    return boxes, len(found)
