"""On-policy GRPO with rewards parsed on the device: sample -> reward -> advantage -> select -> update, top to bottom.

One model program samples and learns. Per prompt the image is encoded once and the prompt prefilled once for its G
completions. `config.rl.micro_batches` bounds the memory: the prompts of a step are sampled, and the groups learned
from, in that many turns, which changes nothing but rounding. The ratio is 1 by construction (old log-probs are the new
ones, stop-gradient); what the sampler recorded is compared with what the learner computes and logged at every step.

Groups whose completions all earned the same reward have no advantage and teach nothing. `config.rl.oversample` draws
that many times `prompts_per_step` prompts, and the learner, which is dearer a prompt, takes the groups that vary first:
DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) in one pass of static shapes instead of a loop.
"""

import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import checks, evaluate, losses, optim, policy, pretrained, rewards, trainable
from cxr_jax.checkpoint import Checkpoints
from cxr_jax.data import batching, tokenizer
from cxr_jax.data.preprocess import patchify
from cxr_jax.errors import UserError
from cxr_jax.labels import parser, reports
from cxr_jax.metrics import MetricsWriter, Progress
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.workdir import Stopped

ZERO_STD = 1e-6  # a group's rewards that spread less are the same


def check(config) -> None:
    """Refuses settings that cannot work, before anything is written. Raises UserError."""
    checks.common(config)
    r = config.rl
    if r.group_size < 2 and r.scale_rewards == "group":
        raise UserError("config.rl.group_size must be at least 2 with config.rl.scale_rewards='group'")
    if r.group_size * r.prompts_per_step < 2 and r.scale_rewards == "batch":
        raise UserError("config.rl.scale_rewards='batch' needs at least 2 completions a step")
    unknown = sorted(set(r.reward_weights) - set(rewards.TERMS))
    if unknown:
        raise UserError(
            f"config.rl.reward_weights names {unknown[0]!r}; known terms: {', '.join(rewards.TERMS)}"
        )
    for term, weight in r.reward_weights.items():
        if not math.isfinite(weight):
            raise UserError(f"config.rl.reward_weights.{term}={weight!r} is not a finite number")
    if not any(r.reward_weights.values()):
        raise UserError(f"config.rl.reward_weights weighs nothing; known terms: {', '.join(rewards.TERMS)}")


