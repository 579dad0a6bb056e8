"""The header of a DICOM radiograph: what it says it is, before any pixel is decoded."""

import contextlib
import io
import zlib
from pathlib import Path
from typing import Any, overload

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import words
from cxr_jax.data.dicom.words import FRONTAL, Meaning
from cxr_jax.errors import UserError

Metadata = dict[str, Any]  # of a `radiograph.Image`

# Photometric Interpretations of one sample a pixel, and of three.
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420")
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
# Views of `words` that leave open which way the film was taken.
_WAY_UNKNOWN = ("", "unknown", "FRONTAL")
# What describes CT and MR slices, and no projection.
_OF_SLICES = ("EchoTime", "RepetitionTime", "MagneticFieldStrength") + (
    "GantryDetectorTilt",
    "ReconstructionDiameter",
)
OVERLAY_GROUPS = range(0x6000, 0x6020, 2)
INFLATE_STEP = 2**22  # bytes


# ---- Before the header is parsed -------------------------------------------------------------------


def check_deflated(path: str | Path, file_bytes: bytes) -> None:
    """Refuse a deflated data set that is a bomb: the parser itself inflates it whole.

    Raises:
        UserError: for that.
    """
    # The file's own header is never deflated.
    stream = io.BytesIO(file_bytes)
    read_preamble(stream, False)
    syntax = _read_file_meta_info(stream).TransferSyntaxUID
    if syntax != DeflatedExplicitVRLittleEndian:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    deflated = stream.read()
    while deflated:
        piece = inflater.decompress(deflated, INFLATE_STEP)
        size += len(piece)
        if size > radiograph.MAX_FILE_BYTES:
            raise UserError(
                f"{path}: inflates to more than {radiograph.MAX_FILE_BYTES // 2**20} MiB"
            )
        if not piece:
            return
        deflated = inflater.unconsumed_tail


# ---- Elements, whatever they hold ------------------------------------------------------------------


def read_text(dataset: Dataset, name: str) -> str:
    """Read an element's text in upper case, or "" when missing or unreadable. For comparing, never for printing."""
    try:
        value = dataset.get(name)
        return "" if value is None else str(value).strip(" \0\t\r\n").upper()
    except Exception:
        return ""


def read_numbers(dataset: Dataset, name: str) -> list[float]:
    """Read an element's finite numbers as floats; [] when missing, empty or not numbers."""
    try:
        values = dataset.get(name)
        if values is None:
            values = []
        elif isinstance(values, str):
            values = values.split("\\")
        elif not isinstance(values, list | tuple | pydicom.multival.MultiValue):
            values = [values]
        numbers = [float(value) for value in values]
        return numbers if all(np.isfinite(numbers)) else []
    except Exception:
        return []


@overload
def whole_number(dataset: Dataset, name: str) -> int | None: ...


@overload
def whole_number(dataset: Dataset, name: str, default: int) -> int: ...


def whole_number(dataset: Dataset, name: str, default: int | None = None) -> int | None:
    """Read an element's first number, cut to a whole one; `default` when there is none."""
    numbers = read_numbers(dataset, name)
    return int(numbers[0]) if numbers else default


# ---- What is refused -------------------------------------------------------------------------------


def check_kind(path: str | Path, dataset: Dataset, metadata: Metadata) -> None:
    """Refuse what is no radiograph or holds no picture; doubts go to `meta["warnings"]`. Raises UserError."""
    sop_class = read_text(dataset, "SOPClassUID")
    if sop_class == MediaStorageDirectoryStorage or "DirectoryRecordSequence" in dataset:
        raise UserError(f"{path}: a DICOMDIR index, not an image")
    # No message names a header's value: it may be patient data.
    # What the file is stored as decides where the modality's word is not understood.
    class_name = UID(sop_class).name
    modality = words.meaning_of_modality(read_text(dataset, "Modality"), class_name)
    if modality is Meaning.OTHER:
        raise UserError(f"{path}: the Modality is not projection radiography (CR or DX)")
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise UserError(f"{path}: stores floating-point pixels, which no radiograph does")
    if "PixelData" not in dataset or not dataset["PixelData"].value:
        raise UserError(f"{path}: the DICOM file holds no image (no Pixel Data)")
    if modality is Meaning.NOT_UNDERSTOOD:
        metadata["warnings"].append(
            "the Modality does not say that this is a radiograph (CR or DX)"
        )
    elif words.OTHER_CLASSES.search(class_name) or any(
        read_text(dataset, name) for name in _OF_SLICES
    ):
        # One of the two is wrong, and nobody knows which.
        metadata["warnings"].append(
            "the Modality says radiograph (CR or DX), and the rest of the header another kind of image"
        )
        metadata["unusable"].append("by its header another kind of image, whatever the Modality")


