"""Attention by one name: what sees what is said once (`masks`), and how it is computed is a choice of the model config.

- `xla`: all scores at once (`plain`), the path by which the others are judged;
- `blocked`: by blocks of queries and keys (`blocked`), with nothing of the size of the scores kept;
- `splash`: by JAX's kernel for TPUs (`splash`), keys that a group shares by blocks;
- `cudnn`: by cuDNN's kernel for GPUs (`cudnn`) in the same way, and by blocks what it has no mask for;
- `auto`: `blocked` where the scores would be more than SCORES_AT_ONCE, else `xla`.

Axes: B sequences, or groups; R rows, n a group (R = B * n); T queries, S keys, N own keys of a row; H query heads that
share K key heads, G = H / K; d features of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cxr_jax.models.attention import blocked, cudnn, plain
from cxr_jax.models.attention.blocked import blocked_attention
from cxr_jax.models.attention.masks import NEG, Mask, key_bias
from cxr_jax.models.attention.plain import KeysAndValues
from cxr_jax.runtime.batch_rows import head_shards, row_shards
from cxr_jax.runtime.trees import Array

__all__ = [
    "KINDS",
    "NEG",
    "KeysAndValues",
    "Mask",
    "attention",
    "causal_attention",
    "following_attention",
    "key_bias",
    "part_attention",
]

KINDS = ("auto", "xla", "blocked", "splash", "cudnn")
"""Names of `config.attention`."""

SCORES_AT_ONCE = 2**26
"""Scores up to which `auto` takes `xla`, in all rows and heads of one device: 256 MiB in float32."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(queries [B, T, H, d], keys [B, S, K, d], values [B, S, K, d]) -> [B, T, H, d]."""


# ---- The choice --------------------------------------------------------------------------------------------


def _shards() -> int:
    """Count the devices over which rows and heads are divided."""
    return row_shards() * head_shards()


def chosen_kind(kind: str, rows: int, queries: int, keys: int) -> str:
    """Choose how attention of a size is computed: a name of KINDS other than "auto".

    Args:
        kind: of KINDS.
        rows: sequences times query heads, on all devices.
        queries: of a sequence.
        keys: that each query asks.
    """
    # Where there is nothing to divide: one query, as in a step of the decode loop, or the keys of a small window.
    if queries == 1 or keys <= blocked.LEAST_BLOCK:
        return "xla"
    # A name that was asked for holds at any size.
    if kind != "auto":
        return kind
    return "blocked" if rows * queries * keys > SCORES_AT_ONCE * _shards() else "xla"


def _in_parts(
    kind: str, queries: jax.Array, parts: tuple[KeysAndValues, ...], masks: tuple[Mask, ...]
) -> jax.Array:
    """Attention in any way but `xla`: queries [R, K, G, T, d]; of the parts, the last is the rows' own."""
    if kind == "blocked" or kind == "cudnn" and not cudnn.has_kernel(queries, masks[-1]):
        return blocked_attention(queries, parts, masks, shards=_shards())
    # Of two parts the first is the one that a group shares.
    kept, kept_mask = (parts[0], masks[0]) if len(parts) > 1 else (None, None)
    if kind == "cudnn":
        return cudnn.cudnn_attention(queries, parts[-1], masks[-1], kept, kept_mask)
    # Imported where it is asked for: its kernels take a second to import.
    from cxr_jax.models.attention import splash

    return splash.splash_attention(queries, parts[-1], masks[-1], kept, kept_mask)


# ---- Layouts -----------------------------------------------------------------------------------------------


def _grouped(queries: jax.Array, key_heads: int, scale: float | None) -> jax.Array:
    """[B, T, H, d] -> [B, K, G, T, d], scaled: query heads of a key head side by side."""
    B, T, H, d = queries.shape
    # As a factor of the queries, which are fewer than the scores.
    scaled = queries * (d**-0.5 if scale is None else scale)
    return scaled.reshape(B, T, key_heads, H // key_heads, d).transpose(0, 2, 3, 1, 4)


def _ungrouped(output: jax.Array) -> jax.Array:
    """The inverse of `_grouped`, but for the scale."""
    B, K, G, T, d = output.shape
    return output.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, d)


# ---- One part ----------------------------------------------------------------------------------------------


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    kind: str = "auto",
) -> jax.Array:
    """Compute softmax attention, with the softmax in float32.

    Args:
        queries: [B, T, H, d].
        keys: [B, S, K, d], as values; H a multiple of K.
        mask: which keys are seen; None: all.
        scale: of the scores; None: d ** -0.5.
        kind: of KINDS.

    Returns:
        [B, T, H, d].
    """
    (B, T, H, _), S = queries.shape, keys.shape[1]
    mask = Mask() if mask is None else mask
    kind = chosen_kind(kind, B * H, T, S)
    if kind != "xla":
        return _in_one_part(kind, queries, keys, values, mask, scale)
    return _plain(queries, keys, values, mask.bias(T, S), scale)


