"""The image settings of a Qwen2.5-VL folder: what sizes its processor makes."""

from pathlib import Path
from typing import Any, TypeGuard

from cxr_jax.errors import UserError, shown
from cxr_jax.models.network.config import Config
from cxr_jax.models.qwen2_5_vl import patches

PIXEL_LIMITS = 3136, 12845056  # min_pixels and max_pixels of the published Qwen2.5-VL folders
MOST_PIXELS = 2**28  # some gigabytes of patches: more is a mistake
# The processor's, for a file without.
_DEFAULT_SIZE = {"shortest_edge": patches.MIN_PIXELS, "longest_edge": patches.MAX_PIXELS}


def pixel_limits(settings: dict[str, Any], path: Path | None) -> tuple[int, int]:
    """Find (min_pixels, max_pixels) of image settings; min_pixels and max_pixels go before size.

    Args:
        settings: as from `hf_folder.image_settings`.
        path: their file; None, where there is none: the limits of the published folders.

    Raises:
        UserError: which names the file, for limits that no image meets.
    """
    # No file at all: nobody has said otherwise, so the published limits hold.
    if path is None:
        return PIXEL_LIMITS
    size = settings.get("size", _DEFAULT_SIZE)
    if not isinstance(size, dict):
        raise UserError(f"{path}: size is not a JSON object")
    # The older keys go first, as in the processor.
    low = settings.get("min_pixels", size.get("shortest_edge"))
    high = settings.get("max_pixels", size.get("longest_edge"))
    if not (_is_limit(low) and _is_limit(high)) or low > high:
        raise UserError(
            f"{path}: min_pixels (or size.shortest_edge) is {shown(str(low))} and max_pixels (or size.longest_edge) is "
            f"{shown(str(high))}: they must be whole numbers from 784 to {MOST_PIXELS}, in this order"
        )
    return low, high


def _is_limit(value: object) -> TypeGuard[int]:
    """At least one merged patch; `type`, because a bool is an int."""
    return type(value) is int and 28 * 28 <= value <= MOST_PIXELS


def preprocessor_config(
    model_config: Config, min_pixels: int = PIXEL_LIMITS[0], max_pixels: int = PIXEL_LIMITS[1]
) -> dict[str, Any]:
    """Write down the image arithmetic of Qwen2-VL, as preprocessor_config.json has it."""
    vision = model_config.vision
    return {
        # The names that transformers looks its classes up by.
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        # Mean and standard deviation are CLIP's, in the digits of the published files.
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        # Bytes to 0..1; 3 is PIL's number for bicubic.
        "rescale_factor": 1 / 255,
        "resample": 3,
    }
