"""Which films are of a registered evaluation set: by the rules of registered.toml and by lists beside the data."""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

from cxr_jax.data import json_rows
from cxr_jax.data.sources.table import Table, column_key
from cxr_jax.errors import UserError


class Films(Protocol):
    """Columns of films, N of each; a cell may be empty or None where a data set does not tell.

    Attributes:
        name: of the data set (`cxr_jax.data.sources NAME`), or anything else: its films are then known by their ids.
        ids: of the films; the path below the root of the data set, in most. What stands on further lines of one is no
            part of it, but is looked at as well.
        patients, studies, splits: as the data set spells them.
    """

    # Properties, so that frozen columns are films as well.
    @property
    def name(self) -> str: ...  # noqa: D102 - above

    @property
    def ids(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def patients(self) -> Sequence[str | None]: ...  # noqa: D102

    @property
    def studies(self) -> Sequence[str | None]: ...  # noqa: D102

    @property
    def splits(self) -> Sequence[str | None]: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class FilmList:
    """A file beside the data that names films of a set: see registered.toml."""

    files: tuple[str, ...]
    find: re.Pattern[str]
    column: str = ""
    where: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RegisteredSet:
    """An evaluation set: see registered.toml."""

    name: str
    about: str
    fact: str
    sources: tuple[str, ...]
    pattern: re.Pattern[str]
    column: str
    patients: tuple[int, ...]
    splits: tuple[str, ...]
    paths: re.Pattern[str] | None
    all_of: tuple[str, ...]
    lists: tuple[FilmList, ...]
    studies: bool


# Data sets that no registered set is of: their ids mean nothing to the rules of others.
_OTHERS = ("brax", "rsna", "siim")


@functools.cache
def registered_sets() -> tuple[RegisteredSet, ...]:
    """Read the rules."""
    text = (resources.files(__package__) / "registered.toml").read_text(encoding="utf-8")
    return tuple(_read_set(set_name, entry) for set_name, entry in tomllib.loads(text).items())


def _read_set(set_name: str, entry: dict) -> RegisteredSet:
    # Patterns are compiled once a process.
    lists = [
        FilmList(
            files=tuple(film_list["files"]),
            find=re.compile(film_list["find"]),
            column=film_list.get("column", ""),
            where=film_list.get("where", {}),
        )
        for film_list in entry.get("lists", ())
    ]
    return RegisteredSet(
        name=set_name,
        about=entry["about"],
        fact=entry["fact"],
        sources=tuple(entry["sources"]),
        pattern=re.compile(entry["pattern"], re.IGNORECASE | re.MULTILINE),
        column=entry.get("column", ""),
        patients=tuple(entry.get("patients", ())),
        splits=tuple(entry.get("splits", ())),
        # A pattern that nothing fits would do, and be asked of every film.
        paths=re.compile(entry["paths"], re.IGNORECASE) if "paths" in entry else None,
        all_of=tuple(entry.get("all_of", ())),
        lists=tuple(lists),
        studies=entry.get("studies", False),
    )


# ---- Films of a set --------------------------------------------------------------------------------


def overlaps(films: Films, folders: Iterable[str | Path] = ()) -> dict[str, int]:
    """Count the films that are of registered evaluation sets: name of the set -> films, sets without one left out.

    Args:
        folders: where files that list the films of a set are looked for, by their published names.

    Raises:
        UserError: for such a file that cannot be read.
    """
    return {set_name: len(rows) for set_name, rows in registered_rows(films, folders).items()}


def registered_rows(films: Films, folders: Iterable[str | Path] = ()) -> dict[str, list[int]]:
    """Find the films that are of registered evaluation sets: name of the set -> their positions; see `overlaps`."""
    # A data set that was read from its root has its lists there.
    root = getattr(films, "root", None)
    places = list(dict.fromkeys(map(Path, filter(None, (*folders, root)))))
    is_known = films.name in _OTHERS
    is_known |= any(films.name in registered.sources for registered in registered_sets())
    found = {}
    for registered in registered_sets():
        # A data set's name says whose films it has; without one their own names do.
        if films.name in registered.sources or not is_known:
            found[registered.name] = _rows_of(registered, films, places)
    return {set_name: rows for set_name, rows in found.items() if rows}


def _rows_of(registered: RegisteredSet, films: Films, folders: Sequence[Path]) -> list[int]:
    """The positions of the films of one set."""
    if films.name in registered.all_of:
        return list(range(len(films.ids)))
    is_source = films.name in registered.sources
    keys = [_key_of(registered, films, film_row) for film_row in range(len(films.ids))]
    # A film without a key is of another data set, unless the name of all says otherwise.
    own = [film_row for film_row, key in enumerate(keys) if key is not None or is_source]
    if not own:
        return []
    # Only now: most data sets have no film of most sets, and lists can be long.
    film_list = _listed(registered, folders)
    # Any of the four is enough: a range, a split, a list, a folder.
    rows = {
        film_row
        for film_row in own
        if _is_in(registered.patients, keys[film_row])
        or (films.splits[film_row] or "").strip().lower() in registered.splits
        or keys[film_row] in film_list
        or _is_below(registered.paths, films, film_row)
    }
    # Labels and reports are of studies: one film of it tells them all.
    if registered.studies:
        studies = {films.studies[film_row] for film_row in rows if films.studies[film_row]}
        rows |= {film_row for film_row in own if films.studies[film_row] in studies}
    return sorted(rows)


def _key_of(registered: RegisteredSet, films: Films, film_row: int) -> str | None:
    """What a set's rules know a film by, None of a film of another data set."""
    # Paths of either system; a set may call a film otherwise than its file.
    images = getattr(films, "images", films.ids)
    for text in (films.ids[film_row], images[film_row], films.patients[film_row]):
        if text and (found := registered.pattern.search(text.replace("\\", "/"))):
            return found[1].lower()
    if films.name in registered.sources and registered.column:
        # Published tables have the number alone, or with the word; pandas makes a float of it.
        number = re.search(r"(\d+)(?:\.0*)?$", getattr(films, registered.column)[film_row] or "")
        return number and number[1]
    return None


def _is_in(ends: tuple[int, ...], key: str | None) -> bool:
    return bool(ends) and key is not None and ends[0] <= int(key) <= ends[1]


def _is_below(paths: re.Pattern[str] | None, films: Films, film_row: int) -> bool:
    if paths is None:
        return False
    images = getattr(films, "images", films.ids)
    names = (films.ids[film_row], images[film_row])
    return any(paths.search((name or "").replace("\\", "/")) for name in names)


def _listed(registered: RegisteredSet, folders: Sequence[Path]) -> set[str]:
    """The keys of films that files beside the data name."""
    keys: set[str] = set()
    for film_list in registered.lists:
        for file_name in film_list.files:
            # Published tables are handed on packed as often as not.
            paths = (folder / (file_name + end) for folder in folders for end in ("", ".gz"))
            for path in filter(Path.is_file, paths):
                keys |= {key.lower() for key in _read_list(film_list, path)}
    return keys


def _read_list(film_list: FilmList, path: Path) -> list[str]:
    """The keys that a file names. Raises UserError."""
    if not film_list.column:
        return film_list.find.findall(json_rows.read_content(path).decode("utf-8", "replace"))
    # By the names of columns: published tables come with their columns in several orders.
    table = Table(path, [film_list.column, *film_list.where])
    names = table.columns([film_list.column])
    if not names:
        raise UserError(f"{path}: has no column {film_list.column!r}")
    wanted = {column_key(cell_name): value for cell_name, value in film_list.where.items()}
    found = []
    for record in table:
        cells = {
            column_key(cell_name): cell.strip().lower() for cell_name, cell in record.cells.items()
        }
        if all(cells.get(cell_name) == value for cell_name, value in wanted.items()):
            found += film_list.find.findall(record.cells[names[0]])
    return found
