"""The image settings of a Qwen2.5-VL folder: what sizes its processor makes."""

from pathlib import Path

from cxr_jax.errors import UserError, shown
from cxr_jax.models.qwen2_5_vl.config import Config

PIXEL_LIMITS = 3136, 12845056  # min_pixels and max_pixels of the published Qwen2.5-VL folders
_DEFAULT_SIZE = {
    "shortest_edge": 56 * 56,
    "longest_edge": 28 * 28 * 1280,
}  # the processor's, for a file without


MOST_PIXELS = 2**28  # some gigabytes of patches: more is a mistake


def pixel_limits(settings: dict, path: Path | None) -> tuple[int, int]:
    """(min_pixels, max_pixels) of `image_settings`, or those of the published folders where there is no file.

    min_pixels and max_pixels go before size. Raises UserError, naming the file, for limits that no image meets.
    """
    if path is None:
        return PIXEL_LIMITS
    size = settings.get("size", _DEFAULT_SIZE)
    if not isinstance(size, dict):
        raise UserError(f"{path}: size is not a JSON object")
    limits = tuple(
        settings.get(a, size.get(b))
        for a, b in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    if (
        not all(type(x) is int and 28 * 28 <= x <= MOST_PIXELS for x in limits)
        or limits[0] > limits[1]
    ):
        low, high = (shown(str(x)) for x in limits)
        raise UserError(
            f"{path}: min_pixels (or size.shortest_edge) is {low} and max_pixels (or size.longest_edge) is "
            f"{high}: they must be whole numbers from 784 to {MOST_PIXELS}, in this order"
        )
    return limits


def preprocessor_config(
    model_config: Config, min_pixels: int = PIXEL_LIMITS[0], max_pixels: int = PIXEL_LIMITS[1]
) -> dict:
    """The image arithmetic of Qwen2-VL (mean and standard deviation are CLIP's)."""
    v = model_config.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": v.patch_size,
        "temporal_patch_size": v.temporal_patch_size,
        "merge_size": v.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
    }
