"""The vision tower on packed films of mixed sizes beside as many patches in squares: forward, and with the gradient.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/packed_vision.py [--shape small] [--films 16] [--rows 4]

Films have the five sizes of CheXpert and MIMIC that are commonest, each prepared as the published recipe does (at most
476 x 476 pixels by area). Squares are of 476 x 476, by the program of one size (`vision.forward`); times are a patch of
an image, so that what packing leaves empty counts against it. Both run in turns; the ratio is the median of ratios.

The goal is a ratio of at most 1.15; it is missed. 2026-11-30, 2 cores of an AMD EPYC, jax 0.10.2, --shape tiny, 16
films of 16,116 patches; microseconds a patch, packed and squares; the first row by commit 6eb957b, the second before
angles were looked up:

    --rows 16 (a film a row, as training has them; 1.160 slots a patch) forward 25.0, 17.4: 1.42  gradient 84, 69: 1.23
    --rows 4 (1.076 slots a patch)                                      forward 71.2, 27.9: 2.55  gradient 204, 81: 2.50

Every row attends to all of its slots in the layers without windows, so longer rows cost more than the slots they save.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import _common as common
import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models.network import packing, tower, tower_layers, tower_packed
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR

FILMS = ((2544, 3056), (2500, 2048), (2828, 2320), (390, 320), (2022, 2022))  # pixels, h x w
SQUARE = (1, 34, 34)


def film_grids(count: int) -> list[tuple[int, int, int]]:
    """The grids of so many films, of each size as many."""
    sides = [PROCESSOR.resized(*film, 128**2, 476**2) for film in FILMS]
    grids = [
        (1, height // PROCESSOR.patch_size, width // PROCESSOR.patch_size)
        for height, width in sides
    ]
    return [grids[number % len(grids)] for number in range(count)]


def least_row(
    model_config: VisionConfig, grids: list[tuple[int, int, int]], rows: int
) -> packing.PackSizes:
    """The smallest rows into which these films go: what a run would choose for its data."""
    patches_of_row = sum(height * width for _, height, width in grids) // rows // 64 * 64
    while True:
        sizes = packing.PackSizes(rows, patches_of_row)
        try:
            packing.pack(model_config, grids, sizes)
        except UserError:
            patches_of_row += 16
        else:
            return sizes


def seconds(step: Callable, *arguments: object) -> float:
    """The time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


def with_gradient(encode: Callable) -> Callable:
    """The program of the parameters' gradient."""

    def total(params: dict, *arguments: object) -> jax.Array:
        return jnp.sin(encode(params, *arguments).astype(jnp.float32)).sum()

    return jax.grad(total)


def main() -> None:
    """Print a row a program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=("tiny", "small", "3b"), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    model_config = common.config(options.shape).vision
    params = jax.jit(tower_layers.init_params, static_argnums=0)(model_config, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)
    grids = film_grids(options.films)
    sizes = least_row(model_config, grids, options.rows)
    start = time.perf_counter()
    packed, _ = packing.pack(model_config, grids, sizes)
    host = time.perf_counter() - start

    film_patches = sum(height * width for _, height, width in grids)
    squares = round(film_patches / (34 * 34))
    rng = np.random.default_rng(0)
    pixels, square_pixels = (
        jnp.asarray(rng.normal(size=(*shape, model_config.patch_dim)), options.dtype)
        for shape in (sizes, (squares, 34 * 34))
    )
    print(
        f"{options.films} films, {film_patches:,} patches, in {sizes.rows} rows of {sizes.patches:,} "
        f"({sizes.rows * sizes.patches / film_patches:.3f} slots a patch; packed in {host * 1e3:.1f} ms); "
        f"{squares} squares",
        flush=True,
    )

    settings = {"remat": options.remat, "dtype": options.dtype}

    def encode_packed(params: dict, pixels: jax.Array, packed: packing.Packing) -> jax.Array:
        return tower_packed.forward(params, model_config, pixels, packed, **settings).tokens

    def encode_squares(params: dict, pixels: jax.Array) -> jax.Array:
        return tower.forward(params, model_config, pixels, SQUARE, **settings).tokens

    for name, change in (("forward", lambda encode: encode), ("gradient", with_gradient)):
        ours = functools.partial(jax.jit(change(encode_packed)), params, pixels, packed)
        square = functools.partial(jax.jit(change(encode_squares)), params, square_pixels)
        seconds(ours), seconds(square)  # compiled
        times = [(seconds(ours), seconds(square)) for _ in range(options.rounds)]
        a_patch = [
            (packed_time / film_patches, square_time / (squares * 34 * 34))
            for packed_time, square_time in times
        ]
        ratio = statistics.median(packed_time / square for packed_time, square in a_patch)
        packed_time, square_time = (
            1e6 * statistics.median(column) for column in zip(*a_patch, strict=True)
        )
        print(
            f"{name:10} packed {packed_time:8.2f} us a patch   squares {square_time:8.2f}   ratio {ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
