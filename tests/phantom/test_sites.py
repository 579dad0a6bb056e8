"""Random sites around a hospital: what they change, what they leave alone, and that no sites is as it was."""

import hashlib

import jax
import numpy as np
import pytest
from compile_counts import compiled

from cxr_jax import phantom
from cxr_jax.data.sources import phantom as sources_phantom
from cxr_jax.errors import UserError
from cxr_jax.labels import answers
from cxr_jax.phantom import scene, sites
from cxr_jax.phantom.constants import PATHOLOGIES, SIZE, Acquisition
from cxr_jax.phantom.render import _soften

INDICES = np.arange(
    8
)  # the batch size of test_phantom.py, whose program of hospital A is this one's
_scenes = jax.jit(jax.vmap(lambda key, site: scene._sample_one(key, "A", site)))
_draw = jax.jit(jax.vmap(sites.draw))


def _source(n, seed=1):
    return sources_phantom.PhantomSource("A", "train", seed, 0.75, sites=n)


@pytest.fixture(scope="module")
def batches():
    return {n: _source(n).batch(INDICES) for n in (0, 4, 8)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_without_sites_all_is_as_it_was_before_there_were_any(batches):
    batch = batches[0]
    assert "sharpness" not in batch["scene"]
    texts = "\n".join(_source(0).targets(batch, INDICES))
    assert (_digest(batch["labels"].tobytes()), _digest(texts.encode())) == (
        "6adeeaf6086e2742",
        "b2e1ee5b91b5f0b9",
    )
    means = [0.426096, 0.451533, 0.385841, 0.526251, 0.42869, 0.498112, 0.496646, 0.434672]
    np.testing.assert_allclose(batch["image"].mean((1, 2)), means, atol=1e-5)


def test_a_site_is_a_function_of_seed_and_number_alone(batches):
    four, eight = batches[4], batches[8]
    for name in ("image", "labels", "regions"):  # examples 0 to 3 come from sites 0 to 3 in both
        np.testing.assert_allclose(four[name][:4], eight[name][:4], atol=1e-6)
    for name in ("contrast", "present"):
        drawn = [np.asarray(_draw(phantom.site_keys(seed, INDICES))[name]) for seed in (1, 1, 2)]
        assert np.array_equal(drawn[0], drawn[1]) and not np.isclose(drawn[0], drawn[2]).any()
        assert len(np.unique(drawn[0])) == drawn[0].size
    assert (
        list(_source(4).sites_of([0, 3, 4, 9])) == [0, 3, 0, 1] and _source(0).sites_of([3]) is None
    )


def test_sites_share_one_program(batches):
    with compiled() as names:
        _source(64, 9).batch([63])
    assert "_batch" not in names


def test_labels_sides_regions_and_texts_are_those_of_the_picture(batches):
    batch, exact = batches[8], sources_phantom.PhantomSource("A", "train", 1, sites=8)
    assert np.array_equal(batch["labels"], phantom.labels(batch["scene"]))
    assert np.array_equal(batch["sides"], phantom.sides(batch["scene"]))
    assert np.array_equal(exact.solutions(INDICES), batch["solution"])
    severity = batch["scene"]["severity"]
    assert np.array_equal(batch["regions"].max((2, 3)) > 0, severity > 0)
    said = np.asarray(answers.parse_texts(exact.targets(batch, INDICES))["answer"])
    assert np.array_equal(said, batch["solution"])


def test_pictures_are_other_than_the_hospitals_and_sharpness_is_seen(batches):
    assert (np.abs(batches[8]["image"] - batches[0]["image"]).mean((1, 2)) > 0.02).all()
    assert np.isfinite(batches[8]["image"]).all() and batches[8]["image"].std((1, 2)).min() > 0.1
    step = np.tile(np.where(np.arange(SIZE) < 100, 0.2, 0.8), (SIZE, 1)).astype(np.float32)
    soft = np.asarray(jax.jit(_soften)(step))
    np.testing.assert_allclose(soft.sum(), step.sum(), rtol=1e-5)
    np.testing.assert_allclose(soft[7, 98:103], [0.2375, 0.3875, 0.6125, 0.7625, 0.8], atol=1e-6)


@pytest.fixture(scope="module")
def many():
    """4,096 patients of hospital A: at home (a site that changes nothing), and each 64 at one of 64 sites."""
    keys = phantom.example_keys(3, "train", "A", np.arange(4096))
    drawn = jax.tree.map(np.asarray, _draw(phantom.site_keys(3, np.arange(4096) % 64)))
    nothing = {
        k: np.zeros_like(v) if k == "sharpness" else np.ones_like(v) for k, v in drawn.items()
    }
    numpy = lambda tree: jax.tree.map(np.asarray, tree)
    home = numpy(jax.jit(phantom.sample_scenes, static_argnums=1)(keys, "A"))
    return home, numpy(_scenes(keys, nothing)), numpy(_scenes(keys, drawn)), drawn


def test_a_site_that_changes_nothing_is_the_hospital(many):
    home, same, _, _ = many
    assert set(same) == {*home, "sharpness"}
    for name, value in home.items():
        np.testing.assert_allclose(same[name], value, atol=2e-6, err_msg=name)


def test_what_sites_vary_lies_around_the_hospital(many):
    home, _, away, drawn = many
    acq = lambda scenes, i: scenes["acq"][:, i]
    of_site = lambda values: values.reshape(64, 64, *values.shape[1:]).mean(
        0
    )  # example i comes from site i mod 64
    for i in (Acquisition.CONTRAST, Acquisition.NOISE, Acquisition.MAGNIFICATION):
        between = of_site(acq(away, i)).std()
        assert between > 2.5 * of_site(acq(home, i)).std(), i
        assert abs(acq(away, i).mean() / acq(home, i).mean() - 1) < 0.15, i
    unchanged = [
        Acquisition.AP,
        Acquisition.LOW_INSPIRATION,
        Acquisition.SCATTER,
        Acquisition.VEIL,
        Acquisition.WINDOW,
    ]
    assert np.array_equal(away["acq"][:, unchanged], home["acq"][:, unchanged])
    present = lambda scenes: scenes["severity"][:, :PATHOLOGIES] > 0
    for rate in (
        present,
        lambda scenes: scenes["device"],
        lambda scenes: scenes["quality"][:, 1:2] == 1,
    ):
        assert of_site(rate(away)).std(0).mean() > 1.2 * of_site(rate(home)).std(0).mean()
        assert np.abs(rate(away).mean(0) / rate(home).mean(0) - 1).max() < 0.3
    np.testing.assert_array_equal(away["sharpness"], drawn["sharpness"])


def test_films_are_straight_or_rotated_and_the_report_knows(many):
    away = many[2]
    angle = np.abs(away["acq"][:, Acquisition.ROTATION])
    assert not ((angle > 2.05) & (angle < 2.51)).any() and angle.max() > 5
    np.testing.assert_array_equal(away["quality"][:, 1], angle > 2.5)


def test_odds():
    assert (
        sites.with_odds(0.5, 3.0) == 0.75
        and sites.with_odds(0.0, 3.0) == 0
        and sites.with_odds(1.0, 0.2) == 1
    )


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match=r"config\.data\.sites=-1 must be"):
        _source(-1)