def _plain(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    bias: jax.Array | None,
    scale: float | None,
) -> jax.Array:
    grouped = _grouped(queries, keys.shape[2], scale)
    seen = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    return _ungrouped(plain.softmax_attention(grouped, *seen, bias))


def _in_one_part(
    kind: str,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: Mask,
    scale: float | None,
) -> jax.Array:
    grouped = _grouped(queries, keys.shape[2], scale)
    seen = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    return _ungrouped(_in_parts(kind, grouped, (seen,), (mask,)))


def causal_attention(
    mask: Array,
    *,
    heads: int,
    images: Array | None = None,
    window: Array | int | None = None,
    scale: float | None = None,
    kind: str = "auto",
) -> Attend:
    """Make `attention` of (queries, keys, values) for sequences in which a token sees itself and those before it.

    Args:
        mask: bool [B, T], False at padding, which is on the right.
        heads: H, of the queries.
        images: int [B, T], of each token its image, 0 for none: tokens of one image see each other both ways.
        window: a token sees itself and the window - 1 tokens before it, and no others of those before it.
        scale: of the scores; None: d ** -0.5.
        kind: of KINDS.
    """
    B, T = mask.shape
    pair = None if images is None else (images, images)
    # Padding is on the right: the mask matters for the padding's own queries only.
    seen = Mask(keys=mask.astype(bool), is_causal=True, images=pair, window=window)
    kind = chosen_kind(kind, B * heads, T, T)
    if kind != "xla":
        return lambda queries, keys, values: _in_one_part(kind, queries, keys, values, seen, scale)
    # Made once for all layers.
    bias = seen.bias(T, T)
    return lambda queries, keys, values: _plain(queries, keys, values, bias, scale)


def part_attention(
    parts: jax.Array, queries: jax.Array, keys: jax.Array, values: jax.Array, *, kind: str = "auto"
) -> jax.Array:
    """Compute `attention` within each part of a sequence: parts int [B, T], of queries and keys alike."""
    return attention(queries, keys, values, Mask(parts=(parts, parts)), kind=kind)


# ---- Two parts ---------------------------------------------------------------------------------------------


def _following_masks(
    filled: Array, slots: int, step: jax.Array | None, window: Array | int | None
) -> tuple[Mask, Mask]:
    """Of kept keys and of own ones."""
    own_start = None if step is None else jnp.reshape(step, -1)
    # The query's place in the whole sequence is filled[b] + its own.
    start = filled if own_start is None else filled + own_start
    # Keys in slots that are not filled yet lie ahead of every query.
    is_filled = jnp.arange(slots) < filled[:, None]
    return (
        Mask(keys=is_filled, window=window, start=start),
        Mask(is_causal=True, window=window, start=own_start),
    )


def following_attention(
    filled: Array,
    *,
    slots: int,
    own_slots: int,
    rows: int,
    step: jax.Array | None = None,
    window: Array | int | None = None,
    scale: float | None = None,
    kind: str = "auto",
) -> Callable[..., jax.Array]:
    """Make attention of tokens that follow kept keys, shared by the rows of a group, and each other causally.

    Args:
        filled: int [B]: of a group's kept keys, the first filled[b] are seen.
        slots: S, of a group's kept keys.
        own_slots: N, of the keys of the tokens that follow, in their order; padding on the right is never seen.
        rows: R times H.
        step: the place among them of the one query that there is, int32 or, of each row, int32 [R] (B = R then);
            None: all of them ask, T = N.
        window: a token sees itself and the window - 1 tokens before it; None: all.
        scale: of the scores; None: d ** -0.5.
        kind: of KINDS.

    Returns:
        attend(queries [R, T, H, d], kept (keys, values) [B, K, S, d], own (keys, values) [R, K, N, d], place=None)
        -> [R, T, H, d], in a single softmax. place: (index, rows) where only some of the `rows` = B * n rows in group
        order are left, those at `index` (see `take_rows`); not differentiable then.
    """
    queries = own_slots if step is None else 1
    masks = _following_masks(filled, slots, step, window)
    kind = chosen_kind(kind, rows, queries, slots + own_slots)
    # Made once for all layers, with an axis for the rows of a group.
    biases: tuple = ()
    if kind == "xla":
        sizes = zip(masks, (slots, own_slots), strict=True)
        biases = tuple(
            bias[:, None] for mask, keys in sizes if (bias := mask.bias(queries, keys)) is not None
        )

    def attend(
        queries: jax.Array,
        kept: KeysAndValues,
        own: KeysAndValues,
        place: tuple[jax.Array, int] | None = None,
    ) -> jax.Array:
        grouped = _grouped(queries, kept[0].shape[1], scale)
        if kind != "xla":
            assert place is None, "rows leave the batch in steps of one query alone"
            return _ungrouped(_in_parts(kind, grouped, (kept, own), masks))
        if place is None:
            return _ungrouped(plain.two_part_softmax(grouped, kept, own, *biases))
        kept_bias, own_bias = biases
        of_left = plain.two_part_softmax_of_left(grouped, kept, own, kept_bias, own_bias, place)
        return _ungrouped(of_left)

    return attend
