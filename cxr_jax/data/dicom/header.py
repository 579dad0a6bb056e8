"""The header of a DICOM radiograph: what it says it is, before any pixel is decoded."""

import contextlib
import io
import re
import zlib

import numpy as np
import pydicom
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from cxr_jax.data import radiograph
from cxr_jax.errors import UserError

RADIOGRAPHY = ("CR", "DX", "RG", "DR")
# May hold a radiograph (secondary captures, test images): read, with a warning.
DOUBTFUL = ("OT", "SC", "RF", "")
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420")
CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "HEART", "STERNUM")
FRONTAL, LATERAL = ("PA", "AP"), ("LL", "RL", "LAT", "LATERAL")
VIEW_CODES = {  # SNOMED CT and the older SNOMED RT codes of DICOM CID 4010
    "272479007": "PA",
    "R-10214": "PA",
    "399348003": "AP",
    "R-10206": "AP",
    "399067008": "LATERAL",
    "399173006": "LATERAL",
    "399198007": "LATERAL",
    "R-10228": "LATERAL",
    "R-10236": "LATERAL",
}


# --- the header, before any pixel is decoded ----------------------------------------------------------------


def check_deflated(path, data):
    """A deflated data set is inflated by the parser itself: refuse a bomb first."""
    stream = io.BytesIO(data)
    read_preamble(stream, False)
    syntax = _read_file_meta_info(stream).get("TransferSyntaxUID")
    if syntax is None:
        raise UserError(f"{path}: the DICOM file does not say its transfer syntax")
    if syntax != DeflatedExplicitVRLittleEndian:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    tail = stream.read()
    while tail:
        piece = inflater.decompress(tail, 2**22)
        size += len(piece)
        if size > radiograph.MAX_FILE_BYTES:
            raise UserError(
                f"{path}: inflates to more than {radiograph.MAX_FILE_BYTES // 2**20} MiB"
            )
        if not piece:
            return
        tail = inflater.unconsumed_tail


def read_text(ds, name):
    """An element's text in upper case, or "" when missing or unreadable. For comparing, never for
    printing.
    """
    try:
        value = ds.get(name)
        return "" if value is None else str(value).strip().upper()
    except Exception:
        return ""


def read_numbers(ds, name):
    """An element's finite numbers as floats; [] when missing, empty or not numbers."""
    try:
        value = ds.get(name)
        if value is None or isinstance(value, str):
            value = [] if value is None else value.split("\\")
        elif not isinstance(value, list | tuple | pydicom.multival.MultiValue):
            value = [value]
        numbers = [float(v) for v in value]
        return numbers if all(np.isfinite(numbers)) else []
    except Exception:
        return []


def whole_number(ds, name, default=None):
    numbers = read_numbers(ds, name)
    return int(numbers[0]) if numbers else default


def check_kind(path, ds, meta):
    if (
        read_text(ds, "SOPClassUID") == MediaStorageDirectoryStorage
        or "DirectoryRecordSequence" in ds
    ):
        raise UserError(f"{path}: a DICOMDIR index, not an image")
    modality = read_text(ds, "Modality")
    if modality not in RADIOGRAPHY + DOUBTFUL:
        raise UserError(f"{path}: the Modality is not projection radiography (CR or DX)")
    if "FloatPixelData" in ds or "DoubleFloatPixelData" in ds:
        raise UserError(f"{path}: stores floating-point pixels, which no radiograph does")
    if "PixelData" not in ds or not ds["PixelData"].value:
        raise UserError(f"{path}: the DICOM file holds no image (no Pixel Data)")
    if modality in DOUBTFUL:
        meta["warnings"].append("the Modality does not say that this is a radiograph (CR or DX)")


