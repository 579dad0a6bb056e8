"""Packed images: the arrays are those of the reference's window index, and the packed tower is the one of exact shapes,
in values and gradients, whatever the mix, by one program."""

import dataclasses
import functools

import fast_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from compile_counts import compiled

from cxr_jax.errors import UserError
from cxr_jax.models import attention as attentions
from cxr_jax.models import layers, lora
from cxr_jax.models.attention import blocked
from cxr_jax.models.network import packing, tower, tower_layers, tower_packed
from cxr_jax.models.network.packing import PackSizes
from cxr_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR

PUBLISHED = QWEN2_5_VL_3B.vision
# Windows of 3 x 3 units: whole and cut ones, one row of units, smaller than a window.
GRIDS = [(1, 8, 14), (1, 2, 16), (1, 4, 4)]
SIZES = PackSizes(rows=2, patches=256)
PATTERNS = {"windows": (1, ()), "one full": (2, (1,)), "full": (1, (0,)), "scanned": (9, (2, 5, 8))}


# ---- Arrays ------------------------------------------------------------------------------------------------


def reference_windows(height, width, side):
    """The units of each window of height x width units, as the reference's window index groups them."""
    windows = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows = range(top, min(top + side, height))
            columns = range(left, min(left + side, width))
            windows.append([row * width + column for row in rows for column in columns])
    return windows


