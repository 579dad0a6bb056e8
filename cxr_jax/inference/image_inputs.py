"""A picture as the model takes it: its size, its patches, its grid."""

import math
import os

import numpy as np

from cxr_jax.data.resize import fit
from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl.patches import FACTOR, PATCH, _check_aspect, patchify


def fit_to_model(pixels, pixel_limits):
    """`fit`, if the model takes one size only (min_pixels == max_pixels); else the array as it is.

    Such a model was trained on squares: the processor's own resize would give it grids it has never seen.
    """
    low, high = pixel_limits
    return fit(pixels, math.isqrt(high)) if low == high else np.asarray(pixels, np.float32)


# Few shapes


def bucket_shapes(max_pixels: int) -> list[tuple[int, int]]:
    """At most 9 image shapes (h, w), multiples of 28 with h * w <= max_pixels: h / w from 1/2 to 2 in steps of about
    2 ** 0.25, each as large as max_pixels allows."""
    side = lambda length: max(FACTOR, math.floor(length / FACTOR) * FACTOR)
    ratios = [2 ** (k / 4) for k in range(-4, 5)]
    shapes = [(side(math.sqrt(max_pixels * r)), side(math.sqrt(max_pixels / r))) for r in ratios]
    return sorted({shape for shape in shapes if shape[0] * shape[1] <= max_pixels})


def prepare_in_buckets(pixels, max_pixels: int):
    """`prepare` into the one of `bucket_shapes` whose aspect ratio is nearest.

    The picture is padded with black, not stretched and not cropped: stretching changes the ratio of heart to chest.
    Padding takes up to about a tenth of the shape for aspect ratios from 1/2 to 2 (more where max_pixels is so small
    that the shapes are coarse). Unlike `prepare`, a picture smaller than max_pixels is enlarged to it. Raises
    UserError for an aspect ratio above 200.
    """
    h, w = np.shape(pixels)
    _check_aspect(h, w)
    shape = min(bucket_shapes(max_pixels), key=lambda s: abs(math.log(s[0] / s[1] / (h / w))))
    return patchify(fit(pixels, shape)[None], np)[0], (1, shape[0] // PATCH, shape[1] // PATCH)


GRIDS = ("exact", "bucket")


def pixels_of(image) -> np.ndarray:
    """Any accepted image -> float32 [H, W] in 0..1."""
    if isinstance(image, (str, os.PathLike)):
        from cxr_jax.data import images

        return images.read_image(image).pixels
    if hasattr(image, "convert"):
        return np.asarray(image.convert("L"), np.float32) / 255
    try:
        pixels = np.asarray(image, np.float32)
    except (TypeError, ValueError):
        raise UserError(
            "an image must be a path, a PIL image, an array [H, W] with values in 0..1, or None, not "
            f"{type(image).__name__}"
        ) from None
    if (
        pixels.ndim != 2
        or not pixels.size
        or not np.isfinite(pixels).all()
        or pixels.min() < 0
        or pixels.max() > 1
    ):
        raise UserError(
            f"an image array must be [H, W] with values in 0..1, got shape {list(pixels.shape)}"
        )
    return pixels