def check_layout(path, ds, meta):
    rows, cols = whole_number(ds, "Rows"), whole_number(ds, "Columns")
    if not rows or not cols or rows < 0 or cols < 0:
        raise UserError(f"{path}: Rows or Columns is missing")
    radiograph.check_size(path, rows, cols, meta["warnings"])
    if whole_number(ds, "NumberOfFrames", 1) > 1:
        raise UserError(f"{path}: holds several frames; a single-frame radiograph is needed")
    photometric, samples = (
        read_text(ds, "PhotometricInterpretation"),
        whole_number(ds, "SamplesPerPixel", 1),
    )
    if not photometric:
        raise UserError(
            f"{path}: Photometric Interpretation is missing, so black and white cannot be told apart"
        )
    if (photometric, samples) not in [(p, 1) for p in MONOCHROME] + [(p, 3) for p in COLOUR]:
        raise UserError(
            f"{path}: Photometric Interpretation and Samples per Pixel do not describe a gray image"
        )
    allocated, bits = whole_number(ds, "BitsAllocated"), whole_number(ds, "BitsStored")
    if allocated not in (8, 16, 32) or bits is None or not 1 < bits <= allocated:
        raise UserError(
            f"{path}: Bits Allocated and Bits Stored are missing or contradict each other"
        )
    meta.update(photometric=photometric, bits=bits)
    if not UID(ds.file_meta.TransferSyntaxUID).is_transfer_syntax:
        raise UserError(f"{path}: unknown transfer syntax")
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        pixels = 2 if photometric == "YBR_FULL_422" else samples
        if len(ds.PixelData) < rows * cols * pixels * (allocated // 8):
            raise UserError(f"{path}: the pixel data is cut short (less than Rows x Columns need)")


def describe(ds, meta):
    """What a reader should know before trusting the picture: warnings, and reasons not to report on it at
    all.
    """
    notes = meta["warnings"]
    meta["view"] = view = _view(ds)
    if view not in FRONTAL + ("unknown",):
        notes.append("not frontal: the header says that this is a lateral or other view")
        meta["unusable"].append("not a frontal view")
    part = read_text(ds, "BodyPartExamined")
    if part and not any(word in part for word in CHEST):
        notes.append("the body part is not the chest")
        meta["unusable"].append("the body part is not the chest")
    elif not part and not re.search(
        r"CHEST|THORAX", read_text(ds, "StudyDescription") + read_text(ds, "SeriesDescription")
    ):
        notes.append("the header does not say that this is a chest")
    if read_text(ds, "PresentationIntentType") == "FOR PROCESSING":
        notes.append("raw detector data (FOR PROCESSING): not meant for display")
    if read_text(ds, "BurnedInAnnotation") == "YES":
        notes.append("burned-in annotation: may show patient data")
    if read_text(ds, "FieldOfViewHorizontalFlip") == "YES":
        notes.append("mirrored by the modality: check the side marker")
    orientation = (
        read_text(ds, "PatientOrientation")
        .replace("'", "")
        .strip("[]")
        .replace(" ", "")
        .replace("\\", ",")
    )
    if view in FRONTAL and orientation not in ("", "L,F", "L,H", "NONE"):
        # Turning it silently could hide situs inversus or a wrong marker, so the picture stays as stored.
        notes.append(
            "unusual orientation in the header: left and right, or up and down, may be exchanged"
        )
    if any((0x6000 <= tag.group <= 0x601E and tag.element == 0x3000) for tag in ds.keys()):
        notes.append("an overlay is present and is not shown")


def _view(ds):
    """PA, AP, LATERAL, OTHER or unknown: from ViewPosition, else the view code, else the protocol's or
    series' name.
    """
    position = read_text(ds, "ViewPosition")
    if position in FRONTAL:
        return position
    if position in LATERAL:
        return "LATERAL"
    if position:
        return "OTHER"
    with contextlib.suppress(Exception):
        code = str(ds.ViewCodeSequence[0].CodeValue).strip()
        if code in VIEW_CODES:
            return VIEW_CODES[code]
    for name in ("ProtocolName", "SeriesDescription"):
        words = set(re.findall(r"[A-Z]+", read_text(ds, name)))
        found = (words & set(FRONTAL)) | ({"LATERAL"} if words & set(LATERAL) else set())
        if len(found) == 1:
            return found.pop()
    return "unknown"
