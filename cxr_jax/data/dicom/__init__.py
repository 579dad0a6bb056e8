"""DICOM radiograph -> `Image`, in the order the standard asks for (PS3.3 C.7.6.3, C.11.1, C.11.2, C.11.6).

Header checks and size limits come before any pixel is decoded; compressed pixels are decoded by a worker
process with memory and time limits. Then: padding mask, Modality LUT or rescale, VOI LUT or window, one
inversion, square pixels, float32 all the way. Messages and `meta` never hold free text of the header: patient
data does not reach a log.
"""

import io
import logging
import warnings

import numpy as np
import pydicom

from cxr_jax.data import radiograph
from cxr_jax.data.dicom.header import check_deflated, check_kind, check_layout, describe
from cxr_jax.data.dicom.pixels import decode, modality, padding, render, square_pixels
from cxr_jax.data.radiograph import Image
from cxr_jax.errors import UserError

# pydicom logs and warns with the raw value of a bad element. Set for the process, not per call, because a web
# server reads in several threads.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module=r"pydicom\b.*")


def read(path, renderer="voi") -> Image:
    """Read one single-frame radiograph -> Image(pixels float32 [H, W] in 0..1, meta).

    `renderer`: `voi`, `mimic_jpg` or `percentile`, see `images.read_image`. Raises UserError for all else, in
    a message that never holds a header value.
    """
    radiograph.check_renderer(renderer)
    data = radiograph.read_bytes(path)
    if data[128:132] != radiograph.DICOM_MAGIC:
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
    check_deflated(path, data)
    ds = pydicom.dcmread(io.BytesIO(data))
    meta = radiograph.new_meta("DICOM", renderer)
    check_kind(path, ds, meta)
    check_layout(path, ds, meta)
    describe(ds, meta)
    stored = decode(path, ds, data)
    colour = stored.ndim == 3
    if colour:
        meta["warnings"].append("colour (secondary capture): read as gray")
        stored = radiograph.to_gray(stored.astype(np.float32), 2 ** meta["bits"] - 1, meta)
    valid = np.ones(stored.shape, bool) if colour else ~padding(ds, stored)
    if not valid.all():
        meta["warnings"].append("pixel padding was masked")
    values = modality(ds, stored, meta)
    pixels = render(ds, values, valid, renderer, meta)
    pixels[~valid] = 0  # black after the inversion, whatever the photometric interpretation
    return radiograph.finish(path, square_pixels(ds, pixels, meta), meta)
