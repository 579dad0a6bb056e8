"""Textures that are cheap per image: a small bank of branching trees, smooth noise and hashed pixel noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.phantom.constants import SIZE

TREE = 96  # side of one tree texture
TREES = 24
# a tree texture covers this window of one half of the chest (distance from midline, height), body units
TREE_X = (0.04, 0.72)
TREE_V = (-0.80, 0.62)


def _segments(rng, root, angle, length, width, depth, out):
    """Grow one branch: a few bent steps, then two children, thinner and shorter."""
    x, y = root
    for _ in range(3):
        angle += rng.normal(0, 0.13)
        nx, ny = x + np.cos(angle) * length / 3, y + np.sin(angle) * length / 3
        out.append((x, y, nx, ny, width))
        x, y, width = nx, ny, width * 0.93
    if depth:
        spread = rng.uniform(0.25, 0.55)
        _segments(
            rng,
            (x, y),
            angle + spread,
            length * rng.uniform(0.65, 0.85),
            width * 0.72,
            depth - 1,
            out,
        )
        _segments(
            rng,
            (x, y),
            angle - spread,
            length * rng.uniform(0.65, 0.85),
            width * 0.8,
            depth - 1,
            out,
        )


def _raster(segments):
    """Draw segments as soft tubes, the brightest wins; float32 [TREE, TREE] in 0..1."""
    xs = TREE_X[0] + (TREE_X[1] - TREE_X[0]) * np.arange(TREE) / (TREE - 1)
    vs = TREE_V[0] + (TREE_V[1] - TREE_V[0]) * np.arange(TREE) / (TREE - 1)
    px, py = xs[None, :], vs[:, None]
    canvas = np.zeros((TREE, TREE), np.float32)
    for x0, y0, x1, y1, w in segments:
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((px - x0) * dx + (py - y0) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
        d2 = (px - x0 - t * dx) ** 2 + (py - y0 - t * dy) ** 2
        # thin tubes keep a drawable radius and lose brightness instead
        radius = max(w, 0.008)
        canvas = np.maximum(canvas, (w / 0.022) ** 0.8 * np.exp(-d2 / (radius * radius)))
    return np.minimum(canvas, 1.0)


@functools.lru_cache(maxsize=1)
def tree_bank() -> np.ndarray:
    """float32 [TREES, TREE, TREE]: vessel trees of one lung, hilum near the midline; always the same."""
    bank = []
    for i in range(TREES):
        rng = np.random.default_rng(7000 + i)
        out = []
        for angle in np.linspace(-1.25, 1.35, 6) + rng.normal(0, 0.12, 6):
            root = (0.15 + rng.normal(0, 0.01), 0.0 + 0.06 * angle + rng.normal(0, 0.015))
            reach = 0.19 if angle < -0.6 or 0.2 > angle > -0.3 else 0.22
            _segments(rng, root, angle, reach, rng.uniform(0.017, 0.024), 3, out)
        bank.append(_raster(out))
    return np.stack(bank).astype(np.float32)


def hat(position: jax.Array, n: int) -> jax.Array:
    """Linear-interpolation weights [..., n] of real positions in 0..n-1 (0 outside)."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(n, dtype=jnp.float32)))


@functools.lru_cache(maxsize=8)
def _upsampler(n: int) -> np.ndarray:
    """Cubic B-spline upsampling matrix [SIZE, n], scaled so unit noise keeps about unit variance."""
    t = np.abs((np.arange(SIZE)[:, None] + 0.5) / SIZE * (n - 1) - np.arange(n)[None, :])
    w = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0))
    return (w / np.sqrt((w**2).sum(1, keepdims=True).mean())).astype(np.float32)


def smooth_noise(seed: jax.Array, n: int) -> jax.Array:
    """Smooth unit-variance noise float32 [SIZE, SIZE] from an n x n grid of normal numbers."""
    up = jnp.asarray(_upsampler(n))
    return up @ pixel_noise(seed, n) @ up.T


def pixel_noise(seed: jax.Array, n: int = SIZE) -> jax.Array:
    """About normal, unit-variance white noise [n, n] from a uint32 seed: one integer hash a pixel."""
    h = jnp.arange(n * n, dtype=jnp.uint32).reshape(n, n) * jnp.uint32(0x9E3779B1)
    h = (h ^ seed) * jnp.uint32(0x7FEB352D) + (seed >> 7)
    h = h ^ (h >> 15)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
    # the sum of four independent bytes is close enough to a normal number for detector noise
    total = (h & 255) + ((h >> 8) & 255) + ((h >> 16) & 255) + (h >> 24)
    return (total.astype(jnp.float32) - 510.0) * (1.0 / 147.8)
