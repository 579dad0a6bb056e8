"""The learning half of a GRPO step, one jitted program: a rollout in, one or several optimizer steps out.

The groups to learn from go through the model in micro-batches whose gradients are summed; every token weighs what it
weighs in the whole minibatch, whichever micro-batch it is in, and a micro-batch computes only as many completion slots
as its longest completion needs. A group's image and prompt are computed once, forward and backward
(`policy.completion_logprobs`). With one update a rollout the old log-probs are the new ones under stop-gradient, so the
ratio is 1 by construction; with several (`num_iterations`, `minibatches`) they come from a pass over the same
micro-batches before the first update. What the sampler recorded is compared with what the learner computes at every
step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax.config.sections import LearnerConfig, PolicyLossConfig
from cxr_jax.inference import compaction
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models.qwen2_5_vl.patches import patchify
from cxr_jax.rl import losses
from cxr_jax.runtime import sharding
from cxr_jax.training import log_probs
from cxr_jax.training import losses as training_losses
from cxr_jax.training import micro_batches as training_micro_batches
from cxr_jax.training.optimizer import guarded_update

LOSS_KNOBS = (
    "aggregation",
    "ratio_level",
    "clip",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "kl",
    "sampler_correction",
    "sampler_cap",
)
CLIPPED = ("low", "high", "region", "delta")  # parts of `losses.policy_loss`'s metrics, clip_<part>
OF_TOKENS = ("tokens", "mask", "train_mask", "sampler_logp", "old_logp")  # of a rollout, [P, G, C]


def take_groups(batch, index) -> dict:
    """The groups `index` of a batch {"image", "prompts", "ro"}, rows on axis 0 but for the prompts' positions."""
    prompts = {
        k: jnp.take(v, index, axis=1 if k == "positions" else 0)
        for k, v in batch["prompts"].items()
    }
    pick = lambda tree: jax.tree.map(lambda x: x[index], tree)
    return {"image": batch["image"][index], "prompts": prompts, "ro": pick(batch["ro"])}


def by_length(lengths, micro_batches: int):
    """int [P]: groups of lengths [P, G] in an order that puts about equal ones into the same micro-batch."""
    order = jnp.argsort(lengths.max(axis=1), stable=True)
    return order.reshape(micro_batches, -1).T.reshape(
        -1
    )  # part i of `policy.cut` is rows i, i + micro_batches, ...


def trimmed(fn, ends: list[int]):
    """fn(part) -> (anything, {name: [P, G, C] or scalar}), given only as many slots of the completions as the longest
    of the part needs, one of `ends`; a program a length, picked on the device."""

    def at(end):
        def run(part):
            cut = {k: v[:, :, :end] if k in OF_TOKENS else v for k, v in part["ro"].items()}
            out, of_rows = fn({**part, "ro": cut})
            pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, ends[-1] - end))) if x.ndim == 3 else x
            return out, jax.tree.map(pad, of_rows)

        return run

    def pick(part):
        if len(ends) == 1:
            return fn(part)
        need = part["ro"]["lengths"].max()
        return jax.lax.switch(
            sum((need > end).astype(jnp.int32) for end in ends[:-1]),
            [at(end) for end in ends],
            part,
        )

    return pick


