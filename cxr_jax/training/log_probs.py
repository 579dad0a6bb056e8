"""Log-probs and entropies of completions under the model: one program for SFT and RL."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cxr_jax.models import network
from cxr_jax.models.network import Seen
from cxr_jax.models.network.config import Config
from cxr_jax.runtime import sharding
from cxr_jax.runtime.batch_rows import row_shards
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.losses import token_log_probs
from cxr_jax.training.needed_slots import RowSlots


def output_head(params: Tree, model_config: Config) -> jax.Array:
    """Give the output matrix [D, V], tied or not; on a mesh whole, for the loop over the tokens."""
    name = "embed" if model_config.tie_word_embeddings else "head"
    head = {"text": {name: params["text"][name]}}
    text = sharding.gather_weights(head, jax.tree.leaves(head)[0].dtype)["text"]
    if model_config.tie_word_embeddings:
        return text["embed"]["embedding"].T
    return text["head"]["kernel"]


def completion_log_probs(
    params: Tree,
    model_config: Config,
    features: Seen,
    prompts: Tree,
    completions: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    suppress: ArrayLike | None = None,
    remat: str = "none",
    chunk: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """Compute log-probs and entropies of completions under the model.

    The image is encoded once a prompt, by the caller; its gradient sums over the G completions.

    Args:
        features: tokens [P, I, D], one image a prompt; their type is that of the computation.
        prompts: as from `Prompts.encode`. With one completion a prompt, "positions" may be cut to as many slots as hold
            every prompt with its completion.
        completions: int [P, G, C].
        mask: bool [P, G, C], False after the end.
        suppress: as in `token_log_probs`, and `chunk` too.

    Returns:
        (log-probs, entropies), float32 [P, G, C].
    """
    P, G, C = completions.shape
    read = _hidden_by_row if G == 1 else _hidden_by_group
    hidden = read(params, model_config, features, prompts, completions, mask, remat)
    log_probs, entropy = token_log_probs(
        hidden.reshape(P * G * C, -1),
        output_head(params, model_config),
        completions.reshape(-1),
        temperature=temperature,
        suppress=suppress,
        chunk=chunk,
        shards=row_shards(),
    )
    return log_probs.reshape(P, G, C), entropy.reshape(P, G, C)


def completion_loss(
    params: Tree,
    model_config: Config,
    features: Seen,
    batch: Tree,
    total: jax.Array,
    *,
    remat: str = "none",
    room: RowSlots | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum cross-entropy and probability of the right token over completion tokens, and divide both.

    Args:
        batch: "prompts", "completions" int [B, C], "lengths" int [B], the tokens of each, and "mask" bool [B, C], those
            that train: what it leaves out before the end is read, and no target.
        total: the divisor: with the number of such tokens in the whole batch, the sums over its parts are their means.
        room: holds the tokens of every row; None: all slots that there are.
    """
    prompts, completions, trained = (batch[name] for name in ("prompts", "completions", "mask"))
    if room is not None:
        completions, trained = completions[:, : room.completion], trained[:, : room.completion]
        prompts = {**prompts, "positions": prompts["positions"][:, :, : room.row]}
    # A question between two answers is read like any token of the row, whether it trains or not.
    is_token = jnp.arange(completions.shape[1]) < batch["lengths"][:, None]
    log_probs, _ = completion_log_probs(
        params,
        model_config,
        features,
        prompts,
        completions[:, None],
        is_token[:, None],
        remat=remat,
    )
    mask = trained[:, None].astype(log_probs.dtype)
    return -jnp.sum(log_probs * mask) / total, jnp.sum(jnp.exp(log_probs) * mask) / total


def _hidden_by_row(
    params: Tree,
    model_config: Config,
    features: Seen,
    prompts: Tree,
    completions: jax.Array,
    mask: jax.Array,
    remat: str,
) -> jax.Array:
    """[P * G, C, D] that predict the completion tokens: prompt and completion in one pass a row."""
    P, G, C = completions.shape
    row_slots = min(prompts["positions"].shape[2], prompts["ids"].shape[1] + C)
    # A row holds the prompt, then its completion at once, then padding, which may lie beyond the slots.
    lengths = jnp.repeat(prompts["lengths"], G, axis=0)
    slots = lengths[:, None] + jnp.arange(C)
    ids = jnp.pad(jnp.repeat(prompts["ids"], G, axis=0), ((0, 0), (0, C)))
    ids = jnp.put_along_axis(ids, slots, completions.reshape(P * G, C), axis=1, inplace=False)
    ids = ids[:, :row_slots]
    is_token = jnp.arange(row_slots)[None] < (lengths + mask.reshape(P * G, C).sum(axis=1))[:, None]
    # Rows of a group have the same image; the type of its tokens is that of the computation.
    row_features = jax.tree.map(lambda tokens: jnp.repeat(tokens, G, axis=0), features)
    dtype = features.tokens.dtype
    embedded = network.embed(params, model_config, ids, row_features, dtype=dtype)
    positions = jnp.repeat(prompts["positions"][:, :, :row_slots], G, axis=1)
    hidden = network.decode_full(params, model_config, embedded, positions, is_token, remat=remat)
    # What predicts a token stands one slot before it.
    before = jnp.minimum(slots, row_slots) - 1
    return jnp.take_along_axis(hidden, before[:, :, None], axis=1)


def _hidden_by_group(
    params: Tree,
    model_config: Config,
    features: Seen,
    prompts: Tree,
    completions: jax.Array,
    mask: jax.Array,
    remat: str,
) -> jax.Array:
    """The same, with each prompt computed once; its gradient sums over the G completions that attend to it."""
    P, G, C = completions.shape
    width = prompts["ids"].shape[1]
    lengths = prompts["lengths"]
    slots = lengths[:, None] + jnp.arange(C - 1)
    slot_positions = jnp.take_along_axis(prompts["positions"], slots[None], axis=2)
    completion_positions = jnp.repeat(slot_positions, G, axis=1)
    dtype = features.tokens.dtype
    prompt_hidden, completion_hidden = network.decode_group(
        params,
        model_config,
        network.embed(params, model_config, prompts["ids"], features, dtype=dtype),
        prompts["positions"][:, :, :width],
        lengths,
        # The last token of a completion predicts none.
        network.embed_text(
            params, model_config, completions.reshape(P * G, C)[:, :-1], dtype=dtype
        ),
        completion_positions,
        remat=remat,
    )
    # The end of the prompt predicts the first token of every completion.
    last = jnp.take_along_axis(prompt_hidden, (lengths - 1)[:, None, None], axis=1)
    return jnp.concatenate([jnp.repeat(last, G, axis=0), completion_hidden], axis=1)
