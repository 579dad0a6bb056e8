"""Attention by JAX's own kernel for TPUs (splash attention), and its share of a softmax over two parts.

The kernel computes causal attention, or attention within parts of a sequence, and gives the log of its sum of
exponentials; by that it joins the keys that a group shares, which plain XLA asks block by block (`blocked`). The
backward kernel takes any such log and any output: given those of both parts, its gradient is that of the one softmax.
That function of JAX is not public.

Axes as in `blocked`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as kernel_masks

from cxr_jax.errors import UserError
from cxr_jax.models.attention.joined import NO_WEIGHTS, Kernel, KeysAndValues, kernel_attention
from cxr_jax.models.attention.masks import Mask

LANES = 128
"""Numbers in a row of a register: blocks are multiples of it, and narrower heads are filled up."""
LARGEST_BLOCK = 512

INTERPRET = False
"""Whether the kernels are computed by their definition, on any device, slowly: for tests."""


# ---- One row of a batch ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _kernel_mask(heads: int, queries: int, keys: int, is_causal: bool) -> Any:
    shape = queries, keys
    # An object that says what is seen: no array of queries and keys is made.
    one = kernel_masks.CausalMask(shape) if is_causal else kernel_masks.FullMask(shape)
    return kernel_masks.MultiHeadMask([one] * heads)


def _kernel(heads: int, queries: int, keys: int, is_causal: bool) -> kernels.SplashAttentionKernel:
    """The kernel with all that its backward pass needs; queries and keys are multiples of LANES."""
    of_queries, of_keys = (
        max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if tokens % size == 0)
        for tokens in (queries, keys)
    )
    # Forward and backward in the same blocks: their number divides the sequence.
    sizes = kernels.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_q_dq=of_queries,
        block_kv_dq=of_keys,
    )
    return kernels.make_splash_mha(
        _kernel_mask(heads, queries, keys, is_causal),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=INTERPRET,
    )


def _segments(parts: tuple | None) -> Any:
    return None if parts is None else kernels.SegmentIds(*parts)


def _forward(is_causal: bool, queries: Any, keys: Any, values: Any, parts: Any) -> tuple:
    """(output [R, H, T, d], log of the sums float32 [R, H, T]) of rows [R, H, T, d] and [R, K, S, d]."""

    def of_row(queries: Any, keys: Any, values: Any, parts: Any) -> tuple:
        kernel = _kernel(len(queries), queries.shape[1], keys.shape[1], is_causal)
        output, (log_totals,) = kernel(queries, keys, values, _segments(parts))
        return output, log_totals

    return jax.vmap(of_row)(queries, keys, values, parts)


def _backward(
    is_causal: bool, arrays: tuple, output: jax.Array, log_totals: jax.Array, gradient: jax.Array
) -> tuple:
    """Gradients of queries, keys and values, where `output` and `log_totals` are those of the whole softmax."""

    def of_row(arrays: tuple, output: Any, log_totals: Any, gradient: Any) -> tuple:
        queries, keys, values, parts = arrays
        # The same kernel as forward, for its masks and block sizes.
        kernel = _kernel(len(queries), queries.shape[1], keys.shape[1], is_causal)
        saved = (queries, keys, values, _segments(parts), None, output, log_totals)
        gradients = kernels._splash_attention_bwd(
            res=(*saved, kernel.dq_mask_info, kernel.dkv_mask_info), do=gradient, **kernel.kwargs
        )
        return gradients[3:6]

    return jax.vmap(of_row)(arrays, output, log_totals, gradient)


# ---- Arrays as the kernel takes them -----------------------------------------------------------------------


def _filled_up(array: jax.Array) -> jax.Array:
    """[.., T, d] with T and d filled up with zeros to multiples of LANES: they change no score and no output."""
    fill = [(0, -size % LANES) for size in array.shape[-2:]]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + fill)


def _kernel_arrays(queries: jax.Array, own: KeysAndValues, mask: Mask) -> tuple:
    """(queries [R, H, T, d], keys, values [R, K, S, d], parts (int32 [R, T], [R, S]) or None), filled up."""
    R, K, G, T, d = queries.shape
    S = own[0].shape[2]
    # Query heads of a key head stand side by side, as the kernel counts them.
    arrays = tuple(_filled_up(array) for array in (queries.reshape(R, K * G, T, d), *own))
    # Nobody sees later keys anyway.
    if mask.is_causal:
        return *arrays, None
    parts = mask.parts or (jnp.zeros((R, T), jnp.int32), jnp.zeros((R, S), jnp.int32))
    # What is filled up is a part of its own.
    filled = tuple(
        jnp.pad(
            jnp.asarray(part, jnp.int32), ((0, 0), (0, -part.shape[1] % LANES)), constant_values=-1
        )
        for part in parts
    )
    return *arrays, filled


def _check(mask: Mask) -> None:
    is_plain = mask.images is None and mask.window is None and mask.start is None
    if not is_plain or (mask.keys is not None and not mask.is_causal):
        raise UserError(
            "config.attention='splash' has no kernel for windows of tokens and for images that see themselves both "
            "ways (Gemma 3): use 'blocked'"
        )


# ---- The function ------------------------------------------------------------------------------------------


def _sums(queries: jax.Array, own: KeysAndValues, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """See `Kernel.forward`."""
    R, K, G, T, d = queries.shape
    output, log_totals = _forward(mask.is_causal, *_kernel_arrays(queries, own, mask))
    # Without what was filled up.
    output = output[:, :, :T, :d].reshape(queries.shape)
    return output, log_totals[:, :, :T].reshape(R, K, G, T, 1)


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
    S = own[0].shape[2]
    filled_output, filled_gradient = (
        _filled_up(array.astype(queries.dtype).reshape(R, K * G, T, d))
        for array in (output, gradient)
    )
    fill = ((0, 0), (0, 0), (0, -T % LANES))
    filled_totals = jnp.pad(log_totals.reshape(R, K * G, T), fill, constant_values=NO_WEIGHTS)
    arrays = _kernel_arrays(queries, own, mask)
    d_queries, d_keys, d_values = _backward(
        mask.is_causal, arrays, filled_output, filled_totals, filled_gradient
    )
    d_queries = d_queries[:, :, :T, :d].reshape(queries.shape)
    return d_queries, d_keys[:, :, :S, :d], d_values[:, :, :S, :d]


_KERNEL = Kernel(_sums, _gradients)


def splash_attention(
    queries: jax.Array,
    own: KeysAndValues,
    mask: Mask,
    kept: KeysAndValues | None = None,
    kept_mask: Mask | None = None,
) -> jax.Array:
    """Compute `joined.kernel_attention` by this kernel.

    Args:
        queries: [R, K, G, T, d], already scaled.
        own: (keys, values) [R, K, S, d].
        mask: causal, or parts, or neither.
        kept: (keys, values) [B, K, S, d], R a multiple of B.
        kept_mask: of kept keys.

    Returns:
        [R, K, G, T, d].

    Raises:
        UserError: for a mask that the kernel does not have.
    """
    _check(mask)
    return kernel_attention(_KERNEL, queries, own, mask, kept, kept_mask)
