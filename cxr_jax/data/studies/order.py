"""Whose study a film is of, and when it was taken, as far as a table or a path says."""

import contextlib
import datetime
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cxr_jax.data.sources.patients import LostDigitsError, clean_id
from cxr_jax.data.sources.table import column_key

# As `column_key` spells them, in the order in which they are asked.
STUDY_COLUMNS = (
    "studyid",
    "study",
    "studyinstanceuid",
    "studyuid",
    "accession",
    "accessionnumber",
    "anonaccession",
    "reportid",
)
DATE_COLUMNS = ("studydate", "studydatetime", "examdate", "acquisitiondate", "contentdate", "date")
TIME_COLUMNS = ("studytime", "examtime", "acquisitiontime", "contenttime", "time")
# NIH's "Follow-up #", CheXpert Plus' patient_report_date_order.
NUMBER_COLUMNS = (
    "followup",
    "followupnumber",
    "patientreportdateorder",
    "studynumber",
    "studyorder",
    "visit",
    "visitnumber",
)
_STUDY_IN_PATH = (
    re.compile(r"(?:^|/)(?P<id>study[ _-]?[0-9][0-9a-z.]*)(?=/)", re.IGNORECASE),  # CheXpert, BRAX
    re.compile(r"(?:^|/)(?P<id>s\d{8})(?=[/_.])"),  # MIMIC-CXR
)
# CheXpert numbers the studies of a patient in their order; no other number in a path says when.
_NUMBER_IN_PATH = re.compile(r"(?:^|/)patient[ _-]?\d+/study[ _-]?(\d{1,5})(?=/)", re.IGNORECASE)
_DATE = re.compile(r"(\d{4})[-/.]?(\d{2})[-/.]?(\d{2})(?:[T ](\d{2}:?\d{2}.*))?(?:\.0)?")
_NUMBER = re.compile(r"\d{1,6}(?:\.0+)?")
# The digits of a time, up to its fraction of a second; nothing else may stand beside them, such as PM or a time zone.
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?(?:\.\d*)?|(\d{4}|\d{6})")
_CLOCK_AS_NUMBER = re.compile(r"(\d{1,6})\.\d+")
_CLOCK_DIGITS = 6  # hours, minutes, seconds


class Taken(NamedTuple):
    """When a study was made, among those of its patient.

    Attributes:
        date: year, month, day as one text of digits, or "".
        time: hours, minutes and, where they are known, seconds as one text of digits, or "".
        number: of the study, or None.
    """

    date: str = ""
    time: str = ""
    number: int | None = None

    def is_before(self, other: "Taken") -> bool:
        """Tell whether this is known to be earlier: by dates if both have one, and of one day by times, else by
        numbers."""
        # Dates before numbers: a date means the same whoever writes it.
        if self.date and other.date:
            if self.date != other.date:
                return self.date < other.date
            # As far as both tell: 08:30 is not before 08:30:15.
            shorter = min(len(self.time), len(other.time))
            if shorter:
                return self.time[:shorter] < other.time[:shorter]
        # Of one day without times, or without dates, a number may still tell.
        if self.number is None or other.number is None:
            return False
        return self.number < other.number


def find_study(fields: Mapping[str, object], paths: Iterable[str]) -> str | None:
    """Find the study of a row: the first usual column that is not blank, then the first path that names one.

    Args:
        fields: column or key -> its value, however they are spelt.
        paths: the row's id, its image.

    Returns:
        An id, which may be one of its patient's alone (study1).
    """
    found = _by_column(fields, STUDY_COLUMNS)
    if found:
        return found
    matches = (
        pattern.search(path.replace("\\", "/")) for path in paths for pattern in _STUDY_IN_PATH
    )
    return next((match["id"] for match in matches if match), None)


def find_taken(fields: Mapping[str, object], paths: Iterable[str]) -> Taken:
    """Find when the study of a row was made; a date that is not year, month, day says nothing, nor does a time that
    may be another one (`_read_clock`).

    Args:
        fields, paths: as for `find_study`.
    """
    # Other forms of dates are read in two ways by two countries.
    date, clock = "", ""
    said = _DATE.fullmatch(_by_column(fields, DATE_COLUMNS) or "")
    if said and _is_day(*said.groups()[:3]):
        date, clock = "".join(said.groups()[:3]), said[4] or ""
    # Beside a date no program takes it for a number.
    time = _read_clock(clock, is_text=True)
    time = time or _read_clock(_by_column(fields, TIME_COLUMNS) or "")
    number = _by_column(fields, NUMBER_COLUMNS) or ""
    if _NUMBER.fullmatch(number):
        return Taken(date, time, int(number.partition(".")[0]))
    in_paths = (_NUMBER_IN_PATH.search(path.replace("\\", "/")) for path in paths)
    return Taken(date, time, next((int(match[1]) for match in in_paths if match), None))


def _is_day(year: str, month: str, day: str) -> bool:
    # Day and month exchanged, or another number.
    try:
        datetime.date(int(year), int(month), int(day))
    except ValueError:
        return False
    return True


def _read_clock(text: str, *, is_text: bool = False) -> str:
    """Read a time of day: digits of hours, minutes, seconds (083015 or 08:30:15), or of hours and minutes (08:30).

    Fractions of a second are left out. Digits with a fraction are a time that a program took for a number, as in the
    tables of MIMIC-CXR, and get back the zeros that it took off: 1959.531 is 00:19:59. Four digits alone are hours and
    minutes if they begin with a zero, which no number does; else they may be the last four of six.

    Args:
        is_text: whether the digits are surely as they were written.

    Returns:
        "" for what is no time of a day, or may be another one.
    """
    if as_number := _CLOCK_AS_NUMBER.fullmatch(text):
        digits = as_number[1].zfill(_CLOCK_DIGITS)
    elif said := _CLOCK.fullmatch(text):
        digits = said[4] or said[1].zfill(2) + said[2] + (said[3] or "")
        if said[4] and len(digits) < _CLOCK_DIGITS and not (is_text or digits.startswith("0")):
            return ""
    else:
        return ""
    # No time of a day is another number, or one whose zeros are lost elsewhere.
    hours, minutes, seconds = int(digits[:2]), int(digits[2:4]), int(digits[4:] or 0)
    return digits if hours < 24 and minutes < 60 and seconds < 60 else ""


def _by_column(fields: Mapping[str, object], columns: tuple[str, ...]) -> str | None:
    texts: dict[str, str] = {}
    for name, value in fields.items():
        # An id that a program has rounded may be that of another study: it says nothing.
        with contextlib.suppress(LostDigitsError):
            if (key := column_key(name)) in columns and (text := clean_id(value)):
                texts[key] = text
    return next((texts[key] for key in columns if key in texts), None)
