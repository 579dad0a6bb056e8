"""A program that test_packed_images.py starts: packed films over eight fake devices are encoded as on one.

Each device makes the patches of its own rows: neither levels nor patches cross.
"""

import os

import fast_compile

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {fast_compile.FLAGS}"

import dataclasses
import re

import jax
import numpy as np
import tiny_model

from cxr_jax.models.image_batches import PackedImages
from cxr_jax.runtime.layout import Layout

ROWS, FSDP = 8, 8
CFG = dataclasses.replace(
    tiny_model.CFG,
    vision=dataclasses.replace(tiny_model.CFG.vision, depth=2, fullatt_block_indexes=(1,)),
)


def main():
    rng = np.random.default_rng(0)
    images = PackedImages(model_config=CFG, count=1, image_tokens=12, max_pixels=12 * 4**2)
    films = [
        (rng.integers(0, 256, (4 * rng.integers(1, 5), 4 * rng.integers(1, 4)), np.uint8),)
        for _ in range(ROWS)
    ]
    params = tiny_model.draw_params(CFG)
    inputs = images.inputs(films)

    def loss(params, inputs):
        tokens = images.features(params, inputs).tokens
        return (tokens**2).sum(), tokens

    gradient = jax.grad(loss, has_aux=True)
    expected = jax.jit(gradient)(params, inputs)
    layout = Layout.from_config(dict(data=1, fsdp=FSDP, tensor=1))
    step = jax.jit(gradient)
    placed = layout.state(params), layout.batch(inputs)
    got = layout.on_mesh(step)(*placed)
    for value, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # Sums over devices are added in another order: what an entry may differ by goes by the array's largest.
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-5 * np.abs(other).max())
    with jax.set_mesh(layout.mesh):
        text = step.lower(*placed).compile().as_text()
    shapes = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather\(", text)
    rows = [(kind, shape) for kind, shape in shapes if shape.startswith(f"{ROWS},{images.patches}")]
    assert not rows, rows


if __name__ == "__main__":
    assert jax.device_count() == 8
    main()
