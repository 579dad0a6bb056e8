"""Pixels to vision patches: the arithmetic of the Qwen2-VL image processor (PIL backend), without torch.

Written out here, and not called from `transformers`, because the import alone costs seconds and because
training needs the same arithmetic inside jit. `tests/data/test_images.py` holds it equal to
`Qwen2VLImageProcessorPil`.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from jax.typing import ArrayLike
from PIL import Image as PilImage

from cxr_jax.errors import UserError
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import Array

PATCH, MERGE, TEMPORAL, CHANNELS = 14, 2, 2, 3
FACTOR = PATCH * MERGE  # both sides of a resized image are multiples of this
PATCH_DIM = CHANNELS * TEMPORAL * PATCH * PATCH  # 1176
# The processor's own limit on the ratio of the sides.
MAX_ASPECT = 200
# The processor's own defaults; a checkpoint's config replaces them.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280

# CLIP's normalisation constants, one a colour channel.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# ---- Settings of a folder ----------------------------------------------------------------------------------

# Settings of a processor whose arithmetic is the one below.
_FIXED: dict[str, Any] = {
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
# Both classes compute the same; published folders name either.
_TYPES = ("Qwen2VL", "Qwen2_5_VL")


def check_settings(settings: dict[str, Any], path: Path | None) -> None:
    """Refuse a folder's image settings if they ask for other arithmetic than `prepare` does.

    Args:
        settings: of the image processor, without null values (`hf_folder.image_settings`); only keys that are there
            count.
        path: their file.

    Raises:
        UserError: which names the file and the setting.
    """
    # A file without a type is taken for the usual one.
    processor_type = str(settings.get("image_processor_type", _TYPES[0]))
    if not processor_type.startswith(_TYPES):
        raise UserError(
            f"{path}: image_processor_type is {processor_type[:60]!r}: images are prepared as Qwen2-VL's only"
        )
    # What is absent has the processor's default, which is what is computed here.
    for setting, wanted in _FIXED.items():
        if setting in settings and not _is_same(settings[setting], wanted):
            given = " ".join(str(settings[setting]).split())[:80]
            needed = wanted
            if np.ndim(wanted):
                needed = [round(float(value), 8) for value in wanted]
            raise UserError(f"{path}: {setting} is {given}: images are prepared with {needed} only")


def _is_same(value: Any, wanted: Any) -> bool:
    # Settings may be numbers, lists or switches: one comparison for all of them.
    try:
        value = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return value.shape == np.shape(wanted) and np.allclose(value, wanted, rtol=1e-6, atol=0)


# ---- Sizes -------------------------------------------------------------------------------------------------


def smart_resize(
    height: int,
    width: int,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = FACTOR,
) -> tuple[int, int]:
    """Find the size (h, w), multiples of `factor`, nearest to height x width with min_pixels <= h * w <= max_pixels.

    Source: the Qwen2-VL image processor in transformers.

    Raises:
        UserError: for an aspect ratio above 200.
    """
    check_aspect(height, width)
    sides = height, width
    # Python's round, half to even, as the processor's.
    resized = [round(side / factor) * factor for side in sides]
    # Too large: both sides shrink by one factor, rounded down so that the limit holds.
    if math.prod(resized) > max_pixels:
        reduction = math.sqrt(height * width / max_pixels)
        resized = [max(factor, math.floor(side / reduction / factor) * factor) for side in sides]
    # Too small: rounded up, for the same reason.
    elif math.prod(resized) < min_pixels:
        enlargement = math.sqrt(min_pixels / (height * width))
        resized = [math.ceil(side * enlargement / factor) * factor for side in sides]
    return resized[0], resized[1]


def check_aspect(height: int, width: int) -> None:
    """Refuse a picture that is far too long or high. Raises UserError."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"the picture is {width} x {height}: its aspect ratio is above {MAX_ASPECT}"
        )


def grid_of(size: int, model_config: Config) -> tuple[int, int, int]:
    """Compute the patch grid (t, h, w) of a square image of `size` pixels."""
    side = size // model_config.vision.patch_size
    return (1, side, side)


# ---- Pixels ------------------------------------------------------------------------------------------------


def quantise(pixels: ArrayLike) -> np.ndarray:
    """Round gray [..., H, W] in 0..1 to uint8: the one place where a picture loses its depth."""
    # Clipped first: a resize may have overshot, and bytes would wrap around.
    levels = np.clip(np.asarray(pixels, np.float32), 0, 1) * np.float32(255)
    return np.rint(levels).astype(np.uint8)


def prepare(
    pixels: ArrayLike, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Turn one gray image float32 [H, W] in 0..1 into patches as the Hugging Face processor does for 8 bit.

    Returns:
        (patches float32 [P, 1176], grid (1, h, w)), P = h * w.

    Raises:
        UserError: for an aspect ratio above 200.
    """
    image = quantise(pixels)
    height, width = smart_resize(*cast(tuple[int, int], image.shape), min_pixels, max_pixels)
    if (height, width) != image.shape:
        # The three channels are equal, so one gray resize gives what the processor's RGB resize gives.
        resized = PilImage.fromarray(image).resize((width, height), PilImage.Resampling.BICUBIC)
        image = np.asarray(resized)
    # In float32 from here on, level / 255, as the PIL backend.
    patches = _patches(image[None].astype(np.float32) / np.float32(255), np)[0]
    return patches, (1, height // PATCH, width // PATCH)


def patchify(pixels: Array, xp: Any = None) -> Any:
    """Turn gray [N, H, W] in 0..1, H and W multiples of 28, into patches float32 [N, P, 1176]. Works inside jit.

    Rounds to 8 bit first, so that training on an array equals reading the same picture from an 8-bit PNG.

    Args:
        xp: numpy or jax.numpy (the default).

    Raises:
        UserError: if a side is not a multiple of 28.
    """
    if xp is None:
        import jax.numpy as xp
    _, height, width = pixels.shape
    if height % FACTOR or width % FACTOR:
        raise UserError(
            f"patchify needs sides that are multiples of {FACTOR}, got {height} x {width}"
        )
    # Half to even, like numpy's rint.
    levels = xp.round(xp.clip(xp.asarray(pixels, xp.float32), 0, 1) * 255)
    return _patches(levels / 255, xp)


def _patches(gray: Any, xp: ModuleType) -> Any:
    """[N, H, W] float32 in 0..1 -> [N, P, 1176], patches grouped 2 x 2 as the merger wants them."""
    count, height, width = gray.shape
    # Cut both sides into merged blocks, those into patches, and those into pixels.
    cells = gray.reshape(count, height // FACTOR, MERGE, PATCH, width // FACTOR, MERGE, PATCH)
    cells = cells.transpose(0, 1, 4, 2, 5, 3, 6)  # [N, rows/2, columns/2, 2, 2, 14, 14]
    # An axis for the channels.
    cells = cells[:, :, :, :, :, None]
    a_channel = (CHANNELS, 1, 1)
    colour = (cells - xp.asarray(MEAN).reshape(a_channel)) / xp.asarray(STD).reshape(a_channel)
    # A still image is a clip of two equal frames; inside a patch the order is channel, frame, row, column.
    clip = xp.broadcast_to(colour[..., None, :, :], (*colour.shape[:6], TEMPORAL, PATCH, PATCH))
    return clip.reshape(count, height * width // PATCH**2, PATCH_DIM)
