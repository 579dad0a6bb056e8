"""Textures that are cheap per image: a small bank of branching trees, smooth noise and hashed pixel noise."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.phantom.constants import SIZE

TREE = 96  # side of one tree texture
TREES = 24
# A tree texture covers this window of one half of the chest (distance from midline, height), body units.
TREE_LATERAL = (0.04, 0.72)
TREE_DOWN = (-0.80, 0.62)


class _Segment(NamedTuple):
    """A straight piece of a vessel, in body units."""

    start_x: float
    start_y: float
    end_x: float
    end_y: float
    width: float


# ---- Vessel trees ----------------------------------------------------------------------------------


def _grow(
    rng: np.random.Generator,
    root: tuple[float, float],
    angle: float,
    length: float,
    width: float,
    generations: int,
) -> list[_Segment]:
    """One branch: a few bent steps, then two children, thinner and shorter, for so many generations."""
    segments = []
    x, y = root
    for _ in range(3):
        angle += rng.normal(0, 0.13)
        end_x, end_y = x + np.cos(angle) * length / 3, y + np.sin(angle) * length / 3
        segments.append(_Segment(x, y, end_x, end_y, width))
        x, y, width = end_x, end_y, width * 0.93
    if generations:
        spread = rng.uniform(0.25, 0.55)
        # The first child is drawn with all of its own children before the second: the bank depends on this order.
        for turn, thinning in ((spread, 0.72), (-spread, 0.8)):
            child_length = length * rng.uniform(0.65, 0.85)
            segments += _grow(
                rng, (x, y), angle + turn, child_length, width * thinning, generations - 1
            )
    return segments


def _raster(segments: list[_Segment]) -> np.ndarray:
    """Draw segments as soft tubes, the brightest wins; float32 [TREE, TREE] in 0..1."""
    lateral = TREE_LATERAL[0] + (TREE_LATERAL[1] - TREE_LATERAL[0]) * np.arange(TREE) / (TREE - 1)
    down = TREE_DOWN[0] + (TREE_DOWN[1] - TREE_DOWN[0]) * np.arange(TREE) / (TREE - 1)
    canvas = np.zeros((TREE, TREE))
    for start_x, start_y, end_x, end_y, width in segments:
        # Thin tubes keep a drawable radius and lose brightness instead.
        radius = max(width, 0.008)
        # Beyond this exp(-distance^2 / radius^2) is 0 in float32.
        reach = 10.3 * radius
        columns = _within(lateral, min(start_x, end_x) - reach, max(start_x, end_x) + reach)
        rows = _within(down, min(start_y, end_y) - reach, max(start_y, end_y) + reach)
        pixel_x, pixel_y = lateral[None, columns], down[rows, None]
        step_x, step_y = end_x - start_x, end_y - start_y
        # How far along the segment the point nearest to each pixel is.
        along = (pixel_x - start_x) * step_x + (pixel_y - start_y) * step_y
        along = np.clip(along / (step_x * step_x + step_y * step_y + 1e-9), 0, 1)
        squared_offset = (pixel_x - start_x - along * step_x) ** 2
        squared_offset = squared_offset + (pixel_y - start_y - along * step_y) ** 2
        tube = (width / 0.022) ** 0.8 * np.exp(-squared_offset / (radius * radius))
        canvas[rows, columns] = np.maximum(canvas[rows, columns], tube)
    return np.minimum(canvas, 1.0)


def _within(places: np.ndarray, lowest: float, highest: float) -> slice:
    return slice(*np.searchsorted(places, (lowest, highest)))


@functools.lru_cache(maxsize=1)
def tree_bank() -> np.ndarray:
    """Draw the bank, float32 [TREES, TREE, TREE]: vessel trees of one lung, hilum near the midline; always the same."""
    bank = []
    for number in range(TREES):
        rng = np.random.default_rng(7000 + number)
        segments: list[_Segment] = []
        for angle in np.linspace(-1.25, 1.35, 6) + rng.normal(0, 0.12, 6):
            root = (0.15 + rng.normal(0, 0.01), 0.0 + 0.06 * angle + rng.normal(0, 0.015))
            is_short = angle < -0.6 or 0.2 > angle > -0.3
            length = 0.19 if is_short else 0.22
            segments += _grow(rng, root, angle, length, rng.uniform(0.017, 0.024), 3)
        bank.append(_raster(segments))
    return np.stack(bank).astype(np.float32)


# ---- Interpolation and noise -----------------------------------------------------------------------


def hat(position: jax.Array, count: int) -> jax.Array:
    """Give linear-interpolation weights [..., count] of real positions in 0..count-1 (0 outside)."""
    distance = jnp.abs(position[..., None] - jnp.arange(count, dtype=jnp.float32))
    return jnp.maximum(0.0, 1.0 - distance)


@functools.lru_cache(maxsize=8)
def _upsampler(count: int, side: int) -> np.ndarray:
    """Cubic B-spline upsampling matrix [side, count], scaled so unit noise keeps about unit variance."""
    places = (np.arange(side)[:, None] + 0.5) / side * (count - 1)
    distance = np.abs(places - np.arange(count)[None, :])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance) ** 3 / 6
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return (weights / np.sqrt((weights**2).sum(1, keepdims=True).mean())).astype(np.float32)


def smooth_noise(seed: jax.Array, count: int, side: int = SIZE) -> jax.Array:
    """Draw smooth unit-variance noise float32 [side, side] from a count x count grid of normal numbers."""
    upsampler = jnp.asarray(_upsampler(count, side))
    return upsampler @ pixel_noise(seed, count) @ upsampler.T


def pixel_noise(seed: jax.Array, count: int = SIZE) -> jax.Array:
    """Draw about normal, unit-variance white noise [count, count] from a uint32 seed: one integer hash a pixel."""
    places = jnp.arange(count * count, dtype=jnp.uint32).reshape(count, count)
    bits = places * jnp.uint32(0x9E3779B1)
    bits = (bits ^ seed) * jnp.uint32(0x7FEB352D) + (seed >> 7)
    bits = bits ^ (bits >> 15)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    # The sum of four independent bytes is close enough to a normal number for detector noise.
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + (bits >> 24)
    return (total.astype(jnp.float32) - 510.0) * (1.0 / 147.8)
