"""Gemma 3's image processor: the pixels of transformers' own, settings that are refused, and what an export writes."""

import gemma_tokenizer
import numpy as np
import pytest
from PIL import Image

from cxr_jax.errors import UserError
from cxr_jax.models.gemma3.config import GEMMA_PHANTOM, MEDGEMMA_4B
from cxr_jax.models.registry import processor_of
from cxr_jax.weights import hf_folder


def in_raster_order(patches, side, merge, patch, colours=3):
    """Patches of merge blocks -> float32 [colours, H, W]."""
    blocks = patches.reshape(
        side // merge, side // merge, merge, merge, colours, patch, patch
    ).transpose(4, 0, 2, 5, 1, 3, 6)
    return blocks.reshape(colours, side * patch, side * patch)


@pytest.mark.parametrize("model_config", [MEDGEMMA_4B, GEMMA_PHANTOM], ids=["896", "224"])
@pytest.mark.parametrize("shape", [(90, 130), (300, 211), (896, 896), (1200, 40)])
def test_pixels_are_those_of_transformers(model_config, shape):
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    ours = processor_of(model_config)
    film = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    patches, grid = ours.prepare(film / np.float32(255))
    side = ours.side // 14
    assert grid == (1, side, side)
    assert ours.image_tokens(grid) == (256 if side == 64 else 64)
    settings = ours.settings(*ours.published_limits)
    theirs = Gemma3ImageProcessorPil(**settings)
    want = theirs([Image.fromarray(film).convert("RGB")])["pixel_values"][0]
    assert np.array_equal(in_raster_order(patches, side, ours.merge_size, 14), want)


def settings_of(folder):
    return hf_folder.image_settings(folder)


def test_published_settings_are_accepted():
    ours = processor_of(GEMMA_PHANTOM)
    settings, path = settings_of(gemma_tokenizer.folder())
    ours.check_settings(settings, path)
    assert ours.pixel_limits(settings, path) == (224**2, 224**2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do_pan_and_scan": True}, "do_pan_and_scan is True"),
        ({"resample": 3}, "resample is 3"),
        ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean is"),
        ({"image_processor_type": "SiglipImageProcessor"}, "images are prepared as Gemma3's only"),
        ({"size": {"height": 896, "width": 896}}, "size is"),
    ],
)
def test_other_settings_are_refused(change, message):
    ours = processor_of(GEMMA_PHANTOM)
    settings, path = settings_of(gemma_tokenizer.folder())
    settings |= change
    with pytest.raises(UserError, match=message) as refusal:
        ours.check_settings(settings, path)
        ours.pixel_limits(settings, path)
    assert "\n" not in str(refusal.value)
