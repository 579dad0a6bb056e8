"""Supervised fine-tuning: located-finding warm-up of the vision tower, then cross-entropy on the completion.

The warm-up asks each of the merged image tokens which findings lie under it (targets: the phantom's own region maps)
through a linear head that is thrown away afterwards; it teaches the tower to look before the decoder can distract it
with the prior. The joint phase keeps that loss at a small weight. Prompt tokens are never trained on.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import evaluate
from cxr_jax.data import loading
from cxr_jax.data.sources import base as sources_base
from cxr_jax.data.sources import splits
from cxr_jax.errors import UserError
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.metrics.progress import Progress
from cxr_jax.metrics.run_log import MetricsWriter
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.models.qwen2_5_vl import patches
from cxr_jax.models.qwen2_5_vl.patches import patchify
from cxr_jax.runtime import processes, sharding
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.layout import ONE_DEVICE
from cxr_jax.runtime.signals import Skips, StoppedError
from cxr_jax.training import checks, log_probs, micro_batches, optimizer, train_state, trainable
from cxr_jax.training import losses as training_losses
from cxr_jax.training import targets as training_targets
from cxr_jax.weights import export, pretrained


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


def make_steps(config, cfg, tx, grid, what):
    """The two jitted updates: (state, fixed, batch) -> (state, metrics), state donated; what: a `Trainable`.

    A batch is worked through in `config.micro_batches` parts whose gradients are summed; every completion token of
    the batch weighs the same, whichever part it is in.
    """
    parts = config.micro_batches
    see = lambda params, batch: qwen.vision(
        params["model"], cfg, patchify(batch["image"]), grid, remat=config.remat, dtype=what.dtype
    )

    # Losses and metrics of a part, such that those of all parts sum to those of the batch.
    def locate_only(params, batch, total):
        features = see(params, batch)
        loss = locate_loss(params["locate"], features, batch["regions"], batch["severity"]) / parts
        return loss, {"locate_loss": loss}

    def joint(params, batch, total):
        features = see(params, batch)
        ce, p_mean = log_probs.completion_loss(
            params["model"], cfg, features, batch, total, remat=config.remat
        )
        metrics = {"loss": ce, "mean_token_probability": p_mean}
        if not config.locate_weight:
            return ce, metrics
        locate = (
            locate_loss(params["locate"], features, batch["regions"], batch["severity"]) / parts
        )
        return ce + config.locate_weight * locate, {**metrics, "locate_loss": locate}

    def update(loss_fn, state, fixed, batch):
        total = (
            jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), 1.0)
            if "mask" in batch
            else None
        )
        part_loss = lambda train, part: loss_fn(what.whole(train, fixed), part, total)
        grads, metrics = micro_batches.accumulate(
            jax.grad(part_loss, has_aux=True), state["params"], micro_batches.cut(batch, parts)
        )
        state, norm = optimizer.guarded_update(tx, state, sharding.laid_out(grads))
        metrics = {k: v.sum() for k, v in metrics.items()}
        return sharding.laid_out(state), {**metrics, "grad_norm": norm, "skipped": state["skipped"]}

    jit = lambda f: jax.jit(functools.partial(update, f), donate_argnums=0)
    return jit(locate_only), jit(joint)


def make_batch_fn(config, source, prompts, completions, layout=ONE_DEVICE):
    """step -> numpy batch of one SFT step, those of its rows that this process makes. Raises UserError if a target text
    does not fit max_completion."""

    def make(step: int) -> dict:
        indices = sources_base.indices_of(step, config.batch_size, len(source), config.data.seed)
        indices = indices[layout.rows_of(len(indices))]
        batch = source.batch(indices)
        out = {"image": np.asarray(batch["image"])}
        if config.locate_steps or config.locate_weight:
            out["regions"] = np.asarray(batch["regions"])
            out["severity"] = np.asarray(batch["scene"]["severity"])
        if step >= config.locate_steps:
            out |= completions.encode(source.targets(batch, indices))
            out["prompts"] = prompts.encode(source.about(indices)["prompts"])
        return out

    return make


def check(config) -> None:
    """Refuses settings that cannot work, before anything is written. Raises UserError."""
    train = checks.common(config)
    if config.data.source == "files" and (config.locate_steps or config.locate_weight):
        raise UserError(
            "config.locate_steps and config.locate_weight must be 0 for files: only phantoms know regions"
        )
    if config.locate_steps < config.steps:
        checks.targets_fit(config, train)


def run(config, workdir, stop, layout) -> dict:
    """Trains until `config.steps`, saving as it goes; resumes from the workdir. Returns facts about the run."""
    loaded = pretrained.start(config)
    cfg, tok = loaded.cfg, loaded.tokenizer
    sources = splits.open_splits(config)
    source = sources.train
    grid = patches.grid_of(source.size, cfg)
    prompts = inference_prompts.Prompts(
        tok, cfg, grid, config.max_completion, texts=splits.all_prompts(sources)
    )
    completions = training_targets.Completions(tok, config.max_completion)

    what = trainable.Trainable.of(config)
    head = init_locate_head(jax.random.key(config.seed), cfg.text.hidden_size, 12)
    tx = optimizer.make(config.optim, config.steps)
    checkpoints = Checkpoints(workdir.path, about=workdir.about, grace=config.grace_seconds)
    state, train, fixed, meta, start = train_state.train_state(
        config, {"model": loaded.params, "locate": head}, what, tx, layout, checkpoints
    )
    del loaded, train  # host copies, and what the first step takes over
    meta = {"seconds": 0.0, "best": None, "first_look": None, "window": []} | meta
    model_of = lambda train: what.whole(train, fixed)["model"]
    locate_step, joint_step = map(layout.on, make_steps(config, cfg, tx, grid, what))
    metrics = MetricsWriter(
        workdir.path, resume_step=start or -1, redo="eval", enabled=processes.is_main()
    )
    progress = Progress(
        config.steps, start=start, show=("loss", "locate_loss"), unit="samples", stream=sys.stdout
    )
    reader = evaluate.Reader(
        cfg,
        tok,
        prompts,
        batch_size=config.eval.batch_size,
        dtype=what.dtype,
        lexicon=sources.train.lexicon,
        poll=stop.check,
        layout=layout,
    )
    guard = evaluate.Guard(
        config, reader, sources, metrics, checkpoints, model_of, meta["best"], meta["first_look"]
    )

    make = make_batch_fn(config, source, prompts, completions, layout)
    loader = loading.step_loader(make, start, config.steps, poll=stop.poll)
    skips = Skips(config.max_skipped, start, int(state["skipped"]))
    began, evaluating, window, done = time.monotonic(), 0.0, list(meta.get("window", [])), start
    waited, counted = (
        0.0,
        (began, 0.0),
    )  # for data since the last line; when that was, and `evaluating` then
    seconds = lambda: meta["seconds"] + time.monotonic() - began
    look_due = lambda step: (
        step > config.locate_steps and (step % config.eval.every == 0 or step == config.steps)
    )

    def save():
        # `window`: the metrics since the last line, so that a resumed run writes the same lines.
        floats = [{k: float(v) for k, v in w.items()} for w in window]
        kept = {"best": guard.best, "first_look": guard.first, "window": floats}
        checkpoints.save(done, state, {"seconds": seconds(), **kept})

    stop.unsaved = lambda: done - checkpoints.saved
    try:
        if look_due(start):
            guard.look(start, state["params"])  # the checkpoint is older than its own look
        for step in range(start, config.steps):
            stop.check()
            batch = layout.batch(next(loader))
            waited += loader.last_wait
            state, m = (locate_step if step < config.locate_steps else joint_step)(
                state, fixed, batch
            )
            if window:
                jax.block_until_ready(
                    window[-1]
                )  # one step ahead of the device, no more: a wait for data is a wait
            window.append(m)
            done = step + 1
            checkpoints.poll()
            if done % config.log_every == 0 or done == config.steps:
                row = {
                    k: float(np.mean([float(w[k]) for w in window if k in w])) for k in window[-1]
                }
                row["samples_per_second"] = (
                    config.batch_size * (done - start) / (time.monotonic() - began - evaluating)
                )
                passed = time.monotonic() - counted[0] - (evaluating - counted[1])
                row["perf/data_wait_share"] = waited / passed
                waited, counted = 0.0, (time.monotonic(), evaluating)
                row["learning_rate"] = float(
                    optimizer.learning_rate(config.optim, config.steps)(step)
                )
                metrics.write(done, row, kind="train")
                progress.update(done, row, items=config.batch_size * config.log_every)
                skips.look(done, int(m["skipped"]))
                window = []
            if done % config.save_every == 0 or done == config.steps:
                save()
            if look_due(done):
                pause = time.monotonic()
                guard.look(done, state["params"])
                evaluating += time.monotonic() - pause
        train_seconds, last = round(seconds()), state["params"]
        checkpoints.wait()
        if checkpoints.saved == done:
            state = None  # its moments make room for the models that are compared
        export.export(workdir, cfg, what, last, fixed, tok, config)
        before = "base" if config.model.startswith("random:") else "start"
        with layout.on_host():
            base = what.base(fixed) or pretrained.on_device(config)
        models = {before: layout.state(base), "SFT": model_of(last)}
        results = evaluate.full(workdir, config, models, reader, sources)
    except StoppedError:
        if done > checkpoints.saved:
            save()
        return {"stopped": stop.requested, "step": done}
    except BaseException:
        checkpoints.drop()
        raise
    finally:
        loader.close()
        metrics.close()
        checkpoints.close()
    return {"step": config.steps, "train_seconds": train_seconds, "results": results}
