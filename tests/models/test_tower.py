"""tower.py: a scanned tower is the unrolled one, whatever the pattern of its blocks, and its program does not grow."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from cxr_jax.models import layers
from cxr_jax.models.network import rope, tower, tower_layers

GRID = (1, 4, 6)  # windows of 4 x 4 patches, of which the second is cut
PATTERNS = {
    "all full": (4, range(4)),
    "first of two is full": (6, (0, 2, 4)),
    "a rest": (8, (2, 5)),
    "no pattern": (5, (1, 3, 4)),
}


def config_of(depth, full):
    return dataclasses.replace(
        tiny_model.CFG.vision, depth=depth, fullatt_block_indexes=tuple(full)
    )


@functools.partial(jax.jit, static_argnums=3)
def run_block(params, *inputs):
    """A block of any tower here: they are all of one shape."""
    return layers.apply(layers.graph(tower_layers.Block, config_of(1, ())), params, *inputs)


def block_by_block(params, model_config, pixels):
    """The tower in plain Python, each block by itself."""
    order, inverse, segments = tower.window_plan(model_config, *GRID[1:])
    frame = GRID[1] * GRID[2]
    units = len(order)

    def in_order(array, places):
        return array.reshape(len(array), units, -1)[:, places]

    hidden = layers.apply(
        layers.graph(tower_layers.PatchEmbed, model_config), params["patch_embed"], pixels
    )
    hidden = in_order(hidden, order).reshape(*hidden.shape)
    angles = rope.vision_angles(model_config, *GRID[1:]).reshape(units, -1)
    angles = angles[order].reshape(frame, 1, -1)
    for index in range(model_config.depth):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"])
        seen = ((1, frame),) if index in model_config.fullatt_block_indexes else segments
        hidden = run_block(own, hidden, (np.cos(angles), np.sin(angles)), seen)
    tokens = layers.apply(layers.graph(tower_layers.Merger, model_config), params["merger"], hidden)
    return tower_layers.Seen(tokens[:, inverse])


def test_what_repeats_and_what_is_left_over_are_all_blocks():
    plain, full = (tower._Kind(is_full, False) for is_full in (False, True))
    tapped = tower._Kind(True, True)
    drawn = (
        *itertools.chain.from_iterable(
            itertools.product((plain, full), repeat=depth) for depth in range(1, 11)
        ),
        *itertools.chain.from_iterable(
            itertools.product((plain, full, tapped), repeat=depth) for depth in range(1, 8)
        ),
    )
    for kinds in drawn:
        found = []
        stretches = tower._stretches(kinds)
        for stretch in stretches:
            assert stretch.first == len(found)
            period = [
                tower._Kind(run.is_full, run.is_tapped and number == run.last - 1)
                for run in stretch.runs
                for number in range(run.first, run.last)
            ]
            found += period * stretch.repeats
            assert stretch.last == len(found)
        assert tuple(found) == kinds
        written = sum(len(stretch.runs) for stretch in stretches)
        assert written <= len(tower._runs(kinds))
    # Those of the published models.
    (stretch,) = tower._stretches(((plain,) * 7 + (full,)) * 4)
    assert (stretch.repeats, len(stretch.runs)) == (4, 2)
    stretches = tower._stretches(((full,) * 5 + (tapped,)) * 3 + (full,) * 6)
    assert [(stretch.repeats, len(stretch.runs)) for stretch in stretches] == [(3, 1), (1, 1)]


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, GRID[1] * GRID[2], config_of(1, ()).patch_dim)).astype(np.float32)


def assert_near(got, want):
    for value, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(value - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", PATTERNS)
def test_any_pattern_scanned_is_block_by_block(monkeypatch, pixels, name):
    model_config = config_of(*PATTERNS[name])
    params = tiny_model.draw_params(model_config)
    monkeypatch.setattr(layers, "UNROLL_UP_TO", 0)
    got = jax.jit(lambda params: tower.forward(params, model_config, pixels, GRID))(params)
    want = jax.jit(lambda params: block_by_block(params, model_config, pixels))(params)
    assert_near(got, want)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_a_scanned_tower_are_those_block_by_block(monkeypatch, pixels, remat):
    model_config = config_of(*PATTERNS["a rest"])
    params = tiny_model.draw_params(model_config)

    def gradients(params, encode):
        loss = lambda params: jnp.sum(jnp.sin(encode(params).tokens))
        return jax.jit(jax.grad(loss))(params)

    want = gradients(params, lambda params: block_by_block(params, model_config, pixels))
    monkeypatch.setattr(layers, "UNROLL_UP_TO", 0)
    scanned = functools.partial(
        tower.forward, model_config=model_config, pixels=pixels, grid=GRID, remat=remat
    )
    assert_near(gradients(params, scanned), want)


def products(model_config, differentiated):
    """How many matrix products the tower's program writes out."""

    def encode(params, pixels):
        return tower.forward(params, model_config, pixels, GRID).tokens.sum()

    params = jax.eval_shape(lambda: tower_layers.init_params(model_config, jax.random.key(0)))
    pixels = jax.ShapeDtypeStruct((1, GRID[1] * GRID[2], model_config.patch_dim), "float32")
    step = jax.jit(jax.grad(encode) if differentiated else encode)
    return step.lower(params, pixels).as_text().count("dot_general")


@pytest.mark.parametrize("differentiated", [False, True])
def test_the_program_does_not_grow_with_the_depth(differentiated):
    counts = {
        depth: products(config_of(depth, range(3, depth, 4)), differentiated) for depth in (12, 32)
    }
    assert counts[12] == counts[32]
    # As much as one windowed block and a full one, unrolled.
    assert counts[32] == products(config_of(2, (1,)), differentiated)
