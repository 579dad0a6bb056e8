"""The network against plain numpy (`plain_network`), each choice of the config by itself and all drawn at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import network_draws
import numpy as np
import plain_network
import pytest
from network_draws import BASE, LIKE_GEMMA, LIKE_QWEN3, NEW, TEXT, VISION, draw_case

from cxr_jax.errors import UserError
from cxr_jax.models import layers, network
from cxr_jax.models.network import (
    decoder,
    decoder_layers,
    packing,
    position_table,
    tower,
    tower_packed,
)
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.runtime import sharding
from cxr_jax.runtime.trees import flatten

BAR = 1e-5  # of the standard deviation


def assert_near(got, want):
    assert np.abs(got - want).max() <= BAR * want.std()


# --- each choice by itself

WINDOWS_OFF = {"fullatt_block_indexes": None}
VISION_CHOICES = {
    "LayerNorm": {"norm": "layer"},
    "another epsilon": {"norm_eps": 1e-2},
    "LayerNorm with another epsilon": {"norm": "layer", "norm_eps": 1e-2, "tap_blocks": (0,)},
    "two layers": {"mlp": "gelu"},
    "bias of patches": {"patch_bias": True},
    "no rotation": {"rotary": False},
    "another rotation": {"rope_theta": 50.0},
    "a table as it is": {"position_table": 100},
    "a table between entries": {"position_table": 27, "interpolates_table": True},
    "a table smaller than the grid": {"position_table": 9, "interpolates_table": True},
    "three projections": {"split_qkv": True},
    "norm behind": {"final_norm": True},
    "mean": {"merger": "mean"},
    "no windows": WINDOWS_OFF,
    "one frame": {"temporal_patch_size": 1},
    "merged 4 by 4": {"spatial_merge_size": 4, "window_size": 16},
    "taps out of order": {"tap_blocks": (1, 0)},
    "taps beyond": {"tap_blocks": (5, 1)},
}
TEXT_CHOICES = {
    "head size": {"head_size": None, "mrope_section": (1, 0, 1), "hidden_size": 16},
    "no biases": {"qkv_bias": False},
    "bias behind": {"output_bias": True},
    "norms of heads": {"qk_norm": True},
    "one plus": {"norm": "one_plus"},
    "norms of heads, one plus": {"qk_norm": True, "norm": "one_plus", "rms_norm_eps": 1e-2},
    "norms behind": {"post_norms": True},
    "GELU": {"activation": "gelu_tanh"},
    "scale of scores": {"query_scale": 0.1},
    "scaled embedding": {"scales_embedding": True},
    "axes in turns": {"mrope_interleaved": True},
    "axes in turns, cut": {"mrope_interleaved": True, "mrope_section": (0, 1, 3)},
    "one axis": {"mrope_section": ()},
    "slower rotation": {"rope_factor": 8.0},
    "some layers slide": {"sliding_layers": (1,), "sliding_window": 4},
    "all layers slide": {"sliding_layers": (0, 1), "sliding_window": 4},
    "images see themselves": {"image_sees_itself": True},
    "images see themselves in windows": {
        "image_sees_itself": True,
        "sliding_layers": (0,),
        "sliding_window": 3,
    },
}


def of_tower(config: VisionConfig, seed=0):
    """(tokens and taps of one image, the same in plain numpy)."""
    case = draw_case(seed, dataclasses.replace(BASE, vision=config))
    pixels, grid = case.images[0][0]
    params = case.params["vision"]
    seen = jax.jit(lambda *arrays: tower.forward(arrays[0], config, arrays[1], grid))(
        params, pixels[None]
    )
    tokens, taps = plain_network.encode(config, params, pixels, grid)
    return [leaf[0] for leaf in jax.tree.leaves(seen)], [tokens, *taps]


@pytest.mark.parametrize("name", VISION_CHOICES)
def test_a_choice_of_the_tower(name):
    for seed in (0, 1):
        got, want = of_tower(dataclasses.replace(VISION, **VISION_CHOICES[name]), seed)
        assert len(got) == len(want)
        for ours, plain in zip(got, want, strict=True):
            assert_near(ours, plain)


@pytest.mark.parametrize("name", TEXT_CHOICES)
def test_a_choice_of_the_decoder(name):
    changes = TEXT_CHOICES[name]
    text = dataclasses.replace(TEXT, **changes)
    vision = dataclasses.replace(VISION, depth=1, out_hidden_size=text.hidden_size)
    for seed in (0, 1):
        case = draw_case(seed, dataclasses.replace(BASE, text=text, vision=vision))
        assert_near(full_row(case, 0), plain_row(case, 0))
        # A choice that changes nothing would be compared with nothing.
        if seed == 0 and "hidden_size" not in changes:
            other = plain_row(with_defaults(case), 0)
            assert np.abs(other - plain_row(case, 0)).max() > 1e-3 * other.std()


def with_defaults(case):
    """The same parameters as far as the network without the choice has them, and else any."""
    config = dataclasses.replace(case.config, text=TEXT)
    other = draw_case(0, config).params
    kept = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf_at(case.params, path, leaf), other
    )
    return dataclasses.replace(case, config=config, params=kept)


def leaf_at(params, path, default):
    for key in path:
        if key.key not in params:
            return default
        params = params[key.key]
    return params


def full_row(case, number):
    """Logits [T, V] of one prompt."""
    config, ids = case.config, case.prompts[number][None]
    features = seen_of(case.params, config, case.images[number])
    grids = [grid for _, grid in case.images[number]] or None
    positions = network.positions(config, ids, grids)

    @jax.jit
    def logits(params, features):
        hidden = network.hidden_states(
            params, config, ids, np.ones(ids.shape, bool), positions, features=features
        )
        return network.unembed(params, config, hidden)

    return np.asarray(logits(case.params, features))[0]


def plain_row(case, number, completion=None):
    ids = case.prompts[number]
    if completion is not None:
        ids = np.concatenate([ids, case.completions[number, completion]])
    return plain_network.logits(case.config, case.params, ids, case.images[number])


def seen_of(params, config, images):
    """Tokens and taps [1, I, D] of a row's images; None without any."""
    if not images:
        return None
    see = jax.jit(network.vision, static_argnums=(1, 3))
    seen = [see(params, config, pixels[None], grid) for pixels, grid in images]
    return jax.tree.map(lambda *tokens: jnp.concatenate(tokens, 1), *seen)


