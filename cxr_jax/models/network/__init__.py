"""A vision-language model as pure functions of a plain nested dict of parameters: {"vision": ..., "text": ...}."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cxr_jax.models.layers import split_key
from cxr_jax.models.network import decoder, decoder_layers, tower, tower_layers, tower_packed
from cxr_jax.models.network.config import Config
from cxr_jax.models.network.decoder import Embedded
from cxr_jax.models.network.packing import Packing
from cxr_jax.models.network.rope import next_positions, positions
from cxr_jax.models.network.sharding_rules import SHARDING_RULES
from cxr_jax.models.network.tower_layers import Seen
from cxr_jax.runtime import sharding
from cxr_jax.runtime.trees import Array, Tree

__all__ = [
    "Embedded",
    "Seen",
    "init_params",
    "vision",
    "vision_packed",
    "embed",
    "embed_text",
    "positions",
    "next_positions",
    "decode_full",
    "decode_group",
    "unembed",
    "hidden_states",
    "count",
]

# On import, so that whoever has the model has its rules.
sharding.register_rules("network", SHARDING_RULES)


# ---- Parameters --------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model_config")
def init_params(model_config: Config, key: jax.Array | None) -> Tree:
    """Draw fresh float32 parameters; without a key nothing is drawn, for who asks for shapes alone."""
    # Apart, so that the tower is drawn alike whatever the decoder's size.
    vision_key, text_key = split_key(key, 2)
    return {
        "vision": tower_layers.init_params(model_config.vision, vision_key),
        "text": decoder_layers.init_params(
            model_config.text, text_key, model_config.tie_word_embeddings
        ),
    }


def count(params: Tree) -> int:
    """Count the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# ---- Images ------------------------------------------------------------------------------------------------


def vision(
    params: Tree,
    model_config: Config,
    pixels: Array,
    grid: tuple[int, int, int] = (1, 16, 16),
    *,
    remat: str = "none",
    dtype: DTypeLike = jnp.float32,
) -> Seen:
    """Encode images: pixels [N, P, 1176] in the processor's patch order -> image tokens [N, P/4, D], taps alike.

    Args:
        grid: static (t, h, w) of all of them, P = t * h * w.
        remat: see `layers.checkpointed`.
    """
    return tower.forward(
        params["vision"], model_config.vision, pixels, grid, remat=remat, dtype=dtype
    )


def vision_packed(
    params: Tree,
    model_config: Config,
    pixels: Array,
    packing: Packing,
    *,
    remat: str = "none",
    dtype: DTypeLike = jnp.float32,
) -> Seen:
    """Encode images of any sizes, packed into rows: pixels [R, P, patch_dim] -> image tokens [R, P/4, D].

    Args:
        packing: where each patch goes, arrays of `packing.pack`: data, so that one program serves all sizes.
        remat: see `layers.checkpointed`.
    """
    return tower_packed.forward(
        params["vision"], model_config.vision, pixels, packing, remat=remat, dtype=dtype
    )


# ---- Tokens in and out -------------------------------------------------------------------------------------


