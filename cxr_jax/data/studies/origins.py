"""Whether films that are read together can be of one patient and in their order, by the headers of their files.

What a header says is compared here and goes no further: a message tells that two films differ, or which is later, and
no value. What a header does not say, and what a picture without one does not, speaks against nothing.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import header, preamble
from cxr_jax.data.sources.patients import LostDigitsError, clean_id, same_patient_key
from cxr_jax.data.studies.order import Taken, find_taken
from cxr_jax.errors import UserError

# Each of these is one for a patient, if it is known.
_OF_PATIENT = ("PatientID", "PatientBirthDate", "PatientSex")
_DATES_WITH_TIMES = (
    ("StudyDate", "StudyTime"),
    ("AcquisitionDate", "AcquisitionTime"),
    ("ContentDate", "ContentTime"),
)
_READ = (*_OF_PATIENT, "StudyInstanceUID", *(name for pair in _DATES_WITH_TIMES for name in pair))
# Whose study a film has to be of.
_STUDY_OF = {"lateral": "frontal", "prior_lateral": "prior"}


@dataclass(frozen=True, repr=False)
class _Origin:
    """What a header says; never shown."""

    patient: dict[str, str]  # of _OF_PATIENT, what is known
    study: str
    taken: Taken


def check_together(paths: Sequence[str | Path], roles: Sequence[str]) -> None:
    """Refuse films that cannot be what their roles say.

    Args:
        paths: of DICOM files that have been read; pictures have no headers, and are left out.
        roles: of `prompts.ROLES`, each once.

    Raises:
        UserError: for films of different patients, a lateral of another study, a prior that is not earlier.
    """
    origins = [_read(path) for path in paths]
    # Each element by itself: films may lack the same ones, and two of three may differ.
    for name in _OF_PATIENT:
        known = [place for place, origin in enumerate(origins) if name in origin.patient]
        for place in known:
            if origins[place].patient[name] != origins[known[0]].patient[name]:
                raise UserError(
                    f"--study: {paths[place]}: of another patient than {paths[known[0]]}, by their headers"
                )
    films = dict(zip(roles, origins, strict=True))
    for role, path in zip(roles, paths, strict=True):
        beside, current = films.get(_STUDY_OF.get(role, "")), films.get("frontal")
        if beside and _is_other_study(films[role], beside):
            raise UserError(
                f"--study: {path}: its role is {role}, and by its header it is of another day than "
                f"the {_STUDY_OF[role]}"
            )
        if role.startswith("prior") and current and _is_no_prior(films[role], current):
            raise UserError(
                f"--study: {path}: its role is {role}, and by its header it is not of an earlier study than the frontal"
            )


def _is_other_study(one: _Origin, other: _Origin) -> bool:
    # By the day: archives give the films of one visit studies of their own.
    if one.study and one.study == other.study:
        return False
    return "" not in (one.taken.date, other.taken.date) and one.taken.date != other.taken.date


def _is_no_prior(film: _Origin, current: _Origin) -> bool:
    # What is known to be later is none whatever else is said.
    if current.taken.is_before(film.taken):
        return True
    # Of one study by its id, unless times say otherwise: some archives give all films of a patient one.
    is_same = bool(film.study) and film.study == current.study
    return is_same and not film.taken.is_before(current.taken)


def _read(path: str | Path) -> _Origin:
    dataset: Dataset
    try:
        file_bytes = preamble.complete(path, radiograph.read_bytes(path))
        header.check_deflated(path, file_bytes)
        dataset = pydicom.dcmread(
            io.BytesIO(file_bytes), stop_before_pixels=True, specific_tags=list(_READ)
        )
    except Exception:
        # What is damaged has been refused, or read as far as it goes.
        dataset = Dataset()
    return _Origin(
        patient=_patient_of(dataset),
        study=header.read_text(dataset, "StudyInstanceUID"),
        taken=_taken_of(dataset),
    )


def _patient_of(dataset: Dataset) -> dict[str, str]:
    found = {}
    # Spelt with zeros or spaces it is the same patient, as in rows.
    try:
        if identifier := clean_id(header.read_text(dataset, "PatientID")):
            found["PatientID"] = same_patient_key(identifier)
    except LostDigitsError:
        pass
    birth_date = find_taken({"date": header.read_text(dataset, "PatientBirthDate")}, ()).date
    if birth_date:
        found["PatientBirthDate"] = birth_date
    # Others are not known, or change.
    if (sex := header.read_text(dataset, "PatientSex")) in ("M", "F"):
        found["PatientSex"] = sex
    return found


def _taken_of(dataset: Dataset) -> Taken:
    # A date with its own time: of different ones a night's film would be put into the wrong order.
    for date_name, time_name in _DATES_WITH_TIMES:
        date, clock = header.read_text(dataset, date_name), header.read_text(dataset, time_name)
        # As one text: no program has taken a header's time for a number.
        taken = find_taken({"date": f"{date}T{clock}"}, ())
        if not taken.date:
            taken = find_taken({"date": date}, ())
        if taken.date:
            return taken
    return Taken()
