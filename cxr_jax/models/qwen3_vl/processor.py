"""The image processor of Qwen3-VL: Qwen2-VL's arithmetic with other sizes and constants."""

from cxr_jax.models.image_processor import BICUBIC, ImageProcessor

PROCESSOR = ImageProcessor(
    # Published folders name Qwen2-VL's.
    types=("Qwen2VL", "Qwen3VL"),
    processor_class="Qwen3VLProcessor",
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resample=BICUBIC,
    # The class is still Qwen2-VL's, whose limits hold for a file that says none.
    default_limits=(56 * 56, 28 * 28 * 1280),
    published_limits=(65536, 16777216),
    # Under their newer names, as the published files have them.
    writes_size=True,
)
