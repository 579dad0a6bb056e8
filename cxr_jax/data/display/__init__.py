"""What a viewer needs of a film: its values with all their depth, and the windows that the file offers.

`images.read_image` gives what is shown by the file's first window. Here the values before any window come with it, as
16-bit levels, so that a browser can window them itself and must come to the same picture. Nothing of this holds text
of a header: a window's name is one of a list of known words.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data import pictures, radiograph
from cxr_jax.data.display import windows
from cxr_jax.data.radiograph import DICOM_MAGIC, JPEG_MAGIC, NO_PICTURE, PNG_MAGIC, Image
from cxr_jax.errors import UserError

MOST_LEVEL = 2**16 - 1
# Rescale Types that are units, and not words of somebody's own.
KNOWN_UNITS = {"OD": "optical density x 1000", "HU": "Hounsfield units", "US": "stored values"}
_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}


@dataclass(frozen=True, kw_only=True)
class Display:
    """A film for a viewer.

    Attributes:
        image: as `images.read_image` gives it.
        levels: uint16 [H, W]; a value is slope * level + offset.
        padding: the level of what is no pixel and stays black; None: there is none.
        windows: the first is what `image` shows. Each has name and source ("file" or "computed"), and either center,
            width and function (PS3.3 C.11.2.1.2), or lut: {first, bits, white, values}.
        is_inverted: whether low values are white.
        aspect: height of a pixel over its width.
        marker: {"left", "right": letters of the patient's sides at the picture's edges, or None, "source"}.
        units: of the values, in words.
    """

    image: Image
    levels: np.ndarray
    slope: float
    offset: float
    padding: int | None
    windows: list[dict[str, Any]]
    is_inverted: bool
    aspect: float
    marker: dict[str, str | None]
    units: str


def open_film(path: str | Path, file_bytes: bytes) -> Display:
    """Read a PNG, JPEG or DICOM for a viewer; `path` is only the name used in messages.

    Raises:
        UserError: as `images.read_image` does.
    """
    if file_bytes[128:132] == DICOM_MAGIC:
        return _open_dicom(path, file_bytes)
    # The same order as in `images`: one file is never two formats.
    for kind, magic in (("PNG", PNG_MAGIC), ("JPEG", JPEG_MAGIC)):
        if file_bytes.startswith(magic):
            return _open_picture(path, file_bytes, kind)
    if radiograph.may_be_old_dicom(file_bytes):
        return _open_dicom(path, file_bytes)
    raise UserError(f"{path}: {NO_PICTURE}")


# ---- Formats ---------------------------------------------------------------------------------------


def _open_picture(path: str | Path, file_bytes: bytes, kind: str) -> Display:
    values, white, metadata = pictures.read_levels(path, file_bytes, kind)
    image = radiograph.finish(path, pictures.show_levels(values, white), metadata)
    everywhere = np.ones(values.shape, bool)
    levels, slope, offset, padding = _as_levels(values, everywhere, 1.0)
    # A picture's own levels run from black to white.
    as_stored = windows.between("As stored", "file", 0.0, float(white))
    return Display(
        image=image,
        levels=levels,
        slope=slope,
        offset=offset,
        padding=padding,
        windows=[as_stored, *windows.computed(values, everywhere, is_inverted=False)],
        is_inverted=False,
        aspect=1.0,
        marker={"left": None, "right": None, "source": "none: the file says nothing of sides"},
        units="levels of the picture",
    )


def _open_dicom(path: str | Path, file_bytes: bytes) -> Display:
    # Loaded only when there is a DICOM to read.
    from cxr_jax.data import dicom

    def open_it() -> Display:
        opened = dicom.open_file(path, file_bytes)
        shown = dicom.show(opened)
        image = radiograph.finish(path, shown, opened.metadata)
        return _describe_dicom(opened, image)

    return dicom.guarded(path, open_it)


def _describe_dicom(opened: Any, image: Image) -> Display:
    from cxr_jax.data.dicom import header
    from cxr_jax.data.dicom import pixels as dicom_pixels

    dataset, values, valid_mask = opened.dataset, opened.values, opened.valid_mask
    rescale = header.read_numbers(dataset, "RescaleSlope")
    # Multiples of the slope, so stored values come through unrounded.
    levels, slope, offset, padding = _as_levels(
        values, valid_mask, abs(rescale[0]) if rescale and rescale[0] else 1.0
    )
    # Asked once more with a meta of its own: its remark stands in the image's already.
    is_inverted = dicom_pixels.is_inverted(dataset, opened.metadata | {"warnings": []})
    # Of the file, before pixels that are not square are made so.
    rows, columns = values.shape
    shown_rows, shown_columns = image.pixels.shape
    return Display(
        image=image,
        levels=levels,
        slope=slope,
        offset=offset,
        padding=padding,
        windows=[
            *windows.of_file(opened),
            *windows.computed(values, valid_mask, is_inverted=is_inverted),
        ],
        is_inverted=is_inverted,
        # Whatever `make_square` decided, the picture that is shown has it.
        aspect=(shown_rows / rows) / (shown_columns / columns),
        marker=_marker(header.read_orientation(dataset)),
        units=KNOWN_UNITS.get(header.read_text(dataset, "RescaleType"), "values of the file"),
    )


def _marker(orientation: str) -> dict[str, str | None]:
    """Which of the patient's sides lie at the left and right edge, by Patient Orientation such as "L,F"."""
    letter = orientation[:1]
    # Letters of direction alone are let through: the element may hold anything.
    if letter not in _OPPOSITE:
        return {"left": None, "right": None, "source": "none: the header does not say"}
    source = "Patient Orientation (0020,0020)"
    # The first letter is where rows run to.
    return {"left": _OPPOSITE[letter], "right": letter, "source": source}


# ---- Levels ----------------------------------------------------------------------------------------


def _as_levels(
    values: np.ndarray, valid_mask: np.ndarray, step: float
) -> tuple[np.ndarray, float, float, int | None]:
    """Values as 16-bit levels, exactly where they are multiples of a step: (levels, slope, offset, padding)."""
    inside = values[valid_mask]
    padding = None if inside.size == values.size else MOST_LEVEL
    if not inside.size:
        return np.full(values.shape, MOST_LEVEL, np.uint16), 1.0, 0.0, padding
    # Padding may lie anywhere: the range is that of the film itself.
    low, high = float(inside.min()), float(inside.max())
    # The last level is padding's, where there is any.
    most = MOST_LEVEL - (padding is not None)
    counts = (values.astype(np.float64) - low) / step
    is_exact = (high - low) / step <= most and _are_whole(counts[valid_mask])
    if not is_exact:
        # Colour turned to gray, or more than 16 bits: rounded to 1/65,535 of the range.
        step = (high - low) / most or 1.0
        counts = (values.astype(np.float64) - low) / step
    levels = np.clip(np.rint(counts), 0, most).astype(np.uint16)
    if padding is not None:
        levels[~valid_mask] = padding
    return levels, step, low, padding


def _are_whole(counts: np.ndarray) -> bool:
    # Values are float32: a product with a slope leaves a few millionths.
    return bool(np.abs(counts - np.rint(counts)).max() < 0.01)
