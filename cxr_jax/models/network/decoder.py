"""The decoder's passes: over whole sequences, over prompts that completions share, and with kept keys.

Right padding everywhere: row b's tokens are the first lengths[b]. A prompt's keys are computed and stored
once, however many completions share it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.models.attention import KeysAndValues, causal_attention, following_attention
from cxr_jax.models.layers import apply, graph, is_shallow, run_layers
from cxr_jax.models.network import rope
from cxr_jax.models.network.config import TextConfig
from cxr_jax.models.network.decoder_layers import Block, Final, final_norm
from cxr_jax.runtime.batch_rows import key_copies
from cxr_jax.runtime.trees import Array, Tree


class Embedded(NamedTuple):
    """Tokens that enter the decoder, and what images are to it beside."""

    hidden: Any  # [B, T, D]
    adds: tuple = ()  # [B, T, D] each, 0 but at image tokens: entry j is added after layer j
    images: Any = None  # int [B, T]: each token's image, from 1, 0 for text; None where images are read like text


# ---- Kinds of layers ---------------------------------------------------------------------------------------

_FAR = 2**30  # tokens: the window of a layer that has none

_OfKind = Callable[[Any], Any]
"""kind of a layer -> a value. 0: it sees all, 1: it sees a window, maybe traced; None where all are of one kind."""


def _windows(model_config: TextConfig) -> list[int | None]:
    """The windows of the kinds of layers that there are: one, or first that of full layers, then that of the others."""
    kinds = set(model_config.layer_kinds)
    windows = {0: None, 1: model_config.sliding_window}
    return [windows[kind] for kind in sorted(kinds)]


def _by_window(model_config: TextConfig, make: Callable[[Any], Any]) -> _OfKind:
    """What make(window) gives for a layer; where all layers are of one kind, it is made once, now."""
    windows = _windows(model_config)
    # One trace for both kinds, so what differs is looked up.
    if len(windows) > 1:
        sizes = jnp.asarray([_FAR, model_config.sliding_window], jnp.int32)
        return lambda kind: make(sizes[kind])
    made = make(windows[0])
    return lambda kind: made


def _angles(model_config: TextConfig, positions: Array) -> _OfKind:
    """Cosines and sines of positions int [axes, B, T], as `rope.text_cos_sin` gives them for a kind."""
    angles = [
        rope.text_cos_sin(model_config, positions, is_sliding=window is not None)
        for window in _windows(model_config)
    ]
    # Stacked, so that a traced kind can choose.
    if len(angles) > 1:
        stacked = jax.tree.map(lambda *kinds: jnp.stack(kinds), *angles)
        return lambda kind: jax.tree.map(lambda leaf: leaf[kind], stacked)
    return lambda kind: angles[0]


# ---- Which keys are seen -----------------------------------------------------------------------------------


def _attention_before(
    model_config: TextConfig, mask: Array, images: Array | None = None
) -> _OfKind:
    """Attention of whole sequences, see `causal_attention`."""
    return _by_window(
        model_config,
        lambda window: causal_attention(
            mask,
            heads=model_config.num_attention_heads,
            images=images,
            window=window,
            scale=model_config.query_scale,
            kind=model_config.attention,
        ),
    )


def _attention_after(
    model_config: TextConfig,
    slots: int,
    filled: Array,
    rows: int,
    own_slots: int,
    step: jax.Array | None = None,
) -> _OfKind:
    """Attention of `rows` sequences that follow kept keys, see `following_attention`."""
    return _by_window(
        model_config,
        lambda window: following_attention(
            filled,
            slots=slots,
            own_slots=own_slots,
            rows=rows * model_config.num_attention_heads,
            step=step,
            window=window,
            scale=model_config.query_scale,
            kind=model_config.attention,
        ),
    )


def _heads_first(keys: jax.Array, values: jax.Array) -> KeysAndValues:
    """[B, T, K, d] -> [B, K, T, d], the layout in which kept keys are read."""
    return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def _last_of(hidden: jax.Array, lengths: Array) -> jax.Array:
    """[B, T, D] -> [B, D]: each row's last token."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1, mode="clip")[:, 0]


# ---- Layers one after the other ----------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """What one layer takes beside the hidden states."""

    params: Any
    kind: Any = None  # see `_OfKind`
    kept: Any = None  # keys of earlier passes
    add: Any = None  # [B, T, D], added after the layer


def _plus(hidden: jax.Array, add: jax.Array | None) -> jax.Array:
    return hidden if add is None else hidden + add


