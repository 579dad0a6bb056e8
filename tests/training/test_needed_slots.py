"""needed_slots.py: texts in as many slots as they need move a model as texts that are padded, by one program."""

import dataclasses
import subprocess
import sys

import fast_compile
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import text_batches
import tiny_model
from places import ROOT

from cxr_jax.models import network
from cxr_jax.models.image_batches import PackedImages, SquareImages
from cxr_jax.sft import step as sft_step
from cxr_jax.training import needed_slots, optimizer
from cxr_jax.training.micro_batches import cut
from cxr_jax.training.needed_slots import RowSlots
from cxr_jax.training.trainable import Trainable

CFG = tiny_model.CFG
ROWS, WIDTH, C = 6, 24, 40
PACKED = PackedImages(model_config=CFG, count=2, image_tokens=12, max_pixels=6 * 4**2)
SQUARES = SquareImages(model_config=CFG, grid=(1, 4, 4))


def use(monkeypatch, is_short, shares=(3 / 8, 9 / 16)):
    """Three rooms for small arrays, or the one program in which every row is padded."""
    monkeypatch.setattr(needed_slots, "LEAST_SLOTS", 1 if is_short else 10**9)
    monkeypatch.setattr(needed_slots, "SHARES", shares)
    monkeypatch.setattr(needed_slots, "GRAIN", 4)


# ---- Rooms, and the order of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 91, 330, 2500])
@pytest.mark.parametrize("completion", [1, 208, 700, 1800, 4096])
def test_rooms_ascend_to_the_whole_row(width, completion):
    rooms = needed_slots.text_slots(width, completion)
    assert rooms[-1] == (width + completion, completion)
    assert rooms == sorted(rooms) and len({room.row for room in rooms}) == len(rooms)
    assert [room.completion for room in rooms] == sorted(room.completion for room in rooms)
    assert all(0 < room.completion <= min(room.row, completion) for room in rooms)
    assert (len(rooms) == 1) == (width + completion < needed_slots.LEAST_SLOTS)


def test_a_third_of_the_published_completion_is_computed_in_less_than_half_of_the_slots():
    rooms = needed_slots.text_slots(330, 1800)
    room = next(room for room in rooms if room.row >= 330 + 620 and room.completion >= 620)
    assert room.row <= 0.46 * (330 + 1800)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_rows_of_about_equal_length_meet_and_stay_on_their_device(shards):
    lengths = np.random.default_rng(shards).permutation(24)
    parts = 3
    index = np.asarray(needed_slots.order_by_length(jnp.asarray(lengths), parts, shards))
    by_device = lengths.reshape(shards, -1)
    taken = np.take_along_axis(by_device, index, 1)
    np.testing.assert_array_equal(np.sort(taken, 1), np.sort(by_device, 1))
    # Of each device a part has the next shortest.
    of_parts = np.asarray(cut({"x": jnp.asarray(taken.reshape(-1))}, parts)["x"])
    for part, rows in enumerate(of_parts):
        share = 24 // shards // parts
        want = np.sort(by_device, 1)[:, part * share : (part + 1) * share]
        np.testing.assert_array_equal(np.sort(rows), np.sort(want.reshape(-1)))


def test_the_smallest_room_that_holds_every_row_is_picked(monkeypatch):
    use(monkeypatch, True, needed_slots.SHARES)
    rooms = needed_slots.text_slots(WIDTH, C)
    assert len(rooms) == 6
    pick = jax.jit(needed_slots.pick_text_slots(lambda part, room: jnp.asarray(room)))
    rng = np.random.default_rng(0)
    picked = set()
    for _ in range(60):
        prompts = rng.integers(1, WIDTH + 1, 3)
        lengths = rng.integers(1, rng.integers(2, C + 2), 3)
        part = {"ids": np.zeros((3, WIDTH)), "lengths": prompts}
        part = {"prompts": part, "completions": np.zeros((3, C)), "lengths": lengths}
        got = RowSlots(*map(int, pick(part)))
        holds = [
            room
            for room in rooms
            if (prompts + lengths).max() <= room.row and lengths.max() <= room.completion
        ]
        assert got == holds[0]
        picked.add(got)
    assert picked == set(rooms)


