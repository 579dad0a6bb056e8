"""The two jitted updates of SFT: the located-finding warm-up, and the joint step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cxr_jax import phantom
from cxr_jax.models import network
from cxr_jax.models.image_batches import Images
from cxr_jax.models.network.config import Config
from cxr_jax.runtime import sharding
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.log_probs import completion_loss
from cxr_jax.training.losses import binary_cross_entropy
from cxr_jax.training.micro_batches import accumulate, cut
from cxr_jax.training.needed_slots import RowSlots, gradients_in_slots, pick_text_slots, sort_texts
from cxr_jax.training.optimizer import guarded_update
from cxr_jax.training.trainable import Trainable

LOCATED_FINDINGS = len(phantom.FINDINGS)  # each is drawn in a place of its own

_Gradients = Callable[[Tree, Tree], tuple[Tree, dict[str, jax.Array]]]
"""(train, part) -> (gradients, metrics): those of all parts sum to those of the batch."""


def init_locate_head(key: jax.Array, width: int, findings: int) -> Tree:
    """Make a linear head on image tokens [.., width] -> findings, and what turns a pooled logit into a label."""
    kernel = jax.random.normal(key, (width, findings), jnp.float32) * width**-0.5
    return {
        "kernel": kernel,
        # Findings cover a few per cent of the tokens: the head begins by saying so.
        "bias": jnp.full((findings,), -3.0),
        "pool_scale": jnp.ones(()),
        "pool_bias": jnp.zeros((findings,)),
    }


def locate_loss(
    head: Tree, features: jax.Array, regions: jax.Array, severity: jax.Array
) -> jax.Array:
    """Compute the loss of saying which findings lie under each image token.

    Per-token cross-entropy (positives weighted up: they cover a few per cent of the tokens) plus an image-level one
    on the smooth maximum over tokens.

    Args:
        head: of `init_locate_head`.
        features: [B, I, D].
        regions: [B, F, n * R, R], the share of each cell that a finding covers, of n images one below another; of as
            many tokens a side, or resampled.
        severity: [B, F]; at least 0.35 is a finding, above 0 half of one.
    """
    B, image_tokens, _ = features.shape
    logits = features @ head["kernel"] + head["bias"]
    cells = regions.shape[-1]
    by_image = regions.reshape(B, regions.shape[1], -1, cells, cells)
    covered = _resampled(by_image, math.isqrt(image_tokens // by_image.shape[2]))
    targets = covered.reshape(B, regions.shape[1], image_tokens).transpose(0, 2, 1)
    token_loss = binary_cross_entropy(logits, targets, 1.0 + 4.0 * targets)
    # A smooth maximum: one token that shows a finding is enough.
    pooled = jax.nn.logsumexp(logits * 2.0, axis=1) / 2.0
    # What readers may leave out counts half.
    present = jnp.where(severity >= 0.35, 1.0, jnp.where(severity > 0, 0.5, 0.0))
    image_loss = binary_cross_entropy(pooled * head["pool_scale"] + head["pool_bias"], present)
    return token_loss + 0.5 * image_loss


def _resampled(regions: jax.Array, side: int) -> jax.Array:
    """Coverage of cells [.., R, R] as that of side x side cells of the same image."""
    count = regions.shape[-1]
    if count == side:
        return regions
    # How much of each new cell lies in each old one, along an axis.
    edges_old, edges_new = np.arange(count + 1) / count, np.arange(side + 1) / side
    shared = np.minimum(edges_new[1:, None], edges_old[1:]) - np.maximum(
        edges_new[:-1, None], edges_old[:-1]
    )
    weights = np.maximum(shared, 0).astype(np.float32) * side
    return jnp.einsum("yr,xc,...rc->...yx", weights, weights, regions)


def make_steps(
    model_config: Config,
    optimizer: optax.GradientTransformation,
    images: Images,
    trainable: Trainable,
    *,
    micro_batches: int,
    locate_weight: float,
    remat: str,
) -> tuple[Callable[..., tuple[Tree, Tree]], Callable[..., tuple[Tree, Tree]]]:
    """Build the two jitted updates, each (state, frozen, batch) -> (state, metrics), state donated.

    A batch is worked through in `micro_batches` parts whose gradients are summed; every completion token of the batch
    weighs the same, whichever part it is in. A part is computed in the slots that its longest row needs
    (`needed_slots`).

    Args:
        images: how image tokens come from a batch.
        locate_weight: of the located loss in the joint step.

    Returns:
        The located warm-up and the joint step.
    """
    steps = _Steps(
        model_config=model_config,
        optimizer=optimizer,
        images=images,
        trainable=trainable,
        micro_batches=micro_batches,
        locate_weight=locate_weight,
        remat=remat,
    )
    return (jax.jit(steps.locate_only, donate_argnums=0), jax.jit(steps.joint, donate_argnums=0))


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """What both updates share; each method is a piece of them, traced inside jit."""

    model_config: Config
    optimizer: optax.GradientTransformation
    images: Images
    trainable: Trainable
    micro_batches: int
    locate_weight: float
    remat: str

    def image_features(self, params: Tree, part: Tree) -> network.Seen:
        return self.images.features(
            params["model"], part, remat=self.remat, dtype=self.trainable.dtype
        )

    def located(self, params: Tree, features: network.Seen, part: Tree) -> jax.Array:
        """A part's share of the located loss."""
        loss = locate_loss(params["locate"], features.tokens, part["regions"], part["severity"])
        return loss / self.micro_batches

    def joint_loss(
        self, params: Tree, part: Tree, room: RowSlots, total: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A part's share of the loss of texts and places, and its metrics.

        Args:
            part: with the "features" of its images.
            room: holds its texts.
            total: completion tokens of the batch that train.
        """
        features = part["features"]
        loss, probability = completion_loss(
            params["model"], self.model_config, features, part, total, remat=self.remat, room=room
        )
        metrics = {"loss": loss, "mean_token_probability": probability}
        if not self.locate_weight:
            return loss, metrics
        located = self.located(params, features, part)
        return loss + self.locate_weight * located, {**metrics, "locate_loss": located}

    # ---- The two updates ----

    def locate_only(self, state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """The located warm-up: one optimizer step on images alone."""

        def part_loss(train: Tree, part: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
            params = self.trainable.merge(train, frozen)
            loss = self.located(params, self.image_features(params, part), part)
            return loss, {"locate_loss": loss}

        return self.update(jax.grad(part_loss, has_aux=True), state, batch)

    def joint(self, state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """One optimizer step on texts, and on places if they weigh anything."""
        total = jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), 1.0)
        batch = sort_texts(batch, self.micro_batches)

        def loss(train: Tree, part: Tree, room: RowSlots) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self.joint_loss(self.trainable.merge(train, frozen), part, room, total)

        def encode(train: Tree, part: Tree) -> network.Seen:
            return self.image_features(self.trainable.merge(train, frozen), part)

        return self.update(gradients_in_slots(loss, encode, pick_text_slots), state, batch)

    def update(self, compute_gradients: _Gradients, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """One optimizer step on a batch, in its parts."""
        gradients, metrics = accumulate(
            compute_gradients, state["params"], cut(batch, self.micro_batches)
        )
        state, norm = guarded_update(self.optimizer, state, sharding.lay_out(gradients))
        # Parts have divided by the whole batch's totals already.
        metrics = {name: values.sum() for name, values in metrics.items()}
        facts = {"grad_norm": norm, "skipped": state["skipped"]}
        return sharding.lay_out(state), {**metrics, **facts}
