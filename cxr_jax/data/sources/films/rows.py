"""Films of a data set -> the rows of a run: those of its splits and views, under its policy, with their files."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.sources import policy, sets, views
from cxr_jax.data.sources.films import Films, places
from cxr_jax.data.sources.patients import PatientOfRow
from cxr_jax.data.sources.policy import LabelPolicy
from cxr_jax.data.sources.rows import Row
from cxr_jax.data.studies.order import Taken
from cxr_jax.data.studies.subjects import Subject
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, POSITIVE, UNCERTAIN

# Sets spell them in their own ways.
_SPLIT_NAMES = {"validate": "valid", "validation": "valid", "val": "valid", "dev": "valid"}
_VIEWS = {"LATERAL": views.LATERAL, "PA": views.FRONTAL, "AP": views.FRONTAL}
_VIEWS["FRONTAL"] = views.FRONTAL
_PROJECTIONS = {view: view for view in ("PA", "AP", "LATERAL")}


@dataclass(frozen=True, kw_only=True)
class FilmRows:
    """The rows of a run on a data set.

    Attributes:
        rows: a film each; groups and what nobody is wrong to name are settled by who sees them all.
        films: of the rows, in their order.
        label_policy: what blank and uncertain labels count as.
        about: what was left out and where films lie, a line each.
    """

    rows: list[Row]
    films: Films
    label_policy: LabelPolicy
    about: tuple[str, ...]

    def describe_protocol(self) -> str:
        """Say whose labels of which set stand behind a number, and what was decided on the way, in one line."""
        # Of the films that are read, not of the whole set.
        films = self.films
        splits = " and ".join(dict.fromkeys(filter(None, films.splits)))
        name = " ".join(filter(None, (films.name, splits)))
        name += f" ({films.edition})" if films.edition else ""
        decided = policy.describe_protocol(self.label_policy, films.states)
        return f"{name}, {films.describe_basis()}; {decided}; map {films.label_map}"


# A run opens its films several times: to check them, to train, to say what they were.
@functools.lru_cache(maxsize=1)
def _read_films(name: str, data_root: str, label_kind: str) -> tuple[Films, places.Found, list]:
    films = sets.open_films(name, data_root, label_kind)
    found = places.look_for(films)
    return places.with_files(films, found.place), found, _stamps(films)


def _stamps(films: Films) -> list[int]:
    return [path.stat().st_mtime_ns for path in films.tables if path.exists()]


def _open_films(name: str, data_root: str, label_kind: str) -> tuple[Films, places.Found]:
    films, found, stamps = _read_films(name, data_root, label_kind)
    # A table that was written over since is another set.
    if stamps != _stamps(films):
        _read_films.cache_clear()
        films, found, _ = _read_films(name, data_root, label_kind)
    return films, found


def open_films(data: DataConfig) -> Films:
    """Read the tables of a run's data set, and take what it asks for of splits and views.

    Raises:
        UserError: naming the file and the line, or the key that leaves no film.
    """
    films, _ = _open_films(data.source, data.root, data.labels)
    # Whether their files are there is asked by who reads them.
    return films.select(_choose(films, data))


def digest(data: DataConfig) -> str:
    """Hash the films of a run, whose they are and their labels: SHA-256."""
    # Not the files' bytes: another order of columns, or compression, is the same set.
    films = open_films(data)
    content = hashlib.sha256(films.states.tobytes())
    for column in (films.ids, films.patients):
        content.update("\n".join(column).encode("utf-8", "surrogatepass"))
    return content.hexdigest()


def read_patients(data: DataConfig) -> list[PatientOfRow]:
    """Read whose films a run reads; they need not be there. Raises UserError for tables that cannot be read."""
    films = open_films(data)
    return [
        PatientOfRow(patient if films.has_patients else None, film_id)
        for patient, film_id in zip(films.patients, films.ids, strict=True)
    ]


def load_rows(data: DataConfig) -> FilmRows:
    """Make the rows of a run.

    Raises:
        UserError: for films that are not there, more than `config.data.max_bad`; no film that is left; a bad policy.
    """
    # ---- What labels count as ----
    label_policy = LabelPolicy(
        blank=data.blank, uncertain=data.uncertain, parents=data.parents, no_finding=data.no_finding
    )
    # ---- Which films, and whether they are there ----
    all_films, found = _open_films(data.source, data.root, data.labels)
    chosen = _choose(all_films, data)
    place = _check_found(all_films, found, chosen, data)
    applied = label_policy.apply_states(all_films.states)
    # A film of which nothing is known teaches nothing and is no score; one with a text to imitate does.
    is_known = np.isin(applied, (POSITIVE, NEGATIVE)).any(axis=1)
    if all_films.targets is not None:
        is_known |= all_films.targets.astype(bool)
    kept = chosen & is_known
    if not kept.any():
        raise UserError(
            f"config.data.root={data.root!r}: no label is known of any film that is read"
        )
    # ---- What a run says of them before it begins ----
    films = all_films.select(kept)
    about = [found.description, *(f"note: {note}" for note in films.notes)]
    for reason, count in (
        ("other splits or views", int((~chosen).sum())),
        ("no label known", int((chosen & ~is_known).sum())),
    ):
        if count:
            about.append(f"{count:,} films left out: {reason}")
    rows = list(_rows_of(films, applied[kept], place, label_policy))
    return FilmRows(rows=rows, films=films, label_policy=label_policy, about=tuple(about))


def _choose(films: Films, data: DataConfig) -> np.ndarray:
    """The films of the splits and views that a run asks for, bool [N].

    Raises:
        UserError: naming the key that leaves none.
    """
    # By the set's own words, or by what others call the same split.
    chosen = np.ones(len(films), bool)
    if wanted := [name.strip() for name in data.split.split(",") if name.strip()]:
        known = dict.fromkeys(films.splits)
        same = {_same_split(name) for name in wanted}
        chosen = np.array([_same_split(split) in same for split in films.splits], bool)
        if absent := [name for name in wanted if _same_split(name) not in map(_same_split, known)]:
            there = ", ".join(sorted(filter(None, known))) or "none"
            raise UserError(f"config.data.split={absent[0]!r}: {films.name} has {there}")
    # With laterals or priors asked for, films of other views are looked at beside others.
    if data.views != ("any",):
        wanted_views = np.array([view != "UNKNOWN" for view in films.views], bool)
        if not data.images.strip():
            wanted_views = films.is_frontal()
        chosen &= wanted_views
    if not chosen.any():
        raise UserError(
            f"config.data.views={','.join(data.views)}: none of the films of {films.name} is known to be frontal "
            "(--config.data.views=any reads all)"
        )
    return chosen


def _same_split(name: str) -> str:
    return _SPLIT_NAMES.get(name.lower(), name.lower())


def _check_found(
    films: Films, found: places.Found, chosen: np.ndarray, data: DataConfig
) -> places.Place:
    """Where films lie. Raises UserError where too many of them do not."""
    if not films.has_images:
        raise UserError(
            f"config.data.root={data.root!r}: the tables list studies, and no folder of their films is there"
        )
    if found.place is None:
        raise UserError(f"config.data.root={data.root!r}: {found.description}")
    # Of those that this run reads.
    missing = [row for row in found.missing if chosen[row]]
    if len(missing) > data.max_bad:
        raise UserError(
            f"config.data.root={data.root!r}: {len(missing):,} of {len(found.asked):,} films that were looked for are "
            f"not there, the first {films.images[missing[0]]} (config.data.max_bad={data.max_bad})"
        )
    return found.place


def _rows_of(
    films: Films, states: np.ndarray, place: places.Place, label_policy: LabelPolicy
) -> Iterator[Row]:
    """Yield a row a film; `states` are under the policy."""
    positive, uncertain = states == POSITIVE, (states == UNCERTAIN).tolist()
    known = np.isin(states, (POSITIVE, NEGATIVE)).tolist()
    # By arrays where there are many, by the row only where a row is made.
    names = np.array(CHEXPERT_14)
    # Many films share one answer.
    solutions: dict[bytes, str] = {}
    for index in range(len(films)):
        key = positive[index].tobytes()
        if key not in solutions:
            solutions[key] = ", ".join(names[positive[index]])
        film_id = films.ids[index]
        yield Row(
            id=film_id,
            image_paths=(place.path(films.images[index]),),
            prompt=_cell(films.prompts, index) or FIND_PROMPT,
            solution=solutions[key],
            target=_cell(films.targets, index) or None,
            known=tuple(known[index]),
            hedged=tuple(uncertain[index]),
            group=film_id,
            former_group=film_id,
            patient=films.patients[index] if films.has_patients else None,
            # Of what, is the set's own spelling: where is all that is asked of them.
            boxes=() if films.boxes is None else tuple(box[1:] for box in films.boxes[index]),
            view=_VIEWS.get(films.views[index]),
            policy=label_policy,
            study=films.studies[index],
            split=films.splits[index] or None,
            taken=_taken(films, index),
            subject=_subject(films, index),
        )


def _cell(column: np.ndarray | None, index: int) -> str:
    # Most sets lack most columns.
    if column is None:
        return ""
    return column[index]


def _taken(films: Films, index: int) -> Taken:
    # Of one patient's studies a number tells the order where there are no dates.
    number = None
    if films.numbers is not None and films.numbers[index] >= 0:
        number = int(films.numbers[index])
    return Taken(date=_cell(films.dates, index), number=number)


def _subject(films: Films, index: int) -> Subject:
    """Who is on a film and how it was taken, for subgroups."""
    age = None
    # Not a number differs from itself.
    if films.ages is not None and films.ages[index] == films.ages[index]:
        age = float(films.ages[index])
    return Subject(
        sex=_cell(films.sexes, index) or None,
        age=age,
        projection=_PROJECTIONS.get(films.views[index]),
        source=films.name,
    )


def table_folders(data: DataConfig) -> list[Path]:
    """List the folders in which lists of a set's evaluation films lie, as it is published."""
    films, _ = _open_films(data.source, data.root, data.labels)
    folders = [films.root, *(path.parent for path in films.tables)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
