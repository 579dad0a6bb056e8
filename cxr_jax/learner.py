"""The learning half of a GRPO step, one jitted program: a rollout in, one or several optimizer steps out.

The groups to learn from go through the model in micro-batches whose gradients are summed; every token weighs what it
weighs in the whole minibatch, whichever micro-batch it is in, and a micro-batch computes only as many completion slots
as its longest completion needs. A group's image and prompt are computed once, forward and
backward (`policy.completion_logprobs`). With one update a rollout the old log-probs are the new ones under
stop-gradient, so the ratio is 1 by construction; with several (`num_iterations`, `minibatches`) they come from a pass
of the same program over the same micro-batches before the first update. What the sampler recorded is compared with what
the learner computes at every step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import losses, optim, policy, sft, stages
from cxr_jax.data.preprocess import patchify
from cxr_jax.models import qwen2_5_vl as qwen

LOSS_KNOBS = ("aggregation", "ratio_level", "clip", "epsilon", "epsilon_high", "delta", "beta", "kl",
              "sampler_correction", "sampler_cap")  # fmt: skip


def take_groups(batch, index) -> dict:
    """The groups `index` of a batch {"image", "prompts", "ro"}, rows on axis 0 but for the prompts' positions."""
    prompts = {k: jnp.take(v, index, axis=1 if k == "positions" else 0) for k, v in batch["prompts"].items()}
    pick = lambda tree: jax.tree.map(lambda x: x[index], tree)
    return {"image": batch["image"][index], "prompts": prompts, "ro": pick(batch["ro"])}


def by_length(lengths, micro_batches: int):
    """int [P]: groups of lengths [P, G] in an order that puts about equal ones into the same micro-batch."""
    order = jnp.argsort(lengths.max(axis=1), stable=True)
    return order.reshape(micro_batches, -1).T.reshape(-1)  # part i of `policy.cut` is rows i, i + micro_batches, ...


def trimmed(fn, ends: list[int]):
    """fn(part) -> (anything, {name: [P, G, C]}), given only as many slots of the completions as the longest of the part
    needs, one of `ends`; a program a length, picked on the device."""

    def at(end):
        def run(part):
            cut = lambda x: x[:, :, :end] if x.ndim == 3 and x.shape[2] == ends[-1] else x
            out, of_rows = fn({**part, "ro": jax.tree.map(cut, part["ro"])})
            pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, ends[-1] - end))) if x.ndim == 3 else x
            return out, jax.tree.map(pad, of_rows)

        return run

    def pick(part):
        if len(ends) == 1:
            return fn(part)
        need = part["ro"]["lengths"].max()
        return jax.lax.switch(sum((need > end).astype(jnp.int32) for end in ends[:-1]), [at(end) for end in ends], part)

    return pick


