"""DICOM radiograph -> `Image`, in the order the standard asks for (PS3.3 C.7.6.3, C.11.1, C.11.2, C.11.6).

Header checks and size limits come before any pixel is decoded; compressed pixels are decoded by a worker
process with memory and time limits. Then: padding mask, Modality LUT or rescale, VOI LUT or window, one
inversion, square pixels, float32 all the way. Messages and `meta` never hold free text of the header: patient
data does not reach a log.
"""

import contextlib
import io
import logging
import re
import warnings
import zlib

import numpy as np
import pydicom
from PIL import Image as PilImage
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from cxr_jax.data import decoders, images
from cxr_jax.data.images import Image
from cxr_jax.errors import UserError

# pydicom logs and warns with the raw value of a bad element. Set for the process, not per call, because a web
# server reads in several threads.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module=r"pydicom\b.*")

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


def read(path, renderer="voi") -> Image:
    """Read one single-frame radiograph -> Image(pixels float32 [H, W] in 0..1, meta).

    `renderer`: `voi`, `mimic_jpg` or `percentile`, see `images.read_image`. Raises UserError for all else, in
    a message that never holds a header value.
    """
    images.check_renderer(renderer)
    data = images.read_bytes(path)
    if data[128:132] != images.DICOM_MAGIC:
        raise UserError(f"{path}: not a DICOM file (no DICM mark after the preamble)")
    return read_data(path, data, renderer)


