"""Training films that must not train: of registered sets, of patients of a test set, of a test set itself."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.data import images
from cxr_jax.data.sources.guard import film_hash, hash_files
from cxr_jax.data.sources.guard.registered import Films, registered_rows, registered_sets
from cxr_jax.data.sources.patients import same_patient_key
from cxr_jax.data.sources.rows import Row
from cxr_jax.errors import shown

NAMED = 3  # films that a message names


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of films: see `registered.Films`."""

    name: str
    ids: Sequence[str]
    patients: Sequence[str | None]
    studies: Sequence[str | None]
    splits: Sequence[str | None]


def columns_of(film_rows: Sequence[Row], name: str, root: str | Path) -> Columns:
    """Take from rows what registered sets and patients are told by.

    Args:
        film_rows: of a manifest or a data set.
        name: of the data set that their patients' ids belong to.
        root: the folder that their films lie below.
    """
    root = os.path.join(root, "")
    return Columns(
        name=name,
        # By its id and by where it lies: manifests give films ids of their own.
        ids=[
            "\n".join(
                [film_row.id, *(str(path).removeprefix(root) for path in film_row.image_paths)]
            )
            for film_row in film_rows
        ],
        patients=[film_row.patient for film_row in film_rows],
        studies=[film_row.study for film_row in film_rows],
        splits=[film_row.split for film_row in film_rows],
    )


class Finding(NamedTuple):
    """Why some of the training rows, or films, must not train.

    Attributes:
        kind: "registered", "patients" or "films".
        text: how many, and why.
        named: the first of them.
    """

    kind: str
    text: str
    named: str


def find_registered(train: Films, folders: Iterable[str | Path] = ()) -> list[Finding]:
    """Find training films of registered evaluation sets; see `registered.overlaps`. Raises UserError."""
    # Named as people know them, with the name in the rules behind.
    about = {registered.name: registered.about for registered in registered_sets()}
    return [
        _finding("registered", f"are of {about[set_name]} ({set_name})", train, rows)
        for set_name, rows in registered_rows(train, folders).items()
    ]


def find_patients(train: Films, tests: Mapping[str, Films]) -> list[Finding]:
    """Find training films of patients that a test set has; only within one data set do ids speak of one person."""
    # Spellings of one id are one patient, as in the split.
    findings = []
    for set_name, test in tests.items():
        # Of this set alone, so that a message can name it.
        tested = {same_patient_key(patient) for patient in test.patients if patient}
        rows = [
            film_row
            for film_row, patient in enumerate(train.patients)
            if patient and train.name == test.name and same_patient_key(patient) in tested
        ]
        if rows:
            findings.append(_finding("patients", f"are of patients of {set_name}", train, rows))
    return findings


def _finding(kind: str, reason: str, train: Films, rows: Sequence[int]) -> Finding:
    # Of an id its first line: the others are where the film lies.
    names = [train.ids[film_row].partition("\n")[0] for film_row in rows]
    return Finding(kind, f"{_count(len(rows), len(train.ids))} {reason}", _first(names))


def _count(count: int, total: int) -> str:
    return f"{count:,} of {total:,} training films"


def _first(names: Sequence[str]) -> str:
    # Enough to look them up; a list of thousands would hide the reason.
    dots = ", .." if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + dots


# ---- By their pixels -------------------------------------------------------------------------------


def find_films(
    train: Sequence[Path], tests: Mapping[str, Sequence[Path]], root: str | Path, threads: int = 0
) -> list[Finding]:
    """Find training films that a test set has as well, under whatever name, size, format and grey scale.

    Args:
        train, tests: files of films.
        root: the folder that they lie below, for the cache of hashes.
        threads: as of `loading.map_in_threads`.
    """
    # All at once, so that the cache is written once.
    hashes = hash_files.hash_files([*train, *sum(map(list, tests.values()), [])], root, threads)
    findings = []
    for set_name, test in tests.items():
        if pairs := same_films(train, test, hashes):
            named = [f"{film.name} is {other.name}" for film, other in pairs.items()]
            total = len(set(train))
            text = f"{_count(len(pairs), total)} are films of {set_name}, stored anew"
            findings.append(Finding("films", text, _first(named)))
    return findings


def same_films(
    films: Sequence[Path], others: Sequence[Path], hashes: Mapping[Path, np.ndarray]
) -> dict[Path, Path]:
    """Find the films that are among others, by their hashes and then by the correlation of their ranks.

    Args:
        hashes: `film_hash` of each; one without is left out.

    Returns:
        Each of `films` that is one of `others` -> that one, in the order of `films`.
    """
    lists = [
        [film_path for film_path in dict.fromkeys(paths) if film_path in hashes]
        for paths in (films, others)
    ]
    if not all(lists):
        return {}
    # One matrix each: all pairs are compared by products of them.
    stacked = [np.stack([hashes[film_path] for film_path in paths]) for paths in lists]
    found: dict[Path, Path] = {}
    for film_row, column in film_hash.near_pairs(*stacked):
        film, other = lists[0][film_row], lists[1][column]
        # One proof is enough, and each takes two films to be read again.
        if film not in found and _is_one(film, other):
            found[film] = other
    return {film: found[film] for film in lists[0] if film in found}


def _is_one(film: Path, other: Path) -> bool:
    return film == other or film_hash.are_one(_thumbnail(film), _thumbnail(other))


@functools.lru_cache(maxsize=4096)
def _thumbnail(film_path: Path) -> np.ndarray:
    return film_hash.thumbnail(images.read_image(film_path).pixels, film_hash.CONFIRM_SIDE)
