"""What is to be written: films with what is known of them, and rows that ask about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_jax.data import json_rows
from cxr_jax.data.json_rows import BadRowError, is_absent
from cxr_jax.data.prompts import FIND_PROMPT, IMAGE_MARK
from cxr_jax.data.sources import dialogue, manifest, sets, views
from cxr_jax.data.sources.films import places, summary
from cxr_jax.data.sources.rows import Row
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, NOT_MENTIONED, POSITIVE, find_label

NO_SPLIT = (
    "train"  # of films whose rows name none, as tensorflow-datasets calls what is not divided
)
_PROMPT_KEYS = {row_key for keys in dialogue.PLAIN_KEYS for row_key in keys if row_key}
# What a row says in its turns and films is written anew; the rest of it is kept.
_WRITTEN_ANEW = _PROMPT_KEYS | {*dialogue.TURN_LISTS, "image", "images", "system", "history"}


@dataclass(frozen=True, kw_only=True)
class Film:
    """A film and the features of its record.

    Attributes:
        file: whose bytes are the record's image.
        states: of the 14 labels: 1, 0, -1 uncertain, -2 blank.
    """

    id: str
    patient: str
    study: str
    view: str
    split: str
    file: Path
    states: tuple[int, ...]
    prompt: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """Films, and rows about them.

    Attributes:
        source: what they are from, in a word; no path.
        films: no file is there twice.
        rows: the rows of a manifest, made with the names that the films have by then, in the order of `films`.
    """

    source: str
    films: Sequence[Film]
    rows: Callable[[Sequence[str]], list[dict[str, Any]]]


def from_manifest(path: str | Path, image_root: str | Path) -> Shipment:
    """Read the rows of a manifest.

    Raises:
        UserError: as `manifest.load_rows` does.
    """
    rows = manifest.load_rows(path, image_root)
    # Every row is a good one by now, so that none is left out here.
    records = [record for _, _, record in json_rows.read_rows(path)]
    # By file: a film that is asked about twice is stored once.
    films: dict[Path, Film] = {}
    for film_row, record in zip(rows, records, strict=True):
        assert not isinstance(record, BadRowError)
        for place, film_file in enumerate(film_row.image_paths):
            # Of several rows on one film the first describes it; `rows` has them all.
            films.setdefault(film_file, _film_of(film_row, record, place))
    numbers = {film_file: number for number, film_file in enumerate(films)}

    def name_rows(names: Sequence[str]) -> list[dict[str, Any]]:
        return [
            _renamed(
                film_row, record, [names[numbers[film_file]] for film_file in film_row.image_paths]
            )
            for film_row, record in zip(rows, records, strict=True)
            if isinstance(record, dict)
        ]

    return Shipment(source=Path(path).stem, films=list(films.values()), rows=name_rows)


def from_data_set(name: str, root: str | Path, labels: str = "") -> Shipment:
    """Read a data set in its own layout, every film of its tables.

    Args:
        name, root, labels: as of `sources.sets.open_films`.

    Raises:
        UserError: for tables that cannot be read, and for films that are not there.
    """
    # All are looked for: a shard without some of its films would be another set.
    films = sets.open_films(name, root, labels)
    found = places.look_for(films, "all")
    if found.place is None or len(found.missing):
        raise UserError(found.description)
    films = places.with_files(films, found.place)
    files = places.paths_of(films, found.place, range(len(films)))
    records = list(summary.rows_of(films))
    # Only a set that asks has an answer.
    targets = [""] * len(films) if films.targets is None else films.targets
    shipped = [
        Film(
            id=record["id"],
            patient=record["patient_id"] if films.has_patients else "",
            study=record["study_id"],
            view=record["view"],
            split=record["split"] or NO_SPLIT,
            file=film_file,
            states=tuple(states),
            prompt=record.get("prompt", ""),
            target=target,
        )
        for record, film_file, states, target in zip(
            records, files, films.states.tolist(), targets, strict=True
        )
    ]

    def name_rows(names: Sequence[str]) -> list[dict[str, Any]]:
        # A manifest refuses a row of which no label is known; its film is in the shards all the same.
        return [
            {"prompt": FIND_PROMPT, **record, "image": file_name}
            for record, film, file_name in zip(records, shipped, names, strict=True)
            if {POSITIVE, NEGATIVE} & set(film.states)
        ]

    return Shipment(source=films.name, films=shipped, rows=name_rows)


def _film_of(film_row: Row, record: dict[str, Any], place: int) -> Film:
    """A film of a row: of several, the row's question stands beside the first."""
    film_id, prompt, target = film_row.id, film_row.prompt, film_row.target or ""
    if place:
        film_id, prompt, target = f"{film_row.id}#{place + 1}", "", ""
    return Film(
        id=film_id,
        patient=film_row.patient or "",
        study=film_row.study or "",
        view=(film_row.roles[place] if film_row.roles else film_row.view) or "",
        split=film_row.split or NO_SPLIT,
        file=film_row.image_paths[place],
        states=_states(film_row, record),
        prompt=prompt,
        target=target,
    )


def _states(film_row: Row, record: dict[str, Any]) -> tuple[int, ...]:
    """The four states as the row has them, before any policy; of one without labels its solution, which is complete."""
    labels = record.get("labels")
    # Without states the solution says all.
    if not isinstance(labels, dict):
        return tuple(int(name in film_row.positive) for name in CHEXPERT_14)
    states = {
        find_label(name): NOT_MENTIONED if is_absent(state) else int(state)
        for name, state in labels.items()
    }
    return tuple(states.get(name, NOT_MENTIONED) for name in CHEXPERT_14)


def _renamed(film_row: Row, record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The row with films under other names, and with what their old names said of patient, study and view."""
    said = {
        "patient_id": film_row.patient,
        "study_id": film_row.study,
        # Where a column says it, that column says more: AP, PA.
        "view": film_row.view if film_row.view != views.find_view(record, ()) else None,
        "study_number": film_row.taken.number,
    }
    # Labels, policy, dates, columns of one's own.
    kept = {row_key: value for row_key, value in record.items() if row_key not in _WRITTEN_ANEW}
    turns = [{"role": turn.role, "content": turn.content} for turn in film_row.conversation]
    # As the row had it: films with roles, several, or one.
    films: dict[str, Any] = {"images": list(names)}
    if film_row.roles:
        films["images"] = [
            {"path": name, "role": role} for name, role in zip(names, film_row.roles, strict=True)
        ]
    elif len(names) == 1 and not any(IMAGE_MARK in turn.content for turn in film_row.conversation):
        films = {"image": names[0]}
    known = {row_key: value for row_key, value in said.items() if value is not None}
    return {**kept, **known, "id": film_row.id, **films, "messages": turns}
