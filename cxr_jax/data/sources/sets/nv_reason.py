"""NV-Reason-CXR's rows, or any manifest: grpo.jsonl, sft.jsonl (`sources.manifest` has the formats).

`label_kind`: grpo (the default where it is there) or sft. A solution is complete: what it does not name is absent.
"""

from pathlib import Path

import numpy as np

from cxr_jax.data import json_rows
from cxr_jax.data.json_rows import BadRowError
from cxr_jax.data.sources import manifest, patients, views
from cxr_jax.data.sources.dialogue import parse_dialogue
from cxr_jax.data.sources.films import Films, as_texts
from cxr_jax.data.sources.films.tables import NoTableError, count_contradictions, find_tables
from cxr_jax.data.sources.image_files import BadNameError, split_name
from cxr_jax.data.studies import order
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, NEGATIVE, NOT_MENTIONED, POSITIVE, UNCERTAIN

LABELS = ("grpo", "sft")
_FOLDERS = ("", "data", "NV-Reason*", "nv_reason*")
_VIEWS = {views.FRONTAL: "FRONTAL", views.LATERAL: "LATERAL"}


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the rows of a manifest; films need not be there."""
    names = [f"{label_kind}.json*"] if label_kind else [f"{name}.json*" for name in LABELS]
    found_tables = find_tables(data_root, names, _FOLDERS)
    if not found_tables:
        raise NoTableError(f"{data_root}: holds no {' and no '.join(names)}")
    # As strict as a run that trains on them.
    rows = []
    for number, place, record in json_rows.read_rows(found_tables[0]):
        try:
            if isinstance(record, BadRowError):
                raise record
            rows.append(_read_row(record))
        except (BadRowError, BadNameError, patients.LostDigitsError) as reason:
            line = f":{number}" if place.startswith("line") else f": {place}"
            raise UserError(f"{found_tables[0]}{line}: {reason}") from None
    if not rows:
        raise UserError(f"{found_tables[0]}: holds no rows")

    def column(name: str) -> np.ndarray:
        return as_texts([row[name] for row in rows])

    states = np.array([row["states"] for row in rows], np.int8)
    # Several answers to one film are several rows.
    notes = []
    if repeated := len(rows) - len({row["id"] for row in rows}):
        notes.append(f"{repeated:,} rows have the id of a row before them")
    return Films(
        name="nv_reason",
        root=data_root,
        ids=column("id"),
        images=column("image"),
        patients=column("patient"),
        studies=column("study"),
        views=column("view"),
        splits=column("split"),
        prompts=column("prompt"),
        solutions=column("solution"),
        targets=column("target"),
        states=states,
        tables=(found_tables[0],),
        basis="solutions of the rows, taken as complete",
        label_map="chexpert 1",
        has_patients=all(row["has_patient"] for row in rows),
        image_folders=("images", "*"),
        notes=(*notes, *count_contradictions(states)),
    )


def _read_row(record: dict) -> dict:
    """The columns of a row. Raises BadRowError, BadNameError, LostDigitsError."""
    # Its films need not be there: folders of the published rows are flattened.
    dialogue = parse_dialogue(record)
    if not dialogue.films:
        raise BadRowError("no image")
    image = "/".join(split_name(dialogue.films[0].names[-1].removeprefix("/")))
    identifier = manifest.parse_id(record, image)
    truth = manifest.parse_truth(record)
    # The published ids and paths name patient, study and view.
    names = (identifier, image)
    patient = patients.find_patient(record, names)
    view = _VIEWS.get(views.find_view(record, names) or "", "UNKNOWN")
    positive = set(filter(None, truth.solution.split(", ")))
    # Four states: a row may say `labels` beside its solution.
    states = []
    for place, label in enumerate(CHEXPERT_14):
        state = POSITIVE if label in positive else NEGATIVE
        if not truth.known[place]:
            state = UNCERTAIN if truth.hedged[place] else NOT_MENTIONED
        states.append(state)
    return {
        "id": identifier,
        "image": image,
        # Without one the row is on its own: `has_patients` of the set says so.
        "patient": patient or identifier,
        "has_patient": patient is not None,
        "study": order.find_study(record, names) or patient or identifier,
        "view": view,
        "split": str(record.get("split") or ""),
        "states": states,
        "prompt": dialogue.prompt,
        "solution": truth.solution,
        "target": dialogue.target or "",
    }
