"""One layer of the decoder, its parameters, and what the decode loop makes of them.

A layer is one module (`Block`); passes (`decoder`) differ in the keys that its queries see. They say so in a function
attend(queries [B, T, H, d], keys, values [B, T, K, d]) -> ([B, T, H, d], what the pass keeps of the layer).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cxr_jax.models.layers import (
    MLP,
    FusedMLP,
    Linear,
    RMSNorm,
    apply,
    cut_columns,
    graph,
    init,
    init_embedding,
    init_stacked,
    join_columns,
    merge_adapters,
    split_adapters,
    split_key,
    unstack,
)
from cxr_jax.models.network import rope
from cxr_jax.models.network.config import TextConfig
from cxr_jax.runtime.batch_rows import copy_key_heads, head_shards, key_copies
from cxr_jax.runtime.trees import Tree

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


# ---- Modules -----------------------------------------------------------------------------------------------


def _norm(model_config: TextConfig, width: int) -> RMSNorm:
    is_one_plus = {"scale": False, "one_plus": True}[model_config.norm]
    return RMSNorm(width, model_config.rms_norm_eps, is_one_plus=is_one_plus)


class Attention(nnx.Module):
    """The projections around `attend`, which picks the keys."""

    def __init__(
        self, model_config: TextConfig, *, rngs: nnx.Rngs | None, fused: bool = False
    ) -> None:
        """Draw fresh kernels; the one that writes into the residual stream is small in deep models."""
        # Several query heads share a key head (grouped-query attention).
        heads, key_heads = model_config.num_attention_heads, model_config.num_key_value_heads
        width, head_dim = model_config.hidden_size, model_config.head_dim
        self.widths = [heads * head_dim, key_heads * head_dim, key_heads * head_dim]
        if fused:
            self.qkv = Linear(width, sum(self.widths), bias=model_config.qkv_bias, rngs=rngs)
        else:
            self.q, self.k, self.v = (
                Linear(width, size, bias=model_config.qkv_bias, rngs=rngs, is_of_keys=is_of_keys)
                for size, is_of_keys in zip(self.widths, (False, True, True), strict=True)
            )
        self.o = Linear(
            self.widths[0],
            width,
            bias=model_config.output_bias,
            rngs=rngs,
            # Each layer adds two terms to the stream: so its variance does not grow with depth.
            scale=(2 * model_config.num_hidden_layers) ** -0.5,
        )
        # One weight of each, shared by all heads.
        self.has_head_norms = model_config.qk_norm
        if self.has_head_norms:
            self.q_norm, self.k_norm = (_norm(model_config, head_dim) for _ in range(2))
        self.head_dim = head_dim
        self.fused = fused

    def __call__(
        self, hidden: jax.Array, cosines: jax.Array, sines: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Compute (what attention adds to hidden [B, T, D], what `attend` keeps)."""
        B, T, _ = hidden.shape
        # One product for all three, cut where one kind of head ends.
        if self.fused:
            copies = key_copies()
            widths = self.widths[0], copies * self.widths[1], copies * self.widths[2]
            projected = cut_columns(self.qkv(hidden), widths)
        else:
            projected = [project(hidden) for project in (self.q, self.k, self.v)]
        queries, keys, values = (
            projection.reshape(B, T, -1, self.head_dim) for projection in projected
        )
        # Of a fused kernel they come copied.
        if not self.fused:
            keys, values = copy_key_heads(keys), copy_key_heads(values)
        # Before the rotation, which keeps lengths.
        if self.has_head_norms:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        # Keys are kept rotated, so that no later pass turns them again.
        output, kept_by_pass = attend(
            rope.rotate(queries, cosines, sines), rope.rotate(keys, cosines, sines), values
        )
        return self.o(output.reshape(B, T, -1)), kept_by_pass