# --- all passes, all choices at once


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of a case: prompts right-padded, and rows of prompt and completion."""

    ids: np.ndarray  # [B, S]
    lengths: np.ndarray  # [B]
    positions: np.ndarray  # [axes, B, S + NEW], of completions that follow at once
    row_ids: np.ndarray  # [B * n, S + NEW]
    grids: list


def batch_of(case) -> Batch:
    lengths = np.array([len(ids) for ids in case.prompts])
    prompts, width = len(lengths), lengths.max()
    ids = np.zeros((prompts, width), np.int32)
    row_ids = np.zeros((prompts, network_draws.COMPLETIONS, width + NEW), np.int32)
    for number, prompt in enumerate(case.prompts):
        ids[number, : len(prompt)] = prompt
        row_ids[number, :, : len(prompt)] = prompt
        row_ids[number, :, len(prompt) : len(prompt) + NEW] = case.completions[number]
    grids = [grid for images in case.images for _, grid in images]
    first = row_ids[:, 0]
    mask = np.arange(width + NEW) < (lengths + NEW)[:, None]
    positions = network.positions(case.config, first, grids, mask)
    return Batch(ids, lengths, positions, row_ids.reshape(-1, width + NEW), grids)


def features_of(config, params, images):
    """[B, I, D] by the packed tower, every image in one program; what is behind a row's own does not matter."""
    flat = [image for of_row in images for image in of_row]
    unit = config.vision.merge_unit
    rows = packing.row_patches(config.vision, max(len(pixels) for pixels, _ in flat))
    sizes = packing.PackSizes(len(flat), rows)
    packed, where = packing.pack(config.vision, [grid for _, grid in flat], sizes)
    pixels = packing.pack_pixels([pixels for pixels, _ in flat], where, unit, sizes)
    seen = tower_packed.forward(params["vision"], config.vision, pixels, packed)
    # The places of each row's tokens in the packed result.
    starts = where.rows * (sizes.patches // unit) + where.offsets
    spans = [start + np.arange(count) for start, count in zip(starts, where.counts, strict=True)]
    own = [[spans.pop(0) for _ in of_row] for of_row in images]
    index = np.zeros((len(images), max(sum(map(len, of_row)) for of_row in own)), np.int32)
    for number, of_row in enumerate(own):
        places = np.concatenate([*of_row, np.zeros(0, np.int32)])
        index[number, : len(places)] = places
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1])[index], seen)