def read_data(path, data, renderer="voi") -> Image:
    """`read` for a file that is already in memory; `path` is only the name used in messages."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path, data, renderer)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read this image") from None
    except (
        Exception
    ) as exc:  # damage makes pydicom raise almost anything, with header values in the text
        raise UserError(
            f"{path}: damaged DICOM file ({type(exc).__name__} while reading it)"
        ) from None


def _read(path, data, renderer):
    _check_deflated(path, data)
    ds = pydicom.dcmread(io.BytesIO(data))
    meta = images.new_meta("DICOM", renderer)
    _check_kind(path, ds, meta)
    _check_layout(path, ds, meta)
    _describe(ds, meta)
    stored = _decode(path, ds, data)
    colour = stored.ndim == 3
    if colour:
        meta["warnings"].append("colour (secondary capture): read as gray")
        stored = images.to_gray(stored.astype(np.float32), 2 ** meta["bits"] - 1, meta)
    valid = np.ones(stored.shape, bool) if colour else ~_padding(ds, stored)
    if not valid.all():
        meta["warnings"].append("pixel padding was masked")
    values = _modality(ds, stored, meta)
    pixels = _render(ds, values, valid, renderer, meta)
    pixels[~valid] = 0  # black after the inversion, whatever the photometric interpretation
    return images.finish(path, _square_pixels(ds, pixels, meta), meta)


# --- the header, before any pixel is decoded ----------------------------------------------------------------


def _check_deflated(path, data):
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
        if size > images.MAX_FILE_BYTES:
            raise UserError(f"{path}: inflates to more than {images.MAX_FILE_BYTES // 2**20} MiB")
        if not piece:
            return
        tail = inflater.unconsumed_tail


def _text(ds, name):
    """An element's text in upper case, or "" when missing or unreadable. For comparing, never for
    printing.
    """
    try:
        value = ds.get(name)
        return "" if value is None else str(value).strip().upper()
    except Exception:
        return ""


def _numbers(ds, name):
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


def _whole(ds, name, default=None):
    numbers = _numbers(ds, name)
    return int(numbers[0]) if numbers else default


def _check_kind(path, ds, meta):
    if _text(ds, "SOPClassUID") == MediaStorageDirectoryStorage or "DirectoryRecordSequence" in ds:
        raise UserError(f"{path}: a DICOMDIR index, not an image")
    modality = _text(ds, "Modality")
    if modality not in RADIOGRAPHY + DOUBTFUL:
        raise UserError(f"{path}: the Modality is not projection radiography (CR or DX)")
    if "FloatPixelData" in ds or "DoubleFloatPixelData" in ds:
        raise UserError(f"{path}: stores floating-point pixels, which no radiograph does")
    if "PixelData" not in ds or not ds["PixelData"].value:
        raise UserError(f"{path}: the DICOM file holds no image (no Pixel Data)")
    if modality in DOUBTFUL:
        meta["warnings"].append("the Modality does not say that this is a radiograph (CR or DX)")


def _check_layout(path, ds, meta):
    rows, cols = _whole(ds, "Rows"), _whole(ds, "Columns")
    if not rows or not cols or rows < 0 or cols < 0:
        raise UserError(f"{path}: Rows or Columns is missing")
    images.check_size(path, rows, cols, meta["warnings"])
    if _whole(ds, "NumberOfFrames", 1) > 1:
        raise UserError(f"{path}: holds several frames; a single-frame radiograph is needed")
    photometric, samples = _text(ds, "PhotometricInterpretation"), _whole(ds, "SamplesPerPixel", 1)
    if not photometric:
        raise UserError(
            f"{path}: Photometric Interpretation is missing, so black and white cannot be told apart"
        )
    if (photometric, samples) not in [(p, 1) for p in MONOCHROME] + [(p, 3) for p in COLOUR]:
        raise UserError(
            f"{path}: Photometric Interpretation and Samples per Pixel do not describe a gray image"
        )
    allocated, bits = _whole(ds, "BitsAllocated"), _whole(ds, "BitsStored")
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


def _describe(ds, meta):
    """What a reader should know before trusting the picture: warnings, and reasons not to report on it at
    all.
    """
    notes = meta["warnings"]
    meta["view"] = view = _view(ds)
    if view not in FRONTAL + ("unknown",):
        notes.append("not frontal: the header says that this is a lateral or other view")
        meta["unusable"].append("not a frontal view")
    part = _text(ds, "BodyPartExamined")
    if part and not any(word in part for word in CHEST):
        notes.append("the body part is not the chest")
        meta["unusable"].append("the body part is not the chest")
    elif not part and not re.search(
        r"CHEST|THORAX", _text(ds, "StudyDescription") + _text(ds, "SeriesDescription")
    ):
        notes.append("the header does not say that this is a chest")
    if _text(ds, "PresentationIntentType") == "FOR PROCESSING":
        notes.append("raw detector data (FOR PROCESSING): not meant for display")
    if _text(ds, "BurnedInAnnotation") == "YES":
        notes.append("burned-in annotation: may show patient data")
    if _text(ds, "FieldOfViewHorizontalFlip") == "YES":
        notes.append("mirrored by the modality: check the side marker")
    orientation = (
        _text(ds, "PatientOrientation")
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
    position = _text(ds, "ViewPosition")
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
        words = set(re.findall(r"[A-Z]+", _text(ds, name)))
        found = (words & set(FRONTAL)) | ({"LATERAL"} if words & set(LATERAL) else set())
        if len(found) == 1:
            return found.pop()
    return "unknown"


# --- pixels -------------------------------------------------------------------------------------------------


def _decode(path, ds, data):
    """Stored values [H, W] or [H, W, 3]."""
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        try:
            stored = decoders.decode(data)
        except decoders.Failed as e:
            raise UserError(f"{path}: {e}") from None
    else:
        stored = ds.pixel_array
    expected = (ds.Rows, ds.Columns) + ((3,) if _whole(ds, "SamplesPerPixel", 1) == 3 else ())
    if stored.shape != expected or stored.dtype.kind not in "iu":
        raise UserError(f"{path}: the decoded image is not of the size that the header gives")
    return stored


def _padding(ds, stored):
    """True where a pixel is padding (outside the exposed field), by PixelPaddingValue and its RangeLimit."""
    limits = [_whole(ds, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    limits = [v for v in limits if v is not None]
    if stored.dtype.kind == "i":  # the value's own type may have been read as unsigned
        top = 2 ** (8 * stored.dtype.itemsize)
        limits = [v - top if v >= top // 2 else v for v in limits]
    if not limits:
        return np.zeros(stored.shape, bool)
    return (stored >= min(limits)) & (stored <= max(limits))


def _lookup(item, values):
    """Apply one LUT item of either kind -> (float32 values, number of bits of the output)."""
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = count or 2**16
    table = item.LUTData
    if isinstance(table, bytes):
        narrow = len(table) < 2 * count  # 8-bit entries, packed
        table = np.frombuffer(table, np.uint8 if narrow else "<u2")
    table = np.atleast_1d(np.asarray(table))[:count].astype(np.float32)
    if not table.size or not 1 < bits <= 16:
        raise ValueError("empty LUT")
    if first >= 2**15 and float(values.min()) < 0:  # signed, read as unsigned
        first -= 2**16
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, table.size - 1)], bits


def _modality(ds, stored, meta):
    """Modality LUT, else rescale slope and intercept. -> float values."""
    values = stored.astype(np.float32 if meta["bits"] <= 16 else np.float64)
    if ds.get("ModalityLUTSequence"):
        try:
            return _lookup(ds.ModalityLUTSequence[0], values)[0]
        except Exception:
            meta["warnings"].append("the Modality LUT is not usable and was ignored")
            return values
    slope, intercept = _numbers(ds, "RescaleSlope"), _numbers(ds, "RescaleIntercept")
    if not slope and not intercept and "RescaleSlope" not in ds:
        return values
    if not slope or slope[0] == 0:
        meta["warnings"].append("the rescale slope is empty or zero and was taken as 1")
        slope = [1.0]
    return values * values.dtype.type(slope[0]) + values.dtype.type(
        intercept[0] if intercept else 0
    )


def _inverted(ds, meta):
    """Whether low values are white. MONOCHROME1 and its INVERSE presentation shape are one inversion, not
    two.
    """
    shape = _text(ds, "PresentationLUTShape")
    if meta["photometric"] == "MONOCHROME1":
        if shape == "IDENTITY":
            meta["warnings"].append(
                "MONOCHROME1 with an IDENTITY presentation: shown as MONOCHROME1"
            )
        return True
    return shape == "INVERSE"


def _render(ds, values, valid, renderer, meta):
    """-> float32 [H, W] in 0..1, bright = dense. Inversion is against the nominal range, not the image's
    maximum.
    """
    if renderer == "voi":
        pixels = _voi(ds, values, valid, meta)
    else:
        pixels = images.stretch(
            values, valid, *((0.5, 99.5) if renderer == "percentile" else (0, 100))
        )
    if _inverted(ds, meta):
        pixels = 1 - pixels
    if renderer == "mimic_jpg":
        pixels = images.equalise(pixels, valid)
    return np.array(pixels, np.float32)


def _voi(ds, values, valid, meta):
    """VOI LUT, else the first window, else the stored range (8 bit) or the 0.5 to 99.5 percentiles."""
    if ds.get("VOILUTSequence"):
        try:
            shown, bits = _lookup(ds.VOILUTSequence[0], values)
            meta["window"] = {"kind": "VOI LUT", "index": 0, "count": len(ds.VOILUTSequence)}
            return np.clip(shown / _lut_top(shown, bits, meta), 0, 1)
        except Exception:
            meta["warnings"].append("the VOI LUT is not usable and was ignored")
    centers, widths = _numbers(ds, "WindowCenter"), _numbers(ds, "WindowWidth")
    if centers and widths:
        function = _text(ds, "VOILUTFunction") or "LINEAR"
        shown = window(values, centers[0], widths[0], function)
        if shown is not None:
            count = min(len(centers), len(widths))
            meta["window"] = {
                "kind": "window",
                "center": centers[0],
                "width": widths[0],
                "function": function,
                "index": 0,
                "count": count,
            }
            if count > 1:
                meta["warnings"].append(f"{count} windows in the file: the first was used")
            return shown
    if "WindowCenter" in ds or "WindowWidth" in ds:
        meta["warnings"].append("the window is not usable and was ignored")
    if meta["bits"] <= 8 and not any(
        name in ds for name in ("ModalityLUTSequence", "RescaleSlope")
    ):
        meta["window"] = {"kind": "stored range"}
        low = -(2 ** (meta["bits"] - 1)) if _whole(ds, "PixelRepresentation", 0) == 1 else 0
        return np.clip((values - low) / (2 ** meta["bits"] - 1), 0, 1)
    meta["window"] = {"kind": "percentile", "low": 0.5, "high": 99.5}
    meta["warnings"].append("no window in the file: the 0.5 to 99.5 percentile range is shown")
    return images.stretch(values, valid, 0.5, 99.5)


def _lut_top(shown, bits, meta):
    """The output level that is white: the nominal one, unless the table plainly uses another number of
    bits.
    """
    top = 2**bits - 1
    highest = float(shown.max())
    if highest > top or highest < top / 2:
        top = 2 ** max(1, int(np.ceil(np.log2(highest + 1)))) - 1
        meta["warnings"].append(
            "the VOI LUT does not use the bits it declares: shown on its own scale"
        )
    return np.float32(top)


def window(values, center, width, function="LINEAR"):
    """Window values to float32 0..1 by PS3.3 C.11.2.1.2 and C.11.2.1.3; None if the window is not legal."""
    if width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return (1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -60, 60)))).astype(
            np.float32
        )
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1).astype(np.float32)
    if function != "LINEAR":
        return None
    if width == 1:
        return (values > center - 0.5).astype(np.float32)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1).astype(np.float32)


def _square_pixels(ds, pixels, meta):
    """Resample when a pixel's height and width differ, so that a heart keeps its shape."""
    ratio = (
        _numbers(ds, "PixelAspectRatio")
        or _numbers(ds, "ImagerPixelSpacing")
        or _numbers(ds, "PixelSpacing")
    )
    if len(ratio) < 2 or min(ratio) <= 0 or abs(ratio[0] / ratio[1] - 1) < 0.01:
        return pixels
    stretch = ratio[0] / ratio[1]  # height of a pixel over its width
    h, w = pixels.shape
    size = (w, round(h * stretch)) if stretch > 1 else (round(w / stretch), h)
    if not 1 / 3 < stretch < 3 or size[0] * size[1] > images.MAX_PIXELS:
        meta["warnings"].append("the pixel aspect ratio is implausible and was ignored")
        return pixels
    meta["warnings"].append("pixels are not square: resampled")
    image = PilImage.fromarray(pixels).resize(size, PilImage.Resampling.BICUBIC)
    return np.clip(np.asarray(image, np.float32), 0, 1)
