"""Learned positions of patches: a square table, read as it is or between its entries.

Between entries: corners on corners, bilinear, the entries in the type of the computation, everything else in float32.
As products with a matrix of weights, two of which are not zero in a row: their gradients are products, too, where that
of a lookup would be a sum in no fixed order.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.runtime.trees import Array, Tree


def check_size(model_config: VisionConfig, rows: int, columns: int) -> None:
    """Refuse an image of more patches than a table has that is read as it is. Raises UserError."""
    table_rows = model_config.position_table
    is_fixed = table_rows and not model_config.interpolates_table
    if is_fixed and rows * columns > table_rows:
        raise UserError(
            f"an image of {rows} x {columns} patches: the model has positions for {table_rows}"
        )


def of_grid(
    params: Tree, model_config: VisionConfig, rows: int, columns: int, dtype: DTypeLike
) -> jax.Array:
    """Read the positions [rows * columns, D] of one frame, in the processor's patch order.

    Raises:
        UserError: if the table is too small.
    """
    table = params["pos_embed"]["embedding"].astype(dtype)
    merge = model_config.spatial_merge_size
    if model_config.interpolates_table:
        side = math.isqrt(model_config.position_table)
        # A table that is no square has entries that nobody reads.
        square = table[: side**2].reshape(side, side, -1).astype(jnp.float32)
        row_weights, column_weights = (
            _weights(jnp.arange(count), jnp.asarray(count), side) for count in (rows, columns)
        )
        grid = jnp.einsum(
            "yr,xc,rcd->yxd", row_weights, column_weights, square, precision="highest"
        )
    else:
        # Row i is that of patch i in reading order, whatever the image's width.
        check_size(model_config, rows, columns)
        grid = table[: rows * columns].reshape(rows, columns, -1)
    # Block by block, and row by row inside a block.
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, -1)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1).astype(dtype)


def of_places(
    params: Tree, model_config: VisionConfig, places: Array, sides: Array, dtype: DTypeLike
) -> jax.Array:
    """Read the positions [R, P, D] of patches of images of all sizes.

    Args:
        places: int [R, P, 2], the row and column of each patch in its image.
        sides: int [R, P, 2], the rows and columns of that image, in patches.
    """
    table = params["pos_embed"]["embedding"].astype(dtype)
    if not model_config.interpolates_table:
        return jnp.take(table, places[..., 0] * sides[..., 1] + places[..., 1], axis=0, mode="clip")
    side = math.isqrt(model_config.position_table)
    row_weights, column_weights = (
        _weights(places[..., axis], sides[..., axis], side) for axis in (0, 1)
    )
    # Of each entry of the square its row's weight times its column's: four are not zero.
    weights = row_weights[..., :, None] * column_weights[..., None, :]
    entries = table[: side**2].astype(jnp.float32)
    flat = weights.reshape(*weights.shape[:-2], side**2)
    return jnp.matmul(flat, entries, precision="highest").astype(dtype)


def _weights(places: Array, counts: Array, side: int) -> jax.Array:
    """What entries of one axis of the table weigh at places of `counts` on it: float32 [.., side]."""
    # In float32 from here on: places of bfloat16 would fall on other entries.
    steps = jnp.maximum(counts - 1, 1).astype(jnp.float32)
    position = jnp.asarray(places * (side - 1), jnp.float32) / steps
    below = jnp.floor(position)
    # The last entry has none above it, and needs none: its share is 0.
    above = jnp.minimum(below + 1, side - 1)
    share = (position - below)[..., None]
    entries = jnp.arange(side, dtype=jnp.float32)
    is_below, is_above = (below[..., None] == entries), (above[..., None] == entries)
    return (1 - share) * is_below + share * is_above
