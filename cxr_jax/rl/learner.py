"""The learning half of a GRPO step, one jitted program: a rollout in, one or several optimizer steps out.

The groups to learn from go through the model in micro-batches whose gradients are summed; every token weighs what it
weighs in the whole minibatch, whichever micro-batch it is in, and a micro-batch computes only as many completion slots
as its longest completion needs. A group's image and prompt are computed once, forward and backward
(`training.log_probs`), and the image is outside of what is compiled once for each number of slots. With one update a
rollout the old log-probs are the new ones under stop-gradient, so the ratio is 1 by construction; with several
(`num_iterations`, `minibatches`) they come from a pass over the same micro-batches before the first update. What the
sampler recorded is compared with what the learner computes at every step.

Groups whose completions all earned the same have no advantage, and without a reference a gradient of exactly 0: they
are gathered in micro-batches of their own, which are not computed. They count in what the loss is divided by.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cxr_jax.config.sections import LearnerConfig, PolicyLossConfig
from cxr_jax.inference import compaction
from cxr_jax.models import network
from cxr_jax.models.image_batches import Images
from cxr_jax.models.network.config import Config
from cxr_jax.rl.losses import Divisors, divisors, has_flat_gradients, policy_loss, varies
from cxr_jax.runtime import sharding
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.log_probs import completion_log_probs, completion_loss
from cxr_jax.training.losses import masked_mean
from cxr_jax.training.micro_batches import accumulate, cut, join, map_in_turns
from cxr_jax.training.needed_slots import (
    RowSlots,
    gradients_in_slots,
    pick_slots,
    pick_text_slots,
    sort_texts,
)
from cxr_jax.training.optimizer import guarded_update
from cxr_jax.training.trainable import Trainable, split_tower

CLIPPED = ("low", "high", "region", "delta")
"""Parts of `policy_loss`'s metrics, clip_<part>."""

_TOKEN_ARRAYS = (
    *("tokens", "mask", "train_mask"),
    *("sampler_log_probs", "old_log_probs", "reference_log_probs"),
)
"""Of the samples, those of shape [P, G, C]."""


def make_learn(
    learner: LearnerConfig,
    loss: PolicyLossConfig,
    model_config: Config,
    images: Images,
    special: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    trainable: Trainable,
    *,
    max_completion: int,
    remat: str,
) -> Callable[..., tuple[Tree, dict[str, jax.Array]]]:
    """Build the jitted function (state, frozen, batch, samples, reference=None) -> (state, metrics), state donated.

    Args:
        images: how image tokens come from a batch.
        special: of `tokenizer.special_ids`.
        max_completion: tokens that a completion may have, C.

    Returns:
        The function. batch and samples: as the rollout takes and gives them, with replay "replay" in the batch;
        reference: the parameters of the reference model with config.rl.beta > 0, else None.
    """
    suppress = np.zeros(model_config.text.vocab_size, bool)
    suppress[list(special["suppress"])] = True
    # Parts of one length would gain nothing from programs of other lengths.
    slot_counts = [max_completion]
    if learner.micro_batches > 1:
        slot_counts = compaction.stage_ends(max_completion)
    programs = _Learner(
        learner=learner,
        loss=loss,
        model_config=model_config,
        images=images,
        suppress=suppress,
        optimizer=optimizer,
        trainable=trainable,
        max_completion=max_completion,
        slot_counts=slot_counts,
        remat=remat,
    )
    return jax.jit(programs.learn, donate_argnums=0)


# ---- Groups, and micro-batches of about equal length -----------------------------------------------------


def take_groups(batch: Tree, index: jax.Array) -> Tree:
    """Take some groups of a batch {images, "prompts", "samples"}, rows on axis 0 but for the prompts' positions."""
    prompts = {
        name: jnp.take(values, index, axis=1 if name == "positions" else 0)
        for name, values in batch["prompts"].items()
    }
    # Images are squares or packed rows: either way a group's are one row.
    names = ("image", "images", "features", "samples")
    rows = {name: batch[name] for name in names if name in batch}
    return {"prompts": prompts, **jax.tree.map(lambda leaf: leaf[index], rows)}


