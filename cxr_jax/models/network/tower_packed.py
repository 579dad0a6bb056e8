"""The vision tower on packed images: one compiled program for images of all sizes, which are data (`packing`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.models.layers import apply, graph
from cxr_jax.models.network import position_table, rope
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.models.network.packing import Packing, bin_patches
from cxr_jax.models.network.tower import run_blocks
from cxr_jax.models.network.tower_layers import Angles, Block, PatchEmbed, Seen, Segments, merged
from cxr_jax.runtime.trees import Array, Tree


@jax.custom_vjp
def _permute(array: jax.Array, order: Array, inverse: Array) -> jax.Array:
    """array[r, order[r]] for a permutation a row: its gradient is a gather too, not a slow scatter."""
    return jnp.take_along_axis(array, jnp.asarray(order)[..., None], axis=1, mode="clip")


def _permute_fwd(array: jax.Array, order: Array, inverse: Array) -> tuple[jax.Array, tuple]:
    return _permute(array, order, inverse), (order, inverse)


def _permute_bwd(saved: tuple, gradient: jax.Array) -> tuple:
    order, inverse = saved
    return _permute(gradient, inverse, order), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


def _patch_places(model_config: VisionConfig, places: Array) -> jax.Array:
    """Rows and columns of units, int [R, U, 2] -> those of their patches [R, U, patches of a unit, 2]."""
    merge_size = model_config.spatial_merge_size
    # Row and column of each patch in its unit, in the processor's order.
    in_unit = np.stack(np.divmod(np.arange(model_config.merge_unit), merge_size), -1)
    return places[:, :, None] * merge_size + in_unit


def _angles(model_config: VisionConfig, places: Array) -> Angles:
    """Float32 [R, P, 1, head_dim / 2] for the rows and columns of patches, int [R, U, patches of a unit, 2]."""
    if not model_config.rotary:
        return None
    R, U, _, _ = places.shape
    # Half of the head follows the row, the other half the column (`rope.vision_angles`). Looked up, and not computed:
    # a compiler joins cosines to every product that takes them, and so computes them anew in each head of each layer.
    frequency = rope.frequencies(model_config.rope_theta, model_config.head_dim // 2)
    # No image of a row has a side longer than one of all its units.
    longest = U * model_config.spatial_merge_size
    angles = np.arange(longest, dtype=np.float32)[:, None] * frequency

    def of_places(table: np.ndarray) -> jax.Array:
        looked_up = jnp.take(jnp.asarray(table), places, axis=0, mode="clip")
        return looked_up.reshape(R, U * model_config.merge_unit, 1, -1)

    return of_places(np.cos(angles)), of_places(np.sin(angles))


def _table(
    params: Tree, model_config: VisionConfig, places: jax.Array, sides: Array, dtype: DTypeLike
) -> jax.Array:
    """Learned positions [R, P, D]; sides int [R, U, 2] in units."""
    R, _, _, _ = places.shape
    of_patches = jnp.broadcast_to(sides[:, :, None] * model_config.spatial_merge_size, places.shape)
    return position_table.of_places(
        params, model_config, places.reshape(R, -1, 2), of_patches.reshape(R, -1, 2), dtype
    )


def _visible(
    model_config: VisionConfig, packing: Packing
) -> dict[bool, tuple[Segments, jax.Array]]:
    """What patches of full blocks (True) and of the others see: static segments, and parts int32 [R, P] of them."""
    # Padding is a part of its own, so that no query is without keys.
    images, windows = (
        jnp.repeat(jnp.asarray(part), model_config.merge_unit, axis=1)
        for part in (packing.images, packing.windows)
    )
    P = images.shape[1]
    visible: dict[bool, tuple[Segments, jax.Array]] = {True: (((1, P),), images)}
    if model_config.has_windows:
        bin_size = bin_patches(model_config)
        bins = ((P // bin_size, bin_size), (1, P % bin_size))
        visible[False] = tuple(pair for pair in bins if all(pair)), windows
    return visible


def forward(
    params: Tree,
    model_config: VisionConfig,
    pixels: Array,
    packing: Packing,
    *,
    remat: str = "none",
    dtype: DTypeLike = jnp.float32,
) -> Seen:
    """Run the tower on rows of packed images; none attends to another, nor to padding.

    Args:
        pixels: [R, P, patch_dim] in reading order; what padding holds does not matter.
        packing: arrays of `packing.pack`.

    Returns:
        Image tokens, and taps alike, [R, P/4, out] in reading order, 0 at padding.

    Raises:
        UserError: for a packing of another size.
    """
    R, P, _ = pixels.shape
    merge_unit = model_config.merge_unit
    U = P // merge_unit
    packing = Packing(*(jnp.asarray(array) for array in packing))
    if packing.order.shape != (R, U) or P % merge_unit:
        raise UserError(
            f"packed pixels of {R} x {P} patches do not fit a packing of {packing.order.shape} units"
        )
    is_image = packing.images[..., None] > 0  # [R, U, 1]

    # ---- Patches go into slots, those of padding as zeros: a NaN there would reach the kernel's gradient ----
    units = _permute(pixels.astype(dtype).reshape(R, U, -1), packing.order, packing.inverse)
    units = jnp.where(is_image, units, 0)
    patches = units.reshape(R, P, -1)
    hidden = apply(graph(PatchEmbed, model_config), params["patch_embed"], patches)
    places = _patch_places(model_config, packing.places)
    angles = _angles(model_config, places)
    if model_config.position_table:  # padding has positions, too, that nobody sees
        hidden = hidden + _table(params, model_config, places, packing.sides, dtype)

    # ---- Blocks ----
    block = graph(Block, model_config)

    def layer(
        segments: Segments, parts: jax.Array, layer_params: Tree, hidden: jax.Array
    ) -> tuple[jax.Array, None]:
        return apply(block, layer_params, hidden, angles, segments, parts), None

    layers = {
        is_full: functools.partial(layer, *visible)
        for is_full, visible in _visible(model_config, packing).items()
    }
    hidden, tapped = run_blocks(layers, model_config, params["blocks"], hidden, remat)

    # ---- Tokens, back in reading order ----
    def in_reading_order(tokens: jax.Array) -> jax.Array:
        return _permute(jnp.where(is_image, tokens, 0), packing.inverse, packing.order)

    return jax.tree.map(in_reading_order, merged(params, model_config, hidden, tapped))
