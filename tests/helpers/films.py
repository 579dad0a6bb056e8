"""A picture that passes for a chest film, of any size, drawn in no time."""

import numpy as np
from PIL import Image as PilImage

from cxr_jax.data import image_gate


def draw_film(height, width, seed=0):
    """The mean phantom of the image gate's card, with a little grain: uint8 [height, width]."""
    mean_film = np.array(image_gate.load_card()["mean_film"], np.float32) / 100
    film = PilImage.fromarray(mean_film).resize((width, height), PilImage.Resampling.BICUBIC)
    grain = np.random.default_rng(seed).normal(0, 0.01, (height, width))
    return (np.clip(np.asarray(film) + grain, 0, 1) * 255).round().astype(np.uint8)