def embed_text(
    params: Tree, model_config: Config, input_ids: Array, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Embed tokens without images [B, T] as [B, T, D]."""
    # Ids out of range are clipped, and do not become NaN as by default.
    embedding = params["text"]["embed"]["embedding"]
    hidden = jnp.take(embedding, input_ids, axis=0, mode="clip").astype(dtype)
    if model_config.text.scales_embedding:
        # The factor is rounded to the type of the computation, as the reference rounds it to that of its weights.
        hidden = hidden * jnp.asarray(math.sqrt(model_config.text.hidden_size), dtype)
    return hidden


def embed(
    params: Tree,
    model_config: Config,
    input_ids: Array,
    image_features: Seen | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Embedded:
    """Embed tokens [B, T]; the i-th image placeholder of a row takes image token [row, i], and its taps.

    Args:
        image_features: [B, I, D] or None. A row may have fewer placeholders than I; the rest is not used.
    """
    hidden = embed_text(params, model_config, input_ids, dtype=dtype)
    if image_features is None:
        return Embedded(hidden)
    is_image = input_ids == model_config.image_token_id
    # A gather by each token's own number among its row's placeholders, so that no shape depends on the ids.
    slot = jnp.clip(jnp.cumsum(is_image, 1) - 1, 0, image_features.tokens.shape[1] - 1)

    def placed(features: jax.Array) -> jax.Array:
        return jnp.take_along_axis(features.astype(dtype), slot[..., None], axis=1, mode="clip")

    # Numbered here, where ids are known: the decoder has none.
    images = None
    if model_config.text.image_sees_itself:
        # An image is a run of placeholders; two are parted by text.
        follows_image = jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
        images = jnp.where(is_image, jnp.cumsum(is_image & ~follows_image, 1), 0)
    is_image = is_image[..., None]
    return Embedded(
        # Text keeps its embedding, and every placeholder takes the token of its image.
        jnp.where(is_image, placed(image_features.tokens), hidden),
        tuple(jnp.where(is_image, placed(tap), 0) for tap in image_features.taps),
        images,
    )


def unembed(params: Tree, model_config: Config, hidden: jax.Array) -> jax.Array:
    """Compute float32 logits [..., V] from hidden [..., D]."""
    text = params["text"]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if model_config.tie_word_embeddings:
        # Not by the transpose: of one row, XLA for CPUs would copy it at every step.
        embedding = text["embed"]["embedding"].astype(hidden.dtype)
        return product("...d,vd->...v", hidden, embedding)
    # An untied head has a kernel of its own, stored the other way around.
    return product("...d,dv->...v", hidden, text["head"]["kernel"].astype(hidden.dtype))


# ---- The decoder -------------------------------------------------------------------------------------------


def decode_full(
    params: Tree,
    model_config: Config,
    embedded: Embedded,
    positions: Array,
    mask: Array,
    *,
    remat: str = "none",
) -> jax.Array:
    """Run the decoder on embedded tokens [B, T, D].

    Args:
        positions: int [axes, B, T].
        mask: bool [B, T].

    Returns:
        [B, T, D] after the final norm.
    """
    return decoder.forward(
        params["text"], model_config.text, embedded, positions, mask, remat=remat
    )


def decode_group(
    params: Tree,
    model_config: Config,
    prompts: Embedded,
    positions: Array,
    lengths: jax.Array,
    own_hidden: jax.Array,
    own_positions: Array,
    *,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Run `decode_full` for B prompts and n completions of each, every prompt computed once.

    Args:
        prompts: [B, S, D].
        positions: int [axes, B, S].
        lengths: int [B].
        own_hidden: [B*n, C, D], right-padded, in prompt order.
        own_positions: int [axes, B*n, C].

    Returns:
        Hidden states [B, S, D] and [B*n, C, D] after the final norm.
    """
    return decoder.forward_group(
        params["text"],
        model_config.text,
        prompts,
        positions,
        lengths,
        own_hidden,
        own_positions,
        remat=remat,
    )


def hidden_states(
    params: Tree,
    model_config: Config,
    input_ids: Array,
    mask: Array,
    positions: Array,
    pixels: jax.Array | None = None,
    features: Seen | None = None,
    *,
    grid: tuple[int, int, int] = (1, 16, 16),
    remat: str = "none",
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Run the training forward: [B, T] ids -> hidden [B, T, D].

    Args:
        pixels: [B, n_img, P, 1176] or [B, P, 1176], all of the static `grid`; or None.
        features: [B, I, D] computed before, in the place of pixels; or neither for text only.
    """
    if pixels is not None:
        # All images of the batch in one pass of the tower.
        flat = pixels.reshape(-1, *pixels.shape[-2:])
        by_image = vision(params, model_config, flat, grid, remat=remat, dtype=dtype)
        # Images of a row side by side.
        row_shape = input_ids.shape[0], -1, model_config.text.hidden_size
        features = jax.tree.map(lambda tokens: tokens.reshape(row_shape), by_image)
    embedded = embed(params, model_config, input_ids, features, dtype=dtype)
    return decode_full(params, model_config, embedded, positions, mask, remat=remat)
