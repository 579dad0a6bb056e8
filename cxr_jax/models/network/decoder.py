"""The Qwen2.5 decoder: grouped-query attention with qkv bias, SwiGLU, M-RoPE; full pass and KV cache.

Right padding everywhere: row b's tokens are the first lengths[b]. A prompt's keys are computed and stored
once, however many completions share it.

A layer is one module (`Block`); the passes below differ in the keys that its queries see. They say so in a function
attend(queries [B, T, H, d], keys, values [B, T, K, d]) -> ([B, T, H, d], what the pass keeps of the layer).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from cxr_jax.models.attention import KeysAndValues, causal_attention, key_bias, two_part_attention
from cxr_jax.models.layers import (
    MLP,
    FusedMLP,
    Linear,
    RMSNorm,
    apply,
    graph,
    init_stacked,
    merge_adapters,
    run_layers,
    split_adapters,
    unstack,
)
from cxr_jax.models.network import rope
from cxr_jax.models.network.config import TextConfig
from cxr_jax.runtime.trees import Array, Tree

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


# ---- Modules -----------------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """The projections around `attend`, which picks the keys."""

    def __init__(self, model_config: TextConfig, *, rngs: nnx.Rngs, fused: bool = False) -> None:
        """Draw fresh kernels; the one that writes into the residual stream is small in deep models."""
        # Several query heads share a key head (grouped-query attention).
        heads, key_heads = model_config.num_attention_heads, model_config.num_key_value_heads
        width, head_dim = model_config.hidden_size, model_config.head_dim
        self.widths = [heads * head_dim, key_heads * head_dim, key_heads * head_dim]
        if fused:
            self.qkv = Linear(width, sum(self.widths), bias=True, rngs=rngs)
        else:
            self.q, self.k, self.v = (
                Linear(width, size, bias=True, rngs=rngs) for size in self.widths
            )
        self.o = Linear(
            self.widths[0],
            width,
            bias=False,
            rngs=rngs,
            # Each layer adds two terms to the stream: so its variance does not grow with depth.
            scale=(2 * model_config.num_hidden_layers) ** -0.5,
        )
        self.head_dim = head_dim
        self.fused = fused

    def __call__(
        self, hidden: jax.Array, cosines: jax.Array, sines: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Compute (what attention adds to hidden [B, T, D], what `attend` keeps)."""
        B, T, _ = hidden.shape
        # One product for all three, cut where one kind of head ends.
        if self.fused:
            boundaries = self.widths[0], sum(self.widths[:2])
            projected = jnp.split(self.qkv(hidden), boundaries, -1)
        else:
            projected = [project(hidden) for project in (self.q, self.k, self.v)]
        queries, keys, values = (
            projection.reshape(B, T, -1, self.head_dim) for projection in projected
        )
        # Keys are kept rotated, so that no later pass turns them again.
        output, kept_by_pass = attend(
            rope.rotate(queries, cosines, sines), rope.rotate(keys, cosines, sines), values
        )
        return self.o(output.reshape(B, T, -1)), kept_by_pass


