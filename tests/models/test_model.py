"""The model equals transformers on tiny random configs: positions, image features, logits, greedy tokens."""

import golden_cases
import numpy as np
import pytest

from cxr_jax.inference import model as inference_model
from cxr_jax.inference import sampling
from cxr_jax.models import network
from cxr_jax.weights import hf_folder

BAR = 1e-4  # of the standard deviation of the logits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = golden_cases.write_folder(tmp_path_factory.mktemp(name), name)
            made[name] = inference_model.Model(*hf_folder.load(folder))
        return made[name]

    return get


def images_of(c):
    return (c["pixels"], c["grids"]) if len(c["grids"]) else (None, None)


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_positions(model, name):
    c = golden_cases.case(name)
    got = network.positions(model(name).config, c["input_ids"], c["grids"], c["attention_mask"])
    if "positions" in c:
        np.testing.assert_array_equal(got, c["positions"])
    else:  # text only: plain counting
        want = np.where(c["attention_mask"], np.arange(c["input_ids"].shape[1]), 0)
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


@pytest.mark.parametrize("name", [n for n in golden_cases.NAMES if n != "text"])
def test_image_features(model, name):
    c = golden_cases.case(name)
    got = np.concatenate([seen.tokens for seen in model(name).image_features(*images_of(c))])
    assert np.abs(got - c["features"]).max() <= BAR * c["features"].std()


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_logits(model, name):
    c = golden_cases.case(name)
    got = model(name).logits(c["input_ids"], *images_of(c), attention_mask=c["attention_mask"])
    keep = c["attention_mask"].astype(bool)
    assert got.dtype == np.float32
    assert np.abs(got - c["logits"])[keep].max() <= BAR * c["logits"][keep].std()


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_greedy_tokens(model, name):
    c, m = golden_cases.case(name), model(name)
    mask = c["attention_mask"].astype(bool)
    features = m.image_features(*images_of(c)) if len(c["grids"]) else []
    out = sampling.generate(
        m.params,
        m.config,
        sampling.PromptBatch(
            c["input_ids"],
            mask.sum(1),
            network.positions(m.config, c["input_ids"], c["grids"], mask),
            m._place(c["input_ids"], features),
        ),
        sampling.SamplingSettings(n=2, max_new_tokens=c["tokens"].shape[1], temperature=0),
    )
    got = np.where(np.arange(out["tokens"].shape[1]) < out["lengths"][:, None], out["tokens"], -1)
    np.testing.assert_array_equal(got, np.repeat(c["tokens"], 2, 0))
