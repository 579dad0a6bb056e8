"""Probabilities in the batch against those of `Model`, which has one image and one completion at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from generating import CFG, FIND, image

import cxr_jax
from cxr_jax.evaluation.reader import Reader, keys_of
from cxr_jax.inference import generation
from cxr_jax.inference import model as inference_model
from cxr_jax.inference.prompts import Prompts
from cxr_jax.inference.requests import Completion

COUNT, LONGEST = 5, 24


@pytest.fixture(scope="module")
def model():
    params = tiny_model.draw_params(CFG)
    params["text"]["embed"]["embedding"] = params["text"]["embed"]["embedding"] * 25
    return inference_model.Model(CFG, params, folder=cxr_jax.asset("phantom"))


def test_probabilities_in_the_batch_are_those_of_one_image_at_a_time(model, monkeypatch):
    images = np.stack([image(number) for number in range(COUNT)])
    grid = (1, *(side // CFG.vision.patch_size for side in images.shape[1:]))
    prompts = Prompts(model.tokenizer, CFG, grid, LONGEST, texts=(FIND,))
    reader = Reader(CFG, model.tokenizer, prompts, 4)
    texts = [FIND] * COUNT
    plain = reader.read(model.params, images, texts)
    weighed = reader.read(model.params, images, texts, weighs=True)
    assert plain.log_odds is None is plain.probabilities and reader.why_no_probabilities() is None
    np.testing.assert_array_equal(plain.tokens, weighed.tokens)
    assert weighed.log_odds.shape == (COUNT, 14) and weighed.exact_mass.shape == (COUNT,)
    differences = []
    for row in range(COUNT):
        ids = weighed.tokens[row][: weighed.lengths[row]].tolist()
        completion = Completion("", ids, [0.0] * len(ids), "length")
        # An untrained model's tree is too wide: which branches survive is drawn, here with the same numbers.
        keys = keys_of(jnp.asarray([ids]), jnp.asarray([len(ids)]))
        monkeypatch.setattr(generation, "sample_keys", lambda *numbers, keys=keys: keys)
        one = model.finding_probabilities(images[row], FIND, [completion])
        alone = np.array(list(one["mean"].values()))
        differences.append(np.abs(weighed.probabilities[row] - alone).max())
        assert weighed.exact_mass[row] == pytest.approx(one["exact_mass"][0], abs=2e-4)
    # A near tie of two branches falls either way with the last bits, which are the processor's: one film, one branch.
    assert sorted(differences)[-2] < 2e-4 and max(differences) < 0.01, differences
    assert np.ptp(weighed.probabilities, axis=0).max() > 0.01

    # What a film's numbers are does not depend on the films beside it, nor on where it stands.
    moved = reader.read(model.params, images[::-1], texts, weighs=True)
    np.testing.assert_allclose(moved.log_odds[::-1], weighed.log_odds, atol=2e-3)

    # Several completions an image: the noise follows from the image's number, whatever the batch.
    rows = np.arange(COUNT)
    drawn = reader.sample(model.params, images, texts, rows, 2)
    assert drawn.answer.shape == drawn.log_odds.shape == (COUNT, 2, 14)
    assert drawn.valid.shape == (COUNT, 2)
    turned = reader.sample(model.params, images[::-1], texts, rows[::-1], 2)
    np.testing.assert_allclose(turned.log_odds[::-1], drawn.log_odds, atol=2e-3)
    np.testing.assert_array_equal(turned.answer[::-1], drawn.answer)
    assert np.abs(drawn.log_odds[:, 0] - drawn.log_odds[:, 1]).max() > 0.01
