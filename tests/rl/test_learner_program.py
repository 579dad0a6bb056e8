"""learner.py: the tower stands once in the update's program, however deep it is and however many lengths there are."""

import dataclasses

import jax
import pytest
import tiny_model

from cxr_jax.config import schema
from cxr_jax.config.sections import RunConfig
from cxr_jax.inference import compaction
from cxr_jax.models import network
from cxr_jax.models.image_batches import SquareImages
from cxr_jax.planning.programs import abstract_array
from cxr_jax.rl import learner
from cxr_jax.training import optimizer
from cxr_jax.training.trainable import Trainable

SIDE, P, G, C, WIDTH = 56, 4, 2, 12, 20
GRID = (1, 4, 4)


def config_of(depth):
    full = tuple(range(3, depth, 4))
    vision = dataclasses.replace(
        tiny_model.CFG.vision,
        depth=depth,
        fullatt_block_indexes=full,
        patch_size=14,
        window_size=28,
    )
    return dataclasses.replace(tiny_model.CFG, vision=vision)


def products(depth, **settings):
    """How many matrix products the update's program writes out."""
    model_config = config_of(depth)
    config = schema.defaults("rl", "phantom")
    config.max_completion = C
    config.rl.update(prompts_per_step=P, oversample=1, group_size=G, micro_batches=2)
    config.update_from_flattened_dict(settings)
    run = RunConfig.from_config(config)
    trainable = Trainable.create(run.lora, run.optim.frozen, run.dtype, run.param_dtype)
    updates = optimizer.make_optimizer(run.optim, 1)

    def make_state(key):
        train, frozen = trainable.split({"model": network.init_params(model_config, key)}, key)
        return optimizer.init_state(updates, train), frozen

    state, frozen = jax.eval_shape(make_state, jax.random.key(0))
    batch = {
        "image": abstract_array((P, SIDE, SIDE)),
        "prompts": {
            "ids": abstract_array((P, WIDTH), "int32"),
            "lengths": abstract_array((P,), "int32"),
            "positions": abstract_array((3, P, WIDTH + C), "int32"),
        },
    }
    samples = {
        "tokens": abstract_array((P, G, C), "int32"),
        "mask": abstract_array((P, G, C), "bool"),
        "train_mask": abstract_array((P, G, C), "bool"),
        "lengths": abstract_array((P, G), "int32"),
        "sampler_log_probs": abstract_array((P, G, C)),
        "advantages": abstract_array((P, G)),
        "kept": abstract_array((P,), "int32"),
    }
    learn = learner.make_learn(
        run.learner,
        run.loss,
        model_config,
        SquareImages(model_config=model_config, grid=GRID),
        {"suppress": ()},
        updates,
        trainable,
        max_completion=C,
        remat=run.remat,
    )
    return learn.lower(state, frozen, batch, samples).as_text().count("dot_general")


@pytest.fixture
def lengths(monkeypatch):
    """Say how many lengths a micro-batch's program is compiled for."""

    def set_lengths(count):
        monkeypatch.setattr(compaction, "SHORTEST", 2 if count > 1 else C + 1)
        monkeypatch.setattr(compaction, "GRAIN", 1)
        monkeypatch.setattr(compaction, "ENDS", [i / count for i in range(1, count)])
        assert len(compaction.stage_ends(C)) == count

    return set_lengths


def test_the_tower_stands_in_the_update_once(lengths):
    lengths(1)
    shallow, deep, deeper = map(products, (1, 12, 24))
    assert deep == deeper
    lengths(4)
    # What a length adds is the decoder's, whatever the tower.
    assert products(12) - deep == products(1) - shallow


def products_of_tower(depth):
    """(forward, with the gradient of its parameters): those of the tower alone."""
    model_config = config_of(depth)

    def encode(tower, pixels):
        return network.vision({"vision": tower}, model_config, pixels, GRID).tokens.sum()

    tower = jax.eval_shape(lambda: network.init_params(model_config, None))["vision"]
    pixels = abstract_array((P // 2, GRID[1] * GRID[2], model_config.vision.patch_dim))
    return [
        jax.jit(step).lower(tower, pixels).as_text().count("dot_general")
        for step in (encode, jax.value_and_grad(encode))
    ]


def test_a_frozen_tower_is_not_differentiated(lengths):
    lengths(2)
    forward, both = products_of_tower(12)
    frozen = products(12, **{"optim.frozen": ("model/vision",)})
    assert products(12) - frozen == both - forward
    # Adapters of the decoder ask no gradient of the image either: another tower costs what it costs to run.
    adapters = {"lora.rank": 2, "lora.targets": ("decoder",)}
    added = products(12, **adapters) - products(1, **adapters)
    assert added == forward - products_of_tower(1)[0]
