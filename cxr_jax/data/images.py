"""Reading one picture file: PNG, JPEG or DICOM, told apart by content and never by name.

Whatever comes in, an `Image` comes out (float32 gray in 0..1, bright = dense, as shown to a reader) or a
`UserError` of one line that names the file and the reason. `meta["warnings"]` lists what a reader should
know; `meta["unusable"]` lists the reasons why this is not a frontal chest radiograph fit to be reported on.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data.pictures import read_picture
from cxr_jax.data.radiograph import (
    DICOM_MAGIC,
    JPEG_MAGIC,
    NO_PICTURE,
    PNG_MAGIC,
    Image,
    check_renderer,
    finish,
    may_be_old_dicom,
    read_bytes,
)
from cxr_jax.errors import UserError


def read_image(path: str | Path, renderer: str = "voi") -> Image:
    """Read a PNG, JPEG or DICOM file.

    Args:
        renderer: `voi` shows the file as its maker meant it (a DICOM's window, a PNG's own levels), `mimic_jpg` the
            min-max and histogram equalisation of the MIMIC-CXR-JPG and CheXpert releases, `percentile` the 0.5 to
            99.5 % range.

    Raises:
        UserError: for anything that is not a usable picture.
    """
    check_renderer(renderer)
    return image_from_bytes(path, read_bytes(path), renderer)


def image_from_bytes(path: str | Path, file_bytes: bytes, renderer: str = "voi") -> Image:
    """Do what `read_image` does for a file that is already in memory; `path` is only the name used in messages."""
    check_renderer(renderer)
    pixels, metadata = _render(path, file_bytes, renderer)
    return finish(path, pixels, metadata)


def _render(
    path: str | Path, file_bytes: bytes, renderer: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels and meta from the reader of the file's format."""
    # 128 bytes of preamble, which may hold anything, stand before a DICOM's mark.
    if file_bytes[128:132] == DICOM_MAGIC:
        from cxr_jax.data import dicom  # pydicom is loaded only when there is a DICOM to read

        return dicom.render_file(path, file_bytes, renderer)
    if file_bytes.startswith(PNG_MAGIC):
        return read_picture(path, file_bytes, "PNG", renderer)
    if file_bytes.startswith(JPEG_MAGIC):
        return read_picture(path, file_bytes, "JPEG", renderer)
    if may_be_old_dicom(file_bytes):
        from cxr_jax.data import dicom

        return dicom.render_file(path, file_bytes, renderer)
    raise UserError(f"{path}: {NO_PICTURE}")