def sampling_keys(seed: int, step, prompts: int, group: int):
    """Keys [P * G] folded from (seed, step, prompt, sample): a completion depends on nothing else that is sampled."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    fold = lambda p, g: jax.random.fold_in(jax.random.fold_in(base, p), g)
    p, g = jnp.meshgrid(jnp.arange(prompts), jnp.arange(group), indexing="ij")
    return jax.vmap(fold)(p.reshape(-1), g.reshape(-1))


def make_rollout(config, cfg, grid, special, table, what, bank):
    """Jitted (train, fixed, batch, step) -> dict of tokens, mask, sampler log-probs, reward terms, advantages, kept.

    table: `parser.TokenBytes`; bank: `labels.reports.Bank`, the words of the trace.

    All leaves are [P, G, ..], P = prompts_per_step * oversample, but kept: int [prompts_per_step], the groups to learn
    from.
    """
    r = config.rl
    weights = dict(r.reward_weights)

    @jax.jit
    def rollout(train, fixed, batch, step):
        params = what.whole(train, fixed)["model"]
        p, g = batch["image"].shape[0], r.group_size

        def complete(part):
            features = qwen.vision(params, cfg, patchify(part["image"]), grid, dtype=what.dtype)
            out = policy.sample(
                params, cfg, features, part["prompts"], special, n=g, max_new_tokens=config.max_completion,
                temperature=r.temperature, keys=part["keys"].reshape(-1),
            )  # fmt: skip
            return jax.tree.map(lambda x: x.reshape(-1, g, *x.shape[1:]), out)  # a row is a group

        keys = sampling_keys(config.seed, step, p, g).reshape(p, g)
        parts = policy.cut({"image": batch["image"], "prompts": batch["prompts"], "keys": keys}, r.micro_batches)
        out = policy.in_turns(complete, parts)
        out = jax.tree.map(lambda x: x.reshape(p * g, *x.shape[2:]), out)
        of_each = lambda key: jnp.repeat(batch[key], g, axis=0)
        solution, known, hedged = of_each("solution"), of_each("known"), of_each("hedged")
        parsed = rewards.read_tokens(
            out["tokens"], out["lengths"], table, config.max_completion * evaluate.BYTES_PER_TOKEN, bank,
            reports.Truth.of(solution & ~hedged, hedged, of_each("sides")),
        )  # fmt: skip
        terms = rewards.reward_terms(
            parsed, solution, out["lengths"], known=known, min_length=r.min_length,
            max_length=int(r.overlong_from * config.max_completion), limit=config.max_completion,
        )  # fmt: skip
        reward = rewards.combine(terms, weights).reshape(p, g)
        mask = jnp.arange(config.max_completion)[None] < out["lengths"][:, None]
        if r.mask_truncated:
            train_mask = mask & out["finished"][:, None]
        else:
            train_mask = mask
        shape = (p, g, config.max_completion)
        return {
            "tokens": out["tokens"].reshape(shape),
            "mask": mask.reshape(shape),
            "train_mask": train_mask.reshape(shape),
            "sampler_logp": out["logprobs"].reshape(shape),
            "lengths": out["lengths"].reshape(p, g),
            "finished": out["finished"].reshape(p, g),
            "terms": {k: v.reshape(p, g) for k, v in terms.items()},
            "answer": parsed["answer"].reshape(p, g, -1),
            "reward": reward,
            "advantages": losses.group_advantages(reward, scale=r.scale_rewards),
            "kept": groups_to_learn(reward, r.prompts_per_step),
        }

    return rollout


def groups_to_learn(reward, n: int):
    """int [n]: the first n groups of reward [P, G] whose rewards vary, in order, filled up with groups that do not."""
    flat = jnp.std(reward, axis=1) < ZERO_STD
    return jnp.argsort(flat, stable=True)[:n]


def take_groups(batch, ro) -> tuple[dict, dict]:
    """The batch and the rollout of the groups to learn from."""
    kept = ro["kept"]
    prompts = {k: jnp.take(v, kept, axis=1 if k == "positions" else 0) for k, v in batch["prompts"].items()}
    pick = lambda tree: jax.tree.map(lambda x: x[kept], tree)
    ro = pick({k: v for k, v in ro.items() if k != "kept"})
    return {"image": batch["image"][kept], "prompts": prompts}, ro


def make_learn(config, cfg, grid, special, tx, what):
    """Jitted (state, fixed, batch, rollout) -> (state, metrics), state donated. One optimizer step a rollout."""
    r = config.rl
    suppress = np.zeros(cfg.text.vocab_size, bool)
    suppress[list(special["suppress"])] = True

    def loss_fn(train, fixed, batch, ro, totals):
        params = what.whole(train, fixed)["model"]
        features = qwen.vision(
            params, cfg, patchify(batch["image"]), grid, remat=config.remat, dtype=what.dtype
        )
        logp, entropy = policy.completion_logprobs(
            params, cfg, features, batch["prompts"], ro["tokens"], ro["mask"],
            temperature=r.temperature, suppress=suppress, remat=config.remat,
        )  # fmt: skip
        rows = lambda x: x.reshape(-1, x.shape[-1])
        loss, clipped = losses.policy_loss(
            rows(logp), jax.lax.stop_gradient(rows(logp)), ro["advantages"].reshape(-1), rows(ro["train_mask"]),
            loss_type=r.loss_type, epsilon=r.epsilon, epsilon_high=r.epsilon_high, max_tokens=config.max_completion,
            **totals,
        )  # fmt: skip
        return loss, {"loss": loss, "logp": logp, "entropy": entropy, "clipped": clipped.reshape(logp.shape)}

    def learn(state, fixed, batch, ro):
        batch, ro = take_groups(batch, ro)
        totals = {"rows": ro["reward"].size, "tokens": ro["train_mask"].sum().astype(jnp.float32)}
        parts = policy.cut({**batch, "ro": ro}, r.micro_batches)
        part_loss = lambda train, part: loss_fn(train, fixed, part, part["ro"], totals)
        grads, aux = optim.accumulate(jax.grad(part_loss, has_aux=True), state["params"], parts)
        state, norm = optim.guarded_update(tx, state, grads)
        metrics = {"loss": aux.pop("loss").sum(), "grad_norm": norm, "skipped_steps": state["skipped"]}
        return state, metrics | learn_metrics(ro, **policy.joined(aux))

    return jax.jit(learn, donate_argnums=0)


def learn_metrics(ro, logp, entropy, clipped) -> dict:
    """How far sampler and learner are apart, and entropy, over all completion tokens. Arrays [P, G, C]."""
    mean = lambda x: losses.masked_mean(x.astype(jnp.float32), ro["mask"])
    gap = jnp.where(ro["mask"], logp - ro["sampler_logp"], 0.0)
    ratio = jnp.exp(gap)
    return {
        "entropy": mean(entropy),
        "sampling/sampling_logp_difference/mean": mean(jnp.abs(gap)),
        "sampling/sampling_logp_difference/max": jnp.max(jnp.abs(gap)),
        "sampling/outside_0.9_1.1": mean((ratio < 0.9) | (ratio > 1.1)),
        "clip_ratio/region_mean": losses.masked_mean(clipped.astype(jnp.float32), ro["train_mask"]),
    }


@jax.jit
def rollout_metrics(ro) -> dict:
    """TRL's metric names from one rollout."""
    std = jnp.std(ro["reward"], axis=1, ddof=1)
    lengths = ro["lengths"].astype(jnp.float32)
    out = {
        "reward": ro["reward"].mean(),
        "reward_std": std.mean(),
        "frac_reward_zero_std": (std < ZERO_STD).mean(),
        "groups/learned": (std[ro["kept"]] >= ZERO_STD).sum(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ro["finished"].mean(),
        "completions/mean_terminated_length": losses.masked_mean(lengths, ro["finished"]),
        "answers/labels_per_answer": ro["answer"].sum(-1).mean(),
        "answers/modal_share": rewards.modal_share(ro["answer"].reshape(-1, ro["answer"].shape[-1])),
    }
    for name, value in ro["terms"].items():
        out |= {f"rewards/{name}/mean": value.mean(), f"rewards/{name}/std": value.std()}
    return out


def make_batch_fn(config, source, prompts):
    """step -> numpy batch of one RL step: images, solutions, encoded prompts."""

    def make(step: int) -> dict:
        prompts_sampled = config.rl.prompts_per_step * config.rl.oversample
        indices = batching.indices_of(step, prompts_sampled, len(source), config.data.seed)
        batch = source.batch(indices)
        texts = batch.get("prompts") or [source.prompt] * len(indices)
        return {
            "image": np.asarray(batch["image"]),
            **{k: np.asarray(batch[k]) for k in ("solution", "known", "hedged", "sides")},
            "prompts": prompts.encode(texts),
        }

    return make


def run(config, workdir, stop) -> dict:
    """RL until `config.steps`, evaluating out of distribution as it goes; resumes from the workdir."""
    start_model = pretrained.start(config)
    cfg, tok = start_model.cfg, start_model.tokenizer
    special = tokenizer.special_ids(tok, cfg.text.vocab_size)
    table = parser.TokenBytes.from_tokenizer(tok)
    sources = evaluate.sources(config)
    train_source = sources.train
    grid = evaluate.grid_of(train_source.size, cfg)
    prompts = policy.Prompts(tok, cfg, grid, config.max_completion, texts=evaluate.all_prompts(sources))

    what = trainable.Trainable.of(config)
    train, fixed = what.split({"model": start_model.params}, jax.random.key(config.seed))
    tx = optim.make(config.optim, config.steps)
    state = optim.init_state(tx, train)
    del start_model, train  # host copies, and what the first step takes over
    checkpoints = Checkpoints(workdir.path)
    start, meta = 0, {"seconds": 0.0, "best": None, "num_tokens": 0}
    if resumed := checkpoints.restore(state):
        state, meta, start = resumed
        print(f"resuming at step {start}", flush=True)
    metrics = MetricsWriter(workdir.path, resume_step=start if resumed else -1, redo="eval")
    progress = Progress(
        config.steps,
        start=start,
        show=("reward", "rewards/accuracy/mean"),
        unit="completions",
        stream=sys.stdout,
    )
    reader = evaluate.Reader(cfg, tok, prompts, batch_size=config.eval.batch_size,
                             dtype=what.dtype, lexicon=train_source.lexicon, poll=stop.check)
    model_of = lambda train: what.whole(train, fixed)["model"]
    guard = evaluate.Guard(config, reader, sources, metrics, checkpoints, model_of, best=meta["best"])
    baselines = evaluate.constant_baselines(sources)
    alarms = rewards.Alarms()

    bank = reports.bank(None, train_source.lexicon)
    rollout = make_rollout(config, cfg, grid, special, table, what, bank)
    learn = make_learn(config, cfg, grid, special, tx, what)
    make = make_batch_fn(config, train_source, prompts)
    loader = batching.step_loader(make, start, config.steps, poll=stop.check)
    look_due = lambda step: step % config.eval.every == 0 or step == config.steps
    seconds, done = meta["seconds"], start
    save = lambda: checkpoints.save(done, state, {**meta, "seconds": seconds, "best": guard.best})
    try:
        if look_due(start):
            guard.look(start, state["params"])  # before the first step; or the checkpoint is older than its look
        for step in range(start, config.steps):
            began = time.monotonic()
            batch = next(loader)
            ro = rollout(state["params"], fixed, batch, step)
            jax.block_until_ready(ro["reward"])
            stop.check()  # the same step samples the same completions again
            sampled = time.monotonic()
            row = rollout_metrics(ro)
            state, learned = learn(state, fixed, batch, ro)
            row = {k: float(v) for k, v in {**row, **learned}.items()}
            done = step + 1
            meta["num_tokens"] += int(ro["lengths"].sum())
            row |= {
                "num_tokens": meta["num_tokens"],
                "learning_rate": float(optim.learning_rate(config.optim, config.steps)(step)),
                "step_time": time.monotonic() - began,
                "perf/rollout_seconds": sampled - began,
                **{f"constant/{k}": v for k, v in baselines.items()},
            }
            row |= alarms(row)
            metrics.write(done, row, kind="train")
            progress.update(done, row, items=ro["reward"].size)
            seconds += time.monotonic() - began
            if done % config.save_every == 0 or done == config.steps:
                save()
            if look_due(done):
                guard.look(done, state["params"])
        results = finish(config, workdir, cfg, tok, what, state["params"], fixed, checkpoints, reader, sources)
    except Stopped:
        if done > 0:
            save()
        return {"stopped": stop.requested, "step": done}
    finally:
        loader.close()
        metrics.close()
        checkpoints.close()
    return {"step": config.steps, "train_seconds": round(seconds), **results}


def finish(config, workdir, cfg, tok, what, last, fixed, checkpoints, reader, sources) -> dict:
    """Exports the parameters that were best out of distribution, and scores them beside where RL started."""
    best = checkpoints.restore_best(last)
    chosen, step = (best[0], best[2]) if best else (last, config.steps)
    evaluate.export(workdir, cfg, what, chosen, fixed, tok, config)
    note = f"RL model: step {step} of {config.steps}"
    if best:
        note += f", the best on the selection split of {sources.ood}."
    models = {"SFT": what.base(fixed) or pretrained.on_device(config), "RL": what.whole(chosen, fixed)["model"]}
    if config.data.source == "phantom":  # of films, untrained weights tell nothing more, and large ones take minutes
        models = {"base": pretrained.fresh(cfg, config.seed), **models}
    return {"best_step": step, "results": evaluate.full(workdir, config, models, reader, sources, notes=[note])}
