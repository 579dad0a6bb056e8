"""Attention by blocks of queries is plain attention: values, gradients, masks, meshes; and its memory is small."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from places import ROOT

from cxr_jax.inference import model as inference_model
from cxr_jax.models import attention as attentions
from cxr_jax.models import network
from cxr_jax.models.network import decoder, tower, tower_layers
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, QWEN2_5_VL_3B
from cxr_jax.weights import hf_folder

FILM = (1, 182, 218)  # patches of a film of 2,544 x 3,056 pixels at the published settings
FILM_PATCHES = 182 * 218


@pytest.fixture
def blocks(monkeypatch):
    """A switch: from now on queries go in blocks of 8, whatever their number."""

    def switch():
        monkeypatch.setattr(attentions, "ALL_AT_ONCE_UP_TO", 1)
        monkeypatch.setattr(attentions, "SCORES_AT_ONCE", 1)
        monkeypatch.setattr(attentions, "LEAST_BLOCK", 8)

    return switch


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_gradients(function, *arrays):
    """The function's value, and gradients of a weighted sum of it, from a program of its own."""

    def loss(*arrays):
        value = function(*arrays)
        weights = normal(*value.shape, seed=9)
        return (value.astype(jnp.float32) * weights).sum(), value

    (_, value), gradients = jax.jit(
        lambda *arrays: jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays)
    )(*arrays)
    return value, *gradients


