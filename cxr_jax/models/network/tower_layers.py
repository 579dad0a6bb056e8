"""The layers of the vision tower, and its mergers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cxr_jax.models.attention import Mask, attention
from cxr_jax.models.layers import (
    MLP,
    LayerNorm,
    Linear,
    PlainMLP,
    RMSNorm,
    activate,
    apply,
    fold_key,
    graph,
    init,
    init_embedding,
    init_stacked,
    split_key,
)
from cxr_jax.models.network import rope
from cxr_jax.models.network.config import VisionConfig
from cxr_jax.runtime.trees import Array, Tree


class Seen(NamedTuple):
    """What the tower gives of images: tokens, and of each tapped block the same number of them (DeepStack)."""

    tokens: Any  # [N, I, D], which take the places of a prompt's image placeholders
    taps: tuple = ()  # each [N, I, D]; tap j is added to them after layer j of the decoder


Segments = tuple[tuple[int, int], ...]
"""((windows, patches a window), ...) along the patch axis: attention stays within each window."""

Angles = tuple[Array, Array] | None
"""(cosines, sines) [.., P, 1, head_dim / 2] of the patches; None without rotary positions."""


# ---- Modules -----------------------------------------------------------------------------------------------


def _norm(model_config: VisionConfig, width: int) -> RMSNorm | LayerNorm:
    norm = {"rms": RMSNorm, "layer": LayerNorm}[model_config.norm]
    return norm(width, model_config.norm_eps)


class PatchEmbed(nnx.Module):
    """Flattened patches [..., patch_dim] -> [..., hidden]; the reference's 3-D convolution as a product."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs | None) -> None:
        """Draw a fresh kernel."""
        self.proj = Linear(
            model_config.patch_dim,
            model_config.hidden_size,
            bias=model_config.patch_bias,
            rngs=rngs,
        )

    def __call__(self, patches: jax.Array) -> jax.Array:
        """Project the patches."""
        return self.proj(patches)


class Attention(nnx.Module):
    """Attention within each window of the segments."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs | None) -> None:
        """Draw fresh kernels; the one that writes into the residual stream is small in deep models."""
        width = model_config.hidden_size
        out_scale = (2 * model_config.depth) ** -0.5
        self.is_split = model_config.split_qkv
        if self.is_split:
            self.q, self.k, self.v = (Linear(width, width, bias=True, rngs=rngs) for _ in range(3))
        else:
            self.qkv = Linear(width, 3 * width, bias=True, rngs=rngs)
        self.proj = Linear(width, width, bias=True, rngs=rngs, scale=out_scale)
        self.heads = model_config.num_heads
        self.kind = model_config.attention

    def __call__(
        self, hidden: jax.Array, angles: Angles, segments: Segments, parts: jax.Array | None = None
    ) -> jax.Array:
        """Compute what attention adds to hidden [N, P, D].

        Args:
            parts: int [N, P] or None: within a window, a patch sees those of its own part only.
        """
        N, P, D = hidden.shape
        # One product or three: the same numbers, by the layout of the published weights.
        if self.is_split:
            projections = [project(hidden) for project in (self.q, self.k, self.v)]
        else:
            projections = jnp.split(self.qkv(hidden), 3, axis=-1)
        queries, keys, values = (
            projected.reshape(N, P, self.heads, -1) for projected in projections
        )
        # Angles are those of the patches' places, in window order.
        if angles is not None:
            queries, keys = rope.rotate(queries, *angles), rope.rotate(keys, *angles)
        # Windows of one shape are rows of one product.
        outputs, segment_start = [], 0
        for windows, size in segments:
            segment = slice(segment_start, segment_start + windows * size)
            windowed = tuple(
                projected[:, segment].reshape(N * windows, size, self.heads, -1)
                for projected in (queries, keys, values)
            )
            # Compared block by block where there are many: a whole mask would be as large as the scores of a head.
            mask = None
            if parts is not None:
                windowed_parts = parts[:, segment].reshape(N * windows, size)
                mask = Mask(parts=(windowed_parts, windowed_parts))
            output = attention(windowed[0], windowed[1], windowed[2], mask, kind=self.kind)
            outputs.append(output.reshape(N, windows * size, D))
            segment_start += windows * size
        return self.proj(jnp.concatenate(outputs, 1) if len(outputs) > 1 else outputs[0])


class Block(nnx.Module):
    """One layer of the tower."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs | None) -> None:
        """Draw fresh parameters."""
        width, inner_width = model_config.hidden_size, model_config.intermediate_size
        out_scale = (2 * model_config.depth) ** -0.5
        self.norm1 = _norm(model_config, width)
        self.attn = Attention(model_config, rngs=rngs)
        self.norm2 = _norm(model_config, width)
        # Both have biases, and are small where they write into the stream.
        if model_config.mlp == "gelu":
            self.mlp: MLP | PlainMLP = PlainMLP(width, inner_width, rngs=rngs, out_scale=out_scale)
        else:
            self.mlp = MLP(width, inner_width, bias=True, rngs=rngs, out_scale=out_scale)

    def __call__(
        self, hidden: jax.Array, angles: Angles, segments: Segments, parts: jax.Array | None = None
    ) -> jax.Array:
        """Compute hidden [N, P, D] after the layer; parts: see `Attention`."""
        hidden = hidden + self.attn(self.norm1(hidden), angles, segments, parts)
        return hidden + self.mlp(self.norm2(hidden))


