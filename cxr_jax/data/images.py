"""Reading one picture file: PNG, JPEG or DICOM, told apart by content and never by name.

Whatever comes in, an `Image` comes out (float32 gray in 0..1, bright = dense, as shown to a reader) or a
`UserError` of one line that names the file and the reason. `meta["warnings"]` lists what a reader should
know; `meta["unusable"]` lists the reasons why this is not a frontal chest radiograph fit to be reported on.
"""

import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from cxr_jax.errors import UserError

RENDERERS = ("voi", "mimic_jpg", "percentile")
MIN_SIDE = 32  # px; the Qwen processor itself would take 1 x 1 and enlarge it
MAX_ASPECT = 20  # no radiograph is a strip; the processor's own limit is 200
ODD_ASPECT = 3
MAX_PIXELS = 64_000_000  # four times the largest digital chest film
MAX_FILE_BYTES = 512 * 2**20

PNG_MAGIC, JPEG_MAGIC, DICOM_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"DICM"


@dataclasses.dataclass(frozen=True)
class Image:
    """`pixels`: float32 [H, W] in 0..1. `meta`: the keys of `new_meta`, `size` being [H, W]."""

    pixels: np.ndarray
    meta: dict


def read_image(path, renderer="voi") -> Image:
    """Read a PNG, JPEG or DICOM file.

    `renderer`: `voi` shows the file as its maker meant it (a DICOM's window, a PNG's own levels), `mimic_jpg`
    the min-max and histogram equalisation of the MIMIC-CXR-JPG and CheXpert releases, `percentile` the 0.5 to
    99.5 % range. Raises UserError for anything that is not a usable picture.
    """
    check_renderer(renderer)
    return image_from_bytes(path, read_bytes(path), renderer)


def image_from_bytes(path, data, renderer="voi") -> Image:
    """`read_image` for a file that is already in memory; `path` is only the name used in messages."""
    check_renderer(renderer)
    if data[128:132] == DICOM_MAGIC:
        from cxr_jax.data import dicom  # pydicom is loaded only when there is a DICOM to read

        return dicom.read_data(path, data, renderer)
    if data.startswith(PNG_MAGIC):
        return _read_picture(path, data, "PNG", renderer)
    if data.startswith(JPEG_MAGIC):
        return _read_picture(path, data, "JPEG", renderer)
    raise UserError(f"{path}: not a PNG, JPEG or DICOM file (told by its content, not its name)")


def new_meta(kind, renderer):
    """An empty `Image.meta`; `kind` is PNG, JPEG or DICOM."""
    meta = dict.fromkeys(("photometric", "window", "bits", "size"))
    return meta | {
        "kind": kind,
        "renderer": renderer,
        "view": "unknown",
        "warnings": [],
        "unusable": [],
    }


def check_renderer(renderer):
    if renderer not in RENDERERS:
        raise UserError(f"--renderer={renderer}: choose one of {', '.join(RENDERERS)}")


def read_bytes(path) -> bytes:
    """The whole file, if it is a regular file of a sane size. Raises UserError otherwise."""
    file = Path(path)
    try:
        if not file.exists():
            raise UserError(f"{path}: no such file")
        if not file.is_file():
            raise UserError(f"{path}: not a regular file")
        size = file.stat().st_size
        if size == 0:
            raise UserError(f"{path}: the file is empty")
        if size > MAX_FILE_BYTES:
            raise UserError(
                f"{path}: {size / 2**20:.0f} MiB is above the limit of {MAX_FILE_BYTES // 2**20} MiB"
            )
        return file.read_bytes()
    except (OSError, ValueError) as exc:  # ValueError: a NUL byte in the name
        raise UserError(
            f"{path}: cannot be read ({getattr(exc, 'strerror', None) or 'bad file name'})"
        ) from None


def check_size(path, height, width, notes=None):
    """Refuse sizes that no radiograph has, before anything of that size is allocated."""
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{path}: {width} x {height} px is too small; at least {MIN_SIDE} px a side are needed"
        )
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{path}: {width} x {height} px is above the limit of {MAX_PIXELS // 10**6} megapixels"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"{path}: {width} x {height} px is a strip, not a radiograph (aspect above {MAX_ASPECT}:1)"
        )
    if notes is not None and max(height, width) > ODD_ASPECT * min(height, width):
        notes.append(
            "unusual shape for a radiograph (long side more than three times the short one)"
        )


# Renderers' building blocks, shared with DICOM. `valid` is False on padding, which never enters a statistic.


def stretch(values, valid, low=0.0, high=100.0):
    """Map the `low`..`high` percentiles of the valid values to 0..1, clipped; a constant image becomes 0."""
    inside = values[valid]
    if inside.size == 0:
        return np.zeros(values.shape, np.float32)
    if (low, high) == (0.0, 100.0):
        a, b = float(inside.min()), float(inside.max())
    else:
        a, b = (float(x) for x in np.percentile(inside, [low, high]))
    if not b > a:
        return np.zeros(values.shape, np.float32)
    return np.clip((values - a) / (b - a), 0, 1).astype(np.float32)


def equalise(pixels, valid):
    """8-bit histogram equalisation of an image in 0..1, as in the MIMIC-CXR-JPG and CheXpert releases.

    Quantised by truncation first, as they do; the level map is OpenCV's `equalizeHist`.
    """
    levels = np.floor(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    counts = np.bincount(levels[valid], minlength=256)
    cumulative = np.cumsum(counts)
    first = int(np.argmax(counts > 0))
    rest = cumulative[-1] - counts[first]
    if rest <= 0:
        return levels.astype(np.float32) / 255
    table = np.clip(np.rint((cumulative - counts[first]) * (255.0 / rest)), 0, 255)
    return (table[levels] / 255).astype(np.float32)


def finish(path, pixels, meta) -> Image:
    """Last checks, the same for every format: finite, sane, not blank."""
    if not np.isfinite(pixels).all():
        raise UserError(f"{path}: rendering gave values that are not numbers")
    if float(pixels.max()) - float(pixels.min()) < 1 / 255:
        meta["warnings"].append("blank: the image is constant")
        meta["unusable"].append("blank: the image is constant")
    meta["size"] = list(pixels.shape)
    return Image(np.ascontiguousarray(pixels, np.float32), meta)


def _read_picture(path, data, kind, renderer) -> Image:
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


def to_gray(rgb, full_scale, meta):
    """RGB float32 [H, W, 3] -> luma [H, W] (ITU-R 601). Marks real colour pictures as unusable."""
    chroma = float(np.mean(rgb.max(-1) - rgb.min(-1))) / full_scale
    if chroma > 0.05:
        meta["warnings"].append("a colour picture, read as gray")
        meta["unusable"].append("a colour picture, not a radiograph")
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)
