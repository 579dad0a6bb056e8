"""Images per second of the phantom renderer, batch 32: render alone, and a whole make_batch.

Use: PYTHONPATH=. python benchmarks/phantom.py [--batch 32] [--seconds 5]

Measured 2026-11-24, 2 cores of an AMD EPYC (Zen 4), jax 0.10.2: render 589, make_batch 616 images/s; with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (as launch/*.sh sets it) 708 and 747. Goal: 500.
"""

import argparse
import os
import time

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.phantom import render


def rate(step, batch: int, seconds: float) -> float:
    """Images per second of step(i) after one warm-up call (which compiles)."""
    step(0)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        n += 1
        step(n)
    return n * batch / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    b = args.batch
    keys = phantom.example_keys(0, "train", "A", np.arange(b))
    scene = jax.jit(phantom.sample_scenes, static_argnums=1)(keys, "A")
    draw = jax.jit(render)
    device = jax.devices()[0]
    print(
        f"device {device.platform}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, batch {b}"
    )
    print(
        f"render     {rate(lambda i: draw(scene).block_until_ready(), b, args.seconds):8.0f} images/s"
    )
    batch = lambda i: phantom.make_batch(0, "train", "A", np.arange(i * b, i * b + b))
    print(f"make_batch {rate(batch, b, args.seconds):8.0f} images/s")


if __name__ == "__main__":
    main()
