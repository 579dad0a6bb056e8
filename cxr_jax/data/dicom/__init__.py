"""DICOM radiograph -> `Image`, in the order the standard asks for (PS3.3 C.7.6.3, C.11.1, C.11.2, C.11.6).

Header checks and size limits come before any pixel is decoded; compressed pixels are decoded by a worker
process with memory and time limits. Then: padding mask, Modality LUT or rescale, VOI LUT or window, one
inversion, square pixels, float32 all the way. Messages and `meta` never hold free text of the header: patient
data does not reach a log.
"""

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydicom

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import header, pixels, preamble, stored_bits
from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError

# pydicom logs and warns with the raw value of a bad element. Set for the process, not per call, because a web
# server reads in several threads; here, so that any import of the room sets them.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module=r"pydicom\b.*")

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A radiograph after its Modality LUT and before any window.

    Attributes:
        values: floats [H, W].
        valid_mask: bool [H, W], False on padding.
        is_for_the_eye: whether the values run from black to white as they are, and need no window.
    """

    dataset: pydicom.Dataset
    values: np.ndarray
    valid_mask: np.ndarray
    metadata: dict[str, Any]
    is_for_the_eye: bool


def read(path: str | Path, renderer: str = "voi") -> Image:
    """Read one single-frame radiograph as Image(pixels float32 [H, W] in 0..1, meta).

    Args:
        renderer: `voi`, `mimic_jpg` or `percentile`, see `images.read_image`.

    Raises:
        UserError: for all else, in a message that never holds a header value.
    """
    radiograph.check_renderer(renderer)
    file_bytes = radiograph.read_bytes(path)
    rendered, metadata = render_file(path, file_bytes, renderer)
    return radiograph.finish(path, rendered, metadata)


def render_file(
    path: str | Path, file_bytes: bytes, renderer: str = "voi"
) -> tuple[np.ndarray, dict[str, Any]]:
    """Render the bytes of a DICOM file.

    Args:
        path: only the name used in messages.

    Returns:
        Pixels float32 [H, W] in 0..1, and the meta that `radiograph.finish` completes.

    Raises:
        UserError: as `read` does.
    """

    def render() -> tuple[np.ndarray, dict[str, Any]]:
        opened = open_file(path, file_bytes, renderer)
        return show(opened, renderer), opened.metadata

    return guarded(path, render)


def guarded(path: str | Path, step: Callable[[], _Result]) -> _Result:
    """Run a step that reads a file's header or pixels; whatever damage makes it raise becomes one line.

    Raises:
        UserError: in a message that never holds a header value.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return step()
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read this image") from None
    except Exception as error:
        # Damage makes pydicom raise almost anything, with header values in the text: only the type is told.
        raise UserError(
            f"{path}: damaged DICOM file ({type(error).__name__} while reading it)"
        ) from None


def open_file(path: str | Path, file_bytes: bytes, renderer: str = "voi") -> Opened:
    """Decode a file up to its values; call it within `guarded`.

    Args:
        path: only the name used in messages.
        renderer: what `metadata` says will show it.
    """
    # ---- The header, before any pixel is decoded ----
    file_bytes = preamble.complete(path, file_bytes)
    header.check_deflated(path, file_bytes)
    dataset = pydicom.dcmread(io.BytesIO(file_bytes))
    metadata = radiograph.new_meta("DICOM", renderer)
    header.check_kind(path, dataset, metadata)
    header.check_layout(path, dataset, metadata)
    header.describe(dataset, metadata)

    # ---- Stored values, and which of them are padding ----
    cells = pixels.decode(path, dataset, file_bytes)
    is_colour = cells.ndim == 3
    # Padding is a stored gray value, which colour has none of.
    padding_mask = np.zeros(cells.shape, bool) if is_colour else pixels.find_padding(dataset, cells)
    stored = stored_bits.extract(path, dataset, cells, padding_mask, metadata)
    if is_colour:
        metadata["warnings"].append("colour (secondary capture): read as gray")
        stored = radiograph.to_gray(stored.astype(np.float32), 2 ** metadata["bits"] - 1, metadata)
        padding_mask = np.zeros(stored.shape, bool)
    elif stored is not cells:
        # Padding may lie outside the range of the values, or be one of them.
        value_mask = pixels.find_padding(dataset, stored)
        is_shifted = stored_bits.shift(dataset, metadata["bits"]) > 0
        padding_mask = value_mask if is_shifted else value_mask | padding_mask
    valid_mask = ~padding_mask
    if padding_mask.any():
        metadata["warnings"].append("pixel padding was masked")

    # ---- Gray values as they are shown ----
    values = pixels.apply_modality(dataset, stored, metadata)
    # Eight bits as stored are made for the eye. Slope 1 and intercept 0 are written by many, and change nothing.
    is_for_the_eye = metadata["bits"] <= 8 and np.array_equal(values, stored)
    return Opened(
        dataset=dataset,
        values=values,
        valid_mask=valid_mask,
        metadata=metadata,
        is_for_the_eye=is_for_the_eye,
    )


def show(opened: Opened, renderer: str = "voi") -> np.ndarray:
    """Render what was opened: float32 [H', W'] in 0..1, of square pixels; its metadata gets the remarks."""
    shown = pixels.render(
        opened.dataset,
        opened.values,
        opened.valid_mask,
        renderer,
        opened.metadata,
        is_for_the_eye=opened.is_for_the_eye,
    )
    # Black after the inversion, whatever the photometric interpretation.
    shown[~opened.valid_mask] = 0
    return pixels.make_square(opened.dataset, shown, opened.metadata)
