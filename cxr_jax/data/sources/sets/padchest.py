"""PadChest (Bustos et al., 2020): PADCHEST_chest_x_ray_images_labels_160K_*.csv, a row a film, with Spanish reports.

Labels are a list in one cell, written as Python does. `label_kind`: all (the default), or physician: only films whose
reports physicians read; of the others a network did. Films that the table excludes are no rows here.
"""

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Films, as_texts, no_states
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    find_table,
    read_sex,
    read_view,
)
from cxr_jax.data.sources.table import column_key, is_blank
from cxr_jax.labels.taxonomy import NEGATIVE, NOT_MENTIONED

LABELS = ("all", "physician")
TABLES = ("PADCHEST_chest_x_ray_images_labels_160K*.csv", "PADCHEST*labels*.csv", "*padchest*.csv")
FOLDERS = ("", "[Pp]ad[Cc]hest*", "PADCHEST*", "BIMCV*")
_NEEDED = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels")
_OPTIONAL = (
    "StudyDate_DICOM",
    "PatientBirth",
    "PatientSex_DICOM",
    "Pediatric",
    "Report",
    "MethodLabel",
)
# Of the labels what says something of the report or the film.
EXCLUDE, UNCHANGED, SUBOPTIMAL = "exclude", "unchanged", "suboptimal study"
# A list as Python or numpy writes it: between quoted texts a comma or a space. Without either two would become one.
_TEXT = r"""u?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_TEXTS = re.compile(_TEXT)
_LIST = re.compile(rf"\[\s*(?:{_TEXT}(?:(?:\s*,\s*|\s+){_TEXT})*\s*,?\s*)?\]", re.DOTALL)


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the table."""
    table = find_table(data_root, TABLES, FOLDERS)
    columns = Columns(table, _NEEDED, _OPTIONAL)
    label_map = maps.load_map("padchest")
    reader = label_map.reader()
    # 160,861 rows hold 28,809 distinct lists: each is parsed once.
    named = columns.decode("Labels", read_list, "Labels is no list of labels")
    states = np.array([states_of(names, reader) for names in named])
    folders, images = columns.ids("ImageDir"), columns.paths("ImageID")
    # Only the year of birth is published.
    births = _numbers(columns["PatientBirth"]).astype(int)
    dates = [cell.partition(".")[0] for cell in columns["StudyDate_DICOM"]]
    years = _numbers([date[:4] for date in dates])
    # Every row first; what is left out is counted by what the row says.
    films = Films(
        name="padchest",
        root=data_root,
        ids=as_texts(images),
        images=as_texts(
            [f"{folder}/{image}" for folder, image in zip(folders, images, strict=True)]
        ),
        patients=as_texts(columns.ids("PatientID")),
        studies=as_texts(columns.ids("StudyID")),
        views=as_texts(columns.decode("Projection", read_view, "")),
        splits=as_texts([""] * len(images)),
        states=states,
        sexes=as_texts([read_sex(cell) for cell in columns["PatientSex_DICOM"]]),
        ages=np.where((births > 0) & (years > 0), years - births, np.nan).astype(np.float32),
        reports=as_texts(columns["Report"]),
        dates=as_texts(dates),
        tables=(table,),
        lines=np.array(columns.lines),
        basis="labels of reports, by physicians or by a network",
        label_map=str(label_map),
        image_folders=("images", "images-*", "[Pp]ad[Cc]hest*", "BIMCV*", "*/images"),
        suffixes=(".jpg",),
    )
    return _leave_out(films, columns, named, label_kind, reader)


def _leave_out(
    films: Films,
    columns: Columns,
    named: list[tuple[str, ...] | None],
    label_kind: str,
    reader: maps.MapReader,
) -> Films:
    """The films that are rows, with what there is to say of them."""
    # ---- Which films are rows ----
    is_excluded = np.array([is_labelled(names, EXCLUDE) for names in named])
    no_chest = np.array([cell.strip().upper() == "EXCLUDE" for cell in columns["Projection"]])
    by_network = np.array([cell.lower() != "physician" for cell in columns["MethodLabel"]])
    left_out = {"label exclude": is_excluded, "projection EXCLUDE": no_chest & ~is_excluded}
    if label_kind == "physician":
        left_out["labels by a network"] = by_network & ~is_excluded & ~no_chest
    counts = {reason: int(rows.sum()) for reason, rows in left_out.items() if rows.any()}
    kept = films.select(~np.any(list(left_out.values()), axis=0))
    # ---- What there is to say of them ----
    notes = []
    for label in (UNCHANGED, SUBOPTIMAL):
        count = sum(is_labelled(names, label) for names in named)
        if count:
            meaning = "absent labels are unknown there" if label == UNCHANGED else "kept"
            notes.append(f"{count:,} rows are labelled {label}: {meaning}")
    if children := sum(cell.upper() == "PED" for cell in columns["Pediatric"]):
        notes.append(f"{children:,} films are of children")
    if unread := sum(not names for names in named):
        notes.append(f"{unread:,} rows have no labels: blank")
    if reader.unknown:
        notes.append(describe_unknown(reader))
    return replace(kept, left_out=counts, notes=(*notes, *count_contradictions(kept.states)))


def read_list(cell: str) -> tuple[str, ...] | None:
    """Read a list of labels as Python writes it, empty ones left out; None for a blank cell.

    Raises:
        ValueError: for what is no list of texts.
    """
    # 103 published cells are the text nan.
    if is_blank(cell):
        return None
    if not _LIST.fullmatch(cell):
        raise ValueError
    try:
        # Literals alone: a cell is data of strangers and never run.
        names = [ast.literal_eval(text) for text in _TEXTS.findall(cell)]
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError from None
    return tuple(name.strip() for name in names if not is_blank(name))


def is_labelled(names: tuple[str, ...] | None, label: str) -> bool:
    """Tell whether a label is among those of a film; case, spaces and signs do not count, as in maps."""
    return column_key(label) in map(column_key, names or ())


def describe_unknown(reader: maps.MapReader) -> str:
    """Say what became of labels that the map does not have."""
    return (
        f"{len(reader.unknown)} labels are not in the map: absent labels are unknown in their films"
    )


def states_of(names: tuple[str, ...] | None, reader: maps.MapReader) -> np.ndarray:
    """Give the states of a film by its labels, int8 [14]; blank where there are none."""
    if not names:
        return no_states(1)[0]
    # "normal" beside a finding is kept as it is given, and counted.
    states = reader.states(names)
    # The report refers to a film before this one, or names what nobody knows here: either may be what seems absent.
    if is_labelled(names, UNCHANGED) or not all(map(reader.knows, names)):
        states[states == NEGATIVE] = NOT_MENTIONED
    return states


def _numbers(cells: list[str]) -> np.ndarray:
    """Whole years, 0 where there is none."""
    return np.array([float(cell) if cell.replace(".", "", 1).isdecimal() else 0 for cell in cells])