def full_pass(case, batch, params, features):
    """Hidden states [B * n, S + NEW, D] of whole rows."""
    n = network_draws.COMPLETIONS
    mask = np.arange(batch.row_ids.shape[1]) < np.repeat(batch.lengths + NEW, n)[:, None]
    return network.hidden_states(
        params,
        case.config,
        batch.row_ids,
        mask,
        np.repeat(batch.positions, n, 1),
        features=jax.tree.map(lambda leaf: jnp.repeat(leaf, n, 0), features),
    )


def own_positions(batch):
    index = (batch.lengths[:, None] + np.arange(NEW))[None]
    return np.take_along_axis(batch.positions, index, 2)


def group_pass(case, batch, params, features):
    """Hidden states [B, S, D] of prompts and [B * n, NEW, D] of completions."""
    return network.decode_group(
        params,
        case.config,
        network.embed(params, case.config, batch.ids, features),
        batch.positions[:, :, : batch.ids.shape[1]],
        batch.lengths,
        network.embed_text(params, case.config, case.completions.reshape(-1, NEW)),
        np.repeat(own_positions(batch), network_draws.COMPLETIONS, 1),
    )


def decode_pass(case, batch, params, features):
    """Hidden states [B * n, NEW + 1, D]: of each prompt's last token, and of the completion's one by one."""
    text, n = case.config.text, network_draws.COMPLETIONS
    embedded = network.embed(params, case.config, batch.ids, features)
    last, cache = decoder.prefill(
        params["text"], text, embedded, batch.positions[:, :, : batch.ids.shape[1]], batch.lengths
    )
    keys = decoder.prompt_keys(cache)
    stack = decoder_layers.decode_layers(params["text"], text)
    own = decoder.empty_own(text, len(batch.row_ids), NEW + 2, jnp.float32)
    hidden = [jnp.repeat(last, n, 0)]
    places = np.repeat(own_positions(batch), n, 1)
    for step in range(NEW):
        tokens = case.completions.reshape(-1, NEW)[:, step : step + 1]
        row, own = decoder.decode_step(
            stack,
            params["text"]["final"],
            text,
            network.embed_text(params, case.config, tokens),
            places[:, :, step : step + 1],
            keys,
            batch.lengths,
            own,
            jnp.int32(step),
        )
        hidden.append(row)
    return jnp.stack(hidden, 1)


def extend_pass(case, batch, params, features):
    """Hidden states [B, D] of the last token of each row, of which all text behind the images is computed later."""
    text, tail = case.config.text, 3
    kept = batch.lengths - tail
    # Layers that lie apart, as where a reader keeps them.
    stack = layers.unstack(params["text"]["layers"], text.num_hidden_layers)
    apart = {**params["text"], "layers": stack}
    width = batch.ids.shape[1]
    embedded = network.embed(params, case.config, batch.ids, features)
    _, cache = decoder.prefill(apart, text, embedded, batch.positions[:, :, :width], kept)
    index = (kept[:, None] + np.arange(tail + NEW))[None]
    places = np.take_along_axis(batch.positions, index, 2)
    ids = np.take_along_axis(batch.row_ids[:: network_draws.COMPLETIONS], index[0], 1)
    # The last row ends earlier than the others.
    new = np.array([tail + NEW] * (len(kept) - 1) + [tail + 1])
    last, _ = decoder.extend(
        apart,
        text,
        network.embed_text(params, case.config, ids),
        places,
        new,
        decoder.prompt_keys(cache),
        kept,
    )
    return last


