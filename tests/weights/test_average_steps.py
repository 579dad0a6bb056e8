"""The mean of a run's best step and its last, and its way into the package."""

import jax
import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.weights import hf_folder, pretrained
from scripts import average_steps, embed_model


@pytest.fixture
def run(tmp_path):
    """A finished run whose last weights are zeros and ones, and its best ones."""
    last = jax.tree.map(np.array, pretrained.untrained_params(PHANTOM, 0))
    best = jax.tree.map(lambda leaf: leaf + np.float32(1), last)
    hf_folder.save(
        tmp_path / "hf",
        PHANTOM,
        last,
        dtype=np.float32,
        pixel_limits=(224**2, 224**2),
        tokenizer=pretrained.PHANTOM,
    )
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save_best(3, {"model": best, "locate": {"bias": np.zeros(2)}}, {"score": 0.5})
    checkpoints.close()
    return tmp_path, last


def test_the_mean_lies_half_way_and_is_embedded_as_any_folder(run, tmp_path):
    folder, last = run
    average_steps.average(str(folder), str(tmp_path / "mean"))
    _, params = hf_folder.load(tmp_path / "mean", np.float32)
    for mean, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(mean, leaf + 0.5, rtol=1e-6)
    assert hf_folder.image_settings(tmp_path / "mean")[0]["max_pixels"] == 224**2
    (tmp_path / "package").mkdir()
    embed_model.embed(str(tmp_path / "mean"), str(tmp_path / "package"))
    _, embedded = hf_folder.load(tmp_path / "package", np.float32)
    for half, leaf in zip(jax.tree.leaves(embedded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(half, np.float32(np.float16(leaf)))


def test_parts_that_were_frozen_stay(tmp_path, run):
    folder, last = run
    best = jax.tree.map(lambda leaf: leaf + np.float32(1), last)
    checkpoints = Checkpoints(str(folder))
    checkpoints.save_best(4, {"model": {"text": best["text"]}}, {"score": 0.6})
    checkpoints.close()
    average_steps.average(str(folder), str(tmp_path / "mean"))
    _, params = hf_folder.load(tmp_path / "mean", np.float32)
    jax.tree.map(np.testing.assert_array_equal, params["vision"], last["vision"])
    mean, leaf = (tree["text"]["final"]["norm"]["scale"] for tree in (params, last))
    np.testing.assert_allclose(mean, leaf + 0.5, rtol=1e-6)


def test_what_is_no_run_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(UserError, match="no finished run"):
        average_steps.average(str(tmp_path / "hf"), str(tmp_path / "mean"))
    (folder / "adapter").mkdir()
    with pytest.raises(UserError, match="adapters"):
        average_steps.average(str(folder), str(tmp_path / "mean"))
    with pytest.raises(UserError, match="neither"):
        embed_model.embed(str(tmp_path / "nothing"), str(tmp_path / "package"))
