"""The Qwen2.5-VL vision tower: window attention with some full-attention blocks, then a 2x2 merger.

All images of a call share one static grid, so the code is dense: patches are put in window order once, by a
static permutation. Windows come in at most four shapes (interior, right edge, bottom edge, corner); windows
of a shape are adjacent, so window attention is one batched product a shape, with neither padding nor mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cxr_jax.errors import UserError
from cxr_jax.models.attention import attention
from cxr_jax.models.layers import MLP, Linear, RMSNorm, apply, graph, init, init_stacked, run_layers
from cxr_jax.models.qwen2_5_vl import rope
from cxr_jax.models.qwen2_5_vl.config import VisionConfig

EPS = 1e-6  # fixed in the reference, not in config.json


class PatchEmbed(nnx.Module):
    """Flattened patches [..., patch_dim] -> [..., hidden]; the reference's 3-D convolution as a product."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs):
        self.proj = Linear(model_config.patch_dim, model_config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x):
        return self.proj(x)


class Attention(nnx.Module):
    """Attention within each segment. `segments`: ((windows, patches a window), ...) along the patch axis."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs):
        d = model_config.hidden_size
        self.qkv = Linear(d, 3 * d, bias=True, rngs=rngs)
        self.proj = Linear(d, d, bias=True, rngs=rngs, scale=(2 * model_config.depth) ** -0.5)
        self.heads = model_config.num_heads

    def __call__(self, x, cos, sin, segments):
        N, P, D = x.shape
        q, k, v = (a.reshape(N, P, self.heads, -1) for a in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        out, at = [], 0
        for count, size in segments:
            cut = slice(at, at + count * size)
            window = [a[:, cut].reshape(N * count, size, self.heads, -1) for a in (q, k, v)]
            out.append(attention(*window).reshape(N, count * size, D))
            at += count * size
        return self.proj(jnp.concatenate(out, 1) if len(out) > 1 else out[0])


class Block(nnx.Module):
    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs):
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

    def __call__(self, x, cos, sin, segments):
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Four neighbouring patches [N, P, hidden] -> one token [N, P/4, out]."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs):
        d = model_config.hidden_size * model_config.merge_unit
        self.norm = RMSNorm(model_config.hidden_size, EPS)
        self.fc1 = Linear(d, d, bias=True, rngs=rngs)
        self.fc2 = Linear(d, model_config.out_hidden_size, bias=True, rngs=rngs)
        self.unit = model_config.merge_unit

    def __call__(self, x):
        N, P, D = x.shape
        x = self.norm(x).reshape(N, P // self.unit, D * self.unit)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


@functools.lru_cache(maxsize=64)
def window_plan(model_config: VisionConfig, h: int, w: int):
    """(order, inverse, segments) for one frame of h x w patches.

    order int [h*w/4]: merge units in window order, grouped by window shape; inverse undoes it;
    segments: ((windows, patches a window), ...). The windows are those of the reference's window index.
    """
    m = model_config.spatial_merge_size
    rows, cols = h // m, w // m
    side = model_config.window_size // m // model_config.patch_size
    index = np.arange(rows * cols).reshape(rows, cols)
    by_shape: dict[tuple[int, int], list] = {}
    for r in range(0, rows, side):
        for c in range(0, cols, side):
            win = index[r : r + side, c : c + side]
            by_shape.setdefault(win.shape, []).append(win.ravel())
    order = np.concatenate([np.concatenate(ws) for ws in by_shape.values()])
    segments = tuple((len(ws), ws[0].size * model_config.merge_unit) for ws in by_shape.values())
    return order, np.argsort(order), segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _permute(x, order, inverse):
    """x[:, order] for a permutation given as a tuple: its gradient is a gather too, not a slow scatter."""
    return jnp.take(x, np.asarray(order), axis=1, mode="clip")


_permute.defvjp(
    lambda x, order, inverse: (_permute(x, order, inverse), None),
    lambda order, inverse, _, g: (_permute(g, inverse, order),),
)


def _runs(model_config: VisionConfig):
    """Maximal runs of blocks with the same kind of attention: [(full?, first, last + 1)]."""
    kinds = [i in model_config.fullatt_block_indexes for i in range(model_config.depth)]
    cuts = (
        [0]
        + [i for i in range(1, model_config.depth) if kinds[i] != kinds[i - 1]]
        + [model_config.depth]
    )
    return [(kinds[a], a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def init_params(model_config: VisionConfig, key) -> dict:
    """Fresh parameters: {"patch_embed", "blocks" (stacked on axis 0), "merger"}."""
    a, b, c = jax.random.split(key, 3)
    return {
        "patch_embed": init(PatchEmbed, model_config, key=a),
        "blocks": init_stacked(Block, model_config, key=b, n=model_config.depth),
        "merger": init(Merger, model_config, key=c),
    }


def forward(
    params: dict,
    model_config: VisionConfig,
    pixels,
    grid: tuple[int, int, int],
    *,
    remat: str = "none",
    dtype=jnp.float32,
):
    """pixels [N, P, patch_dim] in the processor's patch order, grid (t, h, w) static, P = t*h*w.

    Returns image tokens [N, P/4, out] in row-major order. Frames never attend to each other (nor do they in
    the reference), so t frames are t images. Raises UserError for a grid that does not fit.
    """
    t, h, w = (int(g) for g in grid)
    N, P, _ = pixels.shape
    if P != t * h * w or h % model_config.spatial_merge_size or w % model_config.spatial_merge_size:
        raise UserError(
            f"image grid {(t, h, w)} does not fit {P} patches merged {model_config.spatial_merge_size} by "
            f"{model_config.spatial_merge_size}"
        )
    order, inverse, windows = window_plan(model_config, h, w)
    order, inverse = tuple(order.tolist()), tuple(inverse.tolist())
    unit, n_units = model_config.merge_unit, h * w // model_config.merge_unit

    x = apply(graph(PatchEmbed, model_config), params["patch_embed"], pixels.astype(dtype))
    x = _permute(x.reshape(N * t, n_units, -1), order, inverse).reshape(N * t, h * w, -1)
    angles = (
        rope.vision_angles(model_config, h, w)
        .reshape(n_units, unit, -1)[np.asarray(order)]
        .reshape(h * w, 1, -1)
    )
    cos, sin = np.cos(angles), np.sin(angles)

    block = graph(Block, model_config)
    for full, first, last in _runs(model_config):
        segments = ((1, h * w),) if full else windows
        layer = lambda p, x, segments=segments: (apply(block, p, x, cos, sin, segments), None)
        part = jax.tree.map(lambda a, i=first, j=last: a[i:j], params["blocks"])
        x, _ = run_layers(layer, part, x, last - first, remat)
    x = apply(graph(Merger, model_config), params["merger"], x)
    return _permute(x, inverse, order).reshape(N, P // unit, -1)