def order_groups(lengths: jax.Array, is_needed: jax.Array, micro_batches: int) -> jax.Array:
    """Order groups of lengths [P, G] such that those that are not needed, and then about equal ones, come together.

    Args:
        is_needed: bool [P].

    Returns:
        int [P].
    """
    longest = lengths.max(axis=1)
    # Of those that are not needed the shortest come last: they share a part with groups that are.
    order = jnp.lexsort((jnp.where(is_needed, longest, -longest), is_needed))
    # Part i of `cut` is rows i, i + micro_batches, ...
    return order.reshape(micro_batches, -1).T.reshape(-1)


def is_computed(is_needed: jax.Array, micro_batches: int) -> jax.Array:
    """Mark the groups, in the order of `order_groups`, whose micro-batch has one that is needed, bool [P].

    The last one is always computed: what is logged is never of nothing.
    """
    by_row = jnp.asarray(is_needed).reshape(-1, micro_batches)
    is_part_computed = by_row.any(0).at[-1].set(True)
    return jnp.broadcast_to(is_part_computed, by_row.shape).reshape(-1)


def where_computed(compute: Callable[[Tree], Any], part: Tree) -> Any:
    """compute(part), or zeros of the same shapes where the part is not to be computed (`is_computed`)."""

    def skip(part: Tree) -> Any:
        shapes = jax.eval_shape(compute, part)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return jax.lax.cond(part["samples"]["is_computed"].any(), compute, skip, part)


def in_needed_slots(
    compute: Callable[[Tree], tuple[Any, Tree]], slot_counts: list[int]
) -> Callable[[Tree], tuple[Any, Tree]]:
    """Give `compute` only as many slots of the completions as the longest of the part needs.

    Args:
        compute: part -> (anything, {name: [P, G, C] or scalar}).
        slot_counts: the lengths to choose from, ascending: a program a length, picked on the device.

    Returns:
        The same function, its arrays [P, G, C] padded with zeros.
    """

    def compute_in(part: Tree, slots: int) -> tuple[Any, Tree]:
        padding = ((0, 0), (0, 0), (0, slot_counts[-1] - slots))
        samples = {
            name: values[:, :, :slots] if name in _TOKEN_ARRAYS else values
            for name, values in part["samples"].items()
        }
        result, scores = compute({**part, "samples": samples})
        return result, jax.tree.map(
            lambda leaf: jnp.pad(leaf, padding) if leaf.ndim == 3 else leaf, scores
        )

    def fits(part: Tree, slots: int) -> jax.Array:
        return part["samples"]["lengths"].max() <= slots

    return pick_slots(compute_in, fits, slot_counts)