def assert_equal(got, want, tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def segments(T, S):
    """The bias of packed images: a query sees the keys of its own image only."""
    query_image, key_image = (np.arange(count) * 3 // count for count in (T, S))
    return attentions.key_bias(query_image[:, None] == key_image)


BIASES = {
    "none": lambda B, T, S: None,
    "padding": lambda B, T, S: attentions.key_bias(
        np.arange(S) < np.arange(S - B + 1, S + 1)[:, None]
    )[:, None, None, None],
    "packed": lambda B, T, S: segments(T, S),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    "B,T,S,H,K,dtype",
    [
        (1, 8, 8, 2, 2, "float32"),
        (2, 29, 29, 4, 2, "float32"),
        (3, 17, 40, 6, 3, "float32"),
        (2, 33, 33, 4, 1, "bfloat16"),
    ],
)
def test_blocks_of_queries_are_plain_attention(blocks, bias, B, T, S, H, K, dtype):
    queries = normal(B, T, H, 4, seed=1, dtype=dtype)
    keys, values = (normal(B, S, K, 4, seed=seed, dtype=dtype) for seed in (2, 3))
    made = BIASES[bias](B, T, S)

    def attend(queries, keys, values):
        return attentions.attention(queries, keys, values, made)

    want = value_and_gradients(attend, queries, keys, values)
    blocks()
    got = value_and_gradients(attend, queries, keys, values)
    assert_equal(got, want, 1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("T", [7, 8, 30])
def test_causal_blocks_are_the_causal_mask(blocks, T):
    lengths = np.array([T, T // 2])
    arrays = [normal(2, T, heads, 4, seed=heads) for heads in (4, 2, 2)]

    def attend(queries, keys, values):
        output = attentions.causal_attention(np.arange(T) < lengths[:, None])(queries, keys, values)
        return jnp.where((np.arange(T) < lengths[:, None])[..., None, None], output, 0)

    want = value_and_gradients(attend, *arrays)
    blocks()
    assert_equal(value_and_gradients(attend, *arrays), want, 1e-5)


def test_blocks_of_a_group_are_its_attention_over_two_parts(blocks):
    """Completions of 19 tokens over prompts of 23: `forward_group` and `extend` of a long prompt."""
    queries = normal(6, 19, 4, 4, seed=1)
    parts = [normal(2, 2, 23, 4, seed=seed) for seed in (2, 3)]
    own = [normal(6, 2, 19, 4, seed=seed) for seed in (4, 5)]
    first_bias = attentions.key_bias(np.arange(23) < np.array([[23], [11]]))
    own_bias = attentions.key_bias(np.tri(19, dtype=bool))

    def attend(queries, *keys):
        bias = first_bias[:, None, None, None, None]
        return attentions.two_part_attention(queries, keys[:2], keys[2:], bias, own_bias)

    want = value_and_gradients(attend, queries, *parts, *own)
    blocks()
    assert_equal(value_and_gradients(attend, queries, *parts, *own), want, 1e-5)


def test_usual_sizes_go_at_once():
    """Published recipes: 476 px (1,156 patches), sequences of 2,116 tokens; a decode step is one query."""
    for rows, queries, keys in ((16 * 64, 1156, 1156), (16 * 64, 2116, 2116), (16, 4096, 4096)):
        assert attentions.query_block(rows, queries, keys) == queries
    assert attentions.query_block(16 * 16, 1, 12288) == 1
    # Beyond, whole multiples of the least block, in the memory that is said.
    for rows, keys in ((16, 4097), (16, 12288), (28, 20000), (1, 10**5)):
        block = attentions.query_block(rows, keys, keys)
        assert 0 < block < keys and block % attentions.LEAST_BLOCK == 0
        assert -(-keys // block) * block < 1.06 * keys  # what filling up costs
        assert block == attentions.LEAST_BLOCK or rows * block * keys <= attentions.SCORES_AT_ONCE


def test_blocks_have_the_logits_of_transformers(blocks, tmp_path, monkeypatch):
    """Two images a row, windows and full attention, prefix and cache: the golden case, computed by blocks."""
    case = golden_cases.case("ragged")
    folder = golden_cases.write_folder(tmp_path, "ragged")
    model = inference_model.Model(*hf_folder.load(folder))
    blocks()
    chosen, choose = [], attentions.query_block
    monkeypatch.setattr(
        attentions, "query_block", lambda *sizes: chosen.append(choose(*sizes)) or chosen[-1]
    )
    programs = inference_model.encode_images, inference_model._logits
    try:
        for program in programs:
            program.clear_cache()
        got = model.logits(
            case["input_ids"], case["pixels"], case["grids"], attention_mask=case["attention_mask"]
        )
    finally:
        for program in programs:
            program.clear_cache()
    assert 8 in chosen
    keep = case["attention_mask"].astype(bool)
    assert np.abs(got - case["logits"])[keep].max() <= 1e-4 * case["logits"][keep].std()


def test_the_tower_of_a_large_film_trains_as_that_of_a_small_one(blocks, monkeypatch):
    """Blocks of queries, and layers in scans: the features and every gradient of two films, rematerialised or not."""
    config = dataclasses.replace(
        PHANTOM.vision, depth=3, hidden_size=32, intermediate_size=48, fullatt_block_indexes=(2,)
    )
    params = jax.jit(lambda key: tower_layers.init_params(config, key))(jax.random.key(0))
    films = normal(2, 4 * 8, 1176)

    def trained(remat):
        def loss(params):
            features = tower.forward(params, config, films, (1, 4, 8), remat=remat).tokens
            return (features * normal(*features.shape, seed=4)).sum(), features

        (_, features), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return features, gradients

    want = trained("none")
    blocks()
    monkeypatch.setattr(tower, "ALL_AT_ONCE_UP_TO", 1)
    assert_equal(trained("full"), want, 2e-5)


# --- memory: the largest array of a program, from shapes alone


def largest_array(function, *arguments):
    """Elements of the largest array that any step of the program makes, in loops as well."""

    def largest(jaxpr):
        sizes = [0]
        for equation in jaxpr.eqns:
            sizes += [math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars]
            sizes += [largest(inner) for inner in jaxprs_in_params(equation.params)]
        return max(sizes)

    return largest(jax.make_jaxpr(function)(*arguments).jaxpr)


def shapes_of(model_config):
    return jax.eval_shape(functools.partial(network.init_params, model_config, jax.random.key(0)))


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("model_config", [QWEN2_5_VL_3B, PHANTOM], ids=["3b", "phantom"])
def test_a_full_size_film_makes_no_array_of_scores(model_config, train):
    """Scores of 39,676 patches would be 25 billion numbers in the 3B; the largest array is now smaller."""
    params = shapes_of(model_config)

    def features(params, pixels):
        remat = "full" if train else "none"
        return network.vision(params, model_config, pixels, FILM, remat=remat).tokens

    def gradient(params, pixels):
        return jax.grad(lambda params: features(params, pixels).sum())(params)

    program = gradient if train else features
    elements = largest_array(program, params, shaped(1, FILM_PATCHES, 1176))
    # Where they are differentiated: stacked parameters, and the hidden states that layers keep.
    kept = FILM_PATCHES * model_config.vision.hidden_size * model_config.vision.depth
    widest = max(model_config.vision.intermediate_size, 3 * model_config.vision.hidden_size, 1176)
    stacked = max(kept, *(leaf.size for leaf in jax.tree.leaves(params))) if train else 0
    assert elements <= max(FILM_PATCHES * widest, attentions.SCORES_AT_ONCE * 4, stacked)
    assert elements < FILM_PATCHES**2


@pytest.mark.parametrize("train", [False, True])
def test_a_prompt_with_a_full_size_film_makes_no_array_of_scores(train):
    """9,919 image tokens in 12,288 slots, in prefill and in both trained passes, of a small decoder."""
    T, text = 12288, PHANTOM.text
    params = shapes_of(PHANTOM)

    def prefill(params, hidden, positions):
        embedded = network.Embedded(hidden)
        return decoder.prefill(params["text"], text, embedded, positions, np.array([T - 9]))[
            0
        ].sum()

    def group(params, hidden, positions):
        prompts, own = decoder.forward_group(
            params["text"],
            text,
            network.Embedded(hidden),
            positions,
            jnp.array([T]),
            jnp.zeros((2, 512, text.hidden_size)),
            jnp.zeros((3, 2, 512), jnp.int32),
        )
        return prompts.sum() + own.sum()

    program = jax.grad(group) if train else prefill
    elements = largest_array(
        program, params, shaped(1, T, text.hidden_size), shaped(3, 1, T, dtype=jnp.int32)
    )
    assert elements <= max(attentions.SCORES_AT_ONCE, T * text.intermediate_size)
    assert elements < T * T


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from cxr_jax.models import attention
attention.ALL_AT_ONCE_UP_TO, attention.SCORES_AT_ONCE, attention.LEAST_BLOCK = 1, 1, 8
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
arrays = [jnp.asarray(np.random.default_rng(i).normal(size=(4, 30, 2, 4)), jnp.float32) for i in range(3)]
mask = np.arange(30) < np.array([30, 20, 30, 9])[:, None]
def loss(*arrays):
    return (attention.causal_attention(mask)(*arrays) ** 2).sum() + attention.attention(*arrays).sum() ** 2
step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
want = step(*arrays)
placed = [jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor"))) for x in arrays]
program = step.lower(*placed).compile()
for one, other in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
assert not any(kind in program.as_text() for kind in ("all-gather(", "all-to-all(", "collective-permute("))
print("same")
"""


def test_blocks_on_a_mesh_stay_on_their_devices():
    """Rows over two devices, heads over two: the same numbers, and nothing but the loss's sum is sent."""
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert done.stdout == "same\n", done.stderr
