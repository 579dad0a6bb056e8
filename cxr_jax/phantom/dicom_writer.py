"""Write a phantom as a real digital radiograph: DICOM DX, 12 bits, MONOCHROME1 or 2, with a VOI window."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from numpy.typing import ArrayLike
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from cxr_jax.errors import UserError

PIXEL_MM = 1.6  # side of a pixel on the detector
# Below the stored values that 0..1 is mapped to, and above them, is headroom, as on a real detector: so many of 4096.
_HEADROOM = 32
# SNOMED CT, as DICOM's context groups 4009 (regions) and 4010 (views) have them.
_CHEST = ("43799004", "Chest")
_VIEWS = {"PA": ("272479007", "postero-anterior"), "AP": ("399348003", "antero-posterior")}
# Characters of a seed in a name or an id, which may have 64 in all (PS3.5, table 6.2-1).
_TEXT_LENGTH = 40


class _Stored(NamedTuple):
    """Stored values, and the linear VOI window that undoes what was done to them."""

    pixels: np.ndarray  # uint16 [H, W]
    center: float
    width: float


def write_dicom(
    path: str | Path,
    image: ArrayLike,
    *,
    hospital: str,
    photometric: str = "MONOCHROME2",
    bits: int = 12,
    ap: bool,
    seed: object,
) -> None:
    """Write an image as Explicit VR little endian DX.

    Args:
        image: float32 [H,W] in 0..1 (opacity bright).
        hospital: "A" or "B", stated as the institution.
        photometric: MONOCHROME1 or MONOCHROME2.
        bits: stored, 9 to 16.
        ap: view position AP rather than PA.
        seed: any value that identifies the phantom; all UIDs and the patient follow from it and the hospital: files
            are reproducible.

    Raises:
        UserError: for a photometric interpretation, bit depth or image shape it cannot write.
    """
    image = np.asarray(image)
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"photometric must be MONOCHROME1 or MONOCHROME2, not {photometric!r}")
    if not 8 < bits <= 16:
        raise UserError(f"bits must be 9 to 16, not {bits}")
    if image.ndim != 2:
        raise UserError(f"a phantom image is [H, W], not of shape {image.shape}")
    stored = _store(image, photometric, bits)
    # The file's own header, then the data set.
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid("image", hospital, seed, photometric, bits)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("cxr_jax phantom")
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    _describe(dataset, hospital, ap, seed)
    _add_pixels(dataset, stored, photometric, bits)
    pydicom.dcmwrite(Path(path), dataset, enforce_file_format=True)


def _uid(*parts: object) -> UID:
    """A UID under the UUID root 2.25, the same for the same parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode(errors="backslashreplace")).digest()
    return UID(f"2.25.{int.from_bytes(digest[:15], 'big')}")


def _store(image: np.ndarray, photometric: str, bits: int) -> _Stored:
    highest = (1 << bits) - 1
    # The headroom grows with the number of bits.
    headroom = _HEADROOM * (highest + 1) // 4096
    span = highest - 2 * headroom
    shown = np.round(np.clip(image, 0.0, 1.0) * span)
    if photometric == "MONOCHROME1":  # lowest stored value is white
        shown = span - shown
    # DICOM linear window: y = (x - (center - 0.5)) / (width - 1) + 0.5
    return _Stored((shown + headroom).astype(np.uint16), headroom + span / 2 + 0.5, float(span + 1))


def _describe(dataset: Dataset, hospital: str, is_ap: bool, seed: object) -> None:
    """Who, where and how; everything says that this is a synthetic picture."""
    view = "AP" if is_ap else "PA"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StudyInstanceUID = _uid("study", hospital, seed)
    dataset.SeriesInstanceUID = _uid("series", hospital, seed, is_ap)
    dataset.PatientName = f"PHANTOM^{_text(f'{hospital}{seed}')}"
    dataset.PatientID = f"PHANTOM-{_text(f'{hospital}-{seed}')}"
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    # A fixed date: the same phantom is the same file on any day.
    dataset.StudyDate, dataset.StudyTime = "20000101", "000000"
    dataset.StudyID, dataset.AccessionNumber = "1", ""
    dataset.ReferringPhysicianName = ""
    dataset.InstitutionName = f"Phantom hospital {_text(hospital)}"
    dataset.Manufacturer, dataset.ManufacturerModelName = "cxr_jax", "phantom renderer"
    dataset.StudyDescription, dataset.SeriesDescription = "Synthetic chest radiograph", view
    dataset.Modality, dataset.BodyPartExamined = "DX", "CHEST"
    dataset.ViewPosition = view
    dataset.AnatomicRegionSequence = _code(*_CHEST)
    dataset.ViewCodeSequence = _code(*_VIEWS[view])
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageLaterality = "U"
    dataset.SeriesNumber, dataset.InstanceNumber = "1", "1"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""]
    dataset.BurnedInAnnotation = "NO"
    # Asked for by the standard, even where there is nothing to tell: no stand, no real detector, no contrast.
    dataset.PositionerType, dataset.DetectorType = "NONE", ""
    dataset.AcquisitionContextSequence = Sequence()


def _code(value: str, meaning: str) -> Sequence:
    """A coded concept of SNOMED CT, as the sequence of one item that the standard asks for."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return Sequence([item])


def _text(name: str) -> str:
    """A part of a name or an id as the standard allows it: short, printable, without the marks that part values."""
    allowed = "".join(letter if letter.isprintable() else " " for letter in name)
    text = allowed.translate(dict.fromkeys(map(ord, "\\^="), "/")).strip()
    # Cut off, two patients could become one.
    return text if len(text) <= _TEXT_LENGTH else str(_uid(name))[-_TEXT_LENGTH:]


def _add_pixels(dataset: Dataset, stored: _Stored, photometric: str, bits: int) -> None:
    """The pixels, and how they are stored and shown."""
    is_inverse = photometric == "MONOCHROME1"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.Rows, dataset.Columns = stored.pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.ImagerPixelSpacing = [PIXEL_MM, PIXEL_MM]
    # Values are proportional to attenuation: the detector takes the logarithm.
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = 1 if is_inverse else -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.WindowCenter, dataset.WindowWidth = f"{stored.center:g}", f"{stored.width:g}"
    dataset.VOILUTFunction = "LINEAR"
    dataset.PresentationLUTShape = "INVERSE" if is_inverse else "IDENTITY"
    dataset.LossyImageCompression = "00"
    dataset.PixelData = stored.pixels.astype("<u2").tobytes()
