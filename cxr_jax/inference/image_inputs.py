"""A picture as the model takes it: its size, its patches, its grid."""

import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np

from cxr_jax.data.resize import fit
from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl.patches import FACTOR, PATCH, check_aspect, patchify

GRIDS = ("exact", "bucket")
"""How an image gets its shape, see `Model`."""


# ---- Pixels ------------------------------------------------------------------------------------------------


def pixels_of(image: Any) -> np.ndarray:
    """Read any accepted image as float32 [H, W] in 0..1.

    Args:
        image: path, PIL image, or array [H, W] with values in 0..1.

    Raises:
        UserError: for anything else, and for a file that cannot be read.
    """
    # Imported for paths only: reading DICOM needs libraries that an array does not.
    if isinstance(image, (str, os.PathLike)):
        from cxr_jax.data import images

        return images.read_image(cast(str | Path, image)).pixels
    # PIL images are known by what they can do: importing PIL takes time.
    if hasattr(image, "convert"):
        # Gray by PIL's weights of red, green and blue, in 256 levels.
        return np.asarray(image.convert("L"), np.float32) / 255
    try:
        pixels = np.asarray(image, np.float32)
    except (TypeError, ValueError):
        raise UserError(
            "an image must be a path, a PIL image, an array [H, W] with values in 0..1, or None, not "
            f"{type(image).__name__}"
        ) from None
    if not _is_gray_picture(pixels):
        raise UserError(
            f"an image array must be [H, W] with values in 0..1, got shape {list(pixels.shape)}"
        )
    return pixels


def _is_gray_picture(pixels: np.ndarray) -> bool:
    if pixels.ndim != 2 or not pixels.size or not np.isfinite(pixels).all():
        return False
    return bool(pixels.min() >= 0 and pixels.max() <= 1)


# ---- Their size --------------------------------------------------------------------------------------------


def fit_to_model(pixels: np.ndarray, pixel_limits: tuple[int, int]) -> np.ndarray:
    """Fit a picture, if the model takes one size only (min_pixels == max_pixels); else leave it as it is.

    Such a model was trained on squares: the processor's own resize would give it grids it has never seen.
    """
    low, high = pixel_limits
    if low == high:
        return fit(pixels, math.isqrt(high))
    return np.asarray(pixels, np.float32)


def bucket_shapes(max_pixels: int) -> list[tuple[int, int]]:
    """List at most 9 image shapes (h, w), multiples of 28 with h * w <= max_pixels: h / w from 1/2 to 2 in steps of
    about 2 ** 0.25, each as large as max_pixels allows."""

    def side(length: float) -> int:
        # Rounded down, so that the area stays within max_pixels, but at least one merged patch.
        return max(FACTOR, math.floor(length / FACTOR) * FACTOR)

    # From tall to wide, and square in the middle.
    ratios = [2 ** (step / 4) for step in range(-4, 5)]
    shapes = [
        (side(math.sqrt(max_pixels * ratio)), side(math.sqrt(max_pixels / ratio)))
        for ratio in ratios
    ]
    # A side of the least size may have made a shape too large, and two ratios may share one.
    return sorted({(height, width) for height, width in shapes if height * width <= max_pixels})


def prepare_in_buckets(
    pixels: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Prepare a picture in the one of `bucket_shapes` whose aspect ratio is nearest: few shapes, few programs.

    The picture is padded with black, not stretched and not cropped: stretching changes the ratio of heart to chest.
    Padding takes up to about a tenth of the shape for aspect ratios from 1/2 to 2 (more where max_pixels is so small
    that the shapes are coarse). Unlike the processor, a picture smaller than max_pixels is enlarged to it.

    Returns:
        (patches [P, patch_dim], grid (t, h, w)).

    Raises:
        UserError: for an aspect ratio above 200.
    """
    # Before the padding, which would hide a hopeless ratio.
    height, width = np.shape(pixels)
    check_aspect(height, width)

    def distance(shape: tuple[int, int]) -> float:
        # In logarithms, so that twice as wide is as far as twice as tall.
        return abs(math.log(shape[0] / shape[1] / (height / width)))

    shape = min(bucket_shapes(max_pixels), key=distance)
    # `fit` and `patchify` are those of training.
    patches = patchify(fit(pixels, shape)[None], np)[0]
    return patches, (1, shape[0] // PATCH, shape[1] // PATCH)
