"""Attention by blocks of queries is plain attention: values, gradients, masks, meshes; and its memory is small."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import fast_compile
import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.extend.core import jaxprs_in_params
from places import ROOT

from cxr_jax.errors import UserError
from cxr_jax.inference import model as inference_model
from cxr_jax.models import attention as attentions
from cxr_jax.models import network
from cxr_jax.models.attention import Mask, blocked, splash
from cxr_jax.models.network import decoder, tower
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, QWEN2_5_VL_3B
from cxr_jax.weights import hf_folder

FILM = (1, 182, 218)  # patches of a film of 2,544 x 3,056 pixels at the published settings
FILM_PATCHES = 182 * 218


@pytest.fixture
def blocks(monkeypatch):
    """A switch: from now on queries and keys go in blocks of 8 to 16, whatever their number."""

    def switch():
        monkeypatch.setattr(attentions, "SCORES_AT_ONCE", 1)
        monkeypatch.setattr(blocked, "LEAST_BLOCK", 8)
        monkeypatch.setattr(blocked, "LARGEST_BLOCK", 16)
        monkeypatch.setattr(blocked, "CAUSAL_BLOCKS", 4)

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
        lambda *arrays: jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays),
        compiler_options=fast_compile.OPTIONS,
    )(*arrays)
    return value, *gradients


def assert_equal(got, want, tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def part_numbers(B, T):
    """Packed images: three parts of a row, of other lengths in each."""
    return jnp.asarray(np.arange(T) * 3 // (T + np.arange(B)[:, None]), jnp.int32)


MASKS = {
    "all": lambda B, T, S: Mask(),
    "padding": lambda B, T, S: Mask(keys=np.arange(S) < np.arange(S - B + 1, S + 1)[:, None]),
    "packed": lambda B, T, S: Mask(parts=(part_numbers(B, T), part_numbers(B, S))),
}
# float32: sums in another order. bfloat16: probabilities are rounded relative to another largest score.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "B,T,S,H,K,dtype",
    [(2, 29, 29, 4, 2, "float32"), (3, 17, 40, 6, 3, "float32"), (2, 33, 33, 4, 1, "bfloat16")],
)
def test_blocked_attention_is_plain_attention(blocks, mask, B, T, S, H, K, dtype):
    queries = normal(B, T, H, 4, seed=1, dtype=dtype)
    keys, values = (normal(B, S, K, 4, seed=seed, dtype=dtype) for seed in (2, 3))
    blocks()

    def attend(kind):
        attend = functools.partial(attentions.attention, mask=MASKS[mask](B, T, S), kind=kind)
        return value_and_gradients(attend, queries, keys, values)

    assert_equal(attend("blocked"), attend("xla"), TOLERANCE[dtype])
    assert_equal(attend("auto"), attend("blocked"), 0)


def seen_by_definition(lengths, T, images=None, window=None):
    """bool [B, T, T], token by token, as the references of Qwen and Gemma have it."""
    seen = np.zeros((len(lengths), T, T), bool)
    for row, query, key in np.ndindex(seen.shape):
        is_own_image = (
            images is not None and images[row, key] and images[row, query] == images[row, key]
        )
        is_near = window is None or key > query - window
        is_before = key <= query
        seen[row, query, key] = key < lengths[row] and (is_before or is_own_image) and is_near
    return seen


@pytest.mark.parametrize("kinds", [(), ("window",), ("images",), ("images", "window")])
@pytest.mark.parametrize("T,dtype", [(37, "float32"), (30, "bfloat16")])
def test_causal_blocks_see_what_the_definition_says(blocks, kinds, T, dtype):
    """Padding, windows and images that see themselves both ways: values and gradients, by an oracle without masks."""
    lengths = np.array([T, T // 2])
    arrays = [normal(2, T, heads, 4, seed=heads, dtype=dtype) for heads in (4, 2, 2)]
    images = np.where(np.arange(T) % 13 < 9, np.arange(T) // 13 + 1, 0)[None].repeat(2, 0)
    options = {name: {"images": images, "window": 5}[name] for name in kinds}
    is_token = np.arange(T) < lengths[:, None]
    seen = seen_by_definition(lengths, T, **options)[:, None]

    def by_definition(queries, keys, values):
        queries, keys, values = (
            jnp.repeat(array, 4 // array.shape[2], 2).astype(jnp.float32)
            for array in (queries, keys, values)
        )
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys) / 2
        probabilities = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
        output = jnp.einsum("bhts,bshd->bthd", probabilities, values)
        return jnp.where(is_token[..., None, None], output, 0).astype(dtype)

    def attend(kind):
        def attend_tokens(*arrays):
            attend = attentions.causal_attention(is_token, heads=4, kind=kind, **options)
            return jnp.where(is_token[..., None, None], attend(*arrays), 0)

        return value_and_gradients(attend_tokens, *arrays)

    blocks()
    want = value_and_gradients(by_definition, *arrays)
    assert_equal(attend("xla"), want, TOLERANCE[dtype])
    assert_equal(attend("blocked"), want, TOLERANCE[dtype])


@pytest.mark.parametrize("window,dtype", [(None, "float32"), (9, "float32"), (None, "bfloat16")])
def test_blocks_of_a_group_are_its_attention_over_two_parts(blocks, window, dtype):
    """Completions of 19 tokens over prompts of 23, one of them of 11 tokens: `forward_group` and `extend`."""
    queries = normal(6, 19, 4, 4, seed=1, dtype=dtype)
    kept = [normal(2, 2, 23, 4, seed=seed, dtype=dtype) for seed in (2, 3)]
    own = [normal(6, 2, 19, 4, seed=seed, dtype=dtype) for seed in (4, 5)]
    blocks()

    def attend(kind):
        def attend_both(queries, *keys):
            attend = attentions.following_attention(
                jnp.array([23, 11]), slots=23, own_slots=19, rows=24, window=window, kind=kind
            )
            return attend(queries, keys[:2], keys[2:])

        return value_and_gradients(attend_both, queries, *kept, *own)

    assert_equal(attend("blocked"), attend("xla"), TOLERANCE[dtype])


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels by their definition, which any device can compute; whatever the number of keys."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(blocked, "LEAST_BLOCK", 64)


SPLASH = {
    "causal": lambda kind: attentions.causal_attention(np.ones((2, 150), bool), heads=4, kind=kind),
    "packed": lambda kind: functools.partial(
        attentions.part_attention, part_numbers(2, 150), kind=kind
    ),
}


@pytest.mark.parametrize("case", SPLASH)
def test_the_kernel_of_tpus_is_plain_attention(interpreted, case):
    arrays = [normal(2, 150, heads, 16, seed=heads) for heads in (4, 2, 2)]
    want, got = (value_and_gradients(SPLASH[case](kind), *arrays) for kind in ("xla", "splash"))
    assert_equal(got, want, 5e-6)


def test_the_kernel_of_tpus_joins_a_shared_prompt(interpreted):
    """Two prompts, the second shorter, two completions of each: one softmax over kept and own keys."""
    queries = normal(4, 130, 4, 16, seed=1)
    kept = [normal(2, 2, 70, 16, seed=seed) for seed in (2, 3)]
    own = [normal(4, 2, 130, 16, seed=seed) for seed in (4, 5)]

    def attend(kind):
        options = {"slots": 70, "own_slots": 130, "rows": 16, "kind": kind}
        attend = attentions.following_attention(jnp.array([70, 41]), **options)
        return value_and_gradients(
            lambda queries, *keys: attend(queries, keys[:2], keys[2:]), queries, *kept, *own
        )

    assert_equal(attend("splash"), attend("xla"), 5e-6)


def test_the_kernel_of_tpus_refuses_windows():
    mask = np.ones((1, 200), bool)
    with pytest.raises(UserError, match="config.attention='splash' has no kernel for windows"):
        attentions.causal_attention(mask, heads=2, window=9, kind="splash")(
            *[normal(1, 200, 2, 16)] * 3
        )


def test_queries_without_keys_have_finite_values_and_no_gradient(blocks):
    """A row of padding alone: nothing that is not finite, and nothing into the weights."""
    arrays = [normal(2, 20, 2, 4, seed=seed) for seed in range(3)]
    mask = Mask(keys=np.array([[True] * 20, [False] * 20]))
    blocks()
    attend = functools.partial(attentions.attention, mask=mask, kind="blocked")
    value, *gradients = value_and_gradients(attend, *arrays)
    assert all(np.isfinite(array).all() for array in (value, *gradients))
    assert not any(gradient[1].any() for gradient in gradients)


def test_usual_sizes_go_at_once_and_large_ones_by_blocks():
    """A film of 476 px, a row of the published recipe; a step of the decode loop is one query."""
    for rows, queries, keys in ((16, 1156, 1156), (16 * 256, 1, 12288), (4096, 64, 64)):
        assert attentions.chosen_kind("auto", rows, queries, keys) == "xla"
    for rows, queries, keys in ((16 * 16, 1824, 2144), (16, 4096, 4096), (16, 39676, 39676)):
        assert attentions.chosen_kind("auto", rows, queries, keys) == "blocked"
        assert attentions.chosen_kind("xla", rows, queries, keys) == "xla"


def test_blocks_fill_up_little_and_hold_few_scores():
    for rows, tokens in ((256, 1824), (16, 4096), (16, 39676), (28 * 8, 12288), (16, 1157)):
        for mask in (Mask(), Mask(is_causal=True)):
            query_block, (key_block,) = blocked._choose_blocks(rows, tokens, [tokens], (mask,))
            for block in (query_block, key_block):
                assert block % blocked.LEAST_BLOCK == 0
                assert -(-tokens // block) * block <= 1.05 * (tokens + blocked.LEAST_BLOCK)
            least = rows * blocked.LEAST_BLOCK**2
            assert rows * query_block * key_block <= max(least, blocked.SCORES_IN_BLOCK)


def test_the_mesh_divides_the_scores_that_go_at_once():
    """16 rows on 8 devices are 2 on each."""
    rows, tokens = 16 * 16, 1024
    assert attentions.chosen_kind("auto", rows, tokens, tokens) == "blocked"
    mesh = jax.sharding.AbstractMesh(
        (8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert attentions.chosen_kind("auto", rows, tokens, tokens) == "xla"


def test_blocks_have_the_logits_of_transformers(blocks, tmp_path, monkeypatch):
    """Two images a row, windows and full attention, prefix and cache: the golden case, computed by blocks."""
    case = golden_cases.case("ragged")
    folder = golden_cases.write_folder(tmp_path, "ragged")
    model = inference_model.Model(*hf_folder.load(folder))
    blocks()
    chosen, attend = [], attentions.blocked_attention
    monkeypatch.setattr(
        attentions,
        "blocked_attention",
        lambda *arrays, **options: chosen.append(len(arrays[1])) or attend(*arrays, **options),
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
    assert 1 in chosen
    keep = case["attention_mask"].astype(bool)
    assert np.abs(got - case["logits"])[keep].max() <= 1e-4 * case["logits"][keep].std()


def test_the_tower_of_a_large_film_trains_as_that_of_a_small_one(blocks, monkeypatch):
    """Blocks of queries, and layers in scans: the features and every gradient of two films, rematerialised or not."""
    config = dataclasses.replace(
        PHANTOM.vision, depth=3, hidden_size=32, intermediate_size=48, fullatt_block_indexes=(2,)
    )
    params = tiny_model.draw_params(config)
    films = normal(2, 4 * 8, 1176)

    def trained(remat):
        def loss(params):
            features = tower.forward(params, config, films, (1, 4, 8), remat=remat).tokens
            return (features * normal(*features.shape, seed=4)).sum(), features

        program = jax.jit(
            jax.value_and_grad(loss, has_aux=True), compiler_options=fast_compile.OPTIONS
        )
        (_, features), gradients = program(params)
        return features, gradients

    want = trained("none")
    blocks()
    monkeypatch.setattr(tower, "SMALL_UP_TO", 1)
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
from cxr_jax.models.attention import blocked
attention.SCORES_AT_ONCE, blocked.LEAST_BLOCK, blocked.LARGEST_BLOCK = 1, 8, 16
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
arrays = [jnp.asarray(np.random.default_rng(i).normal(size=(4, 30, 2, 4)), jnp.float32) for i in range(3)]
mask = np.arange(30) < np.array([30, 20, 30, 9])[:, None]
def loss(*arrays):
    return (attention.causal_attention(mask, heads=2)(*arrays) ** 2).sum() + attention.attention(*arrays).sum() ** 2
step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
want = step(*arrays)
placed = [jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor"))) for x in arrays]
program = step.lower(*placed).compile()
for one, other in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
assert not any(kind in program.as_text() for kind in ("all-gather(", "all-to-all(", "collective-permute("))

from cxr_jax.models.attention import splash
splash.INTERPRET = True
shapes = (4, 30, 4, 4), *[(2, 2, 12, 4)] * 2, *[(4, 2, 30, 4)] * 2
arrays = [jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32) for i, shape in enumerate(shapes)]
specs = P("data", None, "tensor"), *[P("data", "tensor")] * 4
def follow(kind, queries, *keys):
    attend = attention.following_attention(np.array([12, 7]), slots=12, own_slots=30, rows=16, kind=kind)
    return (attend(queries, keys[:2], keys[2:]) ** 2).sum()
want = jax.jit(jax.value_and_grad(lambda *arrays: follow("xla", *arrays), range(5)))(*arrays)
placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
with jax.set_mesh(mesh):
    got = jax.jit(jax.value_and_grad(lambda *arrays: follow("splash", *arrays), range(5)))(*placed)
for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
print("same")
"""


def test_blocks_on_a_mesh_stay_on_their_devices():
    """Rows over two devices, heads over two: the same numbers, and nothing but the loss's sum is sent.

    The kernel of TPUs beside a shared prompt, by its definition, gives the same there, too.
    """
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{flags} {fast_compile.FLAGS}"},
    )
    assert done.stdout == "same\n", done.stderr