def make_learn(config, cfg, grid, special, tx, what):
    """Jitted (state, fixed, batch, rollout, reference) -> (state, metrics), state donated.

    what: a `Trainable`; reference: the parameters of the reference model with config.rl.beta > 0, else None.
    """
    r = config.rl
    updates = r.num_iterations * r.minibatches
    suppress = np.zeros(cfg.text.vocab_size, bool)
    suppress[list(special["suppress"])] = True
    rows = lambda x: x.reshape(-1, x.shape[-1])
    ends = stages.stage_ends(config.max_completion) if r.micro_batches > 1 else [config.max_completion]

    def logprobs(model, part):
        """(log-probs, entropies) [P, G, C] of a part's completions."""
        ro = part["ro"]
        features = qwen.vision(model, cfg, patchify(part["image"]), grid, remat=config.remat, dtype=what.dtype)
        return policy.completion_logprobs(
            model, cfg, features, part["prompts"], ro["tokens"], ro["mask"],
            temperature=r.temperature, suppress=suppress, remat=config.remat,
        )  # fmt: skip

    def loss_fn(train, fixed, reference, part, totals):
        ro = part["ro"]
        logp, entropy = logprobs(what.whole(train, fixed)["model"], part)
        old = rows(ro["old_logp"]) if updates > 1 else jax.lax.stop_gradient(rows(logp))
        ref = None if reference is None else jax.lax.stop_gradient(rows(logprobs(reference, part)[0]))
        loss, of_tokens = losses.policy_loss(
            rows(logp), old, ro["advantages"].reshape(-1), rows(ro["train_mask"]), ref_logp=ref,
            sampler_logp=rows(ro["sampler_logp"]), max_tokens=config.max_completion,
            **{k: r[k] for k in LOSS_KNOBS}, **totals,
        )  # fmt: skip
        of_tokens = {k: v.reshape(logp.shape) for k, v in of_tokens.items()}
        return loss, {"loss": loss, "logp": logp, "entropy": entropy, **of_tokens}

    def replay_loss(train, fixed, replay):
        model = what.whole(train, fixed)["model"]
        features = qwen.vision(model, cfg, patchify(replay["image"]), grid, remat=config.remat, dtype=what.dtype)
        total = jnp.maximum(jnp.sum(replay["mask"].astype(jnp.float32)), 1.0)
        return r.replay_weight * sft.completion_loss(model, cfg, features, replay, total, remat=config.remat)[0]

    def update(state, fixed, reference, batch, replay):
        """One optimizer step on a minibatch {"image", "prompts", "ro"}: (state, metrics)."""
        if r.micro_batches > 1:
            batch = take_groups(batch, by_length(batch["ro"]["lengths"], r.micro_batches))
        ro = batch["ro"]
        totals = losses.divisors(
            rows(ro["mask"]), rows(ro["train_mask"]), aggregation=r.aggregation, denominator=r.denominator
        )
        grad = jax.grad(lambda train, part: loss_fn(train, fixed, reference, part, totals), has_aux=True)
        grad_of_part = lambda train, part: trimmed(functools.partial(grad, train), ends)(part)
        grads, aux = optim.accumulate(grad_of_part, state["params"], policy.cut(batch, r.micro_batches))
        metrics = {"loss": aux.pop("loss").sum()}
        if r.replay_weight:
            metrics["replay_loss"], more = jax.value_and_grad(replay_loss)(state["params"], fixed, replay)
            grads = jax.tree.map(jnp.add, optim.float32(grads), optim.float32(more))
        state, metrics["grad_norm"] = optim.guarded_update(tx, state, grads)
        of_rows = policy.joined(aux)
        metrics |= update_metrics(ro, of_rows)
        return state, metrics if updates > 1 else metrics | gap_metrics(ro, of_rows["logp"], of_rows["entropy"])

    def learn(state, fixed, batch, ro, reference=None):
        replay, kept = batch.get("replay"), ro["kept"]
        batch = take_groups({**batch, "ro": {k: v for k, v in ro.items() if k != "kept"}}, kept)
        if updates == 1:
            state, metrics = update(state, fixed, reference, batch, replay)
        else:
            model = what.whole(state["params"], fixed)["model"]
            parts = policy.cut(batch, r.minibatches * r.micro_batches)
            old, entropy = policy.in_turns(lambda part: logprobs(model, part), parts)
            gaps = gap_metrics(batch["ro"], old, entropy)
            each = policy.cut({**batch, "ro": {**batch["ro"], "old_logp": old}}, r.minibatches)
            one = lambda state, i: update(state, fixed, reference, jax.tree.map(lambda x: x[i], each), replay)
            order = jnp.tile(jnp.arange(r.minibatches), r.num_iterations)
            state, metrics = jax.lax.scan(one, state, order)
            metrics = {k: v.mean() for k, v in metrics.items()} | gaps
        return state, {**metrics, "skipped_steps": state["skipped"]}

    return jax.jit(learn, donate_argnums=0)


def update_metrics(ro, of_rows) -> dict:
    """What the loss did to the tokens that train, by TRL's names; of_rows: `losses.policy_loss`'s metrics [P, G, C]."""
    mask = ro["train_mask"]
    mean = lambda x: losses.masked_mean(x.astype(jnp.float32), mask)
    a_row = lambda x: jnp.sum(x.astype(jnp.float32), -1) / jnp.maximum(jnp.sum(mask, -1), 1)
    out = {f"clip_ratio/{part}_mean": mean(of_rows[f"clip_{part}"]) for part in ("low", "high", "region")}
    out["clip_ratio/low_min"] = a_row(of_rows["clip_low"]).min()
    out["clip_ratio/high_max"] = a_row(of_rows["clip_high"]).max()
    return out | ({"kl": mean(of_rows["kl"])} if "kl" in of_rows else {})


def gap_metrics(ro, logp, entropy) -> dict:
    """How far sampler and learner are apart before the update, and entropy, over all completion tokens [P, G, C]."""
    mean = lambda x: losses.masked_mean(x.astype(jnp.float32), ro["mask"])
    gap = jnp.where(ro["mask"], logp - ro["sampler_logp"], 0.0)
    ratio = jnp.exp(gap)
    return {
        "entropy": mean(entropy),
        "sampling/sampling_logp_difference/mean": mean(jnp.abs(gap)),
        "sampling/sampling_logp_difference/max": jnp.max(jnp.abs(gap)),
        "sampling/outside_0.9_1.1": mean((ratio < 0.9) | (ratio > 1.1)),
        "sampling/importance_sampling_ratio/min": jnp.min(jnp.where(ro["mask"], ratio, jnp.inf)),
        "sampling/importance_sampling_ratio/mean": mean(ratio),
        "sampling/importance_sampling_ratio/max": jnp.max(jnp.where(ro["mask"], ratio, 0.0)),
    }
