"""Whose film a row is: the patient by a usual column or path, and the groups that a split never divides.

Two spellings of one id must not become two patients, so groups are made by `same_patient_key`; that two patients share
a key only keeps them on one side. docs/inputs.md lists the columns and paths.
"""

import hashlib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from cxr_jax.data.sources.table import column_key, is_blank
from cxr_jax.errors import UserError

# In the order in which they are asked, as `column_key` spells them.
PATIENT_COLUMNS = (
    "patientid",
    "subjectid",
    "patient",
    "subject",
    "deidpatientid",
    "deidentifiedpatientid",
    "anonpatientid",
    "anonymizedpatientid",
    "patientidentifier",
    "patientnumber",
    "patientno",
    "patientkey",
    "patientuid",
    "patienthash",
    "patid",
    "ptid",
    "pid",
    "idpatient",
    "subjectnumber",
    "participantid",
    "personid",
    "empianon",
    "empi",
    "mrn",
)
# What stands in a column of ids and is none.
_NO_ID = ("unknown", "anonymous", "anonymized", "-", "?")

# The group "id" of each is the patient.
_PATH_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<![a-z])(?P<id>patient[ _-]?\d+)",  # CheXpert: patient00001/study1/view1_frontal.jpg
        r"(?:^|[/_-])p(?P<id>\d{8})(?=[/_-])",  # MIMIC-CXR: p10/p10000032/s50414267/..
        r"(?:^|[^0-9])(?P<id>000\d{5})_\d{3}(?![0-9])",  # NIH: 00000001_000.png
        r"(?:^|/)id_(?P<id>[0-9a-f-]{8,})/study_",  # BRAX
        r"(?:^|/)(?P<id>GRDN[0-9a-z]+)/GRDN[0-9a-z]+/studies/",  # ReXGradient
        r"(?:^|/)sub-(?P<id>[0-9a-z]+)(?=[/_])",  # BIDS, as BIMCV publishes
        r"(?:^|[/_-])(?P<id>subject[ _-]?\d+)(?=[/_.-])",
        r"(?:^|/)(?P<id>CXR\d+)_(?:\d+_)?IM-",  # Open-i, which has one report a patient
    )
)
_WHOLE_FLOAT = re.compile(r"\d+\.0*")
# As programs write numbers: with one digit before the point and a sign, which no hexadecimal id (80e12345) has.
_SCIENTIFIC = re.compile(r"\d(?:[.,]\d+)?e\+\d{1,3}", re.IGNORECASE)
_EXACT_DIGITS = 15  # that a float holds of any whole number
_NUMBERED = re.compile(r"(?:patient|subject|sub|pat|pt|p|id)?[_#-]*0*(\d+)")


class LostDigitsError(ValueError):
    """An id that a program has rounded: it may be another patient's by now."""


def clean_id(value: object) -> str | None:
    """Give the text of an id, None for a blank one: 12345.0 and 1.2345e+04 are 12345, leading zeros stay.

    Raises:
        LostDigitsError: for a number in scientific notation with more digits than a float holds.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = " ".join(str(value).split())
    if is_blank(text) or text.lower() in _NO_ID:
        return None
    if _WHOLE_FLOAT.fullmatch(text):
        return text.partition(".")[0]
    if _SCIENTIFIC.fullmatch(text):
        try:
            number = Decimal(text.replace(",", "."))
        except InvalidOperation:
            return text
        if number.adjusted() >= _EXACT_DIGITS or number != number.to_integral_value():
            raise LostDigitsError("the patient's id is a rounded number: read its column as text")
        return str(int(number))
    return text


def patient_in_path(path: str) -> str | None:
    """Find the patient that a path of CheXpert, MIMIC-CXR, NIH, BRAX, ReXGradient, Open-i or BIDS names."""
    path = path.replace("\\", "/")
    matches = (pattern.search(path) for pattern in _PATH_PATTERNS)
    return next((match["id"] for match in matches if match), None)


def find_patient(fields: Mapping[str, object], paths: Iterable[str]) -> str | None:
    """Find the patient of a row: the first usual column that is not blank, then the first path that names one.

    Args:
        fields: column or key -> its value, however they are spelt.
        paths: the row's id, its image.

    Raises:
        LostDigitsError: see `clean_id`.
    """
    by_key: dict[str, str] = {}
    for name, value in fields.items():
        key = column_key(name)
        if key in PATIENT_COLUMNS and key not in by_key and (patient := clean_id(value)):
            by_key[key] = patient
    for key in PATIENT_COLUMNS:
        if key in by_key:
            return by_key[key]
    return next(filter(None, map(patient_in_path, paths)), None)


def same_patient_key(patient: str) -> str:
    """Give what spellings of one id have in common: case, spaces, leading zeros and the word patient do not count."""
    text = "".join(patient.split()).casefold()
    numbered = _NUMBERED.fullmatch(text)
    return numbered[1] if numbered else text


def are_several(paths: Iterable[str]) -> bool:
    """Tell whether paths name several patients; one that names none is anybody's."""
    return len({same_patient_key(found) for path in paths if (found := patient_in_path(path))}) > 1


class Film(NamedTuple):
    """What says which rows belong together."""

    row_id: str
    patient: str | None
    file: Hashable