def film_grid(rng):
    """The grid of a film of any size, as the published recipe prepares it."""
    height, width = (int(side) for side in rng.integers(200, 3500, 2))
    sides = PROCESSOR.resized(height, width, 128**2, 476**2)
    return 1, *(side // PROCESSOR.patch_size for side in sides)


def check_arrays(model_config, grids, sizes):
    """Everything that the arrays say of the images, against plain Python."""
    packed, tokens = packing.pack(model_config, grids, sizes)
    U = sizes.patches // model_config.merge_unit
    everything = np.broadcast_to(np.arange(U), (sizes.rows, U))
    assert np.array_equal(np.take_along_axis(packed.order, packed.inverse, 1), everything)
    assert np.array_equal(np.take_along_axis(packed.inverse, packed.order, 1), everything)
    side = model_config.window_size // model_config.spatial_merge_size // model_config.patch_size
    bins = np.arange(U) // (3 * side**2)
    ends = [0] * sizes.rows
    for number, (_, height, width) in enumerate(grids):
        row, offset, count = (int(values[number]) for values in tokens)
        # Images of a row follow each other in the order given.
        assert (offset, count) == (ends[row], height * width // model_config.merge_unit)
        ends[row] += count
        slots = packed.inverse[row, offset : offset + count]
        assert set(slots) == set(np.flatnonzero(packed.images[row] == number + 1))
        columns = width // model_config.spatial_merge_size
        assert packed.places[row, slots].tolist() == [
            list(divmod(unit, columns)) for unit in range(count)
        ]
        plan = tower.window_plan(model_config, height, width)
        windows = reference_windows(height // 2, columns, side)
        sizes_of_plan = [size // 4 for windows_, size in plan.segments for _ in range(windows_)]
        planned = np.split(plan.order, np.cumsum(sizes_of_plan)[:-1])
        assert sorted(map(list, planned)) == sorted(windows)
        for window in windows:
            # Side by side in one bin, in the plan's order, and nothing else has this window's number.
            places = slots[window]
            assert places.tolist() == list(range(places[0], places[0] + len(window)))
            assert len(set(bins[places])) == 1
            same = packed.windows[row] == packed.windows[row, places[0]]
            assert np.flatnonzero(same).tolist() == places.tolist()
    assert (packed.images > 0).sum() == sum(ends)
    assert np.array_equal(packed.images > 0, packed.windows > 0)
    return packed


def test_arrays_of_random_films_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, images = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        grids = [film_grid(rng) for _ in range(images)]
        # Always enough: a row could hold all of them, with a third of its bins half empty.
        spare = sum(height * width for _, height, width in grids)
        spare = spare * 4 // 3 // 4 * 4 + 64 + 4 * int(rng.integers(0, 40))
        check_arrays(PUBLISHED, grids, PackSizes(rows, spare))


def test_any_image_fits_into_a_row_of_the_size_found():
    model_config = dataclasses.replace(PUBLISHED, window_size=84)
    row = packing.row_patches(model_config, 160)
    for height in range(1, 41):
        for width in range(1, 40 // height + 1):
            check_arrays(model_config, [(1, 2 * height, 2 * width)], PackSizes(1, row))


def test_usual_films_waste_no_slot():
    """Of up to 476 x 476 pixels, whatever their sides: the row of the largest square is enough."""
    assert packing.row_patches(PUBLISHED, 34 * 34) == 34 * 34


def test_a_square_wastes_no_slot():
    packed = check_arrays(PUBLISHED, [(1, 34, 34)], PackSizes(1, 34 * 34))
    assert (packed.images > 0).all()


@pytest.mark.parametrize(
    ("grids", "line"),
    [
        ([(1, 4, 4), (2, 4, 4)], "image 1: 2 frames: only still images are packed"),
        ([(1, 4, 5)], "image 0: 4 x 5 patches cannot be merged 2 by 2"),
        ([(1, 0, 4)], "image 0: 0 x 4 patches cannot be merged 2 by 2"),
        (
            [(1, 4, 4), (1, 2, 402)],
            "image 1: 2 x 402 patches: one side is more than 200 times the other",
        ),
        (
            [(1, 4, 4), (1, 16, 16)],
            "image 1: 256 patches do not fit even alone into 2 packed rows of 200",
        ),
        (
            [(1, 12, 12)] * 3,
            "image 2: 144 patches do not fit beside the others into 2 packed rows of 200",
        ),
    ],
)
def test_an_image_for_which_there_is_no_room_is_one_line_with_its_number(grids, line):
    with pytest.raises(UserError) as refused:
        packing.pack(config_of("windows"), grids, PackSizes(2, 200))
    assert str(refused.value) == line


# ---- The tower ---------------------------------------------------------------------------------------------


def config_of(pattern):
    depth, full = PATTERNS[pattern]
    return dataclasses.replace(
        tiny_model.CFG.vision, depth=depth, fullatt_block_indexes=full, window_size=12
    )


def program(encode, is_trained):
    """(params, pixels, weights, *rest) -> tokens and, where asked for, the gradients of a weighted sum."""

    def run(params, pixels, weights, *rest):
        def loss(params, pixels):
            tokens = encode(params, pixels, *rest)
            return jnp.sum(jnp.sin(tokens) * weights), tokens

        if not is_trained:
            return (loss(params, pixels)[1],)
        gradients, tokens = jax.grad(loss, (0, 1), has_aux=True)(params, pixels)
        return tokens, *gradients

    run.__name__ = encode.__name__
    return jax.jit(run)


@functools.lru_cache
def exact_program(pattern, grid, is_trained):
    def encode(params, pixels):
        return tower.forward(params, config_of(pattern), pixels[None], grid).tokens[0]

    return program(encode, is_trained)


@functools.lru_cache
def packed_program(pattern, is_trained=True, remat="none"):
    def encode_packed(params, pixels, packed):
        return tower_packed.forward(params, config_of(pattern), pixels, packed, remat=remat).tokens

    return program(encode_packed, is_trained)


def draw(rng, shape):
    return rng.normal(size=shape).astype(np.float32)


def mix(rng, model_config, pool=GRIDS):
    """Images of random grids of the pool: (grids, their patches, weights of their tokens)."""
    grids = [pool[index] for index in rng.integers(0, len(pool), rng.integers(1, 4))]
    images = [draw(rng, (grid[1] * grid[2], model_config.patch_dim)) for grid in grids]
    weights = [draw(rng, (len(image) // 4, model_config.out_hidden_size)) for image in images]
    return grids, images, weights


def packed_inputs(model_config, grids, images, weights):
    packed, tokens = packing.pack(model_config, grids, SIZES)
    pixels = packing.pack_pixels(images, tokens, model_config.merge_unit, SIZES)
    return tokens, (pixels, packing.pack_pixels(weights, tokens, 1, PackSizes(2, 64)), packed)


def assert_near(values, expected, tolerance=1e-5):
    for value, other in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(value - other) <= tolerance * max(np.linalg.norm(other), 1e-3)


def compare(pattern, params, rng, is_trained, pool=GRIDS):
    model_config = config_of(pattern)
    grids, images, weights = mix(rng, model_config, pool)
    tokens, inputs = packed_inputs(model_config, grids, images, weights)
    results, *gradients = packed_program(pattern, is_trained)(params, *inputs)
    exact_gradients = []
    for grid, image, weight, row, offset, count in zip(
        grids, images, weights, *tokens, strict=True
    ):
        exact = exact_program(pattern, grid, is_trained)
        features, *of_image = exact(params, image, weight)
        assert_near(results[row, offset : offset + count], features)
        if is_trained:
            assert_near(gradients[1][row, 4 * offset : 4 * (offset + count)], of_image[1])
            exact_gradients.append(of_image[0])
    if is_trained:
        assert_near(gradients[0], jax.tree.map(lambda *parts: sum(parts), *exact_gradients))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_features_and_gradients_of_any_mix_are_the_exact_ones_by_one_program(pattern):
    params = tiny_model.draw_params(config_of(pattern))
    rng = np.random.default_rng(1)
    is_trained = pattern == "one full"  # gradients of both kinds of blocks
    with compiled() as names:
        for _ in range(8):
            compare(pattern, params, rng, is_trained)
    assert names.count("encode_packed") <= 1  # none where another test had it first


def test_what_is_computed_again_is_the_same():
    params = tiny_model.draw_params(config_of("one full"))
    inputs = mix(np.random.default_rng(2), config_of("one full"))
    _, inputs = packed_inputs(config_of("one full"), *inputs)
    assert_near(
        packed_program("one full", remat="full")(params, *inputs),
        packed_program("one full")(params, *inputs),
        1e-6,
    )


def test_padding_changes_nothing_not_even_nan():
    model_config = config_of("one full")
    params = tiny_model.draw_params(model_config)
    grids, images, weights = mix(np.random.default_rng(3), model_config)
    tokens, (pixels, weights, packed) = packed_inputs(model_config, grids, images, weights)
    run = packed_program("one full")
    expected = run(params, pixels, weights, packed)
    ends = [tokens.counts[tokens.rows == row].sum() for row in range(SIZES.rows)]
    spoiled = pixels.copy()
    for row, end in enumerate(ends):
        spoiled[row, 4 * end :] = np.nan
        weights[row, end:] = 7  # tokens of padding are 0 and without gradient
    assert np.isnan(spoiled).any()
    results = run(params, spoiled, weights, packed)
    for value, other in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(value, other)
    for row, end in enumerate(ends):
        assert not np.any(results[0][row, end:])


def test_adapters_count_as_in_the_exact_program():
    settings = lora.Lora(rank=2, alpha=4.0, targets=("vision", "merger"))
    model_config = config_of("windows")
    params = {"vision": tiny_model.draw_params(model_config)}
    adapters = lora.init(params, settings, jax.random.key(1))
    # `lora_b` begins as zeros.
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    joined = lora.join(params, adapters, settings)["vision"]
    compare("windows", joined, np.random.default_rng(4), is_trained=True, pool=GRIDS[2:])


def test_queries_in_blocks_see_their_own_part_only(monkeypatch):
    rng = np.random.default_rng(5)
    queries, keys, values = (draw(rng, (2, 27, 4, 8)) for _ in range(3))
    parts = rng.integers(0, 3, (2, 27)).astype(np.int32)
    is_own = jnp.asarray(parts[:, :, None] == parts[:, None])[:, None]

    def run(attend):
        loss = jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(attend(*arrays))), (0, 1, 2))
        return jax.jit(loss, compiler_options=fast_compile.OPTIONS)(queries, keys, values)

    def by_definition(queries, keys, values):
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys) * 8**-0.5
        probabilities = jax.nn.softmax(jnp.where(is_own, scores, -jnp.inf), -1)
        return jnp.einsum("bhts,bshd->bthd", probabilities, values)

    expected = run(by_definition)
    monkeypatch.setattr(blocked, "LEAST_BLOCK", 8)
    monkeypatch.setattr(blocked, "LARGEST_BLOCK", 8)
    for kind in ("xla", "blocked"):
        in_parts = functools.partial(attentions.part_attention, jnp.asarray(parts), kind=kind)
        assert_near(run(in_parts), expected, 2e-6)


def test_the_program_does_not_grow_with_the_depth():
    def products(depth):
        model_config = dataclasses.replace(
            config_of("windows"), depth=depth, fullatt_block_indexes=tuple(range(3, depth, 4))
        )
        params = jax.eval_shape(lambda: tower_layers.init_params(model_config, None))
        packed, _ = packing.pack(model_config, [], SIZES)
        pixels = jax.ShapeDtypeStruct((*SIZES, model_config.patch_dim), "float32")
        encode = jax.jit(functools.partial(tower_packed.forward, model_config=model_config))
        return encode.lower(params, pixels=pixels, packing=packed).as_text().count("dot_general")

    assert layers.UNROLL_UP_TO < 12
    assert products(12) == products(32)
