"""ReXGradient-160K (Zhang et al., 2025): *_metadata*.json of train, valid and test, one object of studies with reports.

Paths lead out of their folder (../deid_png/..): the first step is left out. The set has reports and no labels.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data.sources.films import Films, as_texts, no_states
from cxr_jax.data.sources.films.tables import (
    find_table,
    find_tables,
    read_age,
    read_json,
    read_sex,
    read_view,
)
from cxr_jax.data.sources.image_files import BadNameError, split_name
from cxr_jax.data.sources.patients import patient_in_path
from cxr_jax.data.sources.table import is_blank
from cxr_jax.errors import UserError, shown

_FOLDERS = ("", "metadata", "*/metadata", "ReXGradient*")
SPLITS = ("train", "valid", "test")
_SECTIONS = ("Indication", "Comparison", "Findings", "Impression")


def read(data_root: Path, label_kind: str = "") -> Films:
    """Read the files that are there; of one split that with views."""
    # ---- The files of the splits ----
    tables = []
    for split in SPLITS:
        names = (f"{split}*_metadata_view_position*.json", f"{split}*_metadata*.json")
        tables += [(split, path) for path in find_tables(data_root, names, _FOLDERS)[:1]]
    if not tables:
        find_table(data_root, ("train_metadata*.json",), _FOLDERS)  # which says that there is none
    # A file is of the split that its name begins with.
    if data_root.is_file():
        split = next((split for split in SPLITS if data_root.name.lower().startswith(split)), "")
        tables = [(split, data_root)]
    # ---- A row a film, its study's texts beside it ----
    rows: list[dict[str, Any]] = []
    for split, path in tables:
        rows += _read_studies(path, split)
    images = [row["image"] for row in rows]
    if len(set(images)) < len(images):
        raise UserError(f"{tables[-1][1]}: one film is listed twice")

    def column(name: str) -> np.ndarray:
        return as_texts([row[name] for row in rows])

    return Films(
        name="rexgradient",
        root=data_root,
        ids=column("image"),
        images=column("image"),
        patients=column("patient"),
        studies=column("study"),
        views=column("view"),
        splits=column("split"),
        states=no_states(len(rows)),
        sexes=column("sex"),
        ages=np.array([row["age"] for row in rows], np.float32),
        reports=column("report"),
        dates=column("date"),
        tables=tuple(path for _, path in tables),
        basis="no labels: reports",
        image_folders=("ReXGradient*", "images"),
        suffixes=(".jpg",),
        notes=("the set has reports and no labels: all labels are blank",),
    )


def _read_studies(path: Path, split: str) -> list[dict[str, Any]]:
    studies = read_json(path)
    if not isinstance(studies, dict) or not studies:
        raise UserError(f"{path}: is no object of studies")
    rows = []
    for number, (name, study) in enumerate(studies.items(), 1):
        try:
            rows += _read_study(name, study, split)
        except (BadNameError, ValueError) as reason:
            raise UserError(f"{path}: study {number} ({shown(name)}): {reason}") from None
    return rows


def _read_study(name: str, study: Any, split: str) -> list[dict[str, Any]]:
    """The films of a study. Raises ValueError with the reason."""
    paths = study.get("ImagePath") if isinstance(study, dict) else None
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError("ImagePath is no list of paths")
    views = study.get("ImageViewPosition")
    # A list of another length tells nothing of any film.
    if not isinstance(views, list) or len(views) != len(paths):
        views = [None] * len(paths)
    # "None" is how the set writes an empty section.
    shared = {
        "study": name,
        "split": split,
        "sex": read_sex(_text(study, "PatientSex")),
        "age": read_age(_text(study, "PatientAge")),
        "date": _text(study, "StudyDate").partition(".")[0],
        "report": "\n".join(
            f"{section}: {text}"
            for section in _SECTIONS
            if not is_blank(text := _text(study, section))
        ),
    }
    rows = []
    for path, view in zip(paths, views, strict=True):
        # One step up is published; two lead out of the set.
        image = "/".join(split_name(path.replace("\\", "/").removeprefix("../")))
        # GRDN.. once for the patient and once for the study.
        patient = patient_in_path(image)
        if patient is None:
            raise ValueError("a path names no patient (GRDN../GRDN../studies/)")
        view = read_view(view if isinstance(view, str) else "")
        rows.append({**shared, "image": image, "patient": patient, "view": view})
    return rows


def _text(study: dict[str, Any], key: str) -> str:
    # Dates are numbers there, and a missing text may be NaN.
    value = study.get(key)
    # NaN is the one value that differs from itself.
    return "" if value is None or value != value else str(value).strip()