def join_files(files_of_rows: Iterable[Sequence[Hashable]]) -> list[Hashable]:
    """Give each row one file that stands for it: the same for rows that share one, also by way of other rows."""
    parents: dict[Hashable, Hashable] = {}

    def top_of(file: Hashable) -> Hashable:
        while (parent := parents.setdefault(file, file)) != file:
            # Every other step is cut short, so that chains stay short.
            parents[file] = parents[parent]
            file = parents[parent]
        return file

    firsts = []
    for files in files_of_rows:
        for other in files[1:]:
            parents[top_of(other)] = top_of(files[0])
        firsts.append(files[0])
    return [top_of(first) for first in firsts]


def group_films(films: Sequence[Film]) -> list[str]:
    """Name the group of each film: its patient, under one of the spellings; without one, all rows of its file.

    Returns:
        For each film the least spelling of its patient. Where no patient is known that of the patient of another row of
        the file, or else the least id of the file's rows. So a group's name does not depend on the order of rows.
    """
    keys = [film.patient and same_patient_key(film.patient) for film in films]
    owners: dict[Hashable, str] = {}  # of files: a patient's key
    for film, key in zip(films, keys, strict=True):
        if key is not None:
            owners[film.file] = min(key, owners.get(film.file, key))
    groups = [
        key or owners.get(film.file) or ("file", film.file)
        for film, key in zip(films, keys, strict=True)
    ]
    names: dict[Hashable, str] = {}
    for film, key, group in zip(films, keys, groups, strict=True):
        # A row without a patient names its group only where nobody else does.
        if key is not None or film.file not in owners:
            name = film.row_id if film.patient is None else film.patient
            names[group] = min(name, names.get(group, name))
    return [names[group] for group in groups]


class PatientOfRow(NamedTuple):
    """Whose film a row is, whether or not its image is there.

    Attributes:
        patient: as the rows spell it, None where they do not tell.
        former_group: see `former_group`.
    """

    patient: str | None
    former_group: str


# ---- Who is held out -------------------------------------------------------------------------------


def place_of(patient: str, seed: int) -> str:
    """Give the place of a patient in the order in which patients are held out: a hash, which names nobody."""
    return hashlib.sha256(f"{seed}:{patient}".encode(errors="surrogatepass")).hexdigest()


def last_held_out(groups: Iterable[str], seed: int, at_least: int = 2) -> str:
    """Give the place (`place_of`) of the last group that is held out of at least two: see `manifest.open_split`."""
    places = sorted(place_of(group, seed) for group in set(groups))
    # Fewer than about 30 patients say little.
    enough = min(30, len(places) // 3)
    at_least = min(at_least, len(places) - 1)
    return places[max(at_least, enough, round(len(places) / 10)) - 1]


@dataclass(frozen=True)
class Sides:
    """Who is on which side of a run's split, kept in its folder: nobody changes sides when rows do, or rules.

    Attributes:
        held_out_up_to: the place of the last patient that is held out; "" before a split is drawn.
        selected: the places, shortened, of those of them who choose the checkpoint, " " between; "" where the only one
            that is held out also tests.
        patients_by: "" for `group_films`; FORMER for `former_group`.
    """

    held_out_up_to: str = ""
    selected: str = ""
    patients_by: str = ""

    @classmethod
    def of_run(cls, facts: Mapping[str, Any]) -> "Sides":
        """Read what a run keeps among the facts of its data."""
        return cls(**{field.name: str(facts.get(field.name, "")) for field in fields(cls)})

    def facts(self) -> dict[str, str]:
        """Give what a run keeps."""
        return {name: value for name, value in asdict(self).items() if value}

    def last_of(self, groups: Iterable[str], seed: int) -> str:
        """Give the place of the last that is held out of these groups, which are drawn where none are yet."""
        at_least = 1 if self.patients_by == FORMER else 2
        return self.held_out_up_to or last_held_out(groups, seed, at_least)


NOT_DRAWN = Sides()
# Runs that do not keep who was held out are from before all the usual columns and paths were read.
FORMER = "patient_id, subject_id or id"
_FORMER_ID = re.compile(r"patient\d+")
_SHORT = 12  # characters of a place: enough for no two of some thousand to be alike


def short_place(patient: str, seed: int) -> str:
    """Give the beginning of `place_of`, by which one of a run's held-out patients is known."""
    return place_of(patient, seed)[:_SHORT]


def former_group(fields: Mapping[str, object], row_id: str) -> str:
    """Name the group of a row as FORMER says."""
    for name in ("patient_id", "subject_id"):
        if isinstance(patient := fields.get(name), str | int):
            return str(patient)
    named = _FORMER_ID.search(row_id)
    return named[0] if named else row_id


def held_out_groups(groups: Iterable[str], name: str, seed: int, sides: Sides) -> set[str]:
    """Choose the groups of rows that are held out, by the run's sides; `name` is what a message calls the rows.

    Raises:
        UserError: for a single patient, or where nobody trains or nobody is held out.
    """
    everyone = set(groups)
    if len(everyone) < 2:
        raise UserError(f"{name}: rows of at least two patients are needed, to hold some out")
    last = sides.last_of(everyone, seed)
    held = {group for group in everyone if place_of(group, seed) <= last}
    if not 0 < len(held) < len(everyone):
        absent = "trains" if held else "is held out"
        raise UserError(f"{name}: holds no patient that {absent} in this run")
    return held
