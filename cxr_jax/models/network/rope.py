"""Rotary positions: 2-D for vision patches, three axes (M-RoPE) or one for the decoder. Angles are float32 always.

Positions of prompts are host-side numpy: they depend on token ids and grids only, never on weights.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig
from cxr_jax.runtime.trees import Array

# ---- Angles ------------------------------------------------------------------------------------------------


def frequencies(theta: float, size: int) -> np.ndarray:
    """Compute float32 [size / 2]: theta ** (-2i / size)."""
    # In float32 step by step, as the reference: double precision would give other last digits.
    power = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1.0) / np.float32(theta) ** power


@functools.lru_cache(maxsize=64)
def vision_angles(model_config: VisionConfig, rows: int, columns: int) -> np.ndarray:
    """Compute float32 [rows * columns, head_dim / 2] for one frame of patches.

    Patches are in merge-block order, the processor's order.
    """
    merge_size = model_config.spatial_merge_size
    # Rows and columns of the whole frame, cut into blocks that become one token.
    blocks = np.mgrid[:rows, :columns].reshape(
        2, rows // merge_size, merge_size, columns // merge_size, merge_size
    )
    # The order of the processor: block by block, and row by row inside a block.
    row_places, column_places = blocks.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    # Half of the head follows the row, the other half the column.
    frequency = frequencies(model_config.rope_theta, model_config.head_dim // 2)
    halves = [
        place[:, None].astype(np.float32) * frequency for place in (row_places, column_places)
    ]
    return np.concatenate(halves, -1)


@functools.lru_cache(maxsize=64)
def followed_axes(model_config: TextConfig) -> np.ndarray:
    """Find which axis of the positions each frequency follows (time, height, width): int [head_dim / 2].

    In bands, one after the other; or interleaved: every third follows height, as far as its section reaches, the one
    behind it width, and all others time.
    """
    count = model_config.head_dim // 2
    sections = model_config.mrope_section
    if not sections:
        return np.zeros(count, np.int64)
    if not model_config.mrope_interleaved:
        return np.repeat(np.arange(3), sections)
    # By slices and not by counting: a section that reaches beyond the last frequency is cut.
    axes = np.zeros(count, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def text_cos_sin(
    model_config: TextConfig, positions: Array, *, is_sliding: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Compute cos, sin float32 [B, T, 1, head_dim / 2] from positions int [axes, B, T].

    Args:
        is_sliding: those of layers that see a window.
    """
    theta = model_config.sliding_rope_theta if is_sliding else model_config.rope_theta
    frequency = frequencies(theta, model_config.head_dim)
    # Linear scaling stretches the layers that see far, and no others.
    if not is_sliding:
        frequency = frequency / np.float32(model_config.rope_factor)
    axes = followed_axes(model_config)
    followed = jnp.moveaxis(jnp.asarray(positions), 0, -1)[..., axes]  # [B, T, head_dim / 2]
    angles = followed.astype(jnp.float32) * frequency
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(heads: jax.Array, cosines: Array, sines: Array) -> jax.Array:
    """Rotate the pairs (i, i + d/2) of the last axis of [..., heads, d], in float32; the same type comes out."""
    # Halves and not neighbours: the pairing of the published weights.
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(rotated, -1).astype(heads.dtype)


# ---- Positions ---------------------------------------------------------------------------------------------


def positions(
    model_config: Config,
    input_ids: Array,
    grids: Sequence | np.ndarray | None = None,
    mask: Array | None = None,
) -> np.ndarray:
    """Compute positions int32 [axes, B, T]: time, height and width as transformers' `get_rope_index` gives them.

    With one axis, the place in the text, where every image token counts.

    Args:
        input_ids: int [B, T].
        grids: the (t, h, w) of every image in reading order over the batch, [n, 3]; or one (t, h, w) that every image
            has; or None without images.
        mask: bool [B, T], False at padding (positions 0).

    Raises:
        UserError: when placeholders and grids do not match.
    """
    ids = np.asarray(input_ids)
    is_real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    grid_table = np.zeros((0, 3), np.int64) if grids is None else np.asarray(grids)
    is_same_grid = grid_table.ndim == 1
    # Images are taken in reading order over the whole batch.
    source = itertools.repeat(grid_table) if is_same_grid else iter(grid_table)
    axes = model_config.text.position_axes
    places = np.zeros((axes, *ids.shape), np.int32)
    for row_number in range(len(ids)):
        row_ids = ids[row_number][is_real[row_number]]
        by_grid = _row_positions(model_config, row_ids, source, row_number)
        # Grids are checked even where the place in the text is all that counts.
        in_text = np.arange(len(row_ids))
        places[:, row_number, is_real[row_number]] = by_grid if axes == 3 else in_text
    if not is_same_grid and next(source, None) is not None:
        raise UserError("more image grids than image placeholders in input_ids")
    return places


def _row_positions(
    model_config: Config, ids: np.ndarray, grids: Iterator[np.ndarray], row_number: int
) -> np.ndarray:
    """[3, T] for one unpadded row; `grids` is an iterator from which the row takes its images."""
    merge = model_config.vision.spatial_merge_size
    is_image = ids == model_config.image_token_id
    # Runs of text and of image placeholders take turns.
    edges = np.flatnonzero(np.diff(is_image)) + 1
    parts, start = [np.zeros((3, 0), np.int64)], 0
    for segment in np.split(is_image, edges):
        length = len(segment)
        if not (length and segment[0]):
            # Text: all three axes count on together.
            parts.append(np.broadcast_to(np.arange(length) + start, (3, length)))
            start += length
            continue
        # An image: its own grid of places, after which text starts beyond the longer side.
        grid = next(grids, None)
        if grid is None:
            raise UserError(f"row {row_number}: more image placeholders than image grids")
        places = _image_positions(grid, merge, start)
        if places.shape[1] != length:
            raise UserError(
                f"row {row_number}: {length} image tokens, but grid {tuple(map(int, grid))} "
                f"needs {places.shape[1]}"
            )
        parts.append(places)
        # The longer side, since rows and columns both count from the start of the image.
        start += max(int(grid[1]), int(grid[2])) // merge
    return np.concatenate(parts, 1)


def _image_positions(grid: np.ndarray, merge: int, start: int) -> np.ndarray:
    # In merged units, one position for each token that the tower gives.
    frames, rows, columns = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    return np.mgrid[:frames, :rows, :columns].reshape(3, -1) + start


def next_positions(positions: Array, lengths: Array) -> jax.Array:
    """Compute the position int [B] of the first generated token, one past the largest of the prompt."""
    # Padding lies beyond the lengths, whatever its positions say.
    valid = jnp.arange(positions.shape[2]) < lengths[:, None]
    return jnp.where(valid, positions, -1).max((0, 2)) + 1
