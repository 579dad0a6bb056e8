"""Located findings on grids of tokens that are not the grid of their regions."""

import jax
import numpy as np
import pytest

from cxr_jax.sft import step


@pytest.mark.parametrize("side", [1, 3, 7, 8, 11, 16])
def test_regions_are_resampled_by_area(side):
    regions = np.random.default_rng(side).random((2, 3, 8, 8), np.float32)
    # Cells small enough to lie in one cell of both grids.
    fine = np.kron(regions, np.ones((side, side), np.float32))
    want = fine.reshape(2, 3, side, 8, side, 8).mean((3, 5))
    np.testing.assert_allclose(step._resampled(regions, side), want, atol=1e-6)


def test_the_loss_of_the_grid_of_the_regions_is_that_of_before():
    rng = np.random.default_rng(0)
    regions = rng.random((2, 3, 8, 8), np.float32)
    assert step._resampled(regions, 8) is regions
    head = step.init_locate_head(jax.random.key(0), 5, 3)
    severity = rng.random((2, 3), np.float32)
    for tokens in (64, 49):
        features = rng.standard_normal((2, tokens, 5), np.float32)
        assert np.isfinite(step.locate_loss(head, features, regions, severity))