def _run(
    layer: Callable,
    model_config: TextConfig,
    params: Any,
    hidden: Any,
    *,
    kept: list | None = None,
    adds: tuple = (),
    remat: str = "none",
) -> tuple[Any, Any]:
    """`run_layers` of layer(_Inputs, hidden), where images add to what the first layers give.

    Those that nothing is added to are a stack of their own, so that no zeros are made for them.

    Args:
        params: of the layers, stacked, or a list.
        kept: a layer's keys each.
        adds: of the first layers; those of more layers than there are are not used.
    """
    count = model_config.num_hidden_layers
    # The first layers are a stack of their own; of most models it is empty.
    tapped = min(len(adds), count)
    # In deep stacks one trace each; all layers unrolled in shallow ones, as without taps.
    unroll_up_to = 1 if tapped and not is_shallow(count) else None
    all_kept = []
    for first, last in ((0, tapped), (tapped, count)):
        if first == last:
            continue
        inputs = _inputs(model_config, params, kept, adds if first < tapped else (), first, last)
        hidden, of_layers = run_layers(layer, inputs, hidden, last - first, remat, unroll_up_to)
        all_kept.append(of_layers)
    if len(all_kept) == 1:
        return hidden, all_kept[0]
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *all_kept)


def _inputs(
    model_config: TextConfig, params: Any, kept: list | None, adds: tuple, first: int, last: int
) -> Any:
    """The inputs of the layers first to last - 1, as `run_layers` takes them: stacked, or a list as the parameters."""
    kinds = model_config.layer_kinds if len(set(model_config.layer_kinds)) > 1 else None
    columns: list[Any] = [column and column[first:last] for column in (kinds, kept, adds or None)]
    # A list goes layer by layer, and what is not there is None in each.
    if isinstance(params, list):
        absent = [None] * (last - first)
        of_layers = zip(params[first:last], *(column or absent for column in columns), strict=True)
        return [_Inputs(*values) for values in of_layers]
    columns[0] = kinds and [jnp.int32(kind) for kind in columns[0]]
    # The whole stack as it is: a slice of all of it would be one more operation.
    if last - first < model_config.num_hidden_layers:
        params = jax.tree.map(lambda leaf: leaf[first:last], params)
    stacked = (
        column and jax.tree.map(lambda *layers: jnp.stack(layers), *column) for column in columns
    )
    return _Inputs(params, *stacked)


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
        positions: int [axes, B, T].
        mask: bool [B, T].

    Returns:
        [B, T, D] after the final norm.
    """
    angles = _angles(model_config, positions)
    attention_of = _attention_before(model_config, mask, embedded.images)
    block = graph(Block, model_config)

    def layer(inputs: _Inputs, hidden: jax.Array) -> tuple[jax.Array, None]:
        attend_before = attention_of(inputs.kind)

        def attend(*projected: jax.Array) -> tuple[jax.Array, None]:
            return attend_before(*projected), None

        hidden, kept = apply(block, inputs.params, hidden, *angles(inputs.kind), attend)
        return _plus(hidden, inputs.add), kept

    hidden, _ = _run(
        layer, model_config, params["layers"], embedded.hidden, adds=embedded.adds, remat=remat
    )
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
        positions: int [axes, B, S].
        lengths: int [B], of the prompts.
        own_hidden: [B*n, C, D], completions in prompt order, right-padded (causality hides the padding).
        own_positions: int [axes, B*n, C].

    Returns:
        The hidden states after the final norm of both, [B, S, D] and [B*n, C, D]; the gradient of a prompt sums over
        its n.
    """
    slots, own_slots = prompts.hidden.shape[1], own_hidden.shape[1]
    prompt_mask = jnp.arange(slots) < lengths[:, None]
    angles, own_angles = (_angles(model_config, each) for each in (positions, own_positions))
    attention_of = _attention_before(model_config, prompt_mask, prompts.images)
    following_of = _attention_after(model_config, slots, lengths, len(own_hidden), own_slots)
    block = graph(Block, model_config)

    def layer(inputs: _Inputs, hidden: tuple) -> tuple[tuple, None]:
        prompt_hidden, completions = hidden
        attend_before = attention_of(inputs.kind)

        def attend_prompt(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, KeysAndValues]:
            return attend_before(queries, keys, values), _heads_first(keys, values)

        prompt_hidden, shared = apply(
            block, inputs.params, prompt_hidden, *angles(inputs.kind), attend_prompt
        )

        # Defined in the layer: it closes over the prompt's keys of this very layer.
        def attend_own(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, None]:
            own_keys = _heads_first(keys, values)
            return following_of(inputs.kind)(queries, shared, own_keys), None

        completions, _ = apply(
            block, inputs.params, completions, *own_angles(inputs.kind), attend_own
        )
        return (_plus(prompt_hidden, inputs.add), completions), None

    # Both go through the layers together, since no layer needs the prompt's keys of another.
    both = prompts.hidden, own_hidden
    both, _ = _run(layer, model_config, params["layers"], both, adds=prompts.adds, remat=remat)
    return final_norm(params, model_config, both[0]), final_norm(params, model_config, both[1])


# ---- Passes that keep keys ---------------------------------------------------------------------------------


