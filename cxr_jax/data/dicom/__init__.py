"""DICOM radiograph -> `Image`, in the order the standard asks for (PS3.3 C.7.6.3, C.11.1, C.11.2, C.11.6).

Header checks and size limits come before any pixel is decoded; compressed pixels are decoded by a worker
process with memory and time limits. Then: padding mask, Modality LUT or rescale, VOI LUT or window, one
inversion, square pixels, float32 all the way. Messages and `meta` never hold free text of the header: patient
data does not reach a log.
"""

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from cxr_jax.data import radiograph
from cxr_jax.data.dicom import header, pixels
from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError

# pydicom logs and warns with the raw value of a bad element. Set for the process, not per call, because a web
# server reads in several threads; here, so that any import of the room sets them.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module=r"pydicom\b.*")


def read(path: str | Path, renderer: str = "voi") -> Image:
    """Read one single-frame radiograph as Image(pixels float32 [H, W] in 0..1, meta).

    Args:
        renderer: `voi`, `mimic_jpg` or `percentile`, see `images.read_image`.

    Raises:
        UserError: for all else, in a message that never holds a header value.
    """
    radiograph.check_renderer(renderer)
    file_bytes = radiograph.read_bytes(path)
    if file_bytes[128:132] != radiograph.DICOM_MAGIC:
        raise UserError(f"{path}: not a DICOM file (no DICM mark after the preamble)")
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _render(path, file_bytes, renderer)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: not enough memory to read this image") from None
    except Exception as error:
        # Damage makes pydicom raise almost anything, with header values in the text: only the type is told.
        raise UserError(
            f"{path}: damaged DICOM file ({type(error).__name__} while reading it)"
        ) from None


def _render(
    path: str | Path, file_bytes: bytes, renderer: str
) -> tuple[np.ndarray, dict[str, Any]]:
    # ---- The header, before any pixel is decoded ----
    header.check_deflated(path, file_bytes)
    dataset = pydicom.dcmread(io.BytesIO(file_bytes))
    metadata = radiograph.new_meta("DICOM", renderer)
    header.check_kind(path, dataset, metadata)
    header.check_layout(path, dataset, metadata)
    header.describe(dataset, metadata)

    # ---- Stored values, and which of them are padding ----
    stored = pixels.decode(path, dataset, file_bytes)
    if stored.ndim == 3:
        metadata["warnings"].append("colour (secondary capture): read as gray")
        stored = radiograph.to_gray(stored.astype(np.float32), 2 ** metadata["bits"] - 1, metadata)
        valid_mask = np.ones(
            stored.shape, bool
        )  # padding is a stored gray value, which colour has none of
    else:
        valid_mask = ~pixels.find_padding(dataset, stored)
    if not valid_mask.all():
        metadata["warnings"].append("pixel padding was masked")

    # ---- Gray values as they are shown ----
    values = pixels.apply_modality(dataset, stored, metadata)
    shown = pixels.render(dataset, values, valid_mask, renderer, metadata)
    shown[~valid_mask] = 0  # black after the inversion, whatever the photometric interpretation
    return pixels.make_square(dataset, shown, metadata), metadata
