"""A picture as the model takes it: its size, its patches, its grid."""

import logging
import math
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from cxr_jax.data import image_gate
from cxr_jax.data.resize import fit
from cxr_jax.errors import UserError
from cxr_jax.inference.requests import Picture
from cxr_jax.models.image_processor import ImageProcessor, check_aspect

_LOG = logging.getLogger(__name__)

LEAST_SIDE = 28
"""Pixels a side of the smallest merged patch of any family: no picture of any model has less."""

GRIDS = ("exact", "bucket")
"""How an image gets its shape, see `Model`."""


# ---- Pixels ------------------------------------------------------------------------------------------------


def pixels_of(image: Any, gate_policy: str = "off") -> np.ndarray:
    """Read any accepted image as float32 [H, W] in 0..1.

    Args:
        image: path, PIL image, or array [H, W] with values in 0..1.
        gate_policy: what becomes of a file that `data.image_gate` takes for no chest film: "refuse", "warn" (one line
            in the log) or "off". Arrays and PIL images are their maker's affair: they are not judged.

    Raises:
        UserError: for anything else, and for a file that cannot be read or is refused.
    """
    # Imported for paths only: reading DICOM needs libraries that an array does not.
    if isinstance(image, (str, os.PathLike)):
        from cxr_jax.data import images

        film = images.read_image(cast(str | Path, image))
        image_gate.check(cast(str | Path, image), film, gate_policy, flag="image_gate")
        if "image_gate" in film.meta:
            _LOG.warning("%s: %s", image, film.meta["warnings"][-1])
        return film.pixels
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


def prepare_all(images: Any, prepare: Callable[[Any], tuple[Any, Any]]) -> tuple[Picture, ...]:
    """Prepare an image, each of a list of several, or nothing for None.

    Raises:
        UserError: as `prepare` does; of several it names which.
    """
    if not is_several(images):
        patches, grid = prepare(images)
        return () if patches is None else (Picture(patches, grid),)
    # Named by its number: of several arrays nothing else tells which.
    pictures = []
    for number, image in enumerate(images, 1):
        try:
            pictures.append(Picture(*prepare(image)))
        except UserError as error:
            raise UserError(f"image {number} of {len(images)}: {error}") from None
    return tuple(pictures)


def is_several(images: Any) -> bool:
    """Tell whether this is a list of images, and not one, which nested lists of numbers are, too.

    Raises:
        UserError: for a list that holds no image beside one.
    """
    if not isinstance(images, (list, tuple)):
        return False
    are_images = [
        isinstance(item, (str, os.PathLike)) or hasattr(item, "convert") or np.ndim(item) == 2
        for item in images
        if not isinstance(item, (list, tuple))
    ]
    if not any(are_images):
        return False
    if not all(are_images) or len(are_images) < len(images):
        raise UserError("a list of images must hold images alone: a path, a PIL image or an array")
    return True


def _is_gray_picture(pixels: np.ndarray) -> bool:
    if pixels.ndim != 2 or not pixels.size or not np.isfinite(pixels).all():
        return False
    return bool(pixels.min() >= 0 and pixels.max() <= 1)


def split_images(
    pixel_values: Any, image_grid_thw: Any, patch_dim: int
) -> tuple[list[tuple[int, int, int]], list[np.ndarray]]:
    """Part the patches of several images, [sum of t*h*w, patch_dim], by their grids [n, 3]: (grids, patches of each).

    Raises:
        UserError: if the two disagree.
    """
    rows = np.asarray(image_grid_thw).reshape(-1, 3)
    grids = [(int(frames), int(height), int(width)) for frames, height, width in rows]
    patch_counts = [math.prod(grid) for grid in grids]
    pixels = np.asarray(pixel_values)
    needed_shape = (sum(patch_counts), patch_dim)
    if pixels.shape != needed_shape:
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, image_grid_thw needs {list(needed_shape)}"
        )
    return grids, np.split(pixels, np.cumsum(patch_counts)[:-1])


# ---- Their size --------------------------------------------------------------------------------------------


def fit_to_model(pixels: np.ndarray, pixel_limits: tuple[int, int]) -> np.ndarray:
    """Fit a picture, if the model takes one size only (min_pixels == max_pixels); else leave it as it is.

    Such a model was trained on squares: the processor's own resize would give it grids it has never seen.
    """
    low, high = pixel_limits
    if low == high:
        return fit(pixels, math.isqrt(high))
    return np.asarray(pixels, np.float32)


def bucket_shapes(max_pixels: int, factor: int) -> list[tuple[int, int]]:
    """List at most 9 image shapes (h, w), multiples of factor with h * w <= max_pixels: h / w from 1/2 to 2 in
    steps of about 2 ** 0.25, each as large as max_pixels allows."""

    def side(length: float) -> int:
        # Rounded down, so that the area stays within max_pixels, but at least one merged patch.
        return max(factor, math.floor(length / factor) * factor)

    # From tall to wide, and square in the middle.
    ratios = [2 ** (step / 4) for step in range(-4, 5)]
    shapes = [
        (side(math.sqrt(max_pixels * ratio)), side(math.sqrt(max_pixels / ratio)))
        for ratio in ratios
    ]
    # A side of the least size may have made a shape too large, and two ratios may share one.
    return sorted({(height, width) for height, width in shapes if height * width <= max_pixels})