class Block(nnx.Module):
    """One layer. `fused`: for parameters from `fuse`, with q, k, v and gate, up in one kernel each."""

    def __init__(self, model_config: TextConfig, fused: bool = False, *, rngs: nnx.Rngs) -> None:
        """Draw fresh parameters."""
        width, inner_width = model_config.hidden_size, model_config.intermediate_size
        self.norm1 = RMSNorm(width, model_config.rms_norm_eps)
        self.attn = Attention(model_config, rngs=rngs, fused=fused)
        self.norm2 = RMSNorm(width, model_config.rms_norm_eps)
        if fused:
            self.mlp: FusedMLP | MLP = FusedMLP(width, inner_width, rngs=rngs)
        else:
            out_scale = (2 * model_config.num_hidden_layers) ** -0.5
            self.mlp = MLP(width, inner_width, bias=False, rngs=rngs, out_scale=out_scale)

    def __call__(
        self, hidden: jax.Array, cosines: jax.Array, sines: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Compute (hidden [B, T, D] after the layer, what `attend` keeps)."""
        added, kept_by_pass = self.attn(self.norm1(hidden), cosines, sines, attend)
        hidden = hidden + added
        return hidden + self.mlp(self.norm2(hidden)), kept_by_pass


class Final(nnx.Module):
    """The last normalisation."""

    def __init__(self, model_config: TextConfig, *, rngs: nnx.Rngs) -> None:
        """Begin with a scale of 1."""
        del rngs
        self.norm = RMSNorm(model_config.hidden_size, model_config.rms_norm_eps)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Normalise [..., D]."""
        return self.norm(hidden)


def final_norm(params: Tree, model_config: TextConfig, hidden: jax.Array) -> jax.Array:
    """Apply the last normalisation to [..., D]."""
    return apply(graph(Final, model_config), params["final"], hidden)


# ---- Parameters --------------------------------------------------------------------------------------------


def init_params(model_config: TextConfig, key: jax.Array, tied: bool) -> Tree:
    """Draw fresh parameters: {"embed": {"embedding" [V, D]}, "layers" (stacked), "final", "head" if untied}."""
    # Always three keys: a tied model draws the same layers as an untied one.
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    vocab_size, width = model_config.vocab_size, model_config.hidden_size

    def normal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        # 0.02: the standard deviation that transformers initialises with, too.
        return 0.02 * jax.random.normal(key, shape, jnp.float32)

    params = {
        "embed": {"embedding": normal(embed_key, (vocab_size, width))},
        "layers": init_stacked(
            Block, model_config, key=layers_key, count=model_config.num_hidden_layers
        ),
        "final": {"norm": {"scale": jnp.ones((width,), jnp.float32)}},
    }
    if not tied:
        params["head"] = {"kernel": normal(head_key, (width, vocab_size))}
    return params


def fuse(layers: Tree) -> Tree:
    """Concatenate q, k, v and gate, up of layer parameters: fewer, larger products in the decode loop.

    Adapters are added to their kernels: a step then costs what it costs without them.
    """
    # Adapters first, then one kernel of all that reads the same input.
    attn, mlp = (
        {name: merge_adapters(linear) for name, linear in layers[module].items()}
        for module in ("attn", "mlp")
    )

    def side_by_side(*linears: Tree) -> Tree:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *linears)

    return {
        **layers,
        "attn": {"qkv": side_by_side(attn["q"], attn["k"], attn["v"]), "o": attn["o"]},
        "mlp": {"gate_up": side_by_side(mlp["gate"], mlp["up"]), "down": mlp["down"]},
    }


def decode_layers(params: Tree, model_config: TextConfig) -> list[Tree]:
    """Unstack and fuse the layers for `decode_step`: made once, outside the loop, layer by layer, so that there is no
    second whole copy. A list is taken as it is.

    Adapters on kernels narrower than float32 stay beside them: their sum would be rounded to the kernel's type, and
    what adapters add in their first steps is less than that. The learner, which keeps them apart, would then not be
    the sampler.
    """
    layers = params["layers"]
    if isinstance(layers, list):
        return layers
    # Apart, because a loop over stacked layers would slice them at every token.
    apart = unstack(layers, model_config.num_hidden_layers)
    is_narrow = layers["attn"]["q"]["kernel"].dtype != jnp.float32
    if is_narrow and split_adapters(layers)[1]:
        return apart
    return [fuse(layer) for layer in apart]


# ---- Which keys are seen -----------------------------------------------------------------------------------


def _filled_bias(slots: int, filled: Array) -> jax.Array:
    """[B, 1, 1, 1, 1, S]: the first filled[b] of a group's slots are seen by all its queries."""
    seen = jnp.arange(slots) < filled[:, None]
    return key_bias(seen)[:, None, None, None, None]


def _own_bias(length: int) -> jax.Array:
    """[T, T]: causal among a row's own tokens, whose padding is on the right and so never seen."""
    return key_bias(jnp.tril(jnp.ones((length, length), bool)))


