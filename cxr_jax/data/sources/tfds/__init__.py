"""A data set that tensorflow-datasets has prepared, as array_record or parquet; TensorFlow is not needed.

Features are found by name: the film is `image`; its id `id`, `name`, `path` ..; the patient by the usual names of such
columns, else by the id; `study`, `view` or `image_view`, `prompt`, `target`. Labels are the first of these that is
there:

    state               14 numbers: 1, 0, -1 uncertain, -2 blank (what `cxr_jax.data.shards` writes)
    label, labels       14 classes among positive, negative, uncertain, unmentioned, in CheXpert order (the stock
                        `chexpert`), or the classes of the findings that are there, or the one class of the film
    a feature a label   named as the label: 1, 0, -1, or a class as above

So the stock `chexpert` of tensorflow-datasets is read as it is. Films keep the order of their shards, which is hashed.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.data.shards import folder as folders
from cxr_jax.data.shards import records
from cxr_jax.data.shards.examples import Value
from cxr_jax.data.shards.folder import Feature, Folder
from cxr_jax.data.sources import patients
from cxr_jax.data.sources.films import Films, as_texts
from cxr_jax.data.sources.films.tables import read_view
from cxr_jax.data.sources.patients import patient_in_path
from cxr_jax.data.sources.table import column_key
from cxr_jax.data.studies import order
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import (
    CHEXPERT_14,
    INDEX,
    NEGATIVE,
    NOT_MENTIONED,
    POSITIVE,
    UNCERTAIN,
    find_label,
)

# As `column_key` spells them, the likeliest first.
_IDS = ("id", "name", "path", "filename", "imageid", "imagepath", "dicomid")
_STUDIES = order.STUDY_COLUMNS
_VIEWS = ("view", "imageview", "viewposition", "projection", "frontallateral")
_LABELS = ("label", "labels", "finding", "findings")
_STATE = "state"
_STATES_OF_CLASSES = {
    "positive": POSITIVE,
    "negative": NEGATIVE,
    "uncertain": UNCERTAIN,
    "unmentioned": NOT_MENTIONED,
    "blank": NOT_MENTIONED,
    "missing": NOT_MENTIONED,
}
# One record's features -> its 14 states.
_ReadStates = Callable[[dict[str, list[Value]]], list[int]]


def read(root: Path, labels: str = "") -> Films:
    """Read every record of a prepared folder; `labels` has no choice.

    Raises:
        UserError: for another format, a feature that is missing, a shard that is damaged.
    """
    data_folder = folders.open_folder(Path(root))
    # What is missing is told before gigabytes are read.
    names = _Names.of(data_folder)
    read_states, label_map = _states_reader(data_folder)
    rows = [
        _read_row(record, names, read_states, data_folder)
        for record in folders.read_records(data_folder)
    ]
    if not rows:
        raise UserError(f"{data_folder.path}: holds no records")
    _check_ids(data_folder, [film_row.film_id for film_row in rows])
    # Of all or of none: a split by patients needs every one.
    known = [film_row.patient for film_row in rows]
    # Without a patient each film is one of its own, and the set says that it has none.
    has_patients = all(known)
    return Films(
        name="tfds",
        root=data_folder.path,
        ids=as_texts([film_row.film_id for film_row in rows]),
        images=as_texts([film_row.image for film_row in rows]),
        patients=as_texts([film_row.patient or film_row.film_id for film_row in rows]),
        studies=as_texts([film_row.study or film_row.film_id for film_row in rows]),
        views=as_texts([film_row.view for film_row in rows]),
        splits=as_texts([film_row.split for film_row in rows]),
        states=np.array([film_row.states for film_row in rows], np.int8),
        prompts=_column([film_row.prompt for film_row in rows]),
        # Whoever is asked is told what is right, as far as the states say.
        solutions=_column([_solution(film_row) for film_row in rows]),
        targets=_column([film_row.target for film_row in rows]),
        tables=(data_folder.path / folders.INFO,),
        basis=f"labels as {data_folder.name} {data_folder.version} has them",
        label_map=label_map,
        edition=f"{data_folder.name} {data_folder.version}",
        has_patients=has_patients,
        notes=() if has_patients else ("no feature and no id names the patient of every film",),
    )


def _column(texts: Sequence[str]) -> np.ndarray | None:
    """A column that a set may have."""
    # All or none: a set without prompts has no empty ones.
    if not any(texts):
        return None
    return as_texts(texts)


def _solution(film_row: "_Row") -> str:
    named = [
        label
        for label, state in zip(CHEXPERT_14, film_row.states, strict=True)
        if state == POSITIVE
    ]
    return ", ".join(named)


def _check_ids(data_folder: Folder, ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        raise UserError(f"{data_folder.path}: two records have the same id")


# ---- Features by name ------------------------------------------------------------------------------


class _Names(NamedTuple):
    """Features that hold what there is to know, "" for what none holds."""

    film_id: str
    patient: str
    study: str
    view: str
    prompt: str
    target: str

    @classmethod
    def of(cls, data_folder: Folder) -> "_Names":
        """Find them. Raises UserError for a set without films."""
        if records.IMAGE not in data_folder.features:
            raise UserError(
                f"{data_folder.path}: has no feature {records.IMAGE!r}; it has {', '.join(data_folder.features)}"
            )

        # The likeliest key first, whatever order the features have.
        def find(keys: Iterable[str]) -> str:
            by_key = {
                column_key(feature_name): feature_name for feature_name in data_folder.features
            }
            return next((by_key[key] for key in keys if key in by_key), "")

        return cls(
            find(_IDS),
            find(patients.PATIENT_COLUMNS),
            find(_STUDIES),
            find(_VIEWS),
            find(("prompt",)),
            find(("target",)),
        )


class _Row(NamedTuple):
    film_id: str
    image: str
    patient: str
    study: str
    view: str
    split: str
    prompt: str
    target: str
    states: list[int]


def _read_row(
    record: folders.Record, names: _Names, read_states: _ReadStates, data_folder: Folder
) -> _Row:
    texts = {
        field: _text(record.features.get(feature_name, ()), data_folder.features[feature_name])
        if feature_name
        else ""
        for field, feature_name in names._asdict().items()
    }
    # Without an id the record's own name is one.
    film_id = texts["film_id"] or record.name
    patient = texts["patient"] or patient_in_path(film_id) or ""
    study = texts["study"] or order.find_study({}, [film_id]) or ""
    # study1 is one of its patient's alone.
    if not texts["study"] and study and patient:
        study = f"{patient}/{study}"
    try:
        states = read_states(record.features)
    except (ValueError, IndexError, KeyError):
        raise UserError(
            f"{data_folder.path / record.name}: its labels are not states (1, 0, -1, -2) or classes"
        ) from None
    return _Row(
        film_id=film_id,
        image=record.name,
        patient=patient,
        study=study,
        # A word that says no view is none.
        view=read_view(texts["view"]),
        split=record.split,
        prompt=texts["prompt"],
        target=texts["target"],
        states=states,
    )


def _text(values: Iterable[Value], feature: Feature) -> str:
    """A feature as text: of a class its name."""
    for feature_value in values:
        if isinstance(feature_value, bytes):
            return feature_value.decode("utf-8", "backslashreplace")
        if feature.classes and isinstance(feature_value, int):
            return (
                feature.classes[feature_value] if 0 <= feature_value < len(feature.classes) else ""
            )
        return str(feature_value)
    return ""


# ---- Labels ----------------------------------------------------------------------------------------


def _states_reader(data_folder: Folder) -> tuple[_ReadStates, str]:
    """How the labels of a record are read, and what the map is called. Raises UserError where there are none."""
    features = data_folder.features
    if _STATE in features:
        return _read_state, "none"
    by_key = {column_key(feature_name): feature_name for feature_name in features}
    # Lists of classes before features of single labels: a set may have both.
    for key in _LABELS:
        feature_name = by_key.get(key, "")
        if feature_name and features[feature_name].classes:
            return _classes_reader(feature_name, features[feature_name].classes, data_folder)
    by_label = {
        label: feature_name
        for feature_name in features
        if (label := find_label(feature_name.replace("_", " ")))
    }
    if by_label:
        return _single_reader(by_label, features), "features by their names"
    raise UserError(
        f"{data_folder.path}: has no labels: no feature {_STATE!r} or 'label', and none named as one of the 14; it has "
        f"{', '.join(features)}"
    )


def _read_state(features: dict[str, list[Value]]) -> list[int]:
    states = [int(feature_value) for feature_value in features[_STATE]]
    if len(states) != len(CHEXPERT_14) or not set(states) <= set(_STATES_OF_CLASSES.values()):
        raise ValueError("not 14 states")
    return states


def _classes_reader(
    feature_name: str, classes: Sequence[str], data_folder: Folder
) -> tuple[_ReadStates, str]:
    """Of a sequence of classes: a state for each of the 14, or the findings that are there."""
    # Classes that are all states: one for each of the 14, as the table has them.
    states = [_STATES_OF_CLASSES.get(word.strip().lower()) for word in classes]
    if None not in states:
        # By position: nothing in the folder says which label is which.
        def read_each(features: dict[str, list[Value]]) -> list[int]:
            found = [
                _STATES_OF_CLASSES[classes[int(feature_value)].strip().lower()]
                for feature_value in features[feature_name]
            ]
            if len(found) != len(CHEXPERT_14):
                raise ValueError("not 14 states")
            return found

        return read_each, "chexpert 1"
    # Else classes are findings; those that are none of the 14 assert nothing.
    places = [
        INDEX[label] if (label := find_label(word.replace("_", " "))) else None for word in classes
    ]
    covered = {place for place in places if place is not None}
    if not covered:
        raise UserError(
            f"{data_folder.path}: no class of the feature {feature_name!r} is a state or one of the 14 labels"
        )

    def read_named(features: dict[str, list[Value]]) -> list[int]:
        named = {places[int(feature_value)] for feature_value in features.get(feature_name, ())}
        # What no class asserts is known of no film.
        return [
            int(place in named) if place in covered else NOT_MENTIONED
            for place in range(len(CHEXPERT_14))
        ]

    return read_named, "classes by their names"


def _single_reader(by_label: dict[str, str], features: dict[str, Feature]) -> _ReadStates:
    """Of a feature a label: its number, or what its class is called."""

    def read_states(record: dict[str, list[Value]]) -> list[int]:
        # Labels without a feature are blank of every film.
        states = [NOT_MENTIONED] * len(CHEXPERT_14)
        for label, feature_name in by_label.items():
            word = _text(record.get(feature_name, ()), features[feature_name]).strip().lower()
            # A number may be written as a float; blank is blank.
            states[INDEX[label]] = (
                _STATES_OF_CLASSES[word] if word in _STATES_OF_CLASSES else int(float(word or -2))
            )
        if not set(states) <= set(_STATES_OF_CLASSES.values()):
            raise ValueError("not a state")
        return states

    return read_states
