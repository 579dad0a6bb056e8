"""Supervised fine-tuning: located-finding warm-up of the vision tower, then cross-entropy on the completion.

The warm-up asks each of the merged image tokens which findings lie under it (targets: the phantom's own region maps)
through a linear head that is thrown away afterwards; it teaches the tower to look before the decoder can distract it
with the prior. The joint phase keeps that loss at a small weight. Prompt tokens are never trained on.
"""

import sys
import time

import jax
import numpy as np

from cxr_jax.data import loading
from cxr_jax.data.sources import base as sources_base
from cxr_jax.data.sources import splits
from cxr_jax.errors import UserError
from cxr_jax.evaluation import guard as evaluation_guard
from cxr_jax.evaluation import reader as evaluation_reader
from cxr_jax.evaluation import run as evaluation_run
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.metrics.progress import Progress
from cxr_jax.metrics.run_log import MetricsWriter
from cxr_jax.models.qwen2_5_vl import patches
from cxr_jax.runtime import processes
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.layout import ONE_DEVICE
from cxr_jax.runtime.signals import Skips, StoppedError
from cxr_jax.sft.step import init_locate_head, make_steps
from cxr_jax.training import checks, optimizer, train_state
from cxr_jax.training import targets as training_targets
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import export, pretrained


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
    loaded = pretrained.load_starting_model(config.model, config.seed)
    model_config, tokenizer = loaded.config, loaded.tokenizer
    sources = splits.open_splits(config)
    source = sources.train
    grid = patches.grid_of(source.size, model_config)
    prompts = inference_prompts.Prompts(
        tokenizer, model_config, grid, config.max_completion, texts=sources.prompts()
    )
    completions = training_targets.Completions(tokenizer, config.max_completion)

    trainable = Trainable.from_config(config)
    head = init_locate_head(jax.random.key(config.seed), model_config.text.hidden_size, 12)
    tx = optimizer.make(config.optim, config.steps)
    checkpoints = Checkpoints(workdir.path, about=workdir.about, grace=config.grace_seconds)
    state, train, frozen, meta, start = train_state.train_state(
        config, {"model": loaded.params, "locate": head}, trainable, tx, layout, checkpoints
    )
    del loaded, train  # host copies, and what the first step takes over
    meta = {"seconds": 0.0, "best": None, "first_look": None, "window": []} | meta
    model_of = lambda train: trainable.merge(train, frozen)["model"]
    locate_step, joint_step = map(layout.on, make_steps(config, model_config, tx, grid, trainable))
    metrics = MetricsWriter(
        workdir.path, resume_step=start or -1, redo="eval", enabled=processes.is_main()
    )
    progress = Progress(
        config.steps, start=start, show=("loss", "locate_loss"), unit="samples", stream=sys.stdout
    )
    reader = evaluation_reader.Reader(
        model_config,
        tokenizer,
        prompts,
        batch_size=config.eval.batch_size,
        dtype=trainable.dtype,
        lexicon=sources.train.lexicon,
        poll=stop.check,
        layout=layout,
    )
    guard = evaluation_guard.ModelSelection(
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
                state, frozen, batch
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
        export.export(
            workdir,
            model_config,
            trainable.export_params(last, frozen),
            tokenizer,
            export.ExportFacts.from_config(config),
            trainable.export_adapters(last),
        )
        before = "base" if config.model.startswith("random:") else "start"
        with layout.on_host():
            base = trainable.base_params(frozen) or pretrained.to_device(
                pretrained.load_starting_model(config.model, config.seed).params, config.dtype
            )
        models = {before: layout.state(base), "SFT": model_of(last)}
        results = evaluation_run.full(workdir, config, models, reader, sources)
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