def _heads_first(keys: jax.Array, values: jax.Array) -> KeysAndValues:
    """[B, T, K, d] -> [B, K, T, d], the layout in which kept keys are read."""
    return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def _last_of(hidden: jax.Array, lengths: Array) -> jax.Array:
    """[B, T, D] -> [B, D]: each row's last token."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1, mode="clip")[:, 0]


# ---- Whole passes ------------------------------------------------------------------------------------------


def forward(
    params: Tree,
    model_config: TextConfig,
    hidden: jax.Array,
    positions: Array,
    mask: Array,
    *,
    remat: str = "none",
) -> jax.Array:
    """Run all layers on hidden [B, T, D].

    Args:
        positions: int [3, B, T].
        mask: bool [B, T].

    Returns:
        [B, T, D] after the final norm.
    """
    # Angles and bias are the same in all layers, so they are made once.
    cosines, sines = rope.text_cos_sin(model_config, positions)
    attend_before = causal_attention(mask)
    block = graph(Block, model_config)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, None]:
        return attend_before(queries, keys, values), None

    def layer(layer_params: Tree, hidden: jax.Array) -> tuple[jax.Array, None]:
        return apply(block, layer_params, hidden, cosines, sines, attend)

    hidden, _ = run_layers(layer, params["layers"], hidden, model_config.num_hidden_layers, remat)
    return final_norm(params, model_config, hidden)


def forward_group(
    params: Tree,
    model_config: TextConfig,
    prompt_hidden: jax.Array,
    positions: Array,
    lengths: jax.Array,
    own_hidden: jax.Array,
    own_positions: Array,
    *,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Run `forward` for prompts that several completions share: each prompt is computed once.

    Args:
        prompt_hidden: [B, S, D].
        positions: int [3, B, S].
        lengths: int [B], of the prompts.
        own_hidden: [B*n, C, D], completions in prompt order, right-padded (causality hides the padding).
        own_positions: int [3, B*n, C].

    Returns:
        The hidden states after the final norm of both, [B, S, D] and [B*n, C, D]; the gradient of a prompt sums over
        its n.
    """
    prompt_mask = jnp.arange(prompt_hidden.shape[1]) < lengths[:, None]
    angles = rope.text_cos_sin(model_config, positions)
    own_angles = rope.text_cos_sin(model_config, own_positions)
    attend_before = causal_attention(prompt_mask)
    prompt_bias = key_bias(prompt_mask)[:, None, None, None, None]  # [B, 1, 1, 1, 1, S]
    own_bias = _own_bias(own_hidden.shape[1])  # [C, C]
    block = graph(Block, model_config)

    def attend_prompt(
        queries: jax.Array, keys: jax.Array, values: jax.Array
    ) -> tuple[jax.Array, KeysAndValues]:
        return attend_before(queries, keys, values), _heads_first(keys, values)

    def layer(layer_params: Tree, hidden: tuple) -> tuple[tuple, None]:
        prompts, completions = hidden
        prompts, shared = apply(block, layer_params, prompts, *angles, attend_prompt)

        # Defined in the layer: it closes over the prompt's keys of this very layer.
        def attend_own(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, None]:
            own_keys = _heads_first(keys, values)
            return two_part_attention(queries, shared, own_keys, prompt_bias, own_bias), None

        completions, _ = apply(block, layer_params, completions, *own_angles, attend_own)
        return (prompts, completions), None

    # Both go through the layers together, since no layer needs the prompt's keys of another.
    (prompts, completions), _ = run_layers(
        layer, params["layers"], (prompt_hidden, own_hidden), model_config.num_hidden_layers, remat
    )
    return final_norm(params, model_config, prompts), final_norm(params, model_config, completions)


# ---- Passes that keep keys ---------------------------------------------------------------------------------


def prefill(
    params: Tree, model_config: TextConfig, hidden: jax.Array, positions: Array, lengths: Array
) -> tuple[jax.Array, Tree]:
    """Run prompts hidden [B, S, D] once.

    Args:
        positions: int [3, B, S].
        lengths: int [B].

    Returns:
        (hidden [B, D] of each prompt's last token after the final norm, cache {"k", "v"}: [L, B, S, K, d] each).
    """
    mask = jnp.arange(hidden.shape[1]) < lengths[:, None]
    cosines, sines = rope.text_cos_sin(model_config, positions)
    attend_before = causal_attention(mask)
    block = graph(Block, model_config)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, Tree]:
        return attend_before(queries, keys, values), {"k": keys, "v": values}

    def layer(layer_params: Tree, hidden: jax.Array) -> tuple[jax.Array, Tree]:
        return apply(block, layer_params, hidden, cosines, sines, attend)

    hidden, cache = run_layers(layer, params["layers"], hidden, model_config.num_hidden_layers)
    # Only the last token's state is wanted: the next token is drawn from it.
    return final_norm(params, model_config, _last_of(hidden, lengths)), cache


def prompt_keys(cache: Tree) -> list[KeysAndValues]:
    """Lay a cache out as keys are read, made once, outside the loop: [(k, v)] a layer, [B, K, S, d]."""
    return [_heads_first(cache["k"][index], cache["v"][index]) for index in range(len(cache["k"]))]


