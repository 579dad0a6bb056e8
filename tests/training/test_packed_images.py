"""Films in their own aspect ratio: pixels everywhere, features, gradients, one program a step.

The oracle of features and gradients encodes each film alone, by a program of its exact shape.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from compile_counts import compiled
from PIL import Image as PilImage
from places import ROOT

from cxr_jax.config.sections import RunConfig
from cxr_jax.data import resize
from cxr_jax.errors import UserError
from cxr_jax.inference.model import Model
from cxr_jax.models import image_batches, network, registry
from cxr_jax.models.image_batches import PackedImages
from cxr_jax.models.network.tower import Seen
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.presets import rl as presets_rl
from cxr_jax.rl import learner
from cxr_jax.sft import step as sft_step
from cxr_jax.training import optimizer
from cxr_jax.training.trainable import Trainable

LIMITS = 16384, 476**2
# One windowed block and one that sees all; windows of 2 x 2 tokens, so that films have whole and cut ones.
CFG = dataclasses.replace(
    tiny_model.CFG,
    vision=dataclasses.replace(tiny_model.CFG.vision, depth=2, fullatt_block_indexes=(1,)),
)
ROWS, G, C, WIDTH = 2, 2, 6, 40
TOKENS = 24  # of the films of a row
IMAGES = PackedImages(model_config=CFG, count=2, image_tokens=TOKENS, max_pixels=12 * 4**2)


@pytest.fixture
def names():
    """The jitted functions of which a program was compiled so far in a test."""
    with compiled() as names:
        yield names


def draw_films(rng):
    """Of each row one or two films of sizes that nothing else has, levels uint8 [h, w]."""
    rows = []
    for row in range(ROWS):
        sizes = [(int(rng.integers(1, 5)), int(rng.integers(1, 4))) for _ in range(2 - row)]
        rows.append(tuple(rng.integers(0, 256, (4 * h, 4 * w), np.uint8) for h, w in sizes))
    return rows


# ---- Pixels --------------------------------------------------------------------------------------------------


def test_200_films_are_the_processor_s_bit_for_bit_in_training_evaluation_and_inference(tmp_path):
    from transformers import Qwen2VLImageProcessorPil

    reference = Qwen2VLImageProcessorPil()
    size = dict(zip(("shortest_edge", "longest_edge"), LIMITS, strict=True))
    settings = PROCESSOR.settings(*LIMITS)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = Model(PHANTOM, {}, folder=tmp_path)
    native = resize.NativeSize(PROCESSOR, *LIMITS)
    images = PackedImages(model_config=PHANTOM, count=1, image_tokens=289, max_pixels=LIMITS[1])
    normalise = jax.jit(PROCESSOR.normalise)
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(60), np.log(900), 2)))
        if max(height, width) > 2.5 * min(height, width):
            height = width
        film = rng.integers(0, 256, (height, width), np.uint8)
        want = reference([PilImage.fromarray(film)], size=size)
        [grid] = want["image_grid_thw"]
        levels = native.levels(film / np.float32(255))
        # What the host sends for training and evaluation, and what their program makes of it.
        inputs = images.inputs([(levels,)])["images"]
        made = np.asarray(normalise(inputs["levels"]))[0]
        count = int(np.prod(grid))
        assert images.grids([(levels,)]) == [[tuple(grid)]]
        np.testing.assert_array_equal(made[:count], want["pixel_values"])
        patches, own_grid = model.prepare(PilImage.fromarray(film))
        assert own_grid == tuple(grid)
        np.testing.assert_array_equal(patches, want["pixel_values"])


def test_rows_show_the_films_that_they_were_made_of():
    films = draw_films(np.random.default_rng(3))
    inputs = IMAGES.inputs(films)
    for row in range(ROWS):
        np.testing.assert_array_equal(IMAGES.picture(inputs, row), IMAGES.shown(films, row))


def test_films_beyond_the_room_are_one_line_with_the_row():
    films = [(np.zeros((8, 8), np.uint8),), (np.zeros((4, 4 * 25), np.uint8),)]
    with pytest.raises(UserError) as refused:
        IMAGES.inputs(films, ["a", "b"])
    assert str(refused.value) == (
        "row b: its film is 25 image tokens, more than config.data.image_tokens=24 leaves room for"
    )


def test_films_up_to_the_usual_ratio_always_fit():
    images = PackedImages(model_config=PHANTOM, count=2, image_tokens=578, max_pixels=476**2)
    rng = np.random.default_rng(1)
    for _ in range(300):
        ratio = np.exp(rng.uniform(-np.log(2.5), np.log(2.5), 2))
        grids = [
            PROCESSOR.grid(*PROCESSOR.resized(round(1500 * r**0.5), round(1500 / r**0.5), *LIMITS))
            for r in ratio
        ]
        images.check_room(grids, "any")


# ---- Features and gradients ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ExactImages:
    """Films encoded one by one, by programs of their exact shapes; each row of a batch names its own."""

    films: list
    names = ("images",)

    def inputs(self):
        return {"images": {"which": jnp.arange(len(self.films))}}

    def features(self, params, part, *, remat="none", dtype=jnp.float32):
        processor = registry.processor_of(CFG)
        room = IMAGES.patches // CFG.vision.merge_unit

        def encode(films):
            seen = [
                network.vision(
                    params,
                    CFG,
                    processor.normalise(processor.cut(film))[None],
                    processor.grid(*film.shape),
                    dtype=dtype,
                ).tokens[0]
                for film in films
            ]
            tokens = jnp.concatenate(seen)
            return jnp.pad(tokens, ((0, room - len(tokens)), (0, 0)))

        branches = [functools.partial(encode, films) for films in self.films]
        return Seen(
            jax.lax.map(lambda which: jax.lax.switch(which, branches), part["images"]["which"])
        )


def draw_prompts(rng, films):
    ids = rng.integers(2, 20, (ROWS, WIDTH)).astype(np.int32)
    lengths = np.zeros(ROWS, np.int32)
    positions = np.ones((3, ROWS, WIDTH + C), np.int32)
    for row, grids in enumerate(IMAGES.grids(films)):
        tokens = [2, 3]
        for grid in grids:
            tokens += [22, *[20] * (grid[1] * grid[2] // 4), 23]
        tokens += [4, 5]
        ids[row, : len(tokens)] = tokens
        lengths[row] = len(tokens)
        line = np.asarray([*tokens, *[2] * C])[None]
        positions[:, row, : line.shape[1]] = network.positions(CFG, line, grids)[:, 0]
    return {"ids": ids, "lengths": lengths, "positions": positions}


def gradients_of(made, before):
    return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), before, made)


def assert_same_move(one, other, params):
    moves = [gradients_of(state["params"]["model"], params) for state in (one, other)]
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(moves[1])))
    gap = np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, moves), strict=True))
    )
    assert norm > 1e-3 and gap <= 1e-5 * norm, (gap, norm)
    # Not of the decoder alone.
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moves[1]["vision"])) > 1e-6


@pytest.fixture(scope="module")
def params():
    params = tiny_model.draw_params(CFG)
    params["text"]["embed"]["embedding"] *= 5.0
    return jax.tree.map(np.asarray, params)


def fresh(params):
    return optimizer.init_state(optax.sgd(1.0), {"model": jax.tree.map(jnp.array, params)})


def draw_sft(rng, films):
    mask = np.arange(C) < rng.integers(2, C + 1, ROWS)[:, None]
    return {
        "prompts": draw_prompts(rng, films),
        "completions": rng.integers(2, 20, (ROWS, C)).astype(np.int32),
        "lengths": mask.sum(1).astype(np.int32),
        "mask": mask,
    }


def test_an_sft_step_moves_as_films_that_are_encoded_alone_by_one_program(params, names):
    def make(images):
        return sft_step.make_steps(
            CFG,
            optax.sgd(1.0),
            images,
            Trainable(),
            micro_batches=2,
            locate_weight=0.0,
            remat="none",
        )[1]

    packed, rng = make(IMAGES), np.random.default_rng(0)
    for number in range(3):
        films = draw_films(rng)
        batch = draw_sft(rng, films)
        state, metrics = packed(fresh(params), {}, {**batch, **IMAGES.inputs(films)})
        if number:  # once is enough for the dear comparison
            continue
        exact = ExactImages(films)
        expected, told = make(exact)(fresh(params), {}, {**batch, **exact.inputs()})
        assert float(metrics["loss"]) == pytest.approx(float(told["loss"]), rel=1e-5)
        assert_same_move(state, expected, params)
    assert names.count("joint") == 2  # and one of the exact shapes


def test_the_learner_moves_as_films_that_are_encoded_alone_by_one_program(params, names):
    config = presets_rl.get_config()
    config.max_completion = C
    config.rl.update(dict(prompts_per_step=ROWS, oversample=1, group_size=G, micro_batches=2))
    run = RunConfig.from_config(config)

    def make(images):
        return learner.make_learn(
            run.learner,
            run.loss,
            CFG,
            images,
            {"suppress": ()},
            optax.sgd(1.0),
            Trainable(),
            max_completion=C,
            remat="none",
        )

    packed, rng = make(IMAGES), np.random.default_rng(4)
    for number in range(2):
        films = draw_films(rng)
        batch = {"prompts": draw_prompts(rng, films)}
        mask = np.arange(C) < rng.integers(2, C + 1, (ROWS, G))[:, :, None]
        samples = {
            "tokens": rng.integers(2, 20, (ROWS, G, C)).astype(np.int32),
            "mask": mask,
            "train_mask": mask,
            "lengths": mask.sum(2).astype(np.int32),
            "sampler_log_probs": np.full((ROWS, G, C), -3.0, np.float32),
            "advantages": rng.normal(0, 1, (ROWS, G)).astype(np.float32),
            "kept": np.arange(ROWS),
        }
        state, metrics = packed(fresh(params), {}, {**batch, **IMAGES.inputs(films)}, samples)
        if number:
            continue
        exact = ExactImages(films)
        expected, told = make(exact)(fresh(params), {}, {**batch, **exact.inputs()}, samples)
        assert float(metrics["entropy"]) == pytest.approx(float(told["entropy"]), rel=1e-5)
        assert_same_move(state, expected, params)
    assert names.count("learn") == 2


def test_logits_are_those_of_films_that_are_encoded_alone(params):
    films = draw_films(np.random.default_rng(7))
    prompts = draw_prompts(np.random.default_rng(8), films)
    mask = np.arange(WIDTH) < prompts["lengths"][:, None]

    @functools.partial(jax.jit, static_argnames="images")
    def logits(inputs, images):
        features = images.features(params, inputs)
        hidden = network.hidden_states(
            params, CFG, prompts["ids"], mask, prompts["positions"][:, :, :WIDTH], features=features
        )
        return network.unembed(params, CFG, hidden)

    exact = ExactImages(films)
    got, want = logits(IMAGES.inputs(films), IMAGES), logits(exact.inputs(), exact)
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-5 * float(np.std(want[mask])))


def test_what_a_source_gives_is_picked_and_blanked_as_it_is():
    films = draw_films(np.random.default_rng(9))
    assert image_batches.images_of({"images": films, "solution": 0}) is films
    assert [row[0].shape for row in image_batches.pick(films, [1, 0])] == [
        films[1][0].shape,
        films[0][0].shape,
    ]
    grey = image_batches.blank(films, 0.5)
    shapes = [[[film.shape for film in row] for row in rows] for rows in (grey, films)]
    assert shapes[0] == shapes[1]
    assert all((film == 128).all() for row in grey for film in row)
    squares = np.random.default_rng(0).random((3, 8, 8), np.float32)
    assert (image_batches.blank(squares, 0.5) == np.full((3, 8, 8), 0.5)).all()


@pytest.mark.slow
def test_packed_films_over_devices():
    """In a process of its own, with eight fake devices: the same tokens and gradients, and no pixels that cross."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "sharded_films.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/helpers'}"},
    )
    assert done.returncode == 0, done.stderr
