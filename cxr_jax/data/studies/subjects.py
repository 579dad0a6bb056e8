"""What a table says of who is on a film and how it was taken: sex, age, projection, source, for subgroups."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from cxr_jax.data.dicom import words
from cxr_jax.data.sources.table import column_key, is_blank
from cxr_jax.data.sources.views import VIEW_COLUMNS

# As `column_key` spells them, in the order in which they are asked.
SEX_COLUMNS = ("sex", "patientsex", "gender", "patientgender", "patientsexdicom", "sexdicom")
AGE_COLUMNS = ("age", "patientage", "ageyears", "ageatstudy", "anchorage", "ageatscan")
SOURCE_COLUMNS = (
    "source",
    "dataset",
    "datasource",
    "repository",
    "collection",
    "institution",
    "site",
)
OLDEST = 120.0  # years; above stands what is no age (155 in copies of NIH's headers)

_SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "w": "F", "woman": "F", "man": "M"}
# 63, 63.0, 063Y, 11 M, 85 or more
_AGE = re.compile(
    r"(\d{1,3}(?:[.,]\d+)?)\s*(y|yr|yrs|year|years|m|mo|w|d)?(\s*(or more|or older|\+))?", re.I
)
_UNITS_A_YEAR = {"m": 12, "mo": 12, "w": 52.18, "d": 365.25}
_LONGEST_SOURCE = 40  # characters: a name of a set, and no sentence


class Subject(NamedTuple):
    """What is known of a film.

    Attributes:
        sex: "F", "M" or None.
        age: in years, or None.
        projection: "PA", "AP", "LATERAL" .. as headers are understood, or None.
        source: the name of the set that the film is from, or None.
    """

    sex: str | None = None
    age: float | None = None
    projection: str | None = None
    source: str | None = None


def find_subject(fields: Mapping[str, object]) -> Subject:
    """Find what a row's usual columns say; what is not understood is not known.

    Args:
        fields: column or key -> its value, however they are spelt.
    """
    # Each column once, by what its spellings have in common.
    texts = {
        column_key(name): str(value).strip()
        for name, value in fields.items()
        if isinstance(value, str | int | float) and not is_blank(str(value))
    }
    views = (words.view_of_position(text) for key, text in texts.items() if key in VIEW_COLUMNS)
    return Subject(
        sex=_SEXES.get(_first(texts, SEX_COLUMNS).lower()),
        age=read_age(_first(texts, AGE_COLUMNS)),
        projection=next((view for view in views if view in ("PA", "AP", "LATERAL")), None),
        source=_first(texts, SOURCE_COLUMNS)[:_LONGEST_SOURCE] or None,
    )


def _first(texts: Mapping[str, str], columns: tuple[str, ...]) -> str:
    return next((texts[column] for column in columns if column in texts), "")


def read_age(text: str) -> float | None:
    """Read an age in years: 63, 63.0, 063Y, 011M, "85 or more"; None where it says none that a person has."""
    # A number with its unit and nothing else: a date or an id must not become an age.
    found = _AGE.fullmatch(text.strip())
    if found is None:
        return None
    years = float(found[1].replace(",", ".")) / _UNITS_A_YEAR.get((found[2] or "y").lower(), 1)
    return years if years <= OLDEST else None


def as_fields(subject: Subject) -> dict[str, object]:
    """Give the keys of a manifest's row that say it, those that are known."""
    # Keys that `find_subject` reads again.
    named = {
        "sex": subject.sex,
        "age": subject.age,
        "view_position": subject.projection,
        "source": subject.source,
    }
    return {name: value for name, value in named.items() if value is not None}
