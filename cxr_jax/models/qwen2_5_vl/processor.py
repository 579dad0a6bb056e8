"""The image processor of Qwen2.5-VL, which is Qwen2-VL's."""

from cxr_jax.models.image_processor import BICUBIC, ImageProcessor

PROCESSOR = ImageProcessor(
    # Both classes compute the same; published folders name either.
    types=("Qwen2VL", "Qwen2_5_VL"),
    processor_class="Qwen2_5_VLProcessor",
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    # CLIP's.
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resample=BICUBIC,
    default_limits=(56 * 56, 28 * 28 * 1280),
    published_limits=(3136, 12845056),
)
