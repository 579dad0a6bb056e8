"""Stored values to grey values: padding, Modality LUT, VOI LUT or window, inversion, square pixels."""

import numpy as np
from PIL import Image as PilImage

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import codecs
from cxr_jax.data.dicom.header import read_numbers, read_text, whole_number
from cxr_jax.errors import UserError

# --- pixels -------------------------------------------------------------------------------------------------


def decode(path, ds, data):
    """Stored values [H, W] or [H, W, 3]."""
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        try:
            stored = codecs.decode(data)
        except codecs.Failed as e:
            raise UserError(f"{path}: {e}") from None
    else:
        stored = ds.pixel_array
    expected = (ds.Rows, ds.Columns) + ((3,) if whole_number(ds, "SamplesPerPixel", 1) == 3 else ())
    if stored.shape != expected or stored.dtype.kind not in "iu":
        raise UserError(f"{path}: the decoded image is not of the size that the header gives")
    return stored


def padding(ds, stored):
    """True where a pixel is padding (outside the exposed field), by PixelPaddingValue and its RangeLimit."""
    limits = [whole_number(ds, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
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


def modality(ds, stored, meta):
    """Modality LUT, else rescale slope and intercept. -> float values."""
    values = stored.astype(np.float32 if meta["bits"] <= 16 else np.float64)
    if ds.get("ModalityLUTSequence"):
        try:
            return _lookup(ds.ModalityLUTSequence[0], values)[0]
        except Exception:
            meta["warnings"].append("the Modality LUT is not usable and was ignored")
            return values
    slope, intercept = read_numbers(ds, "RescaleSlope"), read_numbers(ds, "RescaleIntercept")
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
    shape = read_text(ds, "PresentationLUTShape")
    if meta["photometric"] == "MONOCHROME1":
        if shape == "IDENTITY":
            meta["warnings"].append(
                "MONOCHROME1 with an IDENTITY presentation: shown as MONOCHROME1"
            )
        return True
    return shape == "INVERSE"


def render(ds, values, valid, renderer, meta):
    """-> float32 [H, W] in 0..1, bright = dense. Inversion is against the nominal range, not the image's
    maximum.
    """
    if renderer == "voi":
        pixels = _voi(ds, values, valid, meta)
    else:
        pixels = radiograph.stretch(
            values, valid, *((0.5, 99.5) if renderer == "percentile" else (0, 100))
        )
    if _inverted(ds, meta):
        pixels = 1 - pixels
    if renderer == "mimic_jpg":
        pixels = radiograph.equalise(pixels, valid)
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
    centers, widths = read_numbers(ds, "WindowCenter"), read_numbers(ds, "WindowWidth")
    if centers and widths:
        function = read_text(ds, "VOILUTFunction") or "LINEAR"
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
        low = -(2 ** (meta["bits"] - 1)) if whole_number(ds, "PixelRepresentation", 0) == 1 else 0
        return np.clip((values - low) / (2 ** meta["bits"] - 1), 0, 1)
    meta["window"] = {"kind": "percentile", "low": 0.5, "high": 99.5}
    meta["warnings"].append("no window in the file: the 0.5 to 99.5 percentile range is shown")
    return radiograph.stretch(values, valid, 0.5, 99.5)


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


def square_pixels(ds, pixels, meta):
    """Resample when a pixel's height and width differ, so that a heart keeps its shape."""
    ratio = (
        read_numbers(ds, "PixelAspectRatio")
        or read_numbers(ds, "ImagerPixelSpacing")
        or read_numbers(ds, "PixelSpacing")
    )
    if len(ratio) < 2 or min(ratio) <= 0 or abs(ratio[0] / ratio[1] - 1) < 0.01:
        return pixels
    stretch = ratio[0] / ratio[1]  # height of a pixel over its width
    h, w = pixels.shape
    size = (w, round(h * stretch)) if stretch > 1 else (round(w / stretch), h)
    if not 1 / 3 < stretch < 3 or size[0] * size[1] > radiograph.MAX_PIXELS:
        meta["warnings"].append("the pixel aspect ratio is implausible and was ignored")
        return pixels
    meta["warnings"].append("pixels are not square: resampled")
    image = PilImage.fromarray(pixels).resize(size, PilImage.Resampling.BICUBIC)
    return np.clip(np.asarray(image, np.float32), 0, 1)
