"""Qwen2.5-VL as pure functions of a plain nested dict of parameters: {"vision": ..., "text": ...}."""

import functools

import jax
import jax.numpy as jnp

from cxr_jax.models.qwen2_5_vl import decoder
from cxr_jax.models.qwen2_5_vl import vision as tower
from cxr_jax.models.qwen2_5_vl.config import Config
from cxr_jax.models.qwen2_5_vl.rope import next_positions, positions
from cxr_jax.models.qwen2_5_vl.sharding_rules import SHARDING_RULES
from cxr_jax.runtime import sharding

__all__ = [
    "init_params",
    "vision",
    "embed",
    "positions",
    "next_positions",
    "decode_full",
    "decode_group",
    "unembed",
    "hidden_states",
    "count",
]

sharding.register_rules(Config.model_type, SHARDING_RULES)


@functools.partial(jax.jit, static_argnames="model_config")
def init_params(model_config: Config, key) -> dict:
    """Fresh float32 parameters."""
    a, b = jax.random.split(key)
    return {
        "vision": tower.init_params(model_config.vision, a),
        "text": decoder.init_params(model_config.text, b, model_config.tie_word_embeddings),
    }


def count(params: dict) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def vision(
    params: dict,
    model_config: Config,
    pixels,
    grid: tuple[int, int, int] = (1, 16, 16),
    *,
    remat: str = "none",
    dtype=jnp.float32,
):
    """pixels [N, P, 1176] in the processor's patch order, one static grid -> image tokens [N, P/4, D]."""
    return tower.forward(
        params["vision"], model_config.vision, pixels, grid, remat=remat, dtype=dtype
    )


def embed(params: dict, model_config: Config, input_ids, image_features=None, *, dtype=jnp.float32):
    """Token embeddings [B, T, D]; the i-th image placeholder of a row takes image_features[row, i].

    image_features [B, I, D] or None. A row may have fewer placeholders than I; the rest is not used.
    """
    h = jnp.take(params["text"]["embed"]["embedding"], input_ids, axis=0, mode="clip").astype(dtype)
    if image_features is None:
        return h
    is_image = input_ids == model_config.image_token_id
    slot = jnp.clip(jnp.cumsum(is_image, 1) - 1, 0, image_features.shape[1] - 1)
    placed = jnp.take_along_axis(image_features.astype(dtype), slot[..., None], axis=1, mode="clip")
    return jnp.where(is_image[..., None], placed, h)


def decode_full(params: dict, model_config: Config, h, positions, mask, *, remat: str = "none"):
    """h [B, T, D], positions int [3, B, T], mask bool [B, T] -> hidden [B, T, D] after the final norm."""
    return decoder.forward(params["text"], model_config.text, h, positions, mask, remat=remat)


def decode_group(
    params: dict,
    model_config: Config,
    h_prompt,
    positions,
    lengths,
    h_own,
    own_positions,
    *,
    remat: str = "none",
):
    """`decode_full` for B prompts and n completions of each, every prompt computed once.

    h_prompt [B, S, D], positions int [3, B, S], lengths int [B]; h_own [B*n, C, D] and own_positions int
    [3, B*n, C] right-padded, in prompt order. Returns hidden [B, S, D] and [B*n, C, D].
    """
    return decoder.forward_group(
        params["text"],
        model_config.text,
        h_prompt,
        positions,
        lengths,
        h_own,
        own_positions,
        remat=remat,
    )


def unembed(params: dict, model_config: Config, hidden):
    """hidden [..., D] -> float32 logits [..., V]."""
    text, product = (
        params["text"],
        functools.partial(jnp.einsum, preferred_element_type=jnp.float32),
    )
    if (
        model_config.tie_word_embeddings
    ):  # not by the transpose: of one row, XLA for CPUs would copy it at every step
        return product("...d,vd->...v", hidden, text["embed"]["embedding"].astype(hidden.dtype))
    return product("...d,dv->...v", hidden, text["head"]["kernel"].astype(hidden.dtype))


def hidden_states(
    params: dict,
    model_config: Config,
    input_ids,
    mask,
    positions,
    pixels=None,
    features=None,
    *,
    grid: tuple[int, int, int] = (1, 16, 16),
    remat: str = "none",
    dtype=jnp.float32,
):
    """The training forward: [B, T] ids -> hidden [B, T, D].

    pixels: [B, n_img, P, 1176] or [B, P, 1176], all of the static `grid`; or features [B, I, D] computed
    before; or neither for text only.
    """
    if pixels is not None:
        B = input_ids.shape[0]
        flat = pixels.reshape(-1, *pixels.shape[-2:])
        features = vision(params, model_config, flat, grid, remat=remat, dtype=dtype)
        features = features.reshape(B, -1, model_config.text.hidden_size)
    h = embed(params, model_config, input_ids, features, dtype=dtype)
    return decode_full(params, model_config, h, positions, mask, remat=remat)