class Final(nnx.Module):
    """The normalisation after the last block, where there is one."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs | None) -> None:
        """Begin with a scale of 1."""
        del rngs
        self.norm = _norm(model_config, model_config.hidden_size)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Normalise [..., D]."""
        return self.norm(hidden)


class Merger(nnx.Module):
    """Neighbouring patches [N, P, hidden], merge_unit of them -> one token [N, I, out].

    is_tap: of a tapped block: normalised over what is joined, and not patch by patch.
    """

    def __init__(
        self, model_config: VisionConfig, is_tap: bool = False, *, rngs: nnx.Rngs | None
    ) -> None:
        """Draw fresh parameters."""
        # All features of the patches side by side, in the order of the merge block.
        joined = model_config.hidden_size * model_config.merge_unit
        self.norm = _norm(model_config, joined if is_tap else model_config.hidden_size)
        self.fc1 = Linear(joined, joined, bias=True, rngs=rngs)
        self.fc2 = Linear(joined, model_config.out_hidden_size, bias=True, rngs=rngs)
        self.unit = model_config.merge_unit
        self.is_tap = is_tap

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Merge the patches, which stand in merge-block order."""
        N, P, D = hidden.shape
        # What is joined first has one mean and one deviation for all its patches.
        if self.is_tap:
            joined = self.norm(hidden.reshape(N, P // self.unit, D * self.unit))
        else:
            joined = self.norm(hidden).reshape(N, P // self.unit, D * self.unit)
        # The exact GELU, as in the reference, and not its tanh form.
        return self.fc2(activate("gelu", self.fc1(joined)))


class MeanMerger(nnx.Module):
    """The mean of neighbouring patches [N, P, hidden], merge_unit of them, normed, times a matrix -> [N, I, out]."""

    def __init__(self, model_config: VisionConfig, *, rngs: nnx.Rngs | None) -> None:
        """Draw fresh parameters."""
        width = model_config.hidden_size
        self.norm = RMSNorm(width, model_config.norm_eps, is_one_plus=True)
        self.proj = Linear(width, model_config.out_hidden_size, bias=False, rngs=rngs)
        self.unit = model_config.merge_unit

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Merge the patches, which stand in merge-block order."""
        N, P, D = hidden.shape
        # Patches of a unit stand side by side, so their mean is one over an axis.
        return self.proj(self.norm(hidden.reshape(N, P // self.unit, self.unit, D).mean(2)))


# ---- Before and after the blocks ---------------------------------------------------------------------------


def init_params(model_config: VisionConfig, key: jax.Array | None) -> Tree:
    """Draw fresh parameters: {"patch_embed", "blocks" (stacked on axis 0), "merger"}, and by the config "pos_embed",
    "final" and "taps" (stacked in the order of `tap_blocks`)."""
    embed_key, blocks_key, merger_key = split_key(key, 3)
    params = {
        "patch_embed": init(PatchEmbed, model_config, key=embed_key),
        "blocks": init_stacked(Block, model_config, key=blocks_key, count=model_config.depth),
        "merger": init(_merger(model_config), model_config, key=merger_key),
    }
    # Keys of their own, so that what other towers draw stays the same.
    if model_config.position_table:
        shape = model_config.position_table, model_config.hidden_size
        params["pos_embed"] = {"embedding": init_embedding(fold_key(embed_key, 1), shape)}
    if model_config.final_norm:
        params["final"] = init(Final, model_config, key=blocks_key)  # draws nothing
    if model_config.tap_blocks:
        taps_key = fold_key(merger_key, 1)
        count = len(model_config.tap_blocks)
        params["taps"] = init_stacked(Merger, model_config, True, key=taps_key, count=count)
    return params


# The two ways from patches to tokens; tapped blocks always have the first.
def _merger(model_config: VisionConfig) -> type[Merger] | type[MeanMerger]:
    return MeanMerger if model_config.merger == "mean" else Merger


def merged(
    params: Tree, model_config: VisionConfig, hidden: jax.Array, tapped: list[jax.Array]
) -> Seen:
    """Merge what the last block and the tapped ones (in their order) give, [N, P, D] each."""
    taps = []
    for block, features in zip(model_config.tapped, tapped, strict=True):
        # By its place in the config's list, which need not be in order.
        number = model_config.tap_blocks.index(block)
        tap_params = jax.tree.map(lambda leaf, number=number: leaf[number], params["taps"])
        taps.append(apply(graph(Merger, model_config, True), tap_params, features))
    # Taps are of the blocks alone: this norm is behind the last.
    if model_config.final_norm:
        hidden = apply(graph(Final, model_config), params["final"], hidden)
    merger = graph(_merger(model_config), model_config)
    return Seen(apply(merger, params["merger"], hidden), tuple(taps))
