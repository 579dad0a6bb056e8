"""The tiny model of the tests of generation, and a watch over what it computes."""

import pytest
import tiny_model
from generating import CFG

import cxr_jax
from cxr_jax.inference import model as inference_model
from cxr_jax.inference import sampling


@pytest.fixture(scope="module")
def model():
    params = tiny_model.draw_params(CFG)
    # Larger embeddings: a peaked distribution, so that a wrong key or position changes tokens.
    params["text"]["embed"]["embedding"] = params["text"]["embed"]["embedding"] * 25
    made = inference_model.Model(CFG, params, folder=cxr_jax.asset("phantom"))
    made.rows = 4
    return made


@pytest.fixture
def calls(monkeypatch):
    """What is computed, in order: ("vision", patches), ("prefill", tokens), ("extend", tokens), ("decode", until)."""
    seen = []

    def watch(module, name, label, what):
        inner = getattr(module, name)

        def wrapped(*args, **kw):
            seen.append((label, int(what(*args))))
            return inner(*args, **kw)

        monkeypatch.setattr(module, name, wrapped)

    watch(inference_model, "encode_images", "vision", lambda p, c, pixels, *_: len(pixels))
    watch(sampling, "prefill", "prefill", lambda p, c, prompts: prompts.lengths[0])
    watch(sampling, "extend", "extend", lambda p, c, keys, used, tokens: tokens.lengths[0])
    watch(sampling, "decode", "decode", lambda *args: args[7])
    return seen
