"""PNG and JPEG, 8 and 16 bits, as radiographs."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from cxr_jax.data.radiograph import (
    MAX_PIXELS,
    PERCENTILES,
    check_size,
    equalise,
    new_meta,
    stretch,
    to_gray,
)
from cxr_jax.errors import UserError

EXIF_ORIENTATION = 0x0112
PNG_BIT_DEPTH = 24  # its byte in the file: the header chunk is always the first


def read_picture(
    path: str | Path, file_bytes: bytes, kind: str, renderer: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Render the bytes of a PNG or JPEG file.

    Args:
        path: only the name used in messages.
        kind: "PNG" or "JPEG".
        renderer: one of RENDERERS.

    Returns:
        Pixels float32 [H, W] in 0..1, and the meta that `radiograph.finish` completes.

    Raises:
        UserError: for damaged data, or a size that no radiograph has.
    """
    values, white, metadata = read_levels(path, file_bytes, kind, renderer)
    return show_levels(values, white, renderer), metadata


def read_levels(
    path: str | Path, file_bytes: bytes, kind: str, renderer: str = "voi"
) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Read a picture's own levels: gray float32 [H, W], the level that is white, and its meta.

    Raises:
        UserError: as `read_picture` does.
    """
    metadata = new_meta(kind, renderer)
    # What a picture is unless its own data says more.
    metadata["photometric"], metadata["bits"] = "MONOCHROME2", 8
    values, white = _decode(path, file_bytes, kind, metadata)
    return values, white, metadata


def show_levels(values: np.ndarray, white: int, renderer: str = "voi") -> np.ndarray:
    """Render a picture's levels as float32 [H, W] in 0..1."""
    # A picture has no padding that could be told from black.
    valid_mask = np.ones(values.shape, bool)
    if renderer == "voi":
        return np.clip(values / np.float32(white), 0, 1)
    if renderer == "percentile":
        return stretch(values, valid_mask, *PERCENTILES)
    return equalise(stretch(values, valid_mask), valid_mask)


def _decode(
    path: str | Path, file_bytes: bytes, kind: str, metadata: dict[str, Any]
) -> tuple[np.ndarray, int]:
    """Gray float32 [H, W] in the file's own levels, and the level that is white."""
    try:
        with warnings.catch_warnings():
            # Pillow's bomb warning: the limit below is lower and an error.
            warnings.simplefilter("ignore")
            image = PilImage.open(io.BytesIO(file_bytes), formats=[kind])
            # Before the pixels are decoded: the header is enough.
            check_size(path, image.height, image.width, metadata["warnings"])
            if getattr(image, "n_frames", 1) > 1:
                metadata["warnings"].append("several pictures in one file: the first was read")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UserError:
        raise
    except PilImage.DecompressionBombError:
        raise UserError(f"{path}: above the limit of {MAX_PIXELS // 10**6} megapixels") from None
    except Exception:  # Pillow raises half a dozen kinds for damaged data
        raise UserError(f"{path}: the {kind} data is damaged or cut short") from None

    if upright.size != image.size or (image.getexif().get(EXIF_ORIENTATION, 1) != 1):
        metadata["warnings"].append("rotated as its EXIF orientation says")
    if upright.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return _deep_gray(path, upright, metadata)
    # Pillow keeps the high byte of 16-bit colour only.
    if kind == "PNG" and file_bytes[PNG_BIT_DEPTH] == 16:
        metadata["warnings"].append("16-bit colour PNG read with 8 bits")
    return _gray(upright, metadata), 255


def _deep_gray(
    path: str | Path, image: PilImage.Image, metadata: dict[str, Any]
) -> tuple[np.ndarray, int]:
    """16-bit PNG: its levels may fill only 10, 12 or 14 of the 16 bits. (Pillow's own conversion clips at 255.)"""
    values = np.asarray(image).astype(np.float32)
    highest = float(values.max(initial=0))
    if not np.isfinite(highest) or values.min(initial=0) < 0:
        raise UserError(f"{path}: pixel values outside the range of a 16-bit image")
    # The smallest depth that holds its brightest pixel.
    bits = next((bits for bits in (8, 10, 12, 14, 16) if highest < 2**bits), 16)
    metadata["bits"] = bits
    if bits < 16:
        metadata["warnings"].append(
            f"16-bit PNG whose values fill {bits} bits: shown on a {bits}-bit scale"
        )
    return values, 2**bits - 1


def _gray(image: PilImage.Image, metadata: dict[str, Any]) -> np.ndarray:
    """8-bit modes -> gray float32 in 0..255. Alpha is dropped, as the Hugging Face processor does."""
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("P", "PA"):
        has_alpha = "transparency" in image.info or image.mode == "PA"
        image = image.convert("RGBA" if has_alpha else "RGB")
    if image.mode in ("LA", "La", "RGBA", "RGBa"):
        least_alpha, _ = image.getchannel(image.getbands()[-1]).getextrema()
        if np.min(least_alpha) < 255:
            metadata["warnings"].append("transparency was ignored")
        image = image.convert("L" if image.mode[0] == "L" else "RGB")
    if image.mode == "L":
        return np.asarray(image).astype(np.float32)
    return to_gray(np.asarray(image.convert("RGB")).astype(np.float32), 255, metadata)
