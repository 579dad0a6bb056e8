"""VinDr-CXR (Nguyen et al., 2022): image_labels_{train,test}.csv of PhysioNet, or train.csv of its Kaggle edition.

Of the train set each film was read by three of 17 radiologists, a row each: a label is 1 where most of them name it, -1
where some do, 0 where nobody does; the test set is their consensus. Kaggle lists boxes with the class of each, and 14
of the findings. The set has no patients.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.data.sources import maps
from cxr_jax.data.sources.films import Films, as_texts
from cxr_jax.data.sources.films.tables import (
    Columns,
    NoTableError,
    count_contradictions,
    find_tables,
)
from cxr_jax.data.sources.table import column_key
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import INDEX, NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

_FOLDERS = (
    "",
    "annotations",
    "*/annotations",
    "[Vv]in*",
    "physionet.org/files/vindr-cxr/*/annotations",
)
_TRAIN, _TEST, _KAGGLE = "image_labels_train.csv", "image_labels_test.csv", "train.csv"
# The two tables spell one column differently.
_OTHER_NAMES = {"Other diseases": ("Other diseases", "Other disease")}


class _Part(NamedTuple):
    """The films of one table, in its order."""

    films: list[str]
    lines: list[int]  # on which each is first listed
    states: np.ndarray  # int8 [N, 14]


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read PhysioNet's tables of readers, train before test, else Kaggle's table of boxes."""
    # ---- Which edition ----
    found = [find_tables(data_root, (name,), _FOLDERS)[:1] for name in (_TRAIN, _TEST)]
    tables = list(dict.fromkeys(path for paths in found for path in paths))
    kaggle = find_tables(data_root, (_KAGGLE,), _FOLDERS)[:1]
    # A file may be any of the three.
    is_kaggle = not tables or (data_root.is_file() and _has_classes(data_root))
    if is_kaggle and not kaggle:
        raise NoTableError(
            f"{data_root}: holds no {_TRAIN}, no {_TEST} and no {_KAGGLE} (.gz or not)"
        )
    # ---- Readings to states ----
    label_map = maps.load_map("vindr_kaggle" if is_kaggle else "vindr")
    if is_kaggle:
        tables, parts = kaggle, [_read_kaggle(kaggle[0], label_map)]
    else:
        parts = [_read_readers(path, label_map) for path in tables]
    splits = ["test" if "test" in path.name.lower() else "train" for path in tables]
    # ---- One film, one row ----
    films = [film for part in parts for film in part.films]
    if len(set(films)) < len(films):
        raise UserError(f"{tables[-1]}: lists a film that {tables[0].name} lists, too")
    counts = [len(part.films) for part in parts]
    of_film = np.repeat(splits, counts).tolist()
    states = np.concatenate([part.states for part in parts])
    return Films(
        name="vindr",
        root=data_root,
        ids=as_texts(films),
        images=as_texts(
            [f"{split}/{film}.dicom" for film, split in zip(films, of_film, strict=True)]
        ),
        patients=as_texts(films),
        studies=as_texts(films),
        # All films are PA by the authors' selection.
        views=as_texts(["PA"] * len(films)),
        splits=as_texts(of_film),
        states=states,
        tables=tuple(tables),
        lines=np.concatenate([part.lines for part in parts]),
        line_tables=np.repeat(np.arange(len(parts)), counts),
        basis="labels of most of three radiologists",
        basis_of_split={"test": "radiologists' consensus labels"},
        label_map=str(label_map),
        edition="Kaggle" if is_kaggle else "",
        has_patients=False,
        image_folders=("vinbigdata*", "*/vindr-cxr/*", "[Vv]in*", "images"),
        suffixes=(".dcm", ".png", ".jpg"),
        notes=tuple(count_contradictions(states)),
    )


def _has_classes(path: Path) -> bool:
    try:
        Columns(path, ("class_name",))
    except UserError:
        return False
    return True


