"""Attention by cuDNN's kernel for GPUs, and its share of a softmax over two parts.

The functions of JAX that are called here are not public: what `jax.nn.dot_product_attention` gives of the log of the
kernel's sums is rounded to the type of the arrays, and has no gradient. Never run on a GPU: it is lowered for one, and
what surrounds the kernel is judged with a plain one in its place.

The kernel computes causal attention, or attention over all keys, of bfloat16. All else goes by blocks (`blocked`):
parts of a sequence, windows, padding in the middle; a bias for them would be an array of all queries and keys.

Axes as in `blocked`.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from cxr_jax.errors import UserError
from cxr_jax.models.attention.joined import NO_WEIGHTS, Kernel, KeysAndValues, kernel_attention
from cxr_jax.models.attention.masks import Mask

LARGEST_HEAD = 128
"""Features of a head at most; a multiple of 8 (cuDNN; on Hopper 256, which no model here has)."""


def has_kernel(queries: jax.Array, mask: Mask) -> bool:
    """Say whether the kernel computes attention of queries [R, K, G, T, d] under a mask of their own keys.

    Raises:
        UserError: for arrays of float32, which it has no kernel for at all.
    """
    if queries.dtype != jnp.bfloat16:
        raise UserError(
            "config.attention='cudnn' is a kernel for config.dtype='bfloat16': use 'blocked' in "
            f"{queries.dtype}"
        )
    T, d = queries.shape[-2:]
    # What is left out here would need a bias.
    is_plain = mask.parts is None and mask.images is None and mask.window is None
    # Padding is on the right, and so is what makes a length even: of a causal sequence it is seen by padding alone.
    is_whole = mask.is_causal or (mask.keys is None and T % 2 == 0)
    return is_plain and is_whole and mask.start is None and d % 8 == 0 and d <= LARGEST_HEAD


# ---- The kernel --------------------------------------------------------------------------------------------


def _changes_scores() -> bool:
    """Say whether the kernel of this JAX takes a function that changes the scores (0.12 and later)."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return "score_mod" in inspect.signature(cudnn._dot_product_attention_fwd_rule).parameters


def _settings(is_causal: bool) -> tuple:
    """What is no array, in the order in which JAX passes it to both rules; the names of some differ between them."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scale, seed, dropout_rate, window = 1.0, 0, 0.0, None
    has_bias_or_its_gradient = False, False
    mask_type = cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK
    layout = cudnn.AttentionLayout.BNTH.value
    score_function = (None,) * _changes_scores()
    numbers = scale, seed, dropout_rate, has_bias_or_its_gradient
    return (*numbers, mask_type, layout, window, *score_function, cudnn.check_cudnn_version())


def _without(dtype: jnp.dtype) -> tuple:
    """What stands for a bias, lengths, offsets, tables of pages and arguments of a score function: none is there."""
    return (*(jnp.zeros(0, dtype),) * 7, *((),) * _changes_scores())


def forward(
    queries: jax.Array, keys: jax.Array, values: jax.Array, is_causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Call the kernel: rows [R, H, T, d], [R, K, S, d] -> (output [R, H, T, d], log of the sums float32 [R, H, T])."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # The rule of the gradient, which keeps the log in float32; called by itself, nothing is differentiated.
    kernel: Any = cudnn._dot_product_attention_fwd_rule
    arrays, gives_log = (queries, keys, values, *_without(queries.dtype)), True
    (output, log_totals), _ = kernel(*arrays, *_settings(is_causal), gives_log)
    return output, log_totals


def backward(
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    output: jax.Array,
    log_totals: jax.Array,
    gradient: jax.Array,
    is_causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Call the kernel's gradient, of queries, keys and values; output and log of the sums may be of more keys."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # In the order in which its own forward rule keeps them.
    saved = (*arrays, *_without(output.dtype), log_totals, output)
    kernel: Any = cudnn._dot_product_attention_bwd_rule
    gave_log = False  # nothing flows back through it
    gradients = kernel(*_settings(is_causal), gave_log, saved, gradient)
    return gradients[:3]


# ---- Its part of a softmax ---------------------------------------------------------------------------------


def _evened(array: jax.Array, filler: float = 0.0) -> jax.Array:
    """Rows [R, H, T, ..] with T even, as the kernel wants it; the learner's have one slot less than a completion."""
    after = [(0, 0), (0, 0), (0, array.shape[2] % 2), *[(0, 0)] * (array.ndim - 3)]
    return jnp.pad(array, after, constant_values=filler)


def _sums(queries: jax.Array, own: KeysAndValues, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """See `Kernel.forward`."""
    R, K, G, T, d = queries.shape
    # Query heads of a key head stand side by side, as the kernel counts them.
    folded, keys, values = map(_evened, (queries.reshape(R, K * G, T, d), *own))
    output, log_totals = forward(folded, keys, values, mask.is_causal)
    return output[:, :, :T].reshape(queries.shape), log_totals[:, :, :T].reshape(R, K, G, T, 1)


def _gradients(
    queries: jax.Array,
    own: KeysAndValues,
    mask: Mask,
    output: jax.Array,
    log_totals: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `Kernel.backward`."""
    R, K, G, T, d = queries.shape
    # All in the type that the kernel knows; only the log stays in float32.
    folded_queries, folded_output, folded_gradient = (
        _evened(array.astype(queries.dtype).reshape(R, K * G, T, d))
        for array in (queries, output, gradient)
    )
    # One log a query, without the axis that broadcasts; a query that is none has no weights.
    totals = _evened(log_totals.reshape(R, K * G, T), NO_WEIGHTS)
    keys, values = map(_evened, own)
    arrays = folded_queries, keys, values
    gradients = backward(arrays, folded_output, totals, folded_gradient, mask.is_causal)
    S = own[0].shape[2]
    d_queries, d_keys, d_values = (
        array[:, :, :length] for array, length in zip(gradients, (T, S, S), strict=True)
    )
    return d_queries.reshape(queries.shape), d_keys, d_values


_KERNEL = Kernel(_sums, _gradients)


def cudnn_attention(
    queries: jax.Array,
    own: KeysAndValues,
    mask: Mask,
    kept: KeysAndValues | None = None,
    kept_mask: Mask | None = None,
) -> jax.Array:
    """Compute `joined.kernel_attention` by this kernel, where `has_kernel`."""
    return kernel_attention(_KERNEL, queries, own, mask, kept, kept_mask)
