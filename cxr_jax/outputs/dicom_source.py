"""What an output takes from the film's own DICOM header: whose and which it is, and nothing else.

Outputs go into the study of the film, so they have to name its patient and study as the film does. Only a short list of
elements is read, each is checked for its kind, and all else of the header, private elements above all, stays behind.
Header values go into the files that are written, and into no message.
"""

import contextlib
import datetime
import hashlib
import io
import logging
import re
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import header, preamble
from cxr_jax.errors import UserError

MANUFACTURER = "cxr_jax"
# highdicom logs identifiers of what it copies.
logging.getLogger("highdicom").disabled = True


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Let the libraries of DICOM say nothing meanwhile: their warnings hold header values, names among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_UID = re.compile(r"[0-2](?:\.(?:0|[1-9][0-9]*))+")
_DATE = re.compile(r"[0-9]{8}")
_TIME = re.compile(r"[0-9]{2}(?:[0-9]{2}(?:[0-9]{2}(?:\.[0-9]{1,6})?)?)?")
# What the standard lets be empty: keyword -> the most characters that its kind of value has.
_TEXTS = {"PatientID": 64, "IssuerOfPatientID": 64, "StudyID": 16, "AccessionNumber": 16}
_NAMES = ("PatientName", "ReferringPhysicianName")
_NAME_GROUP = (
    64  # characters of each of a name's three spellings: Latin letters, ideographs, sounds
)
# What films are taken with; of another modality, an output says "OT", and invents none.
_MODALITIES = ("CR", "DX", "RG", "RF", "XA", "OT")
# Compressed in a way that loses, by their transfer syntaxes: once lossy, lossy for ever (PS3.3 C.7.6.1.1.5).
_LOSSY = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(?:50|51|81|111)")
_OFFSET = re.compile(r"[+-](?:0[0-9]|1[0-4])[0-5][0-9]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Source(NamedTuple):
    """A film's identity.

    Attributes:
        dataset: of the elements that outputs name, as `highdicom` wants its evidence.
        sha256: of the file's bytes.
    """

    dataset: Dataset
    sha256: str


def read_source(path: str | Path, file_bytes: bytes | None = None) -> Source:
    """Read the identity of a DICOM film.

    Args:
        path: of the file; only the name used in messages, if its bytes are given.
        file_bytes: of the file.

    Raises:
        UserError: for what is no DICOM, or has no study and instance of its own; it holds no header value.
    """
    data = radiograph.read_bytes(path) if file_bytes is None else file_bytes
    if not is_dicom(data):
        raise UserError(
            f"{path}: DICOM outputs belong to a patient and a study, which only a DICOM names; "
            "give the film's DICOM, or ask for FHIR"
        )
    try:
        with without_warnings():
            whole = preamble.complete(path, data)
            header.check_deflated(path, whole)
            found = pydicom.dcmread(io.BytesIO(whole), stop_before_pixels=True)
            dataset = _identity(path, found)
    except UserError:
        raise
    except Exception as error:
        # As for pixels: pydicom's messages hold header values.
        raise UserError(
            f"{path}: damaged DICOM file ({type(error).__name__} while reading it)"
        ) from None
    return Source(dataset, hashlib.sha256(data).hexdigest())


def is_dicom(data: bytes) -> bool:
    """Tell whether bytes begin as those of a DICOM file do, one without preamble included."""
    return data[128:132] == radiograph.DICOM_MAGIC or radiograph.may_be_old_dicom(data)


def _identity(path: str | Path, found: Dataset) -> Dataset:
    dataset = Dataset()
    # In Unicode whatever the film was in: names are decoded here, and model text needs it.
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        uid = str(found.get(keyword, ""))
        if not is_uid(uid):
            raise UserError(f"{path}: {keyword} is missing or no UID, and DICOM outputs need it")
        setattr(dataset, keyword, uid)
    # Too long a value would make the new file invalid, whatever the film did.
    for keyword, most_letters in _TEXTS.items():
        text = _CONTROL.sub(" ", str(found.get(keyword, "") or "")).strip()
        # One value each: a backslash would make two of it.
        setattr(dataset, keyword, text.replace("\\", "/")[:most_letters])
    for keyword in _NAMES:
        setattr(dataset, keyword, _person_name(str(found.get(keyword, "") or "")))
    # Values of short lists, and dates: another value is none.
    patient_sex = str(found.get("PatientSex", "") or "")
    dataset.PatientSex = patient_sex if patient_sex in ("M", "F", "O") else ""
    for keyword, is_valid in (
        ("PatientBirthDate", _is_date),
        ("StudyDate", _is_date),
        ("StudyTime", _is_time),
    ):
        text = str(found.get(keyword, "") or "")
        setattr(dataset, keyword, text if is_valid(text) else "")
    offset_text = str(found.get("TimezoneOffsetFromUTC", "") or "")
    if _OFFSET.fullmatch(offset_text):
        dataset.TimezoneOffsetFromUTC = offset_text
    if not dataset.IssuerOfPatientID:
        del dataset.IssuerOfPatientID
    # Whether the film itself has words in it, which a picture of it would show.
    burned_in = str(found.get("BurnedInAnnotation", "") or "")
    dataset.BurnedInAnnotation = burned_in if burned_in in ("YES", "NO") else ""
    modality = str(found.get("Modality", "") or "")
    dataset.Modality = modality if modality in _MODALITIES else "OT"
    # A picture of a film that has lost something has lost it, too.
    syntax = str(getattr(found, "file_meta", Dataset()).get("TransferSyntaxUID", ""))
    if found.get("LossyImageCompression") == "01" or _LOSSY.fullmatch(syntax):
        dataset.LossyImageCompression = "01"
    # What an image is named by in a content tree.
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _person_name(text: str) -> str:
    """A name of up to three spellings (PS3.5, 6.2.1.2), each no longer than it may be."""
    # Cut as a whole, a long first spelling would be too long still, and the others would be lost.
    spellings = _CONTROL.sub(" ", text).replace("\\", "/").split("=")[:3]
    return "=".join(spelling.strip()[:_NAME_GROUP] for spelling in spellings).rstrip("=")


def _is_date(text: str) -> bool:
    try:
        return bool(_DATE.fullmatch(text) and datetime.datetime.strptime(text, "%Y%m%d"))
    except ValueError:
        # Digits alone make no day: "20261399".
        return False


def _is_time(text: str) -> bool:
    if not _TIME.fullmatch(text):
        return False
    hours, minutes, seconds = text[:2], text[2:4] or "0", text[4:6] or "0"
    # 60 is a leap second's.
    return int(hours) < 24 and int(minutes) < 60 and int(seconds) <= 60


# ---- What all outputs are named and dated by ----


def is_uid(text: str) -> bool:
    """Tell whether a text is a UID (PS3.5, section 9)."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def derive_uid(*parts: object) -> str:
    """Make a UID under the UUID root 2.25 (PS3.5, B.2), the same for the same parts."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    # The version marks it as one that follows from a name: an arbitrary number would be no UUID.
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def parse_time(at: str) -> datetime.datetime:
    """Read a time as documents have it ("2026-11-30T12:00:00Z"), as UTC. Raises UserError for another."""
    try:
        time = datetime.datetime.fromisoformat(at.replace("Z", "+00:00"))
    except (ValueError, AttributeError):
        time = None
    if time is None or time.tzinfo is None:
        raise UserError("at: no time of the form 2026-11-30T12:00:00Z")
    return time.astimezone(datetime.UTC)


def stamp(dataset: Dataset, at: datetime.datetime) -> None:
    """Date a new instance by `at`, where the library has put the clock's time.

    In the film's own time zone where its header says one, since that holds for all times of an instance; else in UTC.
    """
    offset_text = str(dataset.get("TimezoneOffsetFromUTC", ""))
    if offset_text:
        minutes = int(offset_text[1:3]) * 60 + int(offset_text[3:])
        at = at + datetime.timedelta(minutes=-minutes if offset_text[0] == "-" else minutes)
    # Who else had a hand in it is dated, too.
    for equipment_item in dataset.get("ContributingEquipmentSequence", ()):
        # This kind of value can say its zone by itself.
        equipment_item.ContributionDateTime = f"{at:%Y%m%d%H%M%S}{offset_text or '+0000'}"
    date_text, time = at.strftime("%Y%m%d"), at.strftime("%H%M%S")
    for name in ("InstanceCreation", "Series", "Content"):
        if name != "Content" or "ContentDate" in dataset:
            setattr(dataset, f"{name}Date", date_text)
            setattr(dataset, f"{name}Time", time)


def clean(text: str, most_letters: int | None = None) -> str:
    """Make text fit for a DICOM value: no control characters but line feeds, no half characters, one value."""
    # A tab or a hard blank parts words: left out, "no\teffusion" would deny nothing.
    spaced = (" " if letter.isspace() and letter != "\n" else letter for letter in text)
    kept_text = "".join(letter for letter in spaced if letter == "\n" or letter.isprintable())
    kept_text = kept_text.encode("utf-8", "replace").decode().strip()
    # Short kinds of value are parted by backslashes, and have one line.
    return (
        kept_text
        if most_letters is None
        else " ".join(kept_text.replace("\\", "/").split())[:most_letters]
    )


def as_bytes(dataset: Dataset) -> bytes:
    """Write an instance as a file of Explicit VR little endian, with a preamble of zeros."""
    # In memory: who calls writes it whole, or sends it.
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()