def extend(
    params: Tree,
    model_config: TextConfig,
    hidden: jax.Array,
    positions: Array,
    lengths: Array,
    keys: list[KeysAndValues],
    used: Array,
) -> tuple[jax.Array, list[KeysAndValues]]:
    """Run `prefill` of hidden [B, E, D] on top of keys that are kept.

    Args:
        positions: int [3, B, E].
        lengths: int [B] of the new tokens.
        keys: `prompt_keys` of S slots, the first used [B] filled.

    Returns:
        (hidden [B, D] of each last token after the final norm, the new tokens' [(k, v)] a layer, [B, K, E, d]).
    """
    kept_bias = _filled_bias(keys[0][0].shape[2], used)  # [B, 1, 1, 1, 1, S]
    own_bias = _own_bias(hidden.shape[1])
    angles = rope.text_cos_sin(model_config, positions)
    block = graph(Block, model_config)

    def layer(inputs: Tree, hidden: jax.Array) -> tuple[jax.Array, KeysAndValues]:
        def attend(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, KeysAndValues]:
            # Keys of the new tokens are kept apart; whoever asked joins them to the others.
            new = _heads_first(keys, values)
            return two_part_attention(queries, inputs["kept"], new, kept_bias, own_bias), new

        return apply(block, inputs["params"], hidden, *angles, attend)

    # Parameters and kept keys go through the layers together, stacked or as a list, as the parameters are.
    if isinstance(params["layers"], list):
        inputs: Any = [
            {"params": layer_params, "kept": layer_keys}
            for layer_params, layer_keys in zip(params["layers"], keys, strict=True)
        ]
    else:
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *keys)
        inputs = {"params": params["layers"], "kept": stacked}
    # New keys come back stacked over the layers.
    hidden, (new_keys, new_values) = run_layers(
        layer, inputs, hidden, model_config.num_hidden_layers
    )
    last = final_norm(params, model_config, _last_of(hidden, lengths))
    return last, [(new_keys[index], new_values[index]) for index in range(len(keys))]


def empty_own(
    model_config: TextConfig, rows: int, length: int, dtype: DTypeLike
) -> list[KeysAndValues]:
    """Make room for the keys of generated tokens: [(k, v)] a layer, zeros [R, K, length, d]."""
    shape = (rows, model_config.num_key_value_heads, length, model_config.head_dim)
    return [
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(model_config.num_hidden_layers)
    ]


def decode_step(
    layers: list[Tree],
    final: Tree,
    model_config: TextConfig,
    hidden: jax.Array,
    positions: jax.Array,
    prompt: list[KeysAndValues],
    prompt_lengths: jax.Array,
    own: list[KeysAndValues],
    step: jax.Array,
    place: tuple[jax.Array, int] | None = None,
) -> tuple[jax.Array, list[KeysAndValues]]:
    """Run one token of each row; each attends to its prompt's keys and its own in one softmax.

    Args:
        layers: from `decode_layers`.
        final: params["final"].
        hidden: [R, 1, D], rows in prompt order (R = B * n).
        positions: int [3, R, 1].
        prompt: from `prompt_keys`.
        own: from `empty_own`, slots < step filled.
        place: where these rows are not all of the prompts' rows, see `two_part_attention`.

    Returns:
        (hidden [R, D] after the final norm, own with slot `step` filled).
    """
    cosines, sines = rope.text_cos_sin(model_config, positions)
    prompt_bias = _filled_bias(prompt[0][0].shape[2], prompt_lengths)  # [B, 1, 1, 1, 1, S]
    own_bias = key_bias(jnp.arange(own[0][0].shape[2]) <= step)  # [N], the filled slots
    is_fused = "qkv" in layers[0]["attn"]
    block = graph(Block, model_config, is_fused)
    own_after = []
    # A Python loop: the caches of the layers are arrays of their own, written in place.
    for layer_params, shared, (old_keys, old_values) in zip(layers, prompt, own, strict=True):

        def attend(
            queries: jax.Array,
            keys: jax.Array,
            values: jax.Array,
            # Bound now, by defaults: a closure would see the last layer's keys in every turn.
            shared: KeysAndValues = shared,
            old_keys: jax.Array = old_keys,
            old_values: jax.Array = old_values,
        ) -> tuple[jax.Array, KeysAndValues]:
            # The token sees itself: its key goes into its slot before it attends.
            new_keys, new_values = _heads_first(keys, values)
            own_keys = (
                jax.lax.dynamic_update_slice_in_dim(old_keys, new_keys, step, 2),
                jax.lax.dynamic_update_slice_in_dim(old_values, new_values, step, 2),
            )
            output = two_part_attention(queries, shared, own_keys, prompt_bias, own_bias, place)
            return output, own_keys

        hidden, own_keys = apply(block, layer_params, hidden, cosines, sines, attend)
        own_after.append(own_keys)
    # The one position of each row, without its axis.
    return apply(graph(Final, model_config), final, hidden[:, 0]), own_after
