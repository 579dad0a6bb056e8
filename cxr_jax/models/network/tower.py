"""The Qwen2.5-VL vision tower: window attention with some full-attention blocks, then a 2x2 merger.

All images of a call share one static grid, so the code is dense: patches are put in window order once, by a
static permutation. Windows come in at most four shapes (interior, right edge, bottom edge, corner); windows
of a shape are adjacent, so window attention is one batched product a shape, with neither padding nor mask.
Images of several sizes in one call are `tower_packed`'s.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from cxr_jax.errors import UserError
from cxr_jax.models.attention import ALL_AT_ONCE_UP_TO, attention, part_attention
from cxr_jax.models.layers import (
    MLP,
    Linear,
    RMSNorm,
    apply,
    graph,
    init,
    init_stacked,
    is_shallow,
    run_layers,
)
from cxr_jax.models.network import rope
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.runtime.trees import Array, Tree

EPS = 1e-6  # fixed in the reference, not in config.json


class Seen(NamedTuple):
    """What the tower gives of images: tokens, and of each tapped block the same number of them (DeepStack)."""

    tokens: Any  # [N, I, D], which take the places of a prompt's image placeholders
    taps: tuple = ()  # each [N, I, D]; tap j is added to them after layer j of the decoder


Segments = tuple[tuple[int, int], ...]
"""((windows, patches a window), ...) along the patch axis: attention stays within each window."""


# ---- Modules -----------------------------------------------------------------------------------------------


class PatchEmbed(nnx.Module):
    """Flattened patches [..., patch_dim] -> [..., hidden]; the reference's 3-D convolution as a product."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        """Draw a fresh kernel."""
        self.proj = Linear(model_config.patch_dim, model_config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        """Project the patches."""
        return self.proj(patches)


class Attention(nnx.Module):
    """Attention within each window of the segments."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        """Draw fresh kernels; the one that writes into the residual stream is small in deep models."""
        width = model_config.hidden_size
        out_scale = (2 * model_config.depth) ** -0.5
        self.qkv = Linear(width, 3 * width, bias=True, rngs=rngs)
        self.proj = Linear(width, width, bias=True, rngs=rngs, scale=out_scale)
        self.heads = model_config.num_heads

    def __call__(
        self,
        hidden: jax.Array,
        cosines: Array,
        sines: Array,
        segments: Segments,
        parts: jax.Array | None = None,
    ) -> jax.Array:
        """Compute what attention adds to hidden [N, P, D].

        Args:
            parts: int [N, P] or None: within a window, a patch sees those of its own part only.
        """
        N, P, D = hidden.shape
        queries, keys, values = (
            projected.reshape(N, P, self.heads, -1)
            for projected in jnp.split(self.qkv(hidden), 3, axis=-1)
        )
        # Angles are those of the patches' places, in window order.
        queries, keys = rope.rotate(queries, cosines, sines), rope.rotate(keys, cosines, sines)
        # Windows of one shape are rows of one product.
        outputs, segment_start = [], 0
        for windows, size in segments:
            segment = slice(segment_start, segment_start + windows * size)
            windowed = [
                projected[:, segment].reshape(N * windows, size, self.heads, -1)
                for projected in (queries, keys, values)
            ]
            if parts is None:
                output = attention(*windowed)
            else:
                windowed_parts = parts[:, segment].reshape(N * windows, size)
                output = part_attention(windowed_parts, *windowed)
            outputs.append(output.reshape(N, windows * size, D))
            segment_start += windows * size
        return self.proj(jnp.concatenate(outputs, 1) if len(outputs) > 1 else outputs[0])


class Block(nnx.Module):
    """One layer of the tower."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        """Draw fresh parameters."""
        self.norm1 = RMSNorm(model_config.hidden_size, EPS)
        self.attn = Attention(model_config, rngs=rngs)
        self.norm2 = RMSNorm(model_config.hidden_size, EPS)
        self.mlp = MLP(
            model_config.hidden_size,
            model_config.intermediate_size,
            bias=True,
            rngs=rngs,
            out_scale=(2 * model_config.depth) ** -0.5,
        )

    def __call__(
        self,
        hidden: jax.Array,
        cosines: Array,
        sines: Array,
        segments: Segments,
        parts: jax.Array | None = None,
    ) -> jax.Array:
        """Compute hidden [N, P, D] after the layer; parts: see `Attention`."""
        hidden = hidden + self.attn(self.norm1(hidden), cosines, sines, segments, parts)
        return hidden + self.mlp(self.norm2(hidden))


class Merger(nnx.Module):
    """Four neighbouring patches [N, P, hidden] -> one token [N, P/4, out]."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        """Draw fresh parameters."""
        # All features of the four patches side by side, in the order of the merge block.
        joined = model_config.hidden_size * model_config.merge_unit
        self.norm = RMSNorm(model_config.hidden_size, EPS)
        self.fc1 = Linear(joined, joined, bias=True, rngs=rngs)
        self.fc2 = Linear(joined, model_config.out_hidden_size, bias=True, rngs=rngs)
        self.unit = model_config.merge_unit

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Merge the patches, which stand in merge-block order."""
        N, P, D = hidden.shape
        joined = self.norm(hidden).reshape(N, P // self.unit, D * self.unit)
        # The exact GELU, as in the reference, and not its tanh form.
        return self.fc2(jax.nn.gelu(self.fc1(joined), approximate=False))


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


# ---- Blocks that repeat ------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Adjacent blocks with the same kind of attention: first to last - 1."""

    is_full: bool
    first: int
    last: int


def _runs(kinds: tuple[bool, ...]) -> list[_Run]:
    """The longest such runs of blocks whose kinds are given: full attention or windows."""
    changes = [index for index in range(1, len(kinds)) if kinds[index] != kinds[index - 1]]
    boundaries = [0, *changes, len(kinds)]
    return [
        _Run(kinds[first_block], first_block, last_block)
        for first_block, last_block in zip(boundaries, boundaries[1:], strict=False)
    ]


class _Stretch(NamedTuple):
    """Adjacent blocks, first to last - 1, that are `repeats` times the same runs."""

    first: int
    last: int
    repeats: int
    runs: list[_Run]  # of one time, counted from its first block


def _stretches(kinds: tuple[bool, ...]) -> list[_Stretch]:
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
    kinds: tuple[bool, ...],
    stacked: Tree,
    hidden: jax.Array,
    remat: str,
) -> jax.Array:
    """Run blocks of the kinds given, full attention or not, each by the layer of its kind.

    Shallow towers are unrolled (`layers.UNROLL_UP_TO`): on CPUs a scan costs small models more than it saves. Of a
    deep one, only what differs is written out, and once: a scan over what repeats, and within it one over each run.
    So the program, and the time that it takes to compile, does not grow with the depth. The same goes for a tower that
    is computed again in the backward pass on many patches: of unrolled layers, a compiler may compute all again before
    it needs the first, and hold them side by side: in the 3B's backward pass at 39,676 patches 130 GiB, where a scan
    takes 26.
    """
    is_large = remat != "none" and hidden.shape[1] > ALL_AT_ONCE_UP_TO
    if is_large or not is_shallow(len(kinds)):
        stretches, unroll_up_to = _stretches(kinds), 1
    else:
        stretches, unroll_up_to = [_Stretch(0, len(kinds), 1, _runs(kinds))], None

    def run_period(runs: list[_Run], hidden: jax.Array, blocks: Tree) -> tuple[jax.Array, None]:
        for run in runs:
            blocks_of_run = jax.tree.map(lambda leaf, run=run: leaf[run.first : run.last], blocks)
            count = run.last - run.first
            hidden, _ = run_layers(
                layers[run.is_full], blocks_of_run, hidden, count, remat, unroll_up_to
            )
        return hidden, None

    for stretch in stretches:
        blocks = jax.tree.map(lambda leaf, s=stretch: leaf[s.first : s.last], stacked)
        step = functools.partial(run_period, stretch.runs)
        if stretch.repeats == 1:
            hidden, _ = step(hidden, blocks)
            continue
        by_period = jax.tree.map(
            lambda leaf, s=stretch: leaf.reshape(s.repeats, -1, *leaf.shape[1:]), blocks
        )
        hidden, _ = jax.lax.scan(step, hidden, by_period)
    return hidden


# ---- The tower ---------------------------------------------------------------------------------------------


def init_params(model_config: VisionConfig, key: jax.Array) -> Tree:
    """Draw fresh parameters: {"patch_embed", "blocks" (stacked on axis 0), "merger"}."""
    embed_key, blocks_key, merger_key = jax.random.split(key, 3)
    return {
        "patch_embed": init(PatchEmbed, model_config, key=embed_key),
        "blocks": init_stacked(Block, model_config, key=blocks_key, count=model_config.depth),
        "merger": init(Merger, model_config, key=merger_key),
    }


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
    unit_count = rows * columns // merge_unit
    # Static: the same for all images of the grid.
    plan = window_plan(model_config, rows, columns)
    order, inverse = tuple(plan.order.tolist()), tuple(plan.inverse.tolist())

    # ---- Patches, their angles alike, go into window order ----
    hidden = apply(graph(PatchEmbed, model_config), params["patch_embed"], pixels.astype(dtype))
    hidden = _permute(hidden.reshape(N * frames, unit_count, -1), order, inverse)
    hidden = hidden.reshape(N * frames, rows * columns, -1)  # [N * t, h * w, D]
    angles = rope.vision_angles(model_config, rows, columns).reshape(unit_count, merge_unit, -1)
    angles = angles[np.asarray(order)].reshape(rows * columns, 1, -1)
    # In numpy: constants of the program, since the grid is static.
    cosines, sines = np.cos(angles), np.sin(angles)

    # ---- Blocks ----
    block = graph(Block, model_config)

    def layer(segments: Segments, layer_params: Tree, hidden: jax.Array) -> tuple[jax.Array, None]:
        return apply(block, layer_params, hidden, cosines, sines, segments), None

    # A full block is one window that holds the whole frame.
    whole_frame = ((1, rows * columns),)
    layers = {
        True: functools.partial(layer, whole_frame),
        False: functools.partial(layer, plan.segments),
    }
    kinds = tuple(model_config.is_full(block) for block in range(model_config.depth))
    hidden = run_blocks(layers, kinds, params["blocks"], hidden, remat)

    # ---- Tokens, back in reading order ----
    tokens = apply(graph(Merger, model_config), params["merger"], hidden)
    return Seen(_permute(tokens, inverse, order).reshape(N, P // merge_unit, -1))