def bucket_shape(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int
) -> tuple[int, int]:
    """Find the shape (h, w) that a picture is fitted into: of nearest aspect ratio among `bucket_shapes` of max_pixels,
    or of half, a quarter .. of it, so that the picture is not enlarged unless it is below min_pixels."""

    def distance(shape: tuple[int, int]) -> float:
        # In logarithms, so that twice as wide is as far as twice as tall.
        return abs(math.log(shape[0] / shape[1] / (height / width)))

    found = min(bucket_shapes(max_pixels, factor), key=distance)
    area = max_pixels
    # Larger than the picture on both sides: fitting it would enlarge it.
    while found[0] > height and found[1] > width and area // 2 >= factor**2:
        area //= 2
        smaller = min(bucket_shapes(area, factor), key=distance)
        # As the processor, which enlarges what is below min_pixels.
        if math.prod(smaller) < min_pixels and height * width < min_pixels:
            break
        found = smaller
    return found


def prepare_in_buckets(
    processor: ImageProcessor, pixels: np.ndarray, max_pixels: int, min_pixels: int = 0
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Prepare a picture in the shape of `bucket_shape`: few shapes, few programs.

    The picture is padded with black, not stretched and not cropped: stretching changes the ratio of heart to chest.
    Padding takes up to about a tenth of the shape for aspect ratios from 1/2 to 2 (more where the shape is so small
    that shapes are coarse). A picture is never enlarged, unless it is below min_pixels; one that is smaller than
    max_pixels may lose up to half of its area, where the processor would keep its size.

    Returns:
        (patches [P, patch_dim], grid (t, h, w)).

    Raises:
        UserError: for an aspect ratio above 200.
    """
    # Before the padding, which would hide a hopeless ratio.
    height, width = np.shape(pixels)
    check_aspect(height, width)
    shape = bucket_shape(height, width, min_pixels, max_pixels, processor.factor)
    # `fit` and `patchify` are those of training.
    patches = processor.patchify(fit(pixels, shape)[None], np)[0]
    return patches, processor.grid(*shape)


# ---- Their limit -------------------------------------------------------------------------------------------


def check_settings(grids: str, max_pixels: Any, gate_policy: str, factor: int = LEAST_SIDE) -> None:
    """Refuse settings of a reader that mean nothing: grids, max_pixels and image_gate of `Model`.

    Args:
        factor: the model's pixels a side of a merged patch, where it is known already.

    Raises:
        UserError: naming the setting.
    """
    if grids not in GRIDS:
        raise UserError(f"grids={grids!r}: use one of {', '.join(GRIDS)}")
    check_max_pixels(max_pixels, factor)
    image_gate.check_policy(gate_policy, "image_gate")


def check_max_pixels(max_pixels: Any, factor: int = LEAST_SIDE) -> None:
    """Refuse a limit that is no whole number of at least one merged patch, factor x factor. Raises UserError."""
    if max_pixels is None:
        return
    # A bool is a number to Python, and a slip here.
    is_whole = isinstance(max_pixels, numbers.Integral) and not isinstance(max_pixels, bool)
    if not is_whole or max_pixels < factor**2:
        least = f"{factor**2} ({factor} x {factor})"
        raise UserError(f"max_pixels={max_pixels!r}: use a whole number from {least}")


def remark_on_limit(
    processor: ImageProcessor, pixel_limits: tuple[int, int], max_pixels: int
) -> str | None:
    """Say what a reader's max_pixels does that they may not expect, in one line; None if it just lowers the limit."""
    low, high = pixel_limits
    if processor.side is not None:
        square = f"{processor.side} x {processor.side}"
        return f"max_pixels={max_pixels} changes nothing: the model reads every picture at {square}"
    if max_pixels > high:
        return f"max_pixels={max_pixels} is above the model's own limit, {high}, which stays"
    if max_pixels >= low:
        return None
    if low == high:
        sides = [_side(processor, limit) for limit in (high, max_pixels)]
        return (
            f"max_pixels={max_pixels}: the model reads pictures of {sides[0]} x {sides[0]} and now gets "
            f"{sides[1]} x {sides[1]}, a size that it was not trained on"
        )
    return f"max_pixels={max_pixels} is below the model's min_pixels, {low}, which gives way"


def limited(
    processor: ImageProcessor, pixel_limits: tuple[int, int], max_pixels: int | None
) -> tuple[int, int]:
    """Lower the pixel limits of a model to a reader's own max_pixels; above the model's own it changes nothing.

    Below min_pixels, min_pixels gives way. A model of one size (min_pixels == max_pixels) gets the largest square of
    merged patches that is within max_pixels: smaller pictures than it was trained on. One that stretches every picture
    to its one size keeps it.
    """
    low, high = pixel_limits
    if max_pixels is None or max_pixels >= high or processor.side is not None:
        return pixel_limits
    if low == high:
        side = _side(processor, max_pixels)
        return side**2, side**2
    # Such a minimum could not be kept: one merged patch is the least that there is.
    return (low if low <= max_pixels else processor.factor**2), max_pixels


def _side(processor: ImageProcessor, max_pixels: int) -> int:
    """Of the largest square of merged patches within max_pixels."""
    return math.isqrt(max_pixels) // processor.factor * processor.factor
