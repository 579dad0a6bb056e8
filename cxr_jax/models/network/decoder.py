"""The decoder's passes: over whole sequences, over prompts that completions share, and with kept keys.

Right padding everywhere: row b's tokens are the first lengths[b]. A prompt's keys are computed and stored
once, however many completions share it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.models.attention import KeysAndValues, causal_attention, key_bias, two_part_attention
from cxr_jax.models.layers import apply, graph, is_shallow, run_layers
from cxr_jax.models.network import rope
from cxr_jax.models.network.config import TextConfig
from cxr_jax.models.network.decoder_layers import Block, Final, final_norm
from cxr_jax.runtime.trees import Array, Tree


class Embedded(NamedTuple):
    """Tokens that enter the decoder, and what images add to them on the way."""

    hidden: Any  # [B, T, D]
    adds: tuple = ()  # [B, T, D] each, 0 but at image tokens: entry j is added after layer j


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


# ---- Layers one after the other ----------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """What the layers take beside the hidden states; all of it stacked on axis 0, or each a list of layers."""

    params: Any
    kept: Any = None  # keys of earlier passes
    add: Any = None  # [B, T, D], added after the layer


def _plus(hidden: jax.Array, add: jax.Array | None) -> jax.Array:
    return hidden if add is None else hidden + add


def _run(
    layer: Callable,
    model_config: TextConfig,
    inputs: _Inputs,
    adds: tuple,
    hidden: Any,
    remat: str = "none",
) -> tuple[Any, Any]:
    """`run_layers` of layer(inputs of one layer, hidden), where images add to what the first layers give.

    Those that nothing is added to are a stack of their own, so that no zeros are made for them.
    """
    count = model_config.num_hidden_layers
    # More taps than layers: the rest is not used.
    adds = adds[:count]
    if not adds:
        return run_layers(layer, _by_layer(inputs), hidden, count, remat)
    # One trace each in deep stacks, and all layers unrolled in shallow ones, as without taps.
    unroll_up_to = None if is_shallow(count) else 1
    tapped, others = (
        _Inputs(*(_layers_of(leaf, part) for leaf in inputs))
        for part in (slice(len(adds)), slice(len(adds), count))
    )
    # The additions go through the layers beside their parameters, in the same form.
    is_list = isinstance(inputs.params, list)
    tapped = tapped._replace(add=list(adds) if is_list else jnp.stack(adds))
    hidden, kept = run_layers(layer, _by_layer(tapped), hidden, len(adds), remat, unroll_up_to)
    if len(adds) == count:
        return hidden, kept
    hidden, other_kept = run_layers(
        layer, _by_layer(others), hidden, count - len(adds), remat, unroll_up_to
    )
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), kept, other_kept)


def _by_layer(inputs: _Inputs) -> Any:
    """The inputs as `run_layers` takes them: a list of layers where the parameters are one."""
    if not isinstance(inputs.params, list):
        return inputs
    # A layer is given what there is; the rest has its default.
    present = [name for name, value in inputs._asdict().items() if value is not None]
    columns = (getattr(inputs, name) for name in present)
    return [
        _Inputs(**dict(zip(present, values, strict=True))) for values in zip(*columns, strict=True)
    ]


def _layers_of(stacked: Any, part: slice) -> Any:
    if isinstance(stacked, list):
        return stacked[part]
    return jax.tree.map(lambda leaf: leaf[part], stacked)


# ---- Whole passes ------------------------------------------------------------------------------------------


def forward(
    params: Tree,
    model_config: TextConfig,
    embedded: Embedded,
    positions: Array,
    mask: Array,
    *,
    remat: str = "none",
) -> jax.Array:
    """Run all layers on embedded tokens [B, T, D].

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

    def layer(inputs: _Inputs, hidden: jax.Array) -> tuple[jax.Array, None]:
        hidden, kept = apply(block, inputs.params, hidden, cosines, sines, attend)
        return _plus(hidden, inputs.add), kept

    inputs = _Inputs(params["layers"])
    hidden, _ = _run(layer, model_config, inputs, embedded.adds, embedded.hidden, remat)
    return final_norm(params, model_config, hidden)