# ---- The updates -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Learner:
    """What the pieces of the program share; each method is one of them, traced inside jit.

    A part or batch is {images, "prompts", "samples"}, a prompt and its images a group of completions; a part that is
    scored has the "features" of its images, too, and with a reference its "reference_features".
    """

    learner: LearnerConfig
    loss: PolicyLossConfig
    model_config: Config
    images: Images
    suppress: np.ndarray
    optimizer: optax.GradientTransformation
    trainable: Trainable
    max_completion: int
    slot_counts: list[int]
    remat: str

    # ---- What a part costs and says ----

    def image_features(self, model: Tree, part: Tree) -> network.Seen:
        """Image tokens of a part; those that it has, if the tower does not learn: it is the reference's, too, then."""
        if "features" in part:
            return part["features"]
        return self.images.features(model, part, remat=self.remat, dtype=self.trainable.dtype)

    def features_of(self, train: Tree, frozen: Tree, part: Tree) -> network.Seen:
        return self.image_features(self.trainable.merge(train, frozen)["model"], part)

    def score_part(self, model: Tree, features: network.Seen, part: Tree) -> dict[str, jax.Array]:
        """{"log_probs", "entropy"} [P, G, C] of a part's completions."""
        log_probs, entropy = completion_log_probs(
            model,
            self.model_config,
            features,
            part["prompts"],
            part["samples"]["tokens"],
            part["samples"]["mask"],
            temperature=self.learner.temperature,
            suppress=self.suppress,
            remat=self.remat,
        )
        return {"log_probs": log_probs, "entropy": entropy}

    def part_loss(
        self, train: Tree, frozen: Tree, reference: Tree | None, part: Tree, totals: Divisors
    ) -> tuple[jax.Array, Tree]:
        """A part's share of the policy loss; and that loss again with arrays [P, G, C] to be logged."""
        samples = part["samples"]
        model = self.trainable.merge(train, frozen)["model"]
        scores = self.score_part(model, part["features"], part)
        log_probs = _rows(scores["log_probs"])
        if self.learner.updates > 1:
            old_log_probs = _rows(samples["old_log_probs"])
        else:
            old_log_probs = jax.lax.stop_gradient(log_probs)
        reference_log_probs = None
        if "reference_log_probs" in samples:
            reference_log_probs = _rows(samples["reference_log_probs"])
        elif reference is not None:
            reference_scores = self.score_part(reference, part["reference_features"], part)
            reference_log_probs = jax.lax.stop_gradient(_rows(reference_scores["log_probs"]))
        loss, metrics = policy_loss(
            log_probs,
            old_log_probs,
            samples["advantages"].reshape(-1),
            _rows(samples["train_mask"]),
            self.loss,
            reference_log_probs=reference_log_probs,
            sampler_log_probs=_rows(samples["sampler_log_probs"]),
            max_tokens=self.max_completion,
            divisors=totals,
        )
        logged = {
            name: metrics[name].reshape(samples["mask"].shape)
            for name in ("kl", *(f"clip_{part}" for part in CLIPPED))
            if name in metrics
        }
        return loss, {"loss": loss, **scores, **logged}

    def part_gradients(
        self, train: Tree, frozen: Tree, reference: Tree | None, part: Tree, totals: Divisors
    ) -> tuple[Tree, Tree]:
        """Gradients of `part_loss` in as few slots as the part needs, and what it logs."""
        if reference is not None:
            part = {**part, "reference_features": self.image_features(reference, part)}

        def loss(train: Tree, part: Tree) -> tuple[jax.Array, Tree]:
            return self.part_loss(train, frozen, reference, part, totals)

        differentiate = gradients_in_slots(
            loss,
            lambda train, part: self.features_of(train, frozen, part),
            lambda compute: in_needed_slots(compute, self.slot_counts),
        )
        return differentiate(train, part)

    def replay_loss(
        self, train: Tree, frozen: Tree, part: Tree, room: RowSlots, total: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """A part's share of the weighted cross-entropy of SFT's targets, twice: once to be logged."""
        model = self.trainable.merge(train, frozen)["model"]
        loss, _ = completion_loss(
            model, self.model_config, part["features"], part, total, remat=self.remat, room=room
        )
        return self.learner.replay_weight * loss, self.learner.replay_weight * loss

    # ---- A minibatch in its micro-batches ----

    @property
    def needs_flat_groups(self) -> bool:
        """Whether groups without an advantage are computed."""
        return has_flat_gradients(self.loss)

    def sort_groups(self, batch: Tree) -> Tree:
        """The groups of a minibatch, of about equal length in each micro-batch, and which of them are computed."""
        samples, parts = batch["samples"], self.learner.micro_batches
        is_needed = varies(samples["advantages"]) & samples["train_mask"].any((1, 2))
        is_needed = is_needed | self.needs_flat_groups
        samples = {**samples, "is_computed": jnp.ones_like(is_needed)}
        if parts == 1:
            return {**batch, "samples": samples}
        order = order_groups(samples["lengths"], is_needed, parts)
        batch = take_groups({**batch, "samples": samples}, order)
        batch["samples"]["is_computed"] = is_computed(is_needed[order], parts)
        return batch

    def score_batch(self, model: Tree, batch: Tree) -> dict[str, Any]:
        """`score_part` of a sorted minibatch, in its micro-batches, and the "features" of its images."""
        score = in_needed_slots(
            lambda part: (None, self.score_part(model, part["features"], part)), self.slot_counts
        )

        def score_with_image(part: Tree) -> dict[str, Any]:
            features = self.image_features(model, part)
            return {**score({**part, "features": features})[1], "features": features}

        return map_in_turns(
            lambda part: self.skipping(score_with_image, part),
            cut(batch, self.learner.micro_batches),
        )

    def skipping(self, compute: Callable[[Tree], Any], part: Tree) -> Any:
        """compute(part), unless no group of it is needed."""
        # Where every part is computed, the program has no choice in it.
        if self.needs_flat_groups or self.learner.micro_batches == 1:
            return compute(part)
        return where_computed(compute, part)

    def gradients(
        self, train: Tree, frozen: Tree, reference: Tree | None, batch: Tree
    ) -> tuple[Tree, Tree]:
        """Gradients of the policy loss of a sorted minibatch, and what `part_loss` logs, stacked by part."""
        samples = batch["samples"]
        totals = divisors(
            _rows(samples["mask"]),
            _rows(samples["train_mask"]),
            aggregation=self.loss.aggregation,
            denominator=self.loss.denominator,
        )

        def differentiate(train: Tree, part: Tree) -> tuple[Tree, Tree]:
            return self.skipping(
                lambda part: self.part_gradients(train, frozen, reference, part, totals), part
            )

        return accumulate(differentiate, train, cut(batch, self.learner.micro_batches))

    def add_replay_gradients(
        self, train: Tree, frozen: Tree, replay: Tree, gradients: Tree
    ) -> tuple[Tree, jax.Array]:
        """Add the gradients of SFT on a batch of targets to those of the policy; also give its loss."""
        total = jnp.maximum(jnp.sum(replay["mask"].astype(jnp.float32)), 1.0)
        replay = sort_texts(replay, self.learner.micro_batches)
        differentiate = gradients_in_slots(
            lambda train, part, room: self.replay_loss(train, frozen, part, room, total),
            lambda train, part: self.features_of(train, frozen, part),
            pick_text_slots,
        )
        # On top of the policy's gradients, part by part: no second tree of them is kept.
        gradients, losses = accumulate(
            differentiate, train, cut(replay, self.learner.micro_batches), gradients
        )
        return gradients, losses.sum()

    # ---- One update, and a step of one or several ----

    def update(
        self, state: Tree, frozen: Tree, reference: Tree | None, batch: Tree, replay: Tree | None
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """One optimizer step on a sorted minibatch."""
        train = state["params"]
        gradients, logged = self.gradients(train, frozen, reference, batch)
        # Each part's share of the whole minibatch's loss.
        metrics = {"loss": logged.pop("loss").sum()}
        if replay is not None and self.learner.replay_weight:
            gradients, metrics["replay_loss"] = self.add_replay_gradients(
                train, frozen, replay, gradients
            )
        state, metrics["grad_norm"] = guarded_update(
            self.optimizer, state, sharding.lay_out(gradients)
        )
        state = sharding.lay_out(state)
        scores = join(logged)
        metrics |= update_metrics(batch["samples"], scores)
        if self.learner.updates == 1:
            metrics |= gap_metrics(batch["samples"], scores)
        return state, metrics

    def update_often(
        self, state: Tree, frozen: Tree, reference: Tree | None, batch: Tree, replay: Tree | None
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """`num_iterations` passes over the minibatches, against the log-probs before the first update."""
        model = self.trainable.merge(state["params"], frozen)["model"]
        minibatches = jax.lax.map(self.sort_groups, cut(batch, self.learner.minibatches))

        # ---- Once a rollout: log-probs of the policy and of the reference, and what a frozen tower sees ----
        scores = jax.lax.map(lambda minibatch: self.score_batch(model, minibatch), minibatches)
        features = scores.pop("features")
        if not jax.tree.leaves(split_tower(state["params"])[0]):
            minibatches["features"] = features
        samples, all_scores = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (minibatches["samples"], scores)
        )
        gaps = gap_metrics(samples, all_scores)
        minibatches["samples"]["old_log_probs"] = scores["log_probs"]
        if reference is not None:
            minibatches["samples"]["reference_log_probs"] = jax.lax.map(
                lambda minibatch: self.score_batch(reference, minibatch)["log_probs"], minibatches
            )

        # ---- Updates ----
        def update(state: Tree, index: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
            minibatch = jax.tree.map(lambda leaf: leaf[index], minibatches)
            return self.update(state, frozen, None, minibatch, replay)

        order = jnp.tile(jnp.arange(self.learner.minibatches), self.learner.num_iterations)
        state, metrics = jax.lax.scan(update, state, order)
        return state, {name: values.mean() for name, values in metrics.items()} | gaps

    def learn(
        self, state: Tree, frozen: Tree, batch: Tree, samples: Tree, reference: Tree | None = None
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """The whole step: the groups that are kept, by rows, then one or several updates."""
        replay, kept = batch.get("replay"), samples["kept"]
        samples = {name: values for name, values in samples.items() if name != "kept"}
        # A prompt has a row, or several, each with a share of its group (`rollout`).
        rows, groups = batch["prompts"]["ids"].shape[0], len(samples["tokens"])
        samples = jax.tree.map(lambda leaf: leaf.reshape(rows, -1, *leaf.shape[2:]), samples)
        kept = (kept[:, None] * (rows // groups) + jnp.arange(rows // groups)).reshape(-1)
        batch = take_groups({**batch, "samples": samples}, kept)
        if self.learner.updates == 1:
            batch = self.sort_groups(batch)
            state, metrics = self.update(state, frozen, reference, batch, replay)
        else:
            state, metrics = self.update_often(state, frozen, reference, batch, replay)
        return state, {**metrics, "skipped_steps": state["skipped"]}


def _rows(values: jax.Array) -> jax.Array:
    """[P, G, C] -> [P * G, C]."""
    return values.reshape(-1, values.shape[-1])


# ---- Metrics ---------------------------------------------------------------------------------------------


def update_metrics(samples: Tree, scores: Tree) -> dict[str, jax.Array]:
    """Say what the loss did to the tokens that train, by TRL's names.

    Args:
        scores: of `policy_loss`'s metrics those that are logged, [P, G, C].
    """
    metrics = {
        f"clip_ratio/{part}_mean": _mean(scores[f"clip_{part}"], samples["train_mask"])
        for part in CLIPPED
    }
    # TRL's are over its processes, which hold some groups each; here they are over the groups.
    low, high = (
        _group_means(scores[f"clip_{part}"], samples["train_mask"]) for part in ("low", "high")
    )
    metrics |= {"clip_ratio/low_min": jnp.nan_to_num(jnp.nanmin(low))}
    metrics |= {"clip_ratio/high_max": jnp.nan_to_num(jnp.nanmax(high))}
    if "kl" in scores:
        metrics["kl"] = _mean(scores["kl"], samples["train_mask"])
    return metrics


def gap_metrics(samples: Tree, scores: Tree) -> dict[str, jax.Array]:
    """Say how far sampler and learner are apart before the update, over all tokens computed; and the entropy.

    Args:
        scores: "log_probs" and "entropy" [P, G, C].
    """
    mask = samples["mask"] & samples["is_computed"][:, None, None]
    gap = jnp.where(mask, scores["log_probs"] - samples["sampler_log_probs"], 0.0)
    ratio = jnp.exp(gap)
    return {
        "entropy": _mean(scores["entropy"], mask),
        "sampling/sampling_logp_difference/mean": _mean(jnp.abs(gap), mask),
        "sampling/sampling_logp_difference/max": jnp.max(jnp.abs(gap)),
        "sampling/outside_0.9_1.1": _mean((ratio < 0.9) | (ratio > 1.1), mask),
        "sampling/importance_sampling_ratio/min": jnp.min(jnp.where(mask, ratio, jnp.inf)),
        "sampling/importance_sampling_ratio/mean": _mean(ratio, mask),
        "sampling/importance_sampling_ratio/max": jnp.max(jnp.where(mask, ratio, 0.0)),
    }


def _group_means(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the tokens of each group, [P]; NaN for one of which no token trains."""
    return jnp.sum(values * mask, axis=(1, 2)) / jnp.sum(mask, axis=(1, 2))


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return masked_mean(values.astype(jnp.float32), mask)