def compare_passes(case):
    """Every pass against plain numpy, in one program."""
    batch, n = batch_of(case), network_draws.COMPLETIONS
    images = case.images

    def run(params):
        features = features_of(case.config, params, images)
        prompts, completions = group_pass(case, batch, params, features)
        hidden = {
            "full": full_pass(case, batch, params, features),
            "prompts": prompts,
            "completions": completions,
            "decoded": decode_pass(case, batch, params, features),
            "extended": extend_pass(case, batch, params, features),
        }
        return {
            name: network.unembed(params, case.config, states) for name, states in hidden.items()
        }

    got = jax.tree.map(np.asarray, jax.jit(run)(case.params))
    for row in range(len(batch.row_ids)):
        number, length = row // n, batch.lengths[row // n]
        want = plain_row(case, number, row % n)
        assert_near(got["full"][row, : length + NEW], want)
        assert_near(got["completions"][row], want[length:])
        assert_near(got["decoded"][row], want[length - 1 :])
        assert_near(got["prompts"][number, :length], want[:length])
        if row % n == 0:
            last = length if number == len(batch.lengths) - 1 else -1
            assert_near(got["extended"][number], want[last])


@pytest.mark.parametrize(
    ("config", "unroll_up_to"),
    [
        (LIKE_QWEN3, 0),
        (LIKE_GEMMA, 8),
        pytest.param(LIKE_QWEN3, 8, marks=pytest.mark.slow),
        pytest.param(LIKE_GEMMA, 0, marks=pytest.mark.slow),
    ],
    ids=["qwen3, scanned", "gemma, unrolled", "qwen3, unrolled", "gemma, scanned"],
)
def test_every_pass_of_a_family(monkeypatch, config, unroll_up_to):
    monkeypatch.setattr(layers, "UNROLL_UP_TO", unroll_up_to)
    compare_passes(draw_case(unroll_up_to + 1, config))


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))]
)
def test_every_pass_of_a_drawn_network(monkeypatch, seed):
    monkeypatch.setattr(layers, "UNROLL_UP_TO", (8, 0, 1)[seed % 3])
    compare_passes(draw_case(seed))


# --- gradients


@pytest.mark.parametrize("config", [LIKE_QWEN3, LIKE_GEMMA], ids=["qwen3", "gemma"])
def test_gradients_of_shared_prompts_are_those_of_rows(config):
    """Of parameters, taps and image tokens; with the layers computed again in the group's backward pass."""
    # A layer behind those that taps are added to: what the last one gives to a prompt no completion sees.
    text = dataclasses.replace(config.text, num_hidden_layers=3)
    case = draw_case(2, dataclasses.replace(config, text=text))
    batch, n = batch_of(case), network_draws.COMPLETIONS
    rng = np.random.default_rng(0)
    width = config.text.hidden_size
    weights = rng.standard_normal((len(batch.row_ids), NEW, width)).astype(np.float32)
    count = max((ids == network_draws.IMAGE).sum() for ids in case.prompts)
    tap_count = len(config.vision.tapped)
    tokens = rng.standard_normal((tap_count + 1, len(batch.lengths), count, width))
    first, *rest = tokens.astype(np.float32)
    features = network.Seen(first, tuple(rest))
    slots = np.repeat(batch.lengths, n)[:, None] + np.arange(NEW)

    def by_row(params, features):
        hidden = full_pass(case, batch, params, features)
        return (jnp.take_along_axis(hidden, slots[..., None], 1) * weights).sum()

    def by_group(params, features):
        return (group_pass(case, batch, params, features)[1] * weights).sum()

    want, got = (
        jax.jit(jax.grad(loss, (0, 1)))(case.params, features) for loss in (by_row, by_group)
    )
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for ours, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, other, atol=BAR * largest)
    # Every parameter of the decoder has a gradient, and all that images give.
    for leaf in jax.tree.leaves((want[0]["text"]["layers"], want[1])):
        assert np.abs(leaf).max() > 0


