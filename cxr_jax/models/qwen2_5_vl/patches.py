"""Pixels to vision patches: the arithmetic of the Qwen2-VL image processor (PIL backend), without torch.

Written out here, and not called from `transformers`, because the import alone costs seconds and because
training needs the same arithmetic inside jit. `tests/data/test_images.py` holds it equal to
`Qwen2VLImageProcessorPil`.
"""

import math

import numpy as np
from PIL import Image as PilImage

from cxr_jax.errors import UserError

PATCH, MERGE, TEMPORAL, CHANNELS = 14, 2, 2, 3
FACTOR = PATCH * MERGE  # both sides of a resized image are multiples of this
PATCH_DIM = CHANNELS * TEMPORAL * PATCH * PATCH  # 1176
MAX_ASPECT = 200
MIN_PIXELS, MAX_PIXELS = (
    56 * 56,
    28 * 28 * 1280,
)  # the processor's own defaults; a checkpoint's config replaces them

# CLIP's normalisation constants, one a colour channel.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


# Settings of a processor whose arithmetic is the one below.
_FIXED = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": TEMPORAL,
    "image_mean": MEAN,
    "image_std": STD,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}
_TYPES = ("Qwen2VL", "Qwen2_5_VL")


def check_settings(settings: dict, path) -> None:
    """Raises UserError if a folder's image settings ask for other arithmetic than `prepare` does.

    settings: of the image processor, without null values (`hf.image_settings`); only keys that are there count.
    """
    kind = str(settings.get("image_processor_type", _TYPES[0]))
    if not kind.startswith(_TYPES):
        raise UserError(
            f"{path}: image_processor_type is {kind[:60]!r}: images are prepared as Qwen2-VL's only"
        )
    for name, want in _FIXED.items():
        if name in settings and not _same(settings[name], want):
            given = " ".join(str(settings[name]).split())[:80]
            need = [round(float(x), 8) for x in want] if np.ndim(want) else want
            raise UserError(f"{path}: {name} is {given}: images are prepared with {need} only")


def _same(value, want) -> bool:
    try:
        value = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return value.shape == np.shape(want) and np.allclose(value, want, rtol=1e-6, atol=0)


def smart_resize(height, width, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, factor=FACTOR):
    """Size (h, w), multiples of `factor`, nearest to height x width with min_pixels <= h * w <= max_pixels.

    Raises UserError for an aspect ratio above 200. Source: the Qwen2-VL image processor in transformers.
    """
    check_aspect(height, width)
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def check_aspect(height, width):
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"the picture is {width} x {height}: its aspect ratio is above {MAX_ASPECT}"
        )


def quantise(pixels):
    """Gray [..., H, W] in 0..1 -> uint8: the one place where a picture loses its depth."""
    return np.rint(np.clip(np.asarray(pixels, np.float32), 0, 1) * np.float32(255)).astype(np.uint8)


def prepare(pixels, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """One gray image float32 [H, W] in 0..1 -> (patches float32 [P, 1176], grid (1, h, w)); P = h * w.

    Equals the Hugging Face processor on the 8-bit image. Raises UserError for an aspect ratio above 200.
    """
    image = quantise(pixels)
    h, w = smart_resize(*image.shape, min_pixels, max_pixels)
    if (h, w) != image.shape:
        # The three channels are equal, so one gray resize gives what the processor's RGB resize gives.
        image = np.asarray(PilImage.fromarray(image).resize((w, h), PilImage.Resampling.BICUBIC))
    return _patches(image[None].astype(np.float32) / np.float32(255), np)[0], (
        1,
        h // PATCH,
        w // PATCH,
    )


def patchify(pixels, xp=None):
    """Gray [N, H, W] in 0..1, H and W multiples of 28 -> float32 [N, P, 1176]. Works inside jit.

    Rounds to 8 bit first, so that training on an array equals reading the same picture from an 8-bit PNG.
    `xp` is numpy or jax.numpy (the default). Raises UserError if a side is not a multiple of 28.
    """
    if xp is None:
        import jax.numpy as xp
    _, h, w = pixels.shape
    if h % FACTOR or w % FACTOR:
        raise UserError(f"patchify needs sides that are multiples of {FACTOR}, got {h} x {w}")
    levels = xp.round(xp.clip(xp.asarray(pixels, xp.float32), 0, 1) * 255)
    return _patches(levels / 255, xp)


def _patches(gray, xp):
    """[N, H, W] float32 in 0..1 -> [N, P, 1176], patches grouped 2 x 2 as the merger wants them."""
    n, h, w = gray.shape
    cells = gray.reshape(n, h // FACTOR, MERGE, PATCH, w // FACTOR, MERGE, PATCH)
    cells = cells.transpose(0, 1, 4, 2, 5, 3, 6)  # [N, rows/2, cols/2, 2, 2, 14, 14]
    cells = cells[:, :, :, :, :, None]
    shape = (CHANNELS, 1, 1)
    colour = (cells - xp.asarray(MEAN).reshape(shape)) / xp.asarray(STD).reshape(shape)
    # A still image is a clip of two equal frames; inside a patch the order is channel, frame, row, column.
    clip = xp.broadcast_to(colour[..., None, :, :], (*colour.shape[:6], TEMPORAL, PATCH, PATCH))
    return clip.reshape(n, h * w // PATCH**2, PATCH_DIM)


def grid_of(size: int, model_config) -> tuple[int, int, int]:
    """Patch grid (t, h, w) of a square image of `size` pixels."""
    return (1, size // model_config.vision.patch_size, size // model_config.vision.patch_size)
