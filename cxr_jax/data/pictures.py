"""PNG and JPEG, 8 and 16 bits, as radiographs."""

import io
import warnings

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from cxr_jax.data.radiograph import (
    MAX_PIXELS,
    Image,
    check_size,
    equalise,
    finish,
    new_meta,
    stretch,
    to_gray,
)
from cxr_jax.errors import UserError


def read_picture(path, data, kind, renderer) -> Image:
    meta = new_meta(kind, renderer)
    meta["photometric"], meta["bits"] = "MONOCHROME2", 8
    values, full_scale = _decode(path, data, kind, meta)
    valid = np.ones(values.shape, bool)
    if renderer == "voi":
        pixels = np.clip(values / np.float32(full_scale), 0, 1)
    elif renderer == "percentile":
        pixels = stretch(values, valid, 0.5, 99.5)
    else:
        pixels = equalise(stretch(values, valid), valid)
    return finish(path, pixels, meta)


def _decode(path, data, kind, meta):
    """-> (gray float32 [H, W] in the file's own levels, the level that is white)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's bomb warning: the limit below is lower and an error
            image = PilImage.open(io.BytesIO(data), formats=[kind])
            check_size(path, image.height, image.width, meta["warnings"])
            if getattr(image, "n_frames", 1) > 1:
                meta["warnings"].append("several pictures in one file: the first was read")
            image.load()
            turned = ImageOps.exif_transpose(image)
    except UserError:
        raise
    except PilImage.DecompressionBombError:
        raise UserError(f"{path}: above the limit of {MAX_PIXELS // 10**6} megapixels") from None
    except Exception:  # Pillow raises half a dozen kinds for damaged data
        raise UserError(f"{path}: the {kind} data is damaged or cut short") from None
    if turned.size != image.size or (image.getexif().get(0x0112, 1) != 1):
        meta["warnings"].append("rotated as its EXIF orientation says")
    if turned.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return _deep_gray(path, turned, meta)
    if (
        kind == "PNG" and data[24] == 16
    ):  # the header's bit depth; Pillow keeps the high byte of 16-bit colour only
        meta["warnings"].append("16-bit colour PNG read with 8 bits")
    return _gray(turned, meta), 255


def _deep_gray(path, image, meta):
    """16-bit PNG: its levels may fill only 10, 12 or 14 of the 16 bits. (Pillow's own conversion clips at
    255.)
    """
    values = np.asarray(image).astype(np.float32)
    top = float(values.max(initial=0))
    if not np.isfinite(top) or values.min(initial=0) < 0:
        raise UserError(f"{path}: pixel values outside the range of a 16-bit image")
    bits = next((b for b in (8, 10, 12, 14, 16) if top < 2**b), 16)
    meta["bits"] = bits
    if bits < 16:
        meta["warnings"].append(
            f"16-bit PNG whose values fill {bits} bits: shown on a {bits}-bit scale"
        )
    return values, 2**bits - 1


def _gray(image, meta):
    """8-bit modes -> gray float32 in 0..255. Alpha is dropped, as the Hugging Face processor does."""
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("P", "PA"):
        image = image.convert(
            "RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"
        )
    if image.mode in ("LA", "La", "RGBA", "RGBa"):
        if image.getchannel(image.getbands()[-1]).getextrema()[0] < 255:
            meta["warnings"].append("transparency was ignored")
        image = image.convert("L" if image.mode[0] == "L" else "RGB")
    if image.mode == "L":
        return np.asarray(image).astype(np.float32)
    return to_gray(np.asarray(image.convert("RGB")).astype(np.float32), 255, meta)