# ---- The same step as of padded rows ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    model = tiny_model.draw_params(CFG)
    model["text"]["embed"]["embedding"] *= 5.0
    head = sft_step.init_locate_head(
        jax.random.key(1), CFG.text.hidden_size, sft_step.LOCATED_FINDINGS
    )
    return jax.tree.map(np.asarray, {"model": model, "locate": head})


def make_step(images, trainable, micro_batches):
    return sft_step.make_steps(
        CFG,
        optax.sgd(1.0),
        images,
        trainable,
        micro_batches=micro_batches,
        locate_weight=0.3 if images is SQUARES else 0.0,
        remat="full",
    )[1]


@pytest.mark.parametrize(
    ("images", "frozen", "micro_batches"),
    [(PACKED, (), 2), (SQUARES, (), 1), (SQUARES, ("model/vision",), 3)],
)
def test_a_step_moves_as_one_of_padded_rows(monkeypatch, params, images, frozen, micro_batches):
    trainable = Trainable(frozen_patterns=frozen)
    # Copies: a step takes over its state.
    fresh = lambda: trainable.split(params, jax.random.key(0))
    start, rest = fresh()
    moves, losses, programs = {}, {}, {}
    batches = [
        text_batches.draw(images, seed, ROWS, WIDTH, C, longest=longest)
        for seed, longest in enumerate((7, 16, C))
    ]
    for is_short in (True, False):
        use(monkeypatch, is_short)
        step = make_step(images, trainable, micro_batches)
        state = optimizer.init_state(optax.sgd(1.0), fresh()[0])
        program = step.lower(state, rest, batches[0])
        programs[is_short] = program.as_text().count("stablehlo.case")
        compiled = program.compile(fast_compile.OPTIONS)
        moves[is_short], losses[is_short] = [], []
        for batch in batches:
            state, metrics = compiled(optimizer.init_state(optax.sgd(1.0), fresh()[0]), rest, batch)
            moves[is_short].append(jax.tree.map(lambda new, old: new - old, state["params"], start))
            losses[is_short].append({name: float(value) for name, value in metrics.items()})
    # One choice in the program that all batches go through; none where rows are padded.
    assert (programs[True] > 0, programs[False]) == (True, 0)
    for got, want in zip(losses[True], losses[False], strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    for got, want in zip(moves[True], moves[False], strict=True):
        norm = optax.global_norm(want)
        gap = optax.global_norm(jax.tree.map(lambda a, b: a - b, got, want))
        assert norm > 1e-3 and gap <= 1e-5 * norm, (gap, norm)


def test_the_tower_stands_once_whatever_the_rooms(monkeypatch, params):
    def products(depth, is_short):
        use(monkeypatch, is_short, (3 / 8,))
        vision = dataclasses.replace(CFG.vision, depth=depth, fullatt_block_indexes=())
        model_config = dataclasses.replace(CFG, vision=vision)
        images = dataclasses.replace(SQUARES, model_config=model_config)
        step = sft_step.make_steps(
            model_config,
            optax.sgd(1.0),
            images,
            Trainable(),
            micro_batches=2,
            locate_weight=0.0,
            remat="none",
        )[1]
        model = jax.eval_shape(lambda: network.init_params(model_config, None))
        state = jax.eval_shape(
            lambda model: optimizer.init_state(optax.sgd(1.0), {"model": model}), model
        )
        return (
            step.lower(state, {}, text_batches.draw(SQUARES, 0, ROWS, WIDTH, C))
            .as_text()
            .count("dot_general")
        )

    of_tower = products(4, False) - products(1, False)
    assert products(4, True) - products(1, True) == of_tower


@pytest.mark.slow
def test_rooms_over_devices_in_bfloat16_and_with_adapters():
    """In a process of its own, with eight fake devices."""
    search_path = f"{ROOT}:{ROOT / 'tests/helpers'}"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "sharded_texts.py"],
        capture_output=True,
        text=True,
        env=fast_compile.environment(PYTHONPATH=search_path, JAX_PLATFORMS="cpu"),
    )
    assert done.returncode == 0, done.stderr