def make_learn(
    learner: LearnerConfig,
    loss: PolicyLossConfig,
    model_config,
    grid,
    special,
    optimizer,
    trainable,
    *,
    max_completion: int,
    remat: str,
):
    """Jitted (state, fixed, batch, rollout, reference) -> (state, metrics), state donated.

    reference: the parameters of the reference model with config.rl.beta > 0, else None.
    """
    updates = learner.updates
    settings = loss
    suppress = np.zeros(model_config.text.vocab_size, bool)
    suppress[list(special["suppress"])] = True
    rows = lambda x: x.reshape(-1, x.shape[-1])
    ends = compaction.stage_ends(max_completion) if learner.micro_batches > 1 else [max_completion]

    def see(model, part):
        return qwen.vision(
            model, model_config, patchify(part["image"]), grid, remat=remat, dtype=trainable.dtype
        )

    def logprobs(model, part):
        """{"logp", "entropy"} [P, G, C] of a part's completions."""
        ro = part["ro"]
        logp, entropy = log_probs.completion_logprobs(
            model,
            model_config,
            see(model, part),
            part["prompts"],
            ro["tokens"],
            ro["mask"],
            temperature=learner.temperature,
            suppress=suppress,
            remat=remat,
        )
        return {"logp": logp, "entropy": entropy}

    def loss_fn(train, frozen, reference, part, totals):
        ro, made = part["ro"], logprobs(trainable.merge(train, frozen)["model"], part)
        logp = rows(made["logp"])
        old = rows(ro["old_logp"]) if updates > 1 else jax.lax.stop_gradient(logp)
        ref = (
            None
            if reference is None
            else jax.lax.stop_gradient(rows(logprobs(reference, part)["logp"]))
        )
        loss, of_tokens = losses.policy_loss(
            logp,
            old,
            ro["advantages"].reshape(-1),
            rows(ro["train_mask"]),
            ref_logp=ref,
            sampler_logp=rows(ro["sampler_logp"]),
            max_tokens=max_completion,
            **{k: getattr(settings, k) for k in LOSS_KNOBS},
            **totals,
        )
        logged = {
            k: of_tokens[k] for k in ("kl", *(f"clip_{part}" for part in CLIPPED)) if k in of_tokens
        }
        return loss, {
            "loss": loss,
            **made,
            **{k: v.reshape(ro["mask"].shape) for k, v in logged.items()},
        }

    def replay_loss(train, frozen, part, total):
        model = trainable.merge(train, frozen)["model"]
        loss, _ = log_probs.completion_loss(
            model, model_config, see(model, part), part, total, remat=remat
        )
        return learner.replay_weight * loss, learner.replay_weight * loss

    def ordered(batch):
        """The groups of a minibatch, of about equal length in each micro-batch."""
        if learner.micro_batches == 1:
            return batch
        return take_groups(batch, by_length(batch["ro"]["lengths"], learner.micro_batches))

    def before(model, batch):
        """`logprobs` of an ordered minibatch, in its micro-batches."""
        one = trimmed(lambda part: (None, logprobs(model, part)), ends)
        return training_micro_batches.in_turns(
            lambda part: one(part)[1], training_micro_batches.cut(batch, learner.micro_batches)
        )

    def update(state, frozen, reference, batch, replay):
        """One optimizer step on an ordered minibatch {"image", "prompts", "ro"}: (state, metrics)."""
        ro = batch["ro"]
        totals = losses.divisors(
            rows(ro["mask"]),
            rows(ro["train_mask"]),
            aggregation=settings.aggregation,
            denominator=settings.denominator,
        )
        grad = jax.grad(
            lambda train, part: loss_fn(train, frozen, reference, part, totals), has_aux=True
        )
        grad_of_part = lambda train, part: trimmed(functools.partial(grad, train), ends)(part)
        grads, aux = training_micro_batches.accumulate(
            grad_of_part, state["params"], training_micro_batches.cut(batch, learner.micro_batches)
        )
        metrics = {"loss": aux.pop("loss").sum()}
        if learner.replay_weight:
            total = jnp.maximum(jnp.sum(replay["mask"].astype(jnp.float32)), 1.0)
            grad = jax.grad(
                lambda train, part: replay_loss(train, frozen, part, total), has_aux=True
            )
            grads, aux_of_replay = training_micro_batches.accumulate(
                grad,
                state["params"],
                training_micro_batches.cut(replay, learner.micro_batches),
                grads,
            )
            metrics["replay_loss"] = aux_of_replay.sum()
        state, metrics["grad_norm"] = guarded_update(optimizer, state, sharding.lay_out(grads))
        state = sharding.lay_out(state)
        of_rows = training_micro_batches.joined(aux)
        metrics |= update_metrics(ro, of_rows)
        return state, metrics if updates > 1 else metrics | gap_metrics(ro, of_rows)

    def learn(state, frozen, batch, ro, reference=None):
        replay, kept = batch.get("replay"), ro["kept"]
        batch = take_groups({**batch, "ro": {k: v for k, v in ro.items() if k != "kept"}}, kept)
        if updates == 1:
            state, metrics = update(state, frozen, reference, ordered(batch), replay)
        else:
            model = trainable.merge(state["params"], frozen)["model"]
            each = jax.lax.map(ordered, training_micro_batches.cut(batch, learner.minibatches))
            old = jax.lax.map(lambda minibatch: before(model, minibatch), each)
            gaps = gap_metrics(
                *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (each["ro"], old))
            )
            each["ro"]["old_logp"] = old["logp"]
            one = lambda state, i: update(
                state, frozen, reference, jax.tree.map(lambda x: x[i], each), replay
            )
            order = jnp.tile(jnp.arange(learner.minibatches), learner.num_iterations)
            state, metrics = jax.lax.scan(one, state, order)
            metrics = {k: v.mean() for k, v in metrics.items()} | gaps
        return state, {**metrics, "skipped_steps": state["skipped"]}

    return jax.jit(learn, donate_argnums=0)


def update_metrics(ro, of_rows) -> dict:
    """What the loss did to the tokens that train, by TRL's names; of_rows: `losses.policy_loss`'s metrics [P, G, C]."""
    mean = lambda x: training_losses.masked_mean(x.astype(jnp.float32), ro["train_mask"])
    out = {f"clip_ratio/{part}_mean": mean(of_rows[f"clip_{part}"]) for part in CLIPPED}
    return out | ({"kl": mean(of_rows["kl"])} if "kl" in of_rows else {})


def gap_metrics(ro, made) -> dict:
    """How far sampler and learner are apart before the update, and entropy, over all completion tokens [P, G, C]."""
    mean = lambda x: training_losses.masked_mean(x.astype(jnp.float32), ro["mask"])
    gap = jnp.where(ro["mask"], made["logp"] - ro["sampler_logp"], 0.0)
    ratio = jnp.exp(gap)
    return {
        "entropy": mean(made["entropy"]),
        "sampling/sampling_logp_difference/mean": mean(jnp.abs(gap)),
        "sampling/sampling_logp_difference/max": jnp.max(jnp.abs(gap)),
        "sampling/outside_0.9_1.1": mean((ratio < 0.9) | (ratio > 1.1)),
        "sampling/importance_sampling_ratio/min": jnp.min(jnp.where(ro["mask"], ratio, jnp.inf)),
        "sampling/importance_sampling_ratio/mean": mean(ratio),
        "sampling/importance_sampling_ratio/max": jnp.max(jnp.where(ro["mask"], ratio, 0.0)),
    }
