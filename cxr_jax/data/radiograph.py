"""What every reader of pictures makes: an `Image`, with the limits and the steps that all formats share.

A format's reader gives (pixels, meta); `finish`, at the door, makes the `Image`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.data.shards import records
from cxr_jax.errors import UserError

RENDERERS = ("voi", "mimic_jpg", "percentile")
PERCENTILES = (0.5, 99.5)  # what the renderer `percentile` shows, from black to white

# What a film that is not frontal is told by, in `meta`: a warning, and why it is not read as one.
NOT_FRONTAL_WARNING = "not frontal: the header says that this is a lateral or other view"
NOT_FRONTAL = "not a frontal view"

# ---- Limits ----------------------------------------------------------------------------------------
MIN_SIDE = 32  # px; the Qwen processor itself would take 1 x 1 and enlarge it
MAX_ASPECT = 20  # no radiograph is a strip; the processor's own limit is 200
ODD_ASPECT = 3
MAX_PIXELS = 64_000_000  # four times the largest digital chest film
MAX_FILE_BYTES = 512 * 2**20
COLOURFUL = 0.05  # mean chroma, of full scale, above which a picture is no radiograph

PNG_MAGIC, JPEG_MAGIC, DICOM_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"DICM"
NO_PICTURE = "not a PNG, JPEG or DICOM file (told by its content, not its name)"
LUMA = (0.299, 0.587, 0.114)  # red, green, blue (ITU-R 601)


@dataclasses.dataclass(frozen=True)
class Image:
    """`pixels`: float32 [H, W] in 0..1. `meta`: the keys of `new_meta`, `size` being [H, W]."""

    pixels: np.ndarray
    meta: dict[str, Any]


def new_meta(kind: str, renderer: str) -> dict[str, Any]:
    """Start an `Image.meta` in which nothing is known yet.

    Args:
        kind: PNG, JPEG or DICOM.
    """
    metadata: dict[str, Any] = dict.fromkeys(("photometric", "window", "bits", "size"))
    return metadata | {
        "kind": kind,
        "renderer": renderer,
        "view": "unknown",
        "warnings": [],
        "unusable": [],
    }


def check_renderer(renderer: str) -> None:
    """Refuse a renderer that is none of RENDERERS. Raises UserError."""
    if renderer not in RENDERERS:
        raise UserError(f"--renderer={renderer}: choose one of {', '.join(RENDERERS)}")


def read_bytes(path: str | Path) -> bytes:
    """Read the whole file, if it is a regular file of a sane size. Raises UserError otherwise."""
    file = Path(path)
    # A film in a shard has a name that no file can have.
    if records.is_member(file):
        return records.read_film(file)
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
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or "bad file name"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def may_be_picture(file_bytes: bytes) -> bool:
    """Tell whether bytes begin as those of a PNG, a JPEG or a DICOM do, one without preamble included."""
    if file_bytes.startswith((PNG_MAGIC, JPEG_MAGIC)) or file_bytes[128:132] == DICOM_MAGIC:
        return True
    return may_be_old_dicom(file_bytes)


def may_be_old_dicom(file_bytes: bytes) -> bool:
    """Whether a file may be a DICOM without preamble, by its first tag: a group of 2 to 2E, in either byte order."""
    group = file_bytes[:2] if file_bytes[:4] != DICOM_MAGIC else b"\x02\x00"
    return len(group) == 2 and 0 in group and 2 <= sum(group) < 0x30 and sum(group) % 2 == 0


def check_size(
    path: str | Path, height: int, width: int, warnings: list[str] | None = None
) -> None:
    """Refuse sizes that no radiograph has, before anything of that size is allocated.

    Args:
        warnings: where a remark on an unusual shape goes, if anywhere.

    Raises:
        UserError: for a picture too small, too large or too long.
    """
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
    if warnings is not None and max(height, width) > ODD_ASPECT * min(height, width):
        warnings.append(
            "unusual shape for a radiograph (long side more than three times the short one)"
        )


# ---- Renderers' building blocks --------------------------------------------------------------------
# Shared with DICOM. `valid` is False on padding, which never enters a statistic.


def stretch(
    values: np.ndarray, valid_mask: np.ndarray, low: float = 0.0, high: float = 100.0
) -> np.ndarray:
    """Map the `low`..`high` percentiles of the valid values to 0..1, clipped; a constant image becomes 0.

    Args:
        values, valid: numbers and bool [H, W].

    Returns:
        float32 [H, W].
    """
    inside = values[valid_mask]
    if inside.size == 0:
        return np.zeros(values.shape, np.float32)
    if (low, high) == (0.0, 100.0):
        black, white = float(inside.min()), float(inside.max())
    else:
        black, white = (float(level) for level in np.percentile(inside, [low, high]))
    if not white > black:
        return np.zeros(values.shape, np.float32)
    return np.clip((values - black) / (white - black), 0, 1).astype(np.float32)


def equalise(pixels: np.ndarray, valid_mask: np.ndarray) -> np.ndarray:
    """Equalise the histogram of an image in 0..1 in 8 bits, as in the MIMIC-CXR-JPG and CheXpert releases.

    Quantised by truncation first, as they do; the level map is OpenCV's `equalizeHist`. float32 [H, W].
    """
    levels = np.floor(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    counts = np.bincount(levels[valid_mask], minlength=256)
    cumulative = np.cumsum(counts)
    darkest = int(np.argmax(counts > 0))
    spread_over = cumulative[-1] - counts[darkest]
    if spread_over <= 0:  # one level only: nothing to spread
        return levels.astype(np.float32) / 255
    table = np.clip(np.rint((cumulative - counts[darkest]) * (255.0 / spread_over)), 0, 255)
    return (table[levels] / 255).astype(np.float32)


def to_gray(rgb: np.ndarray, full_scale: float, metadata: dict[str, Any]) -> np.ndarray:
    """Turn RGB float32 [H, W, 3] into luma [H, W] (ITU-R 601). Marks real colour pictures as unusable."""
    chroma = float(np.mean(rgb.max(-1) - rgb.min(-1))) / full_scale
    if chroma > COLOURFUL:
        metadata["warnings"].append("a colour picture, read as gray")
        metadata["unusable"].append("a colour picture, not a radiograph")
    return rgb @ np.array(LUMA, np.float32)


# ---- The last step of every format -----------------------------------------------------------------


def finish(path: str | Path, pixels: np.ndarray, metadata: dict[str, Any]) -> Image:
    """Make the `Image`, after the last checks, the same for every format: finite, sane, not blank.

    Raises:
        UserError: for values that are not finite. A blank image is marked in `meta`.
    """
    if not np.isfinite(pixels).all():
        raise UserError(f"{path}: rendering gave values that are not numbers")
    if float(pixels.max()) - float(pixels.min()) < 1 / 255:
        metadata["warnings"].append("blank: the image is constant")
        metadata["unusable"].append("blank: the image is constant")
    metadata["size"] = list(pixels.shape)
    return Image(np.ascontiguousarray(pixels, np.float32), metadata)