def prefill(
    params: Tree, model_config: TextConfig, embedded: Embedded, positions: Array, lengths: Array
) -> tuple[jax.Array, Tree]:
    """Run embedded prompts [B, S, D] once.

    Args:
        positions: int [axes, B, S].
        lengths: int [B].

    Returns:
        (hidden [B, D] of each prompt's last token after the final norm, cache {"k", "v"}: [L, B, S, K, d] each).
    """
    mask = jnp.arange(embedded.hidden.shape[1]) < lengths[:, None]
    angles = _angles(model_config, positions)
    attention_of = _attention_before(model_config, mask, embedded.images)
    block = graph(Block, model_config)

    def layer(inputs: _Inputs, hidden: jax.Array) -> tuple[jax.Array, Tree]:
        attend_before = attention_of(inputs.kind)

        def attend(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, Tree]:
            return attend_before(queries, keys, values), {"k": keys, "v": values}

        hidden, kept = apply(block, inputs.params, hidden, *angles(inputs.kind), attend)
        return _plus(hidden, inputs.add), kept

    hidden, cache = _run(layer, model_config, params["layers"], embedded.hidden, adds=embedded.adds)
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
        positions: int [axes, B, E].
        lengths: int [B] of the new tokens.
        keys: `prompt_keys` of S slots, the first used [B] filled.

    Returns:
        (hidden [B, D] of each last token after the final norm, the new tokens' [(k, v)] a layer, [B, K, E, d]).
    """
    slots, new_slots = keys[0][0].shape[2], hidden.shape[1]
    following_of = _attention_after(model_config, slots, used, len(hidden), new_slots)
    angles = _angles(model_config, positions)
    block = graph(Block, model_config)

    def layer(inputs: _Inputs, hidden: jax.Array) -> tuple[jax.Array, KeysAndValues]:
        def attend(
            queries: jax.Array, keys: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, KeysAndValues]:
            # Keys of the new tokens are kept apart; whoever asked joins them to the others.
            new = _heads_first(keys, values)
            return following_of(inputs.kind)(queries, inputs.kept, new), new

        return apply(block, inputs.params, hidden, *angles(inputs.kind), attend)

    # New keys come back stacked over the layers.
    hidden, (new_keys, new_values) = _run(layer, model_config, params["layers"], hidden, kept=keys)
    last = final_norm(params, model_config, _last_of(hidden, lengths))
    return last, [(new_keys[index], new_values[index]) for index in range(len(keys))]


def empty_own(
    model_config: TextConfig, rows: int, length: int, dtype: DTypeLike
) -> list[KeysAndValues]:
    """Make room for the keys of generated tokens: [(k, v)] a layer, zeros [R, K, length, d].

    K as keys come on the mesh that is set: see `copy_key_heads`.
    """
    key_heads = model_config.num_key_value_heads * key_copies()
    shape = (rows, key_heads, length, model_config.head_dim)
    return [
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(model_config.num_hidden_layers)
    ]


def _put(old: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Write new [R, K, 1, d] into slot `step` of old [R, K, N, d]: one slot for all rows, or int32 [R]."""
    if step.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, step, 2)
    # A scatter, in place as the above; a choice by `where` would write every slot again.
    return jax.vmap(
        lambda row, row_new, slot: jax.lax.dynamic_update_slice_in_dim(row, row_new, slot, 1)
    )(old, new, step)


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
        positions: int [axes, R, 1].
        prompt: from `prompt_keys`.
        own: from `empty_own`, slots < step filled.
        step: int32, or int32 [R] where rows have not begun together (a prompt each then, B = R).
        place: where these rows are not all of the prompts' rows, see `following_attention`.

    Returns:
        (hidden [R, D] after the final norm, own with slot `step` filled).
    """
    angles = _angles(model_config, positions)
    slots, own_slots = prompt[0][0].shape[2], own[0][0].shape[2]
    rows = len(hidden)
    following_of = _attention_after(model_config, slots, prompt_lengths, rows, own_slots, step)
    is_fused = "qkv" in layers[0]["attn"]
    block = graph(Block, model_config, is_fused)
    own_after = []
    # A Python loop: the caches of the layers are arrays of their own, written in place.
    for layer_params, kind, shared, (old_keys, old_values) in zip(
        layers, model_config.layer_kinds, prompt, own, strict=True
    ):

        def attend(
            queries: jax.Array,
            keys: jax.Array,
            values: jax.Array,
            # Bound now, by defaults: a closure would see the last layer's keys in every turn.
            kind: int = kind,
            shared: KeysAndValues = shared,
            old_keys: jax.Array = old_keys,
            old_values: jax.Array = old_values,
        ) -> tuple[jax.Array, KeysAndValues]:
            # The token sees itself: its key goes into its slot before it attends.
            new_keys, new_values = _heads_first(keys, values)
            own_keys = _put(old_keys, new_keys, step), _put(old_values, new_values, step)
            return following_of(kind)(queries, shared, own_keys, place), own_keys

        hidden, own_keys = apply(block, layer_params, hidden, *angles(kind), attend)
        own_after.append(own_keys)
    # The one position of each row, without its axis.
    return apply(graph(Final, model_config), final, hidden[:, 0]), own_after