class Block(nnx.Module):
    """One layer. `fused`: for parameters from `fuse`, with q, k, v and gate, up in one kernel each."""

    def __init__(
        self, model_config: TextConfig, fused: bool = False, *, rngs: nnx.Rngs | None
    ) -> None:
        """Draw fresh parameters."""
        width, inner_width = model_config.hidden_size, model_config.intermediate_size
        self.norm1 = _norm(model_config, width)
        self.attn = Attention(model_config, rngs=rngs, fused=fused)
        self.norm2 = _norm(model_config, width)
        self.has_post_norms = model_config.post_norms
        if self.has_post_norms:
            self.post_norm1, self.post_norm2 = (_norm(model_config, width) for _ in range(2))
        activation = model_config.activation
        if fused:
            self.mlp: FusedMLP | MLP = FusedMLP(
                width, inner_width, rngs=rngs, activation=activation
            )
        else:
            out_scale = (2 * model_config.num_hidden_layers) ** -0.5
            self.mlp = MLP(
                width,
                inner_width,
                bias=False,
                rngs=rngs,
                out_scale=out_scale,
                activation=activation,
            )

    def __call__(
        self, hidden: jax.Array, cosines: jax.Array, sines: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Compute (hidden [B, T, D] after the layer, what `attend` keeps)."""
        added, kept_by_pass = self.attn(self.norm1(hidden), cosines, sines, attend)
        # Normed before they are added, so that no layer can write more than its scale allows.
        if self.has_post_norms:
            hidden = hidden + self.post_norm1(added)
            return hidden + self.post_norm2(self.mlp(self.norm2(hidden))), kept_by_pass
        hidden = hidden + added
        return hidden + self.mlp(self.norm2(hidden)), kept_by_pass


class Final(nnx.Module):
    """The last normalisation."""

    def __init__(self, model_config: TextConfig, *, rngs: nnx.Rngs | None) -> None:
        """Begin with a scale of 1."""
        del rngs
        self.norm = _norm(model_config, model_config.hidden_size)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Normalise [..., D]."""
        return self.norm(hidden)


def final_norm(params: Tree, model_config: TextConfig, hidden: jax.Array) -> jax.Array:
    """Apply the last normalisation to [..., D]."""
    return apply(graph(Final, model_config), params["final"], hidden)


# ---- Parameters --------------------------------------------------------------------------------------------


def init_params(model_config: TextConfig, key: jax.Array | None, tied: bool) -> Tree:
    """Draw fresh parameters: {"embed": {"embedding" [V, D]}, "layers" (stacked), "final", "head" if untied}."""
    # Always three keys: a tied model draws the same layers as an untied one.
    embed_key, layers_key, head_key = split_key(key, 3)
    vocab_size, width = model_config.vocab_size, model_config.hidden_size
    params = {
        "embed": {"embedding": init_embedding(embed_key, (vocab_size, width))},
        "layers": init_stacked(
            Block, model_config, key=layers_key, count=model_config.num_hidden_layers
        ),
        "final": init(Final, model_config, key=layers_key),  # draws nothing
    }
    if not tied:
        params["head"] = {"kernel": init_embedding(head_key, (width, vocab_size))}
    return params


def fuse(layers: Tree, head_dim: int) -> Tree:
    """Concatenate q, k, v and gate, up of layer parameters: fewer, larger products in the decode loop.

    Adapters are added to their kernels: a step then costs what it costs without them.

    Args:
        head_dim: features of a head, d.
    """
    # Adapters first, then one kernel of all that reads the same input.
    attn, mlp = (
        {name: merge_adapters(linear) for name, linear in layers[module].items()}
        for module in ("attn", "mlp")
    )

    # With biases or without: whatever leaves they have lie side by side.
    def side_by_side(*linears: Tree) -> Tree:
        return jax.tree.map(lambda *leaves: join_columns(leaves), *linears)

    # Each device's share of the columns has the key heads that its queries ask.
    copies = key_copies()

    def copied(leaf: jax.Array) -> jax.Array:
        # Kernels and biases alike: their last axis is heads and features.
        by_head = leaf.reshape(*leaf.shape[:-1], -1, head_dim)
        return jnp.repeat(by_head, copies, axis=-2).reshape(*leaf.shape[:-1], -1)

    if copies > 1:
        attn |= {name: jax.tree.map(copied, attn[name]) for name in ("k", "v")}
    return {
        **layers,
        "attn": {"qkv": side_by_side(*(attn.pop(name) for name in ("q", "k", "v"))), **attn},
        "mlp": {"gate_up": side_by_side(mlp["gate"], mlp["up"]), "down": mlp["down"]},
    }


def fuse_with_adapters(layer: Tree) -> Tree:
    """`fuse` one layer, its adapters apart from the kernels: see `Linear` for the form that they take.

    Each fused module has the columns of all its `lora_a` in its kernel, and one `lora_b` with theirs as blocks on its
    diagonal: a layer takes 8 products, where 7 modules with an adapter each would take 21.
    """
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    qkv = _join_linears(*(attn.pop(name) for name in ("q", "k", "v")))
    attn = {**attn, "qkv": qkv, "o": _join_linears(attn["o"])}
    gate_up = _join_linears(mlp["gate"], mlp["up"])
    return {**layer, "attn": attn, "mlp": {"gate_up": gate_up, "down": _join_linears(mlp["down"])}}


def _join_linears(*linears: Tree) -> Tree:
    """One Linear of several that read the same input, with adapters or without."""
    plain, adapters = zip(*(split_adapters(linear) for linear in linears), strict=True)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *plain)
    # Of each linear: none, or one at the linear itself.
    halves = [adapter[0][1] if adapter else None for adapter in adapters]
    kernel = joined["kernel"]
    lowering = [half["lora_a"].astype(kernel.dtype) for half in halves if half]
    if not lowering:
        return joined
    raising = []
    for linear, half in zip(plain, halves, strict=True):
        # A linear without an adapter has a block of no rows: columns of zeros.
        empty = jnp.zeros((0, linear["kernel"].shape[-1]), lowering[0].dtype)
        raising.append(half["lora_b"].astype(empty.dtype) if half else empty)
    return {
        **joined,
        "kernel": jnp.concatenate([kernel, *lowering], -1),
        "lora_b": jax.scipy.linalg.block_diag(*raising),
    }


def decode_layers(
    params: Tree, model_config: TextConfig, dtype: DTypeLike | None = None
) -> list[Tree]:
    """Unstack and fuse the layers for `decode_step`: made once, outside the loop, layer by layer, so that there is no
    second whole copy. A list is taken as it is.

    Adapters on kernels narrower than float32 stay beside them: their sum would be rounded to the kernel's type, and
    what adapters add in their first steps is less than that. The learner, which keeps them apart, would then not be
    the sampler. Where the kernels have the type of the computation, `dtype`, adapters are rounded to it anyway, and are
    fused as they are.
    """
    layers = params["layers"]
    if isinstance(layers, list):
        return layers
    # Apart, because a loop over stacked layers would slice them at every token.
    apart = unstack(layers, model_config.num_hidden_layers)
    kernel_type = layers["attn"]["q"]["kernel"].dtype
    if kernel_type != jnp.float32 and split_adapters(layers)[1]:
        # Columns of adapters are whole on every device, and do not lie side by side with columns that are divided.
        if kernel_type != dtype or head_shards() > 1:
            return apart
        return [fuse_with_adapters(layer) for layer in apart]
    return [fuse(layer, model_config.head_dim) for layer in apart]
