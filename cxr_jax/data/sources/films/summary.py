"""What `python -m cxr_jax.data.sources` prints of a data set, and the rows that it writes."""

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

from cxr_jax.data.sources import guard
from cxr_jax.data.sources.films import Films
from cxr_jax.data.studies import drawn
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

_STATES = {
    "positive": POSITIVE,
    "negative": NEGATIVE,
    "uncertain": UNCERTAIN,
    "blank": NOT_MENTIONED,
}
# Of every row that is written, in this order.
KEYS = ("id", "image", "patient_id", "study_id", "view", "split", "labels")
_WIDTH = max(map(len, CHEXPERT_14))


def describe(films: Films) -> Iterator[str]:
    """Yield what a person asks of a set, a line each."""
    # ---- What was read ----
    edition = f" ({films.edition})" if films.edition else ""
    yield f"{films.name}{edition}: {films.describe_basis()}; map {films.label_map}"
    for path in films.tables:
        yield f"table: {path}"
    # ---- Who and what is in it ----
    unit = "films"
    if not films.has_images:
        unit = "rows"
    patients = f"{len(set(films.patients)):,} patients"
    if not films.has_patients:
        patients = "no patients: the set names none, each film counts as one"
    yield f"rows: {len(films):,} {unit} of {len(set(films.studies)):,} studies; {patients}"
    yield f"views: {_counts(films.views)}"
    yield f"splits: {_counts(films.splits)}"
    if films.has_patients and (shared := _patients_in_several_splits(films)):
        yield f"note: {shared:,} patients are in more than one split"
    # ---- What is known ----
    yield from _state_table(films)
    # ---- What is not, and what else there is to say ----
    for reason, count in films.left_out.items():
        yield f"left out: {count:,} rows: {reason}"
    for note in films.notes:
        yield f"note: {note}"


def _counts(texts: np.ndarray) -> str:
    found = collections.Counter(texts)
    named = sorted((name, count) for name, count in found.items() if name)
    # What has none last.
    if found[""]:
        named.append(("none", found[""]))
    return ", ".join(f"{name} {count:,}" for name, count in named)


def _patients_in_several_splits(films: Films) -> int:
    # Once for each split that a patient has a film in.
    pairs = {
        (patient, split)
        for patient, split in zip(films.patients, films.splits, strict=True)
        if split
    }
    return sum(count > 1 for count in collections.Counter(patient for patient, _ in pairs).values())


def _state_table(films: Films) -> Iterator[str]:
    yield f"{'label':<{_WIDTH}}" + "".join(f"{name:>11}" for name in _STATES)
    for place, label in enumerate(CHEXPERT_14):
        column = films.states[:, place]
        counts = [int((column == state).sum()) for state in _STATES.values()]
        yield f"{label:<{_WIDTH}}" + "".join(f"{count:>11,}" for count in counts)


def describe_overlaps(films: Films) -> Iterator[str]:
    """Yield how many films are of each registered evaluation set."""
    # Lists of such films lie beside the tables, as a set is published.
    folders = [films.root, *(path.parent for path in films.tables)]
    columns = guard.Columns(
        name=films.name,
        ids=films.ids.tolist(),
        patients=films.patients.tolist(),
        studies=films.studies.tolist(),
        splits=films.splits.tolist(),
    )
    overlaps = guard.overlaps(columns, [folder for folder in folders if folder.is_dir()])
    for name, count in overlaps.items():
        yield f"registered for evaluation: {count:,} films are of {name}"
    if not overlaps:
        yield "registered for evaluation: none of these films"


def rows_of(films: Films) -> Iterator[dict[str, Any]]:
    """Yield an object a film, with None where nothing is known of a label."""
    # Blank is null in rows, as in CheXpert's tables a cell without a number.
    known = {POSITIVE: 1, NEGATIVE: 0, UNCERTAIN: -1, NOT_MENTIONED: None}
    # Of sets that ask and answer, both.
    asks = films.prompts is not None and films.solutions is not None
    for row, states in enumerate(films.states.tolist()):
        record = {
            "id": films.ids[row],
            "image": films.images[row],
            "patient_id": films.patients[row],
            "study_id": films.studies[row],
            "view": films.views[row],
            "split": films.splits[row],
            "labels": dict(zip(CHEXPERT_14, map(known.__getitem__, states), strict=True)),
        }
        if asks:
            assert films.solutions is not None and films.prompts is not None
            record |= {"solution": films.solutions[row], "prompt": films.prompts[row]}
        # Of few films of few sets. Which finding a box holds is the set's own spelling, and stays in its tables.
        if films.boxes is not None and films.boxes[row]:
            record["boxes"] = drawn.as_row(box[1:] for box in films.boxes[row])
        yield record
