"""The image processor of Gemma 3: a square of one size whatever the film, which is stretched to it."""

from cxr_jax.models.image_processor import BILINEAR, ImageProcessor

SIDE = 896  # pixels, of the published models; others' is what their table of positions has room for

PROCESSOR = ImageProcessor(
    types=("Gemma3",),
    processor_class="Gemma3Processor",
    patch_size=14,
    merge_size=4,
    temporal_patch_size=1,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resample=BILINEAR,
    default_limits=(SIDE**2, SIDE**2),
    published_limits=(SIDE**2, SIDE**2),
    side=SIDE,
)
