"""Rotary positions: 2-D for vision patches, three-axis (M-RoPE) for the decoder. Angles are float32 always.

Positions are host-side numpy: they depend on token ids and grids only, never on weights.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl.config import Config, TextConfig, VisionConfig


def frequencies(theta: float, dim: int) -> np.ndarray:
    """float32 [dim / 2]: theta ** (-2i / dim)."""
    power = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** power


@functools.lru_cache(maxsize=64)
def vision_angles(model_config: VisionConfig, h: int, w: int) -> np.ndarray:
    """float32 [h * w, head_dim / 2] for one frame, patches in merge-block order (the processor's order)."""
    m = model_config.spatial_merge_size
    row, col = (
        np.mgrid[:h, :w].reshape(2, h // m, m, w // m, m).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    )
    freq = frequencies(model_config.rope_theta, model_config.head_dim // 2)
    return np.concatenate([a[:, None].astype(np.float32) * freq for a in (row, col)], -1)


def text_cos_sin(model_config: TextConfig, positions):
    """cos, sin float32 [B, T, 1, head_dim / 2] from positions int [3, B, T]: each band of frequencies
    follows its own axis (time, height, width)."""
    axis = np.repeat(np.arange(3), model_config.mrope_section)
    freq = frequencies(model_config.rope_theta, model_config.head_dim)
    picked = jnp.moveaxis(jnp.asarray(positions), 0, -1)[..., axis]  # [B, T, head_dim / 2]
    angles = picked.astype(jnp.float32) * freq
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + d/2) of the last axis of x [..., heads, d], in float32; x's dtype out."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _image_positions(grid, merge: int, start: int) -> np.ndarray:
    t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    return np.mgrid[:t, :h, :w].reshape(3, -1) + start


def _row_positions(model_config: Config, ids: np.ndarray, grids, row: int) -> np.ndarray:
    """[3, T] for one unpadded row; `grids` is an iterator from which the row takes its images."""
    merge = model_config.vision.spatial_merge_size
    is_image = ids == model_config.image_token_id
    edges = np.flatnonzero(np.diff(is_image)) + 1
    out, start = [np.zeros((3, 0), np.int64)], 0
    for run in np.split(is_image, edges):
        if len(run) and run[0]:
            grid = next(grids, None)
            if grid is None:
                raise UserError(f"row {row}: more image placeholders than image grids")
            pos = _image_positions(grid, merge, start)
            if pos.shape[1] != len(run):
                raise UserError(
                    f"row {row}: {len(run)} image tokens, but grid {tuple(map(int, grid))} "
                    f"needs {pos.shape[1]}"
                )
            start += max(int(grid[1]), int(grid[2])) // merge
        else:
            pos = np.broadcast_to(np.arange(len(run)) + start, (3, len(run)))
            start += len(run)
        out.append(pos)
    return np.concatenate(out, 1)


def positions(model_config: Config, input_ids, grids=None, mask=None) -> np.ndarray:
    """M-RoPE positions int32 [3, B, T] (time, height, width) as transformers' `get_rope_index` gives them.

    input_ids: int [B, T]. grids: the (t, h, w) of every image in reading order over the batch, [n, 3]; or one
    (t, h, w) that every image has; or None without images. mask: bool [B, T], False at padding (positions 0).
    Raises UserError when placeholders and grids do not match.
    """
    ids = np.asarray(input_ids)
    keep = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    table = np.zeros((0, 3), np.int64) if grids is None else np.asarray(grids)
    same = table.ndim == 1
    source = itertools.repeat(table) if same else iter(table)
    out = np.zeros((3, *ids.shape), np.int32)
    for b in range(len(ids)):
        out[:, b, keep[b]] = _row_positions(model_config, ids[b][keep[b]], source, b)
    if not same and next(source, None) is not None:
        raise UserError("more image grids than image placeholders in input_ids")
    return out


def next_positions(positions: jax.Array, lengths: ArrayLike) -> jax.Array:
    """Compute the position int [B] of the first generated token, one past the largest of the prompt."""
    valid = jnp.arange(positions.shape[2]) < lengths[:, None]
    return jnp.where(valid, positions, -1).max((0, 2)) + 1
