"""A program that test_needed_slots.py starts: SFT in rooms over eight fake devices moves a model as padded rows on one.

In float32 to 1e-5; in bfloat16, with adapters, by no more than padded rows differ from float32.
"""

import dataclasses
import os
import re

import fast_compile

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {fast_compile.FLAGS}"

import compile_counts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import text_batches
import tiny_model
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from cxr_jax.models import layers
from cxr_jax.models.image_batches import PackedImages
from cxr_jax.models.lora import Lora
from cxr_jax.runtime.layout import ONE_DEVICE, Layout
from cxr_jax.sft import step as sft_step
from cxr_jax.training import needed_slots, optimizer
from cxr_jax.training.trainable import Trainable

CFG = tiny_model.config()
IMAGES = PackedImages(model_config=CFG, count=2, image_tokens=12, max_pixels=6 * 4**2)
ROWS, WIDTH, C, PARTS = 16, 24, 40, 2
ADAPTERS = Lora(2, 4.0, ("decoder", "vision", "merger"))
FSDP, ALL_AXES = ({"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2})
# All rows short; long rows of short answers; all lengths.
BATCHES = [
    text_batches.draw(IMAGES, seed, ROWS, WIDTH, C, longest=longest)
    for seed, longest in enumerate((9, 18, C))
]


def model():
    params = tiny_model.draw_params(CFG, seed=1)
    # Sharp distributions: a wrong key or position changes much.
    params["text"]["embed"]["embedding"] *= 5.0
    return {"model": jax.tree.map(np.asarray, params)}


def move(trainable, layout, is_short, is_wide=False):
    """[(the gradient, metrics)] of the batches, by one program."""
    # Two rooms for small arrays, or the one program in which every row is padded.
    needed_slots.LEAST_SLOTS = 1 if is_short else 10**9
    needed_slots.SHARES, needed_slots.GRAIN = (3 / 8,), 4
    start, frozen = trainable.split(model(), jax.random.key(0))
    if trainable.adapters:
        # b is zero in fresh adapters, and with it the gradient of a.
        start["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, start["lora"])
    descent = optax.sgd(1.0)
    model_config = CFG.with_wide_gradients(is_wide)
    step = sft_step.make_steps(
        model_config,
        descent,
        dataclasses.replace(IMAGES, model_config=model_config),
        trainable,
        micro_batches=PARTS,
        locate_weight=0.0,
        remat="none",
    )[1]
    moves = []
    with compile_counts.compiled() as programs:
        for batch in BATCHES:
            state = optimizer.init_state(descent, jax.tree.map(jnp.copy, start))
            after, metrics = layout.on_mesh(step)(
                layout.state(state), layout.state(frozen), layout.batch(batch)
            )
            gradient = jax.tree.map(
                lambda a, b: np.asarray(a) - np.asarray(b), start, after["params"]
            )
            moves.append((gradient, {name: float(value) for name, value in metrics.items()}))
    assert programs.count("joint") == 1, programs
    return moves


def norm(tree):
    return float(optax.global_norm(tree))


def gap(got, want):
    return norm(jax.tree.map(lambda a, b: a - b, got, want)) / norm(want)


def check_float32():
    trainable = Trainable()
    wanted = move(trainable, ONE_DEVICE, is_short=False)
    moves = move(trainable, Layout.from_config(ALL_AXES), is_short=True)
    for (got, metrics), (want, expected) in zip(moves, wanted, strict=True):
        assert norm(want) > 1e-3 and gap(got, want) <= 1e-5, gap(got, want)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def check_adapters_in_bfloat16():
    narrow = Trainable(adapters=ADAPTERS, dtype=jnp.bfloat16)
    exact = move(Trainable(adapters=ADAPTERS), ONE_DEVICE, is_short=False)
    padded_rows = move(narrow, ONE_DEVICE, is_short=False)
    moves = move(narrow, Layout.from_config(FSDP), is_short=True, is_wide=True)
    for (got, metrics), (padded, expected), (want, _) in zip(
        moves, padded_rows, exact, strict=True
    ):
        rounding = gap(padded, want)
        assert 1e-4 < rounding < 0.05, rounding
        # As far from float32 as padded rows are, and no farther from those.
        assert gap(got, want) <= 1.5 * rounding and gap(got, padded) <= 1.5 * rounding
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-3)


def check_sums_of_gradients():
    """Of a layer in bfloat16, rows over the devices: those of its weights in float32 where the config says so."""
    rng = np.random.default_rng(0)
    inputs, pulls = (rng.normal(size=(64, 32, 16)).astype(jnp.bfloat16) for _ in range(2))
    exact = [np.asarray(value, np.float64).reshape(-1, 16) for value in (inputs, pulls)]
    wanted = {"kernel": exact[0].T @ exact[1], "bias": exact[1].sum(0)}
    params = {"kernel": np.eye(16, dtype=np.float32), "bias": np.zeros(16, np.float32)}
    layout = Layout.from_config(FSDP)
    placed = jax.device_put(
        (inputs, pulls), NamedSharding(layout.mesh, PartitionSpec(("data", "fsdp")))
    )
    errors, widths = {}, {}
    for is_wide in (False, True):
        settings = CFG.with_wide_gradients(is_wide).text
        linear = layers.graph(_OneLinear, settings)

        def loss(params, inputs, pulls, linear=linear):
            outputs = layers.apply(linear, {"linear": params}, inputs)
            return (outputs * pulls).astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss))
        got = layout.on_mesh(program)(params, *placed)
        errors[is_wide] = {name: np.abs(got[name] - wanted[name]).max() for name in wanted}
        with jax.set_mesh(layout.mesh):
            text = program.lower(params, *placed).as_text()
        widths[is_wide] = re.findall(r"dot_general.*-> tensor<16x16x(\w+)>", text)
    assert (widths[False], widths[True]) == (["bf16"], ["f32"]), widths
    for name in wanted:
        assert errors[True][name] < 1e-3 < 0.03 < errors[False][name], (name, errors)


class _OneLinear(nnx.Module):
    def __init__(self, _settings, *, rngs):
        self.linear = layers.Linear(16, 16, bias=True, rngs=rngs)

    def __call__(self, inputs):
        return self.linear(inputs)


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_sums_of_gradients()
    check_float32()
    check_adapters_in_bfloat16()
