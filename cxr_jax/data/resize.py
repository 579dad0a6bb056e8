"""A film of any size on a square or a shape, in float."""

import numpy as np
from PIL import Image as PilImage


def fit(pixels, size):
    """Gray float [H, W] in 0..1 -> float32 [size, size], or [h, w] for a pair: padded with black, evenly on both
    sides, to the shape's aspect ratio, then resized.

    Padding, not cropping: a crop of a portrait film cuts off the costophrenic angles. The resize is bicubic
    with antialiasing, in float, so 12-bit data keeps its depth until `quantise`.
    """
    pixels = np.asarray(pixels, np.float32)
    shape = (size, size) if np.ndim(size) == 0 else tuple(size)
    h, w = pixels.shape
    tall, wide = max(h, -(-w * shape[0] // shape[1])), max(w, -(-h * shape[1] // shape[0]))
    if (tall, wide) != (h, w):
        top, left = (tall - h) // 2, (wide - w) // 2
        pixels = np.pad(pixels, ((top, tall - h - top), (left, wide - w - left)))
    if pixels.shape != shape:
        image = PilImage.fromarray(pixels).resize(shape[::-1], PilImage.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(image, np.float32), 0, 1)  # bicubic overshoots at edges
    return np.ascontiguousarray(pixels)
