"""Images per second of the phantom renderer, batch 32: render alone, and a whole make_batch.

Use: PYTHONPATH=. python benchmarks/phantom.py [--batch 32] [--seconds 5]

Measured 2026-11-24, 2 cores of an AMD EPYC (Zen 4), jax 0.10.2: render 589, make_batch 616 images/s; with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (as launch/*.sh sets it) 708 and 747. Goal: 500.
"""

import argparse
import os
import time
from collections.abc import Callable

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.phantom import render


def images_per_second(step: Callable[[int], object], batch_size: int, seconds: float) -> float:
    """Measure step(number) for so many seconds, after one call that compiles and is not counted."""
    step(0)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        number += 1
        step(number)
    return number * batch_size / (time.perf_counter() - start)


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    batch_size = args.batch
    keys = phantom.example_keys(0, "train", "A", np.arange(batch_size))
    scene = jax.jit(phantom.sample_scenes, static_argnums=1)(keys, "A")
    draw = jax.jit(render)
    device = jax.devices()[0]
    print(
        f"device {device.platform}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, batch {batch_size}"
    )

    def draw_again(number: int) -> None:
        draw(scene).block_until_ready()

    def make_next(number: int) -> None:
        first = number * batch_size
        phantom.make_batch(0, "train", "A", np.arange(first, first + batch_size))

    for name, step in (("render", draw_again), ("make_batch", make_next)):
        print(f"{name:10} {images_per_second(step, batch_size, args.seconds):8.0f} images/s")


if __name__ == "__main__":
    main()
