"""A folder of small pictures."""

import numpy as np
import pytest
from PIL import Image as PilImage


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in [("a.png", (80, 60)), ("b.png", (64, 64)), ("sub/c.png", (50, 90))]:
        PilImage.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder / name)
    return folder
