"""The vision tower on images of one size: attention to all patches or, in some blocks, within windows; then a merger.

All images of a call share one static grid, so the code is dense: patches are put in window order once, by a
static permutation. Windows come in at most four shapes (interior, right edge, bottom edge, corner); windows
of a shape are adjacent, so window attention is one batched product a shape, with neither padding nor mask.
Images of several sizes in one call are `tower_packed`'s.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.models.layers import apply, graph, is_shallow, run_layers
from cxr_jax.models.network import position_table, rope
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.models.network.tower_layers import Angles, Block, PatchEmbed, Seen, Segments, merged
from cxr_jax.runtime.trees import Array, Tree

# ---- Windows -----------------------------------------------------------------------------------------------


class WindowPlan(NamedTuple):
    """The window order of one frame, in merge units (four patches that become one token)."""

    order: np.ndarray  # int [units]: units in window order, grouped by window shape
    inverse: np.ndarray  # int [units]: undoes it
    segments: Segments


@functools.lru_cache(maxsize=4096)
def window_plan(model_config: VisionConfig, rows: int, columns: int) -> WindowPlan:
    """Plan the windows of one frame of rows x columns patches: those of the reference's window index."""
    merge_size = model_config.spatial_merge_size
    unit_rows, unit_columns = rows // merge_size, columns // merge_size
    if not model_config.has_windows:
        # One window, as large as the image, whose order is that of reading.
        in_order = np.arange(unit_rows * unit_columns)
        return WindowPlan(in_order, in_order, ((1, rows * columns),))
    # Windows are measured in pixels, and cut here in tokens.
    window_side = model_config.window_size // merge_size // model_config.patch_size
    unit_numbers = np.arange(unit_rows * unit_columns).reshape(unit_rows, unit_columns)
    # Shape in units -> its windows: whole ones, and those cut by the right or lower edge.
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    for top_row in range(0, unit_rows, window_side):
        for left_column in range(0, unit_columns, window_side):
            window = unit_numbers[
                top_row : top_row + window_side, left_column : left_column + window_side
            ]
            by_shape.setdefault(window.shape, []).append(window.ravel())
    # Windows of one shape side by side, so that a shape is one batched product.
    order = np.concatenate([np.concatenate(windows) for windows in by_shape.values()])
    segments = tuple(
        (len(windows), windows[0].size * model_config.merge_unit) for windows in by_shape.values()
    )
    return WindowPlan(order, np.argsort(order), segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _permute(array: jax.Array, order: tuple[int, ...], inverse: tuple[int, ...]) -> jax.Array:
    """array[:, order] for a permutation given as a tuple: its gradient is a gather too, not a slow scatter."""
    return jnp.take(array, np.asarray(order), axis=1, mode="clip")


def _permute_fwd(
    array: jax.Array, order: tuple[int, ...], inverse: tuple[int, ...]
) -> tuple[jax.Array, None]:
    return _permute(array, order, inverse), None


def _permute_bwd(
    order: tuple[int, ...], inverse: tuple[int, ...], _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (_permute(gradient, inverse, order),)


_permute.defvjp(_permute_fwd, _permute_bwd)


SMALL_UP_TO = 4096
"""Patches up to which a shallow tower is unrolled in training as well: 476 px have 1,156."""

# ---- Blocks that repeat ------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What tells one block from another, but for its parameters."""

    is_full: bool
    is_tapped: bool


class _Run(NamedTuple):
    """Adjacent blocks with the same kind of attention: first to last - 1, of which only the last may be tapped."""

    is_full: bool
    first: int
    last: int
    is_tapped: bool


def _runs(kinds: tuple[_Kind, ...]) -> list[_Run]:
    """The longest such runs of blocks whose kinds are given: full attention or windows."""
    changes = [
        index
        for index in range(1, len(kinds))
        if kinds[index].is_full != kinds[index - 1].is_full or kinds[index - 1].is_tapped
    ]
    boundaries = [0, *changes, len(kinds)]
    return [
        _Run(kinds[first_block].is_full, first_block, last_block, kinds[last_block - 1].is_tapped)
        for first_block, last_block in zip(boundaries, boundaries[1:], strict=False)
    ]


class _Stretch(NamedTuple):
    """Adjacent blocks, first to last - 1, that are `repeats` times the same runs."""

    first: int
    last: int
    repeats: int
    runs: list[_Run]  # of one time, counted from its first block


def _stretches(kinds: tuple[_Kind, ...]) -> list[_Stretch]:
    """Divide the blocks into what repeats and what is left over, such that the fewest runs are written out.

    A tower of 7 windowed blocks and a full one, four times, is one stretch of two runs. Where blocks follow no pattern,
    all runs are written out.
    """
    depth = len(kinds)

    def divided(period: int) -> list[_Stretch]:
        repeats = 1
        while kinds[repeats * period :][:period] == kinds[:period]:
            repeats += 1
        boundary = repeats * period
        stretches = [_Stretch(0, boundary, repeats, _runs(kinds[:period]))]
        if boundary < depth:
            stretches.append(_Stretch(boundary, depth, 1, _runs(kinds[boundary:])))
        return stretches

    def cost(stretches: list[_Stretch]) -> tuple[int, int]:
        return sum(len(stretch.runs) for stretch in stretches), len(stretches)

    return min((divided(period) for period in range(1, depth + 1)), key=cost)


_Layer = Callable[[Tree, jax.Array], tuple[jax.Array, None]]


def run_blocks(
    layers: Mapping[bool, _Layer],
    model_config: VisionConfig,
    stacked: Tree,
    hidden: jax.Array,
    remat: str,
) -> tuple[jax.Array, list[jax.Array]]:
    """Run the blocks, each by the layer of its kind, full attention or not; also give what the tapped ones give.

    Shallow towers are unrolled (`layers.UNROLL_UP_TO`): on CPUs a scan costs small models more than it saves. Of a
    deep one, only what differs is written out, and once: a scan over what repeats, and within it one over each run.
    So the program, and the time that it takes to compile, does not grow with the depth. The same goes for a tower that
    is computed again in the backward pass on many patches: of unrolled layers, a compiler may compute all again before
    it needs the first, and hold them side by side: in the 3B's backward pass at 39,676 patches 130 GiB, where a scan
    takes 26.
    """
    kinds = tuple(
        _Kind(model_config.is_full(block), block in model_config.tap_blocks)
        for block in range(model_config.depth)
    )
    is_large = remat != "none" and hidden.shape[1] > SMALL_UP_TO
    if is_large or not is_shallow(len(kinds)):
        stretches, unroll_up_to = _stretches(kinds), 1
    else:
        stretches, unroll_up_to = [_Stretch(0, len(kinds), 1, _runs(kinds))], None

    def run_period(
        runs: list[_Run], hidden: jax.Array, blocks: Tree
    ) -> tuple[jax.Array, list[jax.Array]]:
        tapped = []
        for run in runs:
            blocks_of_run = jax.tree.map(lambda leaf, run=run: leaf[run.first : run.last], blocks)
            count = run.last - run.first
            hidden, _ = run_layers(
                layers[run.is_full], blocks_of_run, hidden, count, remat, unroll_up_to
            )
            # A run ends with the block that is tapped, so what it gives is the tap.
            if run.is_tapped:
                tapped.append(hidden)
        return hidden, tapped

    all_tapped: list[jax.Array] = []
    for stretch in stretches:
        blocks = jax.tree.map(lambda leaf, s=stretch: leaf[s.first : s.last], stacked)
        step = functools.partial(run_period, stretch.runs)
        if stretch.repeats == 1:
            hidden, tapped = step(hidden, blocks)
            all_tapped += tapped
            continue
        by_period = jax.tree.map(
            lambda leaf, s=stretch: leaf.reshape(s.repeats, -1, *leaf.shape[1:]), blocks
        )
        hidden, tapped = jax.lax.scan(step, hidden, by_period)
        # Stacked by period; in the order of the blocks they are all of one period, then all of the next.
        all_tapped += [stack[period] for period in range(stretch.repeats) for stack in tapped]
    return hidden, all_tapped


# ---- The tower ---------------------------------------------------------------------------------------------


def _check_grid(grid: tuple[int, int, int], patches: int, merge_size: int) -> None:
    frames, rows, columns = grid
    if patches != frames * rows * columns or rows % merge_size or columns % merge_size:
        raise UserError(
            f"image grid {grid} does not fit {patches} patches merged {merge_size} by {merge_size}"
        )


def forward(
    params: Tree,
    model_config: VisionConfig,
    pixels: Array,
    grid: tuple[int, int, int],
    *,
    remat: str = "none",
    dtype: DTypeLike = jnp.float32,
) -> Seen:
    """Run the tower. Frames never attend to each other (nor do they in the reference), so t frames are t images.

    Args:
        pixels: [N, P, patch_dim] in the processor's patch order.
        grid: (t, h, w), static, P = t*h*w.

    Returns:
        Image tokens, and taps alike, [N, P/4, out] in row-major order.

    Raises:
        UserError: for a grid that does not fit.
    """
    frames, rows, columns = (int(side) for side in grid)
    N, P, _ = pixels.shape
    merge_unit = model_config.merge_unit
    _check_grid((frames, rows, columns), P, model_config.spatial_merge_size)
    # Static: the same for all images of the grid.
    plan = window_plan(model_config, rows, columns)

    # ---- Patches, their angles alike, go into window order ----
    hidden = apply(graph(PatchEmbed, model_config), params["patch_embed"], pixels.astype(dtype))
    hidden = hidden.reshape(N * frames, rows * columns, -1)
    # In the processor's order, and so before patches move; frames have the same positions.
    if model_config.position_table:
        hidden = hidden + position_table.of_grid(params, model_config, rows, columns, dtype)
    hidden = _to_windows(model_config, plan, hidden)  # [N * t, h * w, D]
    angles = _angles(model_config, plan, rows, columns)

    # ---- Blocks ----
    block = graph(Block, model_config)

    def layer(segments: Segments, layer_params: Tree, hidden: jax.Array) -> tuple[jax.Array, None]:
        return apply(block, layer_params, hidden, angles, segments), None

    # A full block is one window that holds the whole frame.
    whole_frame = ((1, rows * columns),)
    layers = {
        True: functools.partial(layer, whole_frame),
        False: functools.partial(layer, plan.segments),
    }
    hidden, tapped = run_blocks(layers, model_config, params["blocks"], hidden, remat)

    # ---- Tokens, back in reading order ----
    def in_reading_order(tokens: jax.Array) -> jax.Array:
        if model_config.has_windows:
            tokens = _permute(tokens, tuple(plan.inverse.tolist()), tuple(plan.order.tolist()))
        return tokens.reshape(N, P // merge_unit, -1)

    return jax.tree.map(in_reading_order, merged(params, model_config, hidden, tapped))


def _to_windows(model_config: VisionConfig, plan: WindowPlan, hidden: jax.Array) -> jax.Array:
    # Without windows the processor's order is kept: a permutation of patches would change nothing but the time.
    if not model_config.has_windows:
        return hidden
    order, inverse = tuple(plan.order.tolist()), tuple(plan.inverse.tolist())
    units = hidden.reshape(len(hidden), len(plan.order), -1)
    return _permute(units, order, inverse).reshape(hidden.shape)


def _angles(model_config: VisionConfig, plan: WindowPlan, rows: int, columns: int) -> Angles:
    """Those of one frame's patches [h * w, 1, head_dim / 2], in the order of the plan."""
    if not model_config.rotary:
        return None
    angles = rope.vision_angles(model_config, rows, columns)
    by_unit = angles.reshape(len(plan.order), model_config.merge_unit, -1)
    angles = by_unit[plan.order].reshape(rows * columns, 1, -1)
    # In numpy: constants of the program, since the grid is static.
    return np.cos(angles), np.sin(angles)
