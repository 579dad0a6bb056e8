"""A film of any size on a square or a shape, in float; or as a model's own processor resizes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image as PilImage

from cxr_jax.errors import UserError
from cxr_jax.models.image_processor import ImageProcessor


@dataclass(frozen=True)
class NativeSize:
    """Films in their own aspect ratio, their area within limits: `config.data.min_pixels` and `max_pixels`."""

    processor: ImageProcessor
    min_pixels: int
    max_pixels: int

    def levels(self, pixels: np.ndarray) -> np.ndarray:
        """Resize gray float [H, W] in 0..1 as the processor does for 8 bit: uint8 [h, w].

        Raises:
            UserError: for an aspect ratio above 200.
        """
        # From float: a film's 12 bits are rounded once, before the resize, as a PNG of it would be.
        return self.processor.levels(pixels, self.min_pixels, self.max_pixels)


def fit(pixels: ArrayLike, size: int | tuple[int, int]) -> np.ndarray:
    """Pad an image with black, evenly on both sides, to the aspect ratio of a shape, and resize it to the shape.

    Padding, not cropping: a crop of a portrait film cuts off the costophrenic angles. The resize is bicubic
    with antialiasing, in float, so 12-bit data keeps its depth until `image_processor.quantise`.

    Args:
        pixels: gray float [H, W] in 0..1.
        size: one number for a square, or (height, width).

    Returns:
        float32 [height, width] in 0..1.
    """
    pixels = np.asarray(pixels, np.float32)
    target_height, target_width = (int(side) for side in np.broadcast_to(size, 2))
    shape = (target_height, target_width)
    height, width = pixels.shape

    # The smallest canvas of the shape's aspect ratio that holds the image; -(-a // b) rounds up.
    canvas_height = max(height, -(-width * target_height // target_width))
    canvas_width = max(width, -(-height * target_width // target_height))
    if (canvas_height, canvas_width) != (height, width):
        top, left = (canvas_height - height) // 2, (canvas_width - width) // 2
        bottom, right = canvas_height - height - top, canvas_width - width - left
        pixels = np.pad(pixels, ((top, bottom), (left, right)))

    if pixels.shape != shape:
        image = PilImage.fromarray(pixels).resize(
            (target_width, target_height), PilImage.Resampling.BICUBIC
        )
        pixels = np.clip(np.asarray(image, np.float32), 0, 1)  # bicubic overshoots at edges
    return np.ascontiguousarray(pixels)


def fit_boxes(
    boxes: Sequence[tuple[float, float, float, float]],
    shape: tuple[int, int],
    size: int | tuple[int, int],
) -> np.ndarray:
    """Mark boxes of a film where `fit` puts them.

    Args:
        boxes: left, top, width and height of each, as shares of the film's sides.
        shape: (height, width) of the film.
        size: as for `fit`.

    Returns:
        bool [height, width], of the shape that `fit` gives.
    """
    target_height, target_width = (int(side) for side in np.broadcast_to(size, 2))
    height, width = shape
    # The canvas of `fit`, and its margins.
    canvas_height = max(height, -(-width * target_height // target_width))
    canvas_width = max(width, -(-height * target_width // target_height))
    top_margin, left_margin = (canvas_height - height) // 2, (canvas_width - width) // 2
    down, across = target_height / canvas_height, target_width / canvas_width
    marked = np.zeros((target_height, target_width), bool)
    for left, top, box_width, box_height in boxes:
        # Outward: a pixel that a box touches is of the box. Boxes may begin a little before the film.
        first_row = max(0, int(np.floor((top_margin + top * height) * down)))
        last_row = int(np.ceil((top_margin + (top + box_height) * height) * down))
        first_column = max(0, int(np.floor((left_margin + left * width) * across)))
        last_column = int(np.ceil((left_margin + (left + box_width) * width) * across))
        marked[first_row:last_row, first_column:last_column] = True
    return marked


def stack(images_of_rows: Sequence[Sequence[np.ndarray]], name: str) -> np.ndarray:
    """Stack squares of rows: of one image each [B, S, S], of n each [B, n, S, S].

    Args:
        name: what a message calls the rows.

    Raises:
        UserError: for rows of several numbers of images.
    """
    counts = {len(row_images) for row_images in images_of_rows}
    if len(counts) > 1:
        raise UserError(f"{name}: rows of {min(counts)} and of {max(counts)} images in one batch")
    stacked = np.stack([np.stack(row_images) for row_images in images_of_rows])
    return stacked[:, 0] if counts == {1} else stacked