def check_layout(path: str | Path, dataset: Dataset, metadata: Metadata) -> None:
    """Refuse pixels that are not laid out as those of a single gray or colour picture; notes how they are.

    Raises:
        UserError: for missing or contradicting elements, several frames, or less pixel data than they need.
    """
    rows, columns = whole_number(dataset, "Rows"), whole_number(dataset, "Columns")
    if not rows or not columns or rows < 0 or columns < 0:
        raise UserError(f"{path}: Rows or Columns is missing")
    radiograph.check_size(path, rows, columns, metadata["warnings"])
    if whole_number(dataset, "NumberOfFrames", 1) > 1:
        raise UserError(f"{path}: holds several frames; a single-frame radiograph is needed")

    # ---- Gray or colour ----
    photometric = read_text(dataset, "PhotometricInterpretation")
    samples = whole_number(dataset, "SamplesPerPixel", 1)
    if not photometric:
        raise UserError(
            f"{path}: Photometric Interpretation is missing, so black and white cannot be told apart"
        )
    is_gray = photometric in MONOCHROME and samples == 1
    is_colour = photometric in COLOUR and samples == 3
    if not is_gray and not is_colour:
        raise UserError(
            f"{path}: Photometric Interpretation and Samples per Pixel do not describe a gray image"
        )

    # ---- Depth and amount ----
    allocated, bits = whole_number(dataset, "BitsAllocated"), whole_number(dataset, "BitsStored")
    if allocated not in (8, 16, 32) or bits is None or not 1 < bits <= allocated:
        raise UserError(
            f"{path}: Bits Allocated and Bits Stored are missing or contradict each other"
        )
    if not bits <= whole_number(dataset, "HighBit", bits - 1) + 1 <= allocated:
        raise UserError(f"{path}: High Bit contradicts Bits Allocated and Bits Stored")
    if whole_number(dataset, "PixelRepresentation", 0) not in (0, 1):
        raise UserError(f"{path}: Pixel Representation is neither 0 nor 1")
    metadata.update(photometric=photometric, bits=bits)
    if not UID(dataset.file_meta.TransferSyntaxUID).is_transfer_syntax:
        raise UserError(f"{path}: unknown transfer syntax")
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        # Of undefined length are only compressed pixels.
        if dataset["PixelData"].is_undefined_length:
            raise UserError(
                f"{path}: the pixel data is compressed, and the transfer syntax does not say how"
            )
        # 4:2:2 has half as many samples of each of the two colours.
        stored_samples = 2 if photometric == "YBR_FULL_422" else samples
        if len(dataset.PixelData) < rows * columns * stored_samples * (allocated // 8):
            raise UserError(f"{path}: the pixel data is cut short (less than Rows x Columns need)")


# ---- What a reader is told -------------------------------------------------------------------------


def describe(dataset: Dataset, metadata: Metadata) -> None:
    """Note what a reader should know before trusting the picture: warnings, and reasons not to report on it at all."""
    warnings = metadata["warnings"]
    position = read_text(dataset, "ViewPosition")
    metadata["view"] = view = _read_view(dataset, position)
    if view not in FRONTAL + ("unknown",):
        warnings.append(radiograph.NOT_FRONTAL_WARNING)
        metadata["unusable"].append(radiograph.NOT_FRONTAL)
    elif view == "unknown" and position and not words.view_of_position(position):
        warnings.append("the view is a word that is not understood: check that this is frontal")

    # ---- Is it a chest? ----
    body_part = read_text(dataset, "BodyPartExamined") or _code_meaning(
        dataset, "AnatomicRegionSequence"
    )
    meaning = words.meaning_of_body_part(body_part)
    descriptions = [read_text(dataset, name) for name in ("StudyDescription", "SeriesDescription")]
    if meaning is Meaning.OTHER:
        warnings.append("the body part is not the chest")
        metadata["unusable"].append("the body part is not the chest")
    elif meaning is Meaning.NOT_UNDERSTOOD and all(
        words.meaning_of_body_part(text) is not Meaning.RIGHT for text in descriptions
    ):
        warnings.append(
            "the body part is a word that is not understood: check that this is a chest"
            if body_part
            else "the header does not say that this is a chest"
        )

    # ---- Is it as it was meant to be seen? ----
    if read_text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        warnings.append("raw detector data (FOR PROCESSING): not meant for display")
    if read_text(dataset, "BurnedInAnnotation") == "YES":
        warnings.append("burned-in annotation: may show patient data")
    if read_text(dataset, "FieldOfViewHorizontalFlip") == "YES":
        warnings.append("mirrored by the modality: check the side marker")
    if view in FRONTAL and read_orientation(dataset) not in ("", "L,F", "L,H", "NONE"):
        # Turning it silently could hide situs inversus or a wrong marker, so the picture stays as stored.
        warnings.append(
            "unusual orientation in the header: left and right, or up and down, may be exchanged"
        )
    # Overlay Data beside the pixels, or a plane of bits among theirs (retired).
    if overlay_bits(dataset) or any(
        tag.group in OVERLAY_GROUPS and tag.element == 0x3000 for tag in dataset.keys()
    ):
        warnings.append("an overlay is present and is not shown")


def overlay_bits(dataset: Dataset) -> int:
    """Mask of the bits of a pixel's cell that hold overlays (Overlay Bit Position of groups without Overlay Data)."""
    mask = 0
    for group in OVERLAY_GROUPS:
        if (group, 0x0102) in dataset and (group, 0x3000) not in dataset:
            with contextlib.suppress(Exception):
                position = int(dataset[group, 0x0102].value)
                mask |= 1 << position if 0 <= position < 32 else 0
    return mask


def read_orientation(dataset: Dataset) -> str:
    """Read Patient Orientation as "L,F", whether it is a list, the text of a list, or parted by a backslash."""
    text = read_text(dataset, "PatientOrientation").replace("'", "").strip("[]")
    return text.replace(" ", "").replace("\\", ",")


def _read_view(dataset: Dataset, position: str) -> str:
    """PA, AP, LATERAL, OTHER or unknown.

    From ViewPosition, else the view code, else the protocol's or series' name, else how the patient lies on the film.
    """
    view = words.view_of_position(position)
    if view not in _WAY_UNKNOWN:
        return view
    with contextlib.suppress(Exception):
        code = str(dataset.ViewCodeSequence[0].CodeValue).strip()
        if code in VIEW_CODES:
            return VIEW_CODES[code]
    view = words.view_of_position(_code_meaning(dataset, "ViewCodeSequence"))
    if view not in _WAY_UNKNOWN:
        return view
    for name in ("ProtocolName", "SeriesDescription"):
        # Such a name is of several films, and may say more than the view.
        views = words.views_in(read_text(dataset, name)) & {*FRONTAL, "FRONTAL", "LATERAL"}
        if "LATERAL" not in views:
            views.discard("FRONTAL")  # which says less than PA beside it
        if len(views) == 1:  # a name that says both says nothing
            return views.pop()
    # Rows that run to the front or the back of the patient.
    return "LATERAL" if read_orientation(dataset)[:2] in ("A,", "P,") else "unknown"


def _code_meaning(dataset: Dataset, name: str) -> str:
    """The meaning of the first code of a sequence, in upper case, or "" when there is none."""
    with contextlib.suppress(Exception):
        return read_text(dataset[name][0], "CodeMeaning")
    return ""
