"""CheXpert v1.0 (Irvin et al., AAAI 2019): train.csv and valid.csv, and the test set of 500 studies.

Labels are of studies and stand on every film of theirs. Patient and study are in the path, `patient00001/study1`.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data.sources.films import Films, as_texts
from cxr_jax.data.sources.films.tables import (
    Columns,
    count_contradictions,
    count_divided_studies,
    find_table,
    find_tables,
    folder_of,
    list_folder,
    read_ages,
    read_sex,
    read_view,
)
from cxr_jax.labels.taxonomy import CHEXPERT_14

FOLDERS = ("", "CheXpert-v1.0*", "[Cc]he[Xx]pert*")
TRAIN_TABLES, VALID_TABLES = (
    ("train.csv", "train_labels.csv"),
    ("valid.csv", "val.csv", "val_labels.csv"),
)
# Of the files that list test studies, those of the readers are left alone.
TEST_TABLES = ("groundtruth.csv", "test_labels.csv", "test.csv")
IMAGE_FOLDERS = ("CheXpert-v1.0*", "[Cc]he[Xx]pert*", "images")
# Old copies and new ones differ in what stands before the patient.
OF_STUDY = re.compile(r"(?:^|/)(?P<patient>patient\d+)/(?P<study>study\d+)(?=/|$)")
_SPLIT = re.compile(r"(?:^|/)(train|valid|val|test)(?=/)")
_FILM = re.compile(r"view.*\.(?:jpe?g|png|dcm)", re.IGNORECASE)


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read train.csv and valid.csv, one of which may be missing; `label_kind` has no choice."""
    train = find_tables(data_root, TRAIN_TABLES, FOLDERS)[:1]
    valid = find_tables(data_root, VALID_TABLES, FOLDERS)[:1]
    # A folder with neither is told so; a file is one table, whatever its name.
    tables = train if train == valid else train + valid
    tables = tables or [find_table(data_root, (TRAIN_TABLES[0], VALID_TABLES[0]), FOLDERS)]
    parts = [_read_table(path) for path in tables]
    # Train before valid, each in the order of its table.
    joined: dict[str, Any] = {
        column: np.concatenate([getattr(part, column) for part in parts]) for column in _COLUMNS
    }
    return replace(
        parts[0],
        root=data_root,
        **joined,
        tables=tuple(tables),
        line_tables=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        basis="labels of reports by CheXpert's labeler",
        basis_of_split={"valid": "radiologists' labels"},
        label_map="chexpert 1",
        edition=_edition(tables[0], parts[0].images[0]),
        image_folders=IMAGE_FOLDERS,
        suffixes=(".png", ".dcm"),
        notes=(
            *count_contradictions(joined["states"]),
            *count_divided_studies(joined["studies"], joined["states"]),
        ),
    )


# What every table has of its films.
_COLUMNS = (
    *("ids", "images", "patients", "studies", "views", "splits", "states"),
    *("sexes", "ages", "numbers", "lines"),
)


def _read_table(path: Path) -> Films:
    # Patient and study have no columns: the path is the key.
    columns = Columns(path, ("Path", *CHEXPERT_14), ("Sex", "Age", "Frontal/Lateral", "AP/PA"))
    images = columns.paths("Path")
    patients, studies, numbers = studies_in_paths(columns, images)
    ages = read_ages(columns["Age"])
    return Films(
        name="chexpert",
        root=path,
        ids=as_texts(images),
        images=as_texts(images),
        patients=as_texts(patients),
        studies=as_texts(studies),
        views=as_texts(read_views(columns["Frontal/Lateral"], columns["AP/PA"], images)),
        splits=as_texts([split_in_path(image, path) for image in images]),
        states=columns.states(),
        sexes=as_texts([read_sex(cell) for cell in columns["Sex"]]),
        # 0 is missing there: the youngest are adults.
        ages=np.where(ages == 0, np.float32("nan"), ages),
        numbers=np.array(numbers),
        lines=np.array(columns.lines),
    )


def studies_in_paths(
    columns: Columns, paths: Sequence[str]
) -> tuple[list[str], list[str], list[int]]:
    """Find patients, studies and the studies' numbers in paths.

    Raises:
        UserError: naming the line of a path that names none.
    """
    patients, studies, numbers = [], [], []
    for row, path in enumerate(paths):
        # A film of nobody could stand on both sides of a split.
        found = OF_STUDY.search(path)
        if found is None:
            raise columns.error(row, "the path names no patient and study (patient00001/study1)")
        patients.append(found["patient"])
        studies.append(f"{found['patient']}/{found['study']}")
        numbers.append(int(found["study"].removeprefix("study")))
    return patients, studies, numbers


