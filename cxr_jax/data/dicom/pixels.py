"""Stored values to grey values: padding, Modality LUT, VOI LUT or window, inversion, square pixels."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PilImage
from pydicom.dataset import Dataset

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import codecs
from cxr_jax.data.dicom.header import read_numbers, read_text, whole_number
from cxr_jax.errors import UserError

Metadata = dict[str, Any]  # of a `radiograph.Image`


class Table(NamedTuple):
    """A lookup table: entries float32 [n], the value that gets the first of them, the bits of its output."""

    entries: np.ndarray
    first: int
    bits: int


class _LookedUp(NamedTuple):
    """Values after a lookup table, and the bits of its output."""

    values: np.ndarray  # float32
    bits: int


# ---- Stored values ---------------------------------------------------------------------------------


def decode(path: str | Path, dataset: Dataset, file_bytes: bytes) -> np.ndarray:
    """Decode the pixels' cells, whole numbers [H, W] or [H, W, 3]; `stored_bits` takes the values out of them.

    Args:
        file_bytes: the bytes of the file that `dataset` was read from.

    Raises:
        UserError: for pixels that cannot be decoded, or are not what the header describes.
    """
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        try:
            stored = codecs.decode(file_bytes)
        except codecs.DecodeError as error:
            raise UserError(f"{path}: {error}") from None
    else:
        # Unasked, pydicom takes the lowest bits of a cell, whatever High Bit says.
        dataset.pixel_array_options(correct_unused_bits=False)
        stored = dataset.pixel_array
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    # A codec may well decode something else than the header describes.
    expected: tuple[int, ...] = (dataset.Rows, dataset.Columns)
    if whole_number(dataset, "SamplesPerPixel", 1) == 3:
        expected += (3,)
    if stored.shape != expected or stored.dtype.kind not in "iu":
        raise UserError(f"{path}: the decoded image is not of the size that the header gives")
    return stored


def find_padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Find padding (outside the exposed field), by PixelPaddingValue and its RangeLimit: bool [H, W].

    Args:
        stored: values, or the cells they were taken from.
    """
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    limits = [
        limit for limit in (whole_number(dataset, name) for name in names) if limit is not None
    ]
    if stored.dtype.kind == "i":  # the value's own type may have been read as unsigned
        modulus = 2 ** (8 * stored.dtype.itemsize)
        limits = [limit - modulus if limit >= modulus // 2 else limit for limit in limits]
    if not limits:
        return np.zeros(stored.shape, bool)
    return (stored >= min(limits)) & (stored <= max(limits))


def read_table(item: Dataset, values: np.ndarray) -> Table:
    """Read one LUT item of either kind, for these values. Raises almost anything for one that is damaged."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16  # 16 bits cannot hold 65,536: PS3.3 C.11.1.1.1 writes 0
    table = item.LUTData
    if isinstance(table, bytes):
        has_byte_entries = len(table) < 2 * count  # 8-bit entries, packed
        table = np.frombuffer(table, np.uint8 if has_byte_entries else "<u2")
    table = np.atleast_1d(np.asarray(table))[:count].astype(np.float32)
    if not table.size or not 1 < bits <= 16:
        raise ValueError("empty LUT")
    if first >= 2**15 and float(values.min()) < 0:  # signed, read as unsigned
        first -= 2**16
    return Table(table, first, bits)


def _look_up(item: Dataset, values: np.ndarray) -> _LookedUp:
    """Apply one LUT item of either kind. Raises almost anything for one that is damaged."""
    table, first, bits = read_table(item, values)
    # Values outside the table get its first or last entry.
    entries = np.clip(np.rint(values).astype(np.int64) - first, 0, table.size - 1)
    return _LookedUp(table[entries], bits)


def apply_modality(dataset: Dataset, stored: np.ndarray, metadata: Metadata) -> np.ndarray:
    """Apply the Modality LUT, else rescale slope and intercept. Returns float values of the shape of `stored`."""
    # float32 holds 24 bits exactly.
    values: Any = stored.astype(np.float32 if metadata["bits"] <= 16 else np.float64)
    if dataset.get("ModalityLUTSequence"):
        try:
            return _look_up(dataset.ModalityLUTSequence[0], values).values
        except Exception:
            metadata["warnings"].append("the Modality LUT is not usable and was ignored")
            return values
    slope = read_numbers(dataset, "RescaleSlope")
    intercept = read_numbers(dataset, "RescaleIntercept")
    if not slope and not intercept and "RescaleSlope" not in dataset:
        return values
    # A slope of 0 would make every pixel the same.
    if not slope or slope[0] == 0:
        metadata["warnings"].append("the rescale slope is empty or zero and was taken as 1")
        slope = [1.0]
    offset = intercept[0] if intercept else 0
    return values * values.dtype.type(slope[0]) + values.dtype.type(offset)


# ---- As shown --------------------------------------------------------------------------------------


def render(
    dataset: Dataset,
    values: np.ndarray,
    valid_mask: np.ndarray,
    renderer: str,
    metadata: Metadata,
    *,
    is_for_the_eye: bool,
) -> np.ndarray:
    """Render values as float32 [H, W] in 0..1, bright = dense, by a renderer of `radiograph.RENDERERS`.

    Inversion is against the nominal range, not the image's maximum.

    Args:
        is_for_the_eye: whether the values run from black to white as they are, and need no window.
    """
    if renderer == "voi":
        pixels = _render_voi(dataset, values, valid_mask, metadata, is_for_the_eye)
    elif renderer == "percentile":
        pixels = radiograph.stretch(values, valid_mask, *radiograph.PERCENTILES)
    else:
        pixels = radiograph.stretch(values, valid_mask)
    # mimic_jpg equalises what is shown, so after the inversion.
    if is_inverted(dataset, metadata):
        pixels = 1 - pixels
    if renderer == "mimic_jpg":
        pixels = radiograph.equalise(pixels, valid_mask)
    return np.array(pixels, np.float32)


def is_inverted(dataset: Dataset, metadata: Metadata) -> bool:
    """Tell whether low values are white. MONOCHROME1 and its INVERSE presentation shape are one inversion, not two."""
    shape = read_text(dataset, "PresentationLUTShape")
    if metadata["photometric"] == "MONOCHROME1":
        if shape == "IDENTITY":
            metadata["warnings"].append(
                "MONOCHROME1 with an IDENTITY presentation: shown as MONOCHROME1"
            )
        return True
    return shape == "INVERSE"


def _render_voi(
    dataset: Dataset,
    values: np.ndarray,
    valid_mask: np.ndarray,
    metadata: Metadata,
    is_for_the_eye: bool,
) -> np.ndarray:
    """VOI LUT, else the first window, else the stored range (8 bit) or the 0.5 to 99.5 percentiles."""
    pixels = _apply_voi_lut(dataset, values, metadata)
    if pixels is None:
        pixels = _apply_first_window(dataset, values, metadata)
    if pixels is not None:
        return pixels

    if "WindowCenter" in dataset or "WindowWidth" in dataset:
        metadata["warnings"].append("the window is not usable and was ignored")
    if is_for_the_eye:
        metadata["window"] = {"kind": "stored range"}
        is_signed = whole_number(dataset, "PixelRepresentation", 0) == 1
        lowest = -(2 ** (metadata["bits"] - 1)) if is_signed else 0
        return np.clip((values - lowest) / (2 ** metadata["bits"] - 1), 0, 1)

    low, high = radiograph.PERCENTILES
    metadata["window"] = {"kind": "percentile", "low": low, "high": high}
    metadata["warnings"].append("no window in the file: the 0.5 to 99.5 percentile range is shown")
    return radiograph.stretch(values, valid_mask, low, high)


def _apply_voi_lut(dataset: Dataset, values: np.ndarray, metadata: Metadata) -> np.ndarray | None:
    if not dataset.get("VOILUTSequence"):
        return None
    try:
        looked_up = _look_up(dataset.VOILUTSequence[0], values)
        metadata["window"] = {"kind": "VOI LUT", "index": 0, "count": len(dataset.VOILUTSequence)}
        white = white_of_table(looked_up.values, looked_up.bits, metadata)
        return np.clip(looked_up.values / white, 0, 1)
    except Exception:
        metadata["warnings"].append("the VOI LUT is not usable and was ignored")
        return None


def white_of_table(looked_up: np.ndarray, bits: int, metadata: Metadata) -> np.float32:
    """Find the output level that is white: the nominal one, unless the table plainly uses another number of bits.

    Args:
        looked_up: what the table made of an image.
        bits: of its output, as it declares.
        metadata: gets a warning of the latter.
    """
    white = 2**bits - 1
    highest = float(looked_up.max())
    if highest > white or highest < white / 2:
        white = 2 ** max(1, int(np.ceil(np.log2(highest + 1)))) - 1
        metadata["warnings"].append(
            "the VOI LUT does not use the bits it declares: shown on its own scale"
        )
    return np.float32(white)


def _apply_first_window(
    dataset: Dataset, values: np.ndarray, metadata: Metadata
) -> np.ndarray | None:
    # A file may offer several windows: the first is taken.
    centers, widths = read_numbers(dataset, "WindowCenter"), read_numbers(dataset, "WindowWidth")
    if not centers or not widths:
        return None
    function = read_text(dataset, "VOILUTFunction") or "LINEAR"
    shown = window(values, centers[0], widths[0], function)
    if shown is None:
        return None
    count = min(len(centers), len(widths))
    metadata["window"] = {
        "kind": "window",
        "center": centers[0],
        "width": widths[0],
        "function": function,
        "index": 0,
        "count": count,
    }
    if count > 1:
        metadata["warnings"].append(f"{count} windows in the file: the first was used")
    return shown


def window(
    values: np.ndarray, center: float, width: float, function: str = "LINEAR"
) -> np.ndarray | None:
    """Window values to float32 0..1 by PS3.3 C.11.2.1.2 and C.11.2.1.3; None if the window is not legal."""
    if width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values - center) / width, -60, 60)  # exp of more overflows
        return (1 / (1 + np.exp(exponent))).astype(np.float32)
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1).astype(np.float32)
    if function != "LINEAR":
        return None
    if width == 1:
        return (values > center - 0.5).astype(np.float32)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1).astype(np.float32)


def make_square(dataset: Dataset, pixels: np.ndarray, metadata: Metadata) -> np.ndarray:
    """Resample when a pixel's height and width differ, so that a heart keeps its shape. float32 [H', W']."""
    spacing = (
        read_numbers(dataset, "PixelAspectRatio")
        or read_numbers(dataset, "ImagerPixelSpacing")
        or read_numbers(dataset, "PixelSpacing")
    )
    if len(spacing) < 2 or min(spacing) <= 0 or abs(spacing[0] / spacing[1] - 1) < 0.01:
        return pixels
    aspect = spacing[0] / spacing[1]  # height of a pixel over its width
    height, width = pixels.shape
    # The longer side of the pixel is stretched: no detail is lost.
    size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
    if not 1 / 3 < aspect < 3 or size[0] * size[1] > radiograph.MAX_PIXELS:
        metadata["warnings"].append("the pixel aspect ratio is implausible and was ignored")
        return pixels
    metadata["warnings"].append("pixels are not square: resampled")
    image = PilImage.fromarray(pixels).resize(size, PilImage.Resampling.BICUBIC)
    return np.clip(np.asarray(image, np.float32), 0, 1)