def test_gradients_of_packed_images_are_those_of_images():
    """Of the table, the tap mergers and all else."""
    config = dataclasses.replace(LIKE_QWEN3.vision, tap_blocks=(0,))
    case = draw_case(4, dataclasses.replace(LIKE_QWEN3, vision=config))
    images = [image for of_row in case.images for image in of_row]
    sizes = packing.PackSizes(2, 64)
    packed, where = packing.pack(config, [grid for _, grid in images], sizes)
    pixels = packing.pack_pixels([pixels for pixels, _ in images], where, 4, sizes)

    def loss(seen):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(seen))

    def by_image(params):
        return sum(loss(tower.forward(params, config, p[None], grid)) for p, grid in images)

    def by_packing(params):
        return loss(tower_packed.forward(params, config, pixels, packed))

    params = case.params["vision"]
    want, got = (jax.jit(jax.grad(f))(params) for f in (by_image, by_packing))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for ours, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(ours, other, atol=BAR * largest)


# --- bfloat16, sizes, and what every network needs


def test_the_factor_of_embeddings_is_rounded_to_the_type_of_the_computation():
    config = dataclasses.replace(
        LIKE_GEMMA, text=dataclasses.replace(LIKE_GEMMA.text, hidden_size=2560)
    )
    params = {"text": {"embed": {"embedding": np.ones((40, 2560), np.float32)}}}
    ids = np.array([[9]])
    for dtype, factor in (("float32", np.float32(2560**0.5)), ("bfloat16", 50.5)):
        embedded = network.embed_text(params, config, ids, dtype=dtype)
        assert (embedded == factor).all() and embedded.dtype == dtype


def test_a_table_in_bfloat16_is_rounded_before_and_after_but_not_between():
    config = LIKE_QWEN3.vision
    table = np.random.default_rng(0).standard_normal((28, 24)).astype(np.float32)
    params = {"pos_embed": {"embedding": table}}
    got = position_table.of_grid(params, config, 6, 4, "bfloat16").astype("float32")
    rounded = np.asarray(jnp.asarray(table, "bfloat16"), np.float64)
    places = plain_network.patch_places(config, 6, 4)
    want = plain_network.table_at(config, rounded, 6, 4)[places[:, 0], places[:, 1]]
    # Half of the last digit, and no more.
    assert np.abs(got - want).max() <= 2.0**-8 * np.abs(want).max()
    exact = np.asarray(jnp.asarray(want, "float32").astype("bfloat16"), np.float32)
    assert (got == exact).mean() > 0.99


def test_a_fixed_table_refuses_larger_images():
    config = dataclasses.replace(LIKE_GEMMA.vision, position_table=20)
    params = draw_case(0, dataclasses.replace(LIKE_GEMMA, vision=config)).params["vision"]
    pixels = np.zeros((1, 24, config.patch_dim), np.float32)
    with pytest.raises(UserError, match="6 x 4 patches: the model has positions for 20"):
        tower.forward(params, config, pixels, (1, 6, 4))
    with pytest.raises(UserError, match="6 x 4 patches: the model has positions for 20"):
        packing.pack(config, [(1, 6, 4)], packing.PackSizes(1, 24))


def test_images_without_windows_are_packed_without_gaps():
    config = LIKE_QWEN3.vision
    assert packing.row_patches(config, 1156) == 1156
    grids = [(1, 2, 10), (1, 6, 2), (1, 4, 8)]
    packed, where = packing.pack(config, grids, packing.PackSizes(1, 64))
    assert (packed.images[0] > 0).all() and where.counts.tolist() == [5, 3, 8]


def test_a_mesh_has_a_rule_for_every_parameter():
    rng = np.random.default_rng(0)
    drawn = [LIKE_QWEN3, LIKE_GEMMA, *(network_draws.draw_config(rng) for _ in range(20))]
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for config in drawn:
        draw = functools.partial(network.init_params, config, jax.random.key(0))
        for path, leaf in flatten(jax.eval_shape(draw)):
            axes = sharding.partition_spec("/".join(path), leaf.shape, sizes)
            # Matrices are divided, vectors are whole.
            is_vector = path[-1] in ("scale", "bias")
            assert (axes == jax.sharding.PartitionSpec(*[None] * leaf.ndim)) == is_vector, path
