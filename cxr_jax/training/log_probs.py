"""The model as a policy: prompts in fixed shapes, and log-probs of completions. One program for SFT and RL."""

import jax
import jax.numpy as jnp

from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.runtime import sharding
from cxr_jax.runtime.batch_rows import row_shards
from cxr_jax.training import losses as training_losses


def output_head(params, model_config):
    """The output matrix [D, V], tied or not; on a mesh whole, for the loop over the tokens."""
    name = "embed" if model_config.tie_word_embeddings else "head"
    head = {"text": {name: params["text"][name]}}
    text = sharding.gather_weights(head, jax.tree.leaves(head)[0].dtype)["text"]
    return (
        text["embed"]["embedding"].T if model_config.tie_word_embeddings else text["head"]["kernel"]
    )


def completion_logprobs(
    params,
    model_config,
    features,
    prompts,
    completions,
    mask,
    *,
    temperature=1.0,
    suppress=None,
    remat="none",
    chunk=2048,
):
    """Log-probs and entropies of completions under the model.

    features [P, I, D] image tokens, one image a prompt; prompts as from `Prompts.encode`; completions int [P, G, C],
    mask bool [P, G, C] (False after the end) -> (logp, entropy), float32 [P, G, C]. The image is encoded once a
    prompt, by the caller; its gradient sums over the G completions.
    """
    p, g, c = completions.shape
    hidden = _plain if g == 1 else _shared
    hidden = hidden(params, model_config, features, prompts, completions, mask, remat)
    logp, entropy = training_losses.token_logprobs(
        hidden.reshape(p * g * c, -1),
        output_head(params, model_config),
        completions.reshape(-1),
        temperature=temperature,
        suppress=suppress,
        chunk=chunk,
        shards=row_shards(),
    )
    return logp.reshape(p, g, c), entropy.reshape(p, g, c)


def completion_loss(params, model_config, features, batch, total, *, remat="none"):
    """Cross-entropy and the probability given to the right token, both summed over completion tokens and divided by
    `total`: with the number of such tokens, their means."""
    logp, _ = completion_logprobs(
        params,
        model_config,
        features,
        batch["prompts"],
        batch["completions"][:, None],
        batch["mask"][:, None],
        remat=remat,
    )
    mask = batch["mask"][:, None].astype(logp.dtype)
    return -jnp.sum(logp * mask) / total, jnp.sum(jnp.exp(logp) * mask) / total


def _plain(params, model_config, features, prompts, completions, mask, remat):
    """hidden [P * G, C, D] that predict the completion tokens: prompt and completion in one pass a row."""
    p, g, c = completions.shape
    t = prompts["ids"].shape[1]
    each = lambda x, axis=0: jnp.repeat(x, g, axis=axis)
    lengths = each(prompts["lengths"])
    place = lengths[:, None] + jnp.arange(c)
    ids = jnp.pad(each(prompts["ids"]), ((0, 0), (0, c)))
    ids = jnp.put_along_axis(ids, place, completions.reshape(p * g, c), axis=1, inplace=False)
    valid = jnp.arange(t + c)[None] < (lengths + mask.reshape(p * g, c).sum(axis=1))[:, None]
    hidden = qwen.embed(params, model_config, ids, each(features), dtype=features.dtype)
    hidden = qwen.decode_full(
        params, model_config, hidden, each(prompts["positions"], 1), valid, remat=remat
    )
    return jnp.take_along_axis(hidden, (place - 1)[:, :, None], axis=1)


def _shared(params, model_config, features, prompts, completions, mask, remat):
    """The same, with each prompt computed once; its gradient sums over the G completions that attend to it."""
    p, g, c = completions.shape
    t = prompts["ids"].shape[1]
    each = lambda x, axis=0: jnp.repeat(x, g, axis=axis)
    lengths = prompts["lengths"]
    place = lengths[:, None] + jnp.arange(c - 1)
    positions = each(jnp.take_along_axis(prompts["positions"], place[None], axis=2), 1)
    prompt, own = qwen.decode_group(
        params,
        model_config,
        qwen.embed(params, model_config, prompts["ids"], features, dtype=features.dtype),
        prompts["positions"][:, :, :t],
        lengths,
        qwen.embed(
            params, model_config, completions.reshape(p * g, c)[:, :-1], dtype=features.dtype
        ),  # the last predicts none
        positions,
        remat=remat,
    )
    last = jnp.take_along_axis(prompt, (lengths - 1)[:, None, None], axis=1)
    return jnp.concatenate([each(last), own], axis=1)