def read_views(sides: Sequence[str], directions: Sequence[str], images: Sequence[str]) -> list[str]:
    """Read Frontal/Lateral and AP/PA; without the first, the file's name says it.

    A frontal film with LL or RL is unknown: one of the two columns is wrong.
    """
    known: dict[tuple[str, str], str] = {}
    views = []
    for side, direction, image in zip(sides, directions, images, strict=True):
        if not side:
            side = "Lateral" if "lateral" in image.rpartition("/")[2].lower() else "Frontal"
            # Without columns a name is all there is.
            direction = direction or side
        if (side, direction) not in known:
            view = read_view(direction)
            if read_view(side) == "LATERAL":
                view = "LATERAL"
            elif view == "LATERAL":
                view = "UNKNOWN"
            known[side, direction] = view
        views.append(known[side, direction])
    return views


def split_in_path(image: str, table: Path) -> str:
    """Give the split that a path names, else the table's name."""
    found = _SPLIT.search(image)
    split = found[1] if found else table.name.partition(".")[0].partition("_")[0].lower()
    # chexlocalize spells it so; groundtruth.csv is of the test.
    split = {"val": "valid", "groundtruth": "test"}.get(split, split)
    return split if split in ("train", "valid", "test") else ""


def _edition(table: Path, image: str) -> str:
    # v1.0 and v1.0-small hold other pixels: a number says which.
    for name in (image.partition("/")[0], table.parent.name):
        if name.lower().startswith("chexpert-"):
            return name[len("chexpert-") :]
    return ""


# ---- The test set ----------------------------------------------------------------------------------


def read_test(data_root: Path, label_kind: str = "") -> Films:
    """Read the test set: groundtruth.csv (a row a study, column Study) or test_labels.csv (a row a film, Path).

    Where the studies' folders are there, their films are the rows, else the studies.
    """
    table = find_table(data_root, TEST_TABLES, (*FOLDERS, "labels*", "groundtruth"))
    # Two releases: a row a study without films, or a row a film.
    columns = Columns(table, CHEXPERT_14, ("Study", "Path"))
    name = "Study"
    if "Path" in columns and "Study" not in columns:
        name = "Path"
    if name not in columns:
        Columns(table, ("Study", *CHEXPERT_14))  # which says what is missing
    images = columns.paths(name)
    patients, studies, numbers = studies_in_paths(columns, images)
    # A path without a file at its end is a study.
    of_films = name == "Path" and all("." in image.rpartition("/")[2] for image in images)
    films = Films(
        name="chexpert_test",
        root=data_root,
        ids=as_texts(images),
        images=as_texts(images),
        patients=as_texts(patients),
        studies=as_texts(studies),
        views=as_texts(
            read_views([""] * len(images), [""] * len(images), images)
            if of_films
            else [""] * len(images)
        ),
        splits=as_texts(["test"] * len(images)),
        states=columns.states(),
        numbers=np.array(numbers),
        tables=(table,),
        lines=np.array(columns.lines),
        basis="radiologists' labels",
        label_map="chexpert 1",
        edition=_edition(table, images[0]),
        has_images=of_films,
        image_folders=IMAGE_FOLDERS,
        suffixes=(".png", ".dcm"),
    )
    return films if of_films else _with_films(films)


def _with_films(films: Films) -> Films:
    """The films of the studies, where their folders are there; a study without one stays a row of its own."""
    # A table that was given by name stands for its folder.
    data_root = folder_of(films.root)
    bases = [data_root, data_root.parent]
    bases += [path for name in IMAGE_FOLDERS for path in sorted(data_root.glob(name))]
    # Where most studies are, with the name of the root in front, or without.
    listings = (_list_films(films, base, strip) for base in bases for strip in (0, 1))
    found = max(listings, key=lambda names: sum(map(bool, names)))
    if not any(found):
        return films
    # Labels of the study on every film of it.
    rows = np.repeat(np.arange(len(films)), [max(1, len(names)) for names in found])
    images = [
        f"{study}/{name}" if name else study
        for study, names in zip(films.images, found, strict=True)
        for name in names or ("",)
    ]
    blank = [""] * len(images)
    # A study is no film: it has no view.
    is_study = films.images[rows] == as_texts(images)
    views = as_texts(read_views(blank, blank, images))
    views[is_study] = ""
    notes = []
    if missing := int(is_study.sum()):
        notes.append(f"{missing:,} studies have no film here: each is a row")
    return replace(
        films.select(rows),
        ids=as_texts(images),
        images=as_texts(images),
        views=views,
        has_images=True,
        notes=(*films.notes, *notes),
    )


def _list_films(films: Films, base_folder: Path, strip: int) -> list[list[str]]:
    """The names of the files of each study below a folder."""
    listed = []
    for study in films.images:
        folder = base_folder / study.split("/", strip)[-1]
        # What a download has left half done is no film.
        film_names = filter(_FILM.fullmatch, list_folder(folder))
        listed.append(sorted(film_names))
    return listed
