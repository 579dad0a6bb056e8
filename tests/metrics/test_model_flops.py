"""What a token asks of a model, against the matrix products that JAX traces; and peaks by kinds of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_model

from cxr_jax.metrics.model_flops import PEAKS, ModelFlops, Tokens, peak_of
from cxr_jax.models import network
from cxr_jax.planning import costs

CONFIG = tiny_model.config(vision={"depth": 2, "fullatt_block_indexes": (0, 1)})
GRID, PATCHES = (1, 4, 4), 16


def shapes(model_config):
    return jax.eval_shape(lambda: network.init_params(model_config, None))


def of_decoder(model_config, params):
    """Products of one token through decoder and head; with their gradient. Scores of one key are taken off."""
    ids, positions = jnp.full((1, 1), 9), jnp.zeros((3, 1, 1), jnp.int32)

    def logits(params):
        hidden = network.hidden_states(params, model_config, ids, ids > 0, positions)
        return network.unembed(params, model_config, hidden).sum()

    text = model_config.text
    scores = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    forward, both = costs.flops(logits, params), costs.flops(jax.grad(logits), params)
    return forward - scores, both - 3 * scores


def of_tower(model_config, params):
    """Products of the image tokens of one grid, likewise."""
    vision = model_config.vision
    pixels = jnp.zeros((1, PATCHES, vision.patch_dim))

    def encode(params):
        return network.vision(params, model_config, pixels, GRID).tokens.sum()

    scores = 4 * vision.depth * vision.hidden_size * PATCHES**2
    forward, both = costs.flops(encode, params), costs.flops(jax.grad(encode), params)
    return forward - scores, both - 3 * scores


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_token_asks_what_is_traced(is_tied):
    model_config = dataclasses.replace(CONFIG, tie_word_embeddings=is_tied)
    params = shapes(model_config)
    counted = ModelFlops.of(params, {"model": params}, model_config.vision.merge_unit)
    forward, both = of_decoder(model_config, params)
    one = Tokens(decoder=1, head=1, image=0)
    assert (counted.of_forward(one), counted.of_update(one)) == (forward, both)
    if not is_tied:
        return  # the same tower
    forward, both = of_tower(model_config, params)
    image = Tokens(decoder=0, head=0, image=PATCHES // model_config.vision.merge_unit)
    assert (counted.of_forward(image), counted.of_update(image)) == (forward, both)


def test_what_does_not_train_has_no_gradient_of_its_own():
    params = shapes(CONFIG)
    whole = ModelFlops.of(params, {"model": params}, 4)
    decoder = ModelFlops.of(params, {"model": {"text": params["text"]}}, 4)
    adapters = ModelFlops.of(params, {"lora": {"text": {"layers": {"attn": {"q": 0}}}}}, 4)
    of_all = ModelFlops.of(params, {"lora": {"vision": {"merger": {"fc1": 0}}}}, 4)
    assert whole.forward == decoder.forward == adapters.forward == of_all.forward
    assert whole.backward == Tokens(*(2 * each for each in whole.forward))
    assert decoder.backward == whole.backward._replace(image=0)
    # Gradients go through frozen kernels, and none is formed of them.
    assert adapters.backward == whole.forward._replace(image=0)
    assert of_all.backward == whole.forward


def test_a_share_is_of_devices_that_are_known():
    assert peak_of("cpu", 1) is None and peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1) is None
    assert peak_of("NVIDIA H200", 8) == 8 * PEAKS["NVIDIA H200"]