def _read_readers(path: Path, label_map: maps.LabelMap) -> _Part:
    """Films in the order of the table, and their states."""
    sources = list(dict.fromkeys(row.source for row in label_map.rows))
    optional = [name for names in _OTHER_NAMES.values() for name in names]
    needed = [source for source in sources if source not in _OTHER_NAMES]
    columns = Columns(path, ("image_id", *needed), ("rad_id", *optional))
    images, readers = columns.ids("image_id"), columns["rad_id"]
    # A reading that stands there twice would count as two readers.
    columns.check_once(list(zip(images, readers, strict=True)), "the reading")
    films, lines = _first_lines(images, columns)
    place_of = {film: place for place, film in enumerate(films)}
    rows = np.array([place_of[image] for image in images])
    # Readings of a film may lie apart in the table.
    votes = np.zeros((len(films), len(sources)), int)
    for column, source in enumerate(sources):
        name = next(
            (name for name in _OTHER_NAMES.get(source, (source,)) if name in columns), source
        )
        if name in columns:
            named = columns.decode(name, _read_vote, f"{name} is neither 0 nor 1")
            np.add.at(votes[:, column], rows, named)
    return _Part(films, lines, _states_of(votes, np.bincount(rows), sources, label_map))


def _first_lines(images: list[str], columns: Columns) -> tuple[list[str], list[int]]:
    """Each film once, and the line that lists it first."""
    lines: dict[str, int] = {}
    for image, line in zip(images, columns.lines, strict=True):
        lines.setdefault(image, line)
    return list(lines), list(lines.values())


def _read_vote(cell: str) -> int:
    # 0.0 as pandas writes it.
    number = float(cell)
    if number not in (0, 1):
        raise ValueError
    return int(number)


def _read_kaggle(path: Path, label_map: maps.LabelMap) -> _Part:
    columns = Columns(path, ("image_id", "class_name", "rad_id"))
    images, classes, readers = columns.ids("image_id"), columns["class_name"], columns["rad_id"]
    films, lines = _first_lines(images, columns)
    place_of = {film: place for place, film in enumerate(films)}
    sources = list(dict.fromkeys(row.source for row in label_map.rows))
    column_of = {column_key(source): column for column, source in enumerate(sources)}
    votes = np.zeros((len(films), len(sources)), int)
    class_keys = list(map(column_key, classes))
    # The edition has these classes and no other: a film would be without the finding that another spelling means.
    for box_row, class_key in enumerate(class_keys):
        if class_key not in column_of:
            raise columns.error(box_row, f"class_name is no class of the map {label_map}")
    # A reader draws several boxes of one finding.
    for image, class_key, _ in dict.fromkeys(zip(images, class_keys, readers, strict=True)):
        votes[place_of[image], column_of[class_key]] += 1
    # A reader who found nothing has a row, too: "No finding".
    pairs = dict.fromkeys(zip(images, readers, strict=True))
    reader_counts = np.bincount([place_of[image] for image, _ in pairs], minlength=len(films))
    return _Part(films, lines, _states_of(votes, reader_counts, sources, label_map))


def _states_of(
    votes: np.ndarray, readers: np.ndarray, sources: Sequence[str], label_map: maps.LabelMap
) -> np.ndarray:
    """The states of N films, int8 [N, 14].

    Args:
        votes: int [N, sources], readers who name a source label.
        readers: int [N], of each film.
    """
    # Source label by source label: two readers who say two things do not agree.
    named = np.where(
        2 * votes > readers[:, None], POSITIVE, np.where(votes > 0, UNCERTAIN, NEGATIVE)
    )
    # Every film was read for all findings of the edition: what nobody names is absent.
    covered = label_map.scored()
    states = np.tile(np.where(covered, NEGATIVE, NOT_MENTIONED).astype(np.int8), (len(votes), 1))
    column_of = {source: column for column, source in enumerate(sources)}
    # In this order: what is there goes before what may be, that before what hides it.
    for relations, wanted, state in (
        ((maps.BLOCKS,), (POSITIVE, UNCERTAIN), NOT_MENTIONED),
        (maps.ASSERTS, (UNCERTAIN,), UNCERTAIN),
        (maps.ASSERTS, (POSITIVE,), POSITIVE),
    ):
        for row in label_map.rows:
            if row.relation in relations:
                hit = np.isin(named[:, column_of[row.source]], wanted)
                states[hit, INDEX[row.target]] = state
    return states
