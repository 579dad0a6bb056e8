"""Supervised fine-tuning: located-finding warm-up of the vision tower, then cross-entropy on the answers.

The warm-up asks each of the merged image tokens which findings lie under it (targets: the phantom's own region maps)
through a linear head that is thrown away afterwards; it teaches the tower to look before the decoder can distract it
with the prior. The joint phase keeps that loss at a small weight. What is not the model's to say is never trained on.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cxr_jax.config.sections import RunConfig
from cxr_jax.data import loading
from cxr_jax.data.sources.base import ENDLESS, Batch, Source, indices_of
from cxr_jax.errors import UserError
from cxr_jax.evaluation.model_selection import ModelSelection
from cxr_jax.evaluation.run import evaluate_models
from cxr_jax.models import image_batches
from cxr_jax.runtime import processes
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.layout import ONE_DEVICE, Layout
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Stop
from cxr_jax.runtime.trees import Tree
from cxr_jax.sft.step import LOCATED_FINDINGS, init_locate_head, make_steps
from cxr_jax.sft.window_log import WindowLog
from cxr_jax.training import checks
from cxr_jax.training import optimizer as optimizers
from cxr_jax.training.conversations import Examples
from cxr_jax.training.run_loop import RunLoop
from cxr_jax.training.setup import Setup
from cxr_jax.training.train_state import train_state


def check(config: ConfigDict) -> None:
    """Refuse settings that cannot work, before anything is written; writes `config.steps` where epochs are given.

    Raises:
        UserError: naming the key that is wrong.
    """
    train = checks.check_common(config)
    config.steps = steps_of(RunConfig.from_config(config), train)
    settings = RunConfig.from_config(config)
    if settings.data.kind == "files" and (settings.locate_steps or settings.locate_weight):
        raise UserError(
            "config.locate_steps and config.locate_weight must be 0 for files: only phantoms know regions"
        )
    if checks.imitates(settings):
        checks.check_targets_fit(settings, train)


def steps_of(settings: RunConfig, train: Source) -> int:
    """Compute the steps of a run, from its epochs where those say how long it is.

    Raises:
        UserError: unless one of both is given, and for epochs of phantoms.
    """
    epochs, rows = settings.epochs, len(train)
    if epochs and rows == ENDLESS:
        raise UserError(
            "config.epochs must be 0 for phantoms, of which there is no end: give config.steps"
        )
    # Neither wins unsaid: which of both a default had would be found after the run.
    if bool(epochs) == bool(settings.steps):
        raise UserError(
            f"config.epochs={epochs:g} and config.steps={settings.steps}: one of both says how long a run is, and the "
            "other must be 0"
        )
    if not epochs:
        return settings.steps
    # The last batch may begin another pass: none is smaller.
    steps = math.ceil(epochs * rows / settings.batch_size)
    if processes.is_main():
        said = f"{steps:,} steps of {settings.batch_size} for {rows:,} rows"
        print(f"config.epochs={epochs:g}: {said}", flush=True)
    return steps


def run(config: ConfigDict, run_folder: RunFolder, stop: Stop, layout: Layout) -> dict[str, Any]:
    """Train until `config.steps`, saving as it goes; resumes from `run_folder`.

    Returns:
        "step", "train_seconds" and "results"; "stopped" and "step" if a signal ended it.
    """
    # ---- Model, data, what trains ---------------------------------------------------------------------
    settings = RunConfig.from_config(config)
    setup = Setup.open(settings, run_folder)
    optimizer = optimizers.make_optimizer(settings.optim, settings.steps)
    checkpoints = Checkpoints(run_folder.path, about=run_folder.about, grace=settings.grace_seconds)
    width = setup.model_config.text.hidden_size
    head = init_locate_head(jax.random.key(settings.seed), width, LOCATED_FINDINGS)
    begun = train_state(
        {"model": setup.start_params, "locate": head},
        setup.trainable,
        optimizer,
        layout,
        checkpoints,
        seed=settings.seed,
    )
    frozen, meta = begun.frozen, begun.meta
    from_zero = optimizers.began_from_zero(meta)
    optimizer = optimizers.make_optimizer(settings.optim, settings.steps, from_zero=from_zero)
    loop = RunLoop(run_folder, checkpoints, stop, begun, settings.steps, settings.save_every)
    # Host copies, and what the first step takes over: they would keep their memory for the whole run.
    setup.forget_start()
    del begun

    # ---- The two compiled steps, and what happens every K steps -----------------------------------------
    locate_step, joint_step = _programs(setup, optimizer, layout, stop)
    selection = ModelSelection.open(setup, loop, frozen, layout)
    selection.resume(meta.get("best"), meta.get("first_look"))
    log = WindowLog(settings, loop, meta, len(setup.splits.train))
    loop.keep("best", lambda: selection.best)
    loop.keep("first_look", lambda: selection.first_recall)
    # The decoder says nothing before the joint phase: there is nothing to look at.
    look = log.off_the_clock(selection.evaluate_at)
    loop.every(settings.eval.every, look, after=settings.locate_steps)

    # ---- The loop -----------------------------------------------------------------------------------------
    with loop:
        source = setup.splits.train
        make_batch = make_batch_fn(settings, source, setup.examples, layout)
        loader = loading.step_loader(make_batch, loop.start, settings.steps, poll=stop.poll)
        for step, batch in loop.steps(loader):
            update = locate_step if step < settings.locate_steps else joint_step
            state, metrics = update(loop.state, frozen, layout.batch(batch))
            log.add(metrics)
            loop.finish_step(state)
            log.end_step()
            del state  # in the end its moments make room for the models that are compared
        train_seconds, last = round(log.seconds()), loop.take_params()
        setup.export(run_folder, last, frozen)
        before = "base" if settings.model.startswith("random:") else "start"
        models = {before: setup.start_model(frozen, layout), "SFT": selection.model_of(last)}
        table = evaluate_models(models, selection.reader, setup.splits, run_folder, settings)
        facts = {"train_seconds": train_seconds, "results": {"table": table}}
        return {"step": settings.steps, **facts}
    return {"stopped": stop.requested, "step": loop.done}


def _programs(
    setup: Setup, optimizer: Any, layout: Layout, stop: Stop
) -> list[Callable[..., tuple[Tree, Tree]]]:
    """The located warm-up and the joint step, each (state, frozen, batch) -> (state, metrics), state donated."""
    settings = setup.settings
    steps = make_steps(
        setup.model_config,
        optimizer,
        setup.prompts.images,
        setup.trainable,
        micro_batches=settings.micro_batches,
        locate_weight=settings.locate_weight,
        remat=settings.remat,
    )
    return [layout.on_mesh(step, stop.unwatched) for step in steps]


def make_batch_fn(
    settings: RunConfig, source: Source, examples: Examples, layout: Layout = ONE_DEVICE
) -> Callable[[int], Batch]:
    """Build step -> numpy batch of one SFT step, a function of the step alone; of its rows those of this process.

    Keys: those of the images (`image_batches`); with a located loss "regions" [B, F, R, C] and "severity" [B, F]; from
    the joint phase on those of `Examples.encode`. The function raises UserError for a conversation that does not fit.
    """
    locates = bool(settings.locate_steps or settings.locate_weight)
    images = examples.prompts.images

    def make(step: int) -> Batch:
        indices = indices_of(step, settings.batch_size, len(source), settings.data.seed)
        indices = indices[layout.rows_of(len(indices))]
        batch = source.batch(indices)
        about, films = source.about(indices), image_batches.images_of(batch)
        step_batch: Batch = images.inputs(films, about["ids"])
        if locates:
            step_batch["regions"] = np.asarray(batch["regions"])
            # Of several films the largest that any shows.
            located = batch.get("located", batch["scene"]["severity"])
            step_batch["severity"] = np.asarray(located)
        if step >= settings.locate_steps:
            grids = images.grids(films)
            step_batch |= examples.encode(source.conversations(batch, indices), grids)
        return step_batch

    return make
