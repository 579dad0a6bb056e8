"""The two jitted updates of SFT: the located-finding warm-up, and the joint step."""

import functools

import jax
import jax.numpy as jnp

from cxr_jax import phantom
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models.qwen2_5_vl.patches import patchify
from cxr_jax.runtime import sharding
from cxr_jax.training import log_probs
from cxr_jax.training import losses as training_losses
from cxr_jax.training import micro_batches as training_micro_batches
from cxr_jax.training.optimizer import guarded_update

LOCATED_FINDINGS = len(phantom.FINDINGS)  # each is drawn in a place of its own


def init_locate_head(key, width: int, findings: int) -> dict:
    """Linear head on image tokens [.., width] -> findings, and the scale that turns its pooled logit into a label."""
    kernel = jax.random.normal(key, (width, findings), jnp.float32) * width**-0.5
    return {
        "kernel": kernel,
        "bias": jnp.full((findings,), -3.0),
        "pool_scale": jnp.ones(()),
        "pool_bias": jnp.zeros((findings,)),
    }


def locate_loss(head, features, regions, severity):
    """features [B, I, D]; regions [B, F, R, C] with R*C = I; severity [B, F] -> scalar.

    Per-token cross-entropy (positives weighted up: they cover a few per cent of the tokens) plus an image-level one
    on the smooth maximum over tokens.
    """
    b, i, _ = features.shape
    logits = features @ head["kernel"] + head["bias"]
    targets = regions.reshape(b, regions.shape[1], i).transpose(0, 2, 1)
    token = training_losses.binary_cross_entropy(logits, targets, 1.0 + 4.0 * targets)
    pooled = jax.nn.logsumexp(logits * 2.0, axis=1) / 2.0
    present = jnp.where(severity >= 0.35, 1.0, jnp.where(severity > 0, 0.5, 0.0))
    image = training_losses.binary_cross_entropy(
        pooled * head["pool_scale"] + head["pool_bias"], present
    )
    return token + 0.5 * image


def make_steps(
    model_config,
    optimizer,
    grid,
    trainable,
    *,
    micro_batches: int,
    locate_weight: float,
    remat: str,
):
    """The two jitted updates: (state, fixed, batch) -> (state, metrics), state donated.

    A batch is worked through in `micro_batches` parts whose gradients are summed; every completion token of
    the batch weighs the same, whichever part it is in.
    """
    parts = micro_batches
    see = lambda params, batch: qwen.vision(
        params["model"],
        model_config,
        patchify(batch["image"]),
        grid,
        remat=remat,
        dtype=trainable.dtype,
    )

    # Losses and metrics of a part, such that those of all parts sum to those of the batch.
    def locate_only(params, batch, total):
        features = see(params, batch)
        loss = locate_loss(params["locate"], features, batch["regions"], batch["severity"]) / parts
        return loss, {"locate_loss": loss}

    def joint(params, batch, total):
        features = see(params, batch)
        ce, p_mean = log_probs.completion_loss(
            params["model"], model_config, features, batch, total, remat=remat
        )
        metrics = {"loss": ce, "mean_token_probability": p_mean}
        if not locate_weight:
            return ce, metrics
        locate = (
            locate_loss(params["locate"], features, batch["regions"], batch["severity"]) / parts
        )
        return ce + locate_weight * locate, {**metrics, "locate_loss": locate}

    def update(loss_fn, state, frozen, batch):
        total = (
            jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), 1.0)
            if "mask" in batch
            else None
        )
        part_loss = lambda train, part: loss_fn(trainable.merge(train, frozen), part, total)
        grads, metrics = training_micro_batches.accumulate(
            jax.grad(part_loss, has_aux=True),
            state["params"],
            training_micro_batches.cut(batch, parts),
        )
        state, norm = guarded_update(optimizer, state, sharding.lay_out(grads))
        metrics = {k: v.sum() for k, v in metrics.items()}
        return sharding.lay_out(state), {**metrics, "grad_norm": norm, "skipped": state["skipped"]}

    jit = lambda f: jax.jit(functools.partial(update, f), donate_argnums=0)
    return jit(locate_only), jit(joint)