def forward_group(
    params: Tree,
    model_config: TextConfig,
    prompts: Embedded,
    positions: Array,
    lengths: jax.Array,
    own_hidden: jax.Array,
    own_positions: Array,
    *,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Run `forward` for prompts that several completions share: each prompt is computed once.

    Args:
        prompts: [B, S, D]; what images add concerns them alone.
        positions: int [3, B, S].
        lengths: int [B], of the prompts.
        own_hidden: [B*n, C, D], completions in prompt order, right-padded (causality hides the padding).
        own_positions: int [3, B*n, C].

    Returns:
        The hidden states after the final norm of both, [B, S, D] and [B*n, C, D]; the gradient of a prompt sums over
        its n.
    """
    prompt_mask = jnp.arange(prompts.hidden.shape[1]) < lengths[:, None]
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

    def layer(inputs: _Inputs, hidden: tuple) -> tuple[tuple, None]:
        prompt_hidden, completions = hidden
        prompt_hidden, shared = apply(block, inputs.params, prompt_hidden, *angles, attend_prompt)

        # Defined in the layer: it closes over the prompt's keys of this very layer.
        def attend_own(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, None]:
            own_keys = _heads_first(keys, values)
            return two_part_attention(queries, shared, own_keys, prompt_bias, own_bias), None

        completions, _ = apply(block, inputs.params, completions, *own_angles, attend_own)
        return (_plus(prompt_hidden, inputs.add), completions), None

    # Both go through the layers together, since no layer needs the prompt's keys of another.
    inputs, both = _Inputs(params["layers"]), (prompts.hidden, own_hidden)
    both, _ = _run(layer, model_config, inputs, prompts.adds, both, remat)
    return final_norm(params, model_config, both[0]), final_norm(params, model_config, both[1])


# ---- Passes that keep keys ---------------------------------------------------------------------------------


def prefill(
    params: Tree, model_config: TextConfig, embedded: Embedded, positions: Array, lengths: Array
) -> tuple[jax.Array, Tree]:
    """Run embedded prompts [B, S, D] once.

    Args:
        positions: int [3, B, S].
        lengths: int [B].

    Returns:
        (hidden [B, D] of each prompt's last token after the final norm, cache {"k", "v"}: [L, B, S, K, d] each).
    """
    mask = jnp.arange(embedded.hidden.shape[1]) < lengths[:, None]
    cosines, sines = rope.text_cos_sin(model_config, positions)
    attend_before = causal_attention(mask)
    block = graph(Block, model_config)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, Tree]:
        return attend_before(queries, keys, values), {"k": keys, "v": values}

    def layer(inputs: _Inputs, hidden: jax.Array) -> tuple[jax.Array, Tree]:
        hidden, kept = apply(block, inputs.params, hidden, cosines, sines, attend)
        return _plus(hidden, inputs.add), kept

    inputs = _Inputs(params["layers"])
    hidden, cache = _run(layer, model_config, inputs, embedded.adds, embedded.hidden)
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

    def layer(inputs: _Inputs, hidden: jax.Array) -> tuple[jax.Array, KeysAndValues]:
        def attend(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, KeysAndValues]:
            # Keys of the new tokens are kept apart; whoever asked joins them to the others.
            new = _heads_first(keys, values)
            return two_part_attention(queries, inputs.kept, new, kept_bias, own_bias), new

        return apply(block, inputs.params, hidden, *angles, attend)

    # Parameters and kept keys go through the layers together, stacked or as a list, as the parameters are.
    kept: Any = keys
    if not isinstance(params["layers"], list):
        kept = jax.tree.map(lambda *layers: jnp.stack(layers), *keys)
    # New keys come back stacked over the layers.
    inputs = _Inputs(params["layers"], kept)
    hidden, (new_keys, new_values) = _run(layer, model_config, inputs, (), hidden)
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
