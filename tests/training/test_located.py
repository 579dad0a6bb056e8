"""Located findings on grids of tokens that are not the grid of their regions."""

import jax
import numpy as np
import pytest

from cxr_jax.sft import step

locate_loss = jax.jit(step.locate_loss)


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
        assert np.isfinite(locate_loss(head, features, regions, severity))


def test_regions_of_several_images_belong_to_the_tokens_of_each():
    rng = np.random.default_rng(1)
    head = {
        "kernel": np.eye(3, 2, dtype=np.float32) * 4,
        "bias": np.zeros(2, np.float32),
        "pool_scale": np.ones(()),
        "pool_bias": np.zeros(2, np.float32),
    }
    severity = np.zeros((1, 2), np.float32)
    maps = (rng.random((2, 2, 8, 8)) < 0.2).astype(np.float32)  # image, finding
    regions = np.concatenate(list(maps), axis=1)[None]
    # A token's first two numbers say what lies under it: right where images keep their order.
    for side in (8, 16):
        wide = maps.repeat(side // 8, 2).repeat(side // 8, 3)
        said = (2 * wide - 1).reshape(2, 2, side * side).transpose(0, 2, 1)
        said = np.concatenate([said, np.zeros_like(said[..., :1])], -1)
        right, wrong = said.reshape(1, -1, 3), said[::-1].reshape(1, -1, 3)
        losses = [locate_loss(head, each, regions, severity) for each in (right, wrong)]
        assert losses[0] + 0.3 < losses[1]
