"""On-policy GRPO: rollout -> reward -> advantage -> select -> update, guarded by an out-of-distribution set.

One model program samples (`rollout`) and learns (`learner`). `config.rl.sample_micro_batches` and
`config.rl.micro_batches` bound the memory: the prompts of a step are sampled, and the groups learned from, in that many
turns, which changes nothing but rounding. A step is whole or it never was: it ends after its last update, a checkpoint
holds what is between two steps, and a step that a kill has cut is done again from its own keys, to the same
completions. So there are no pending rollouts to save.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cxr_jax import report
from cxr_jax.config.sections import RunConfig
from cxr_jax.data import loading
from cxr_jax.data.sources.base import Batch
from cxr_jax.evaluation.model_selection import ModelSelection
from cxr_jax.evaluation.run import evaluate_models
from cxr_jax.labels import answers
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.rewards.own import OwnReward
from cxr_jax.rl.batches import make_batch_fn
from cxr_jax.rl.checks import check
from cxr_jax.rl.learner import make_learn
from cxr_jax.rl.own_rewards import OwnRewards
from cxr_jax.rl.rollout import make_rollout, rollout_metrics, with_turns
from cxr_jax.rl.step_log import GroupRecords, StepLog
from cxr_jax.runtime import layout as layouts
from cxr_jax.runtime import processes
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Stop
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import optimizer as optimizers
from cxr_jax.training.checks import group_shares
from cxr_jax.training.run_loop import RunLoop
from cxr_jax.training.setup import Setup
from cxr_jax.training.train_state import StartState, train_state
from cxr_jax.weights import pretrained

__all__ = ["check", "run"]


def run(config: ConfigDict, run_folder: RunFolder, stop: Stop, layout: Layout) -> dict[str, Any]:
    """Train a policy with group-relative advantages until `config.steps`; resumes from `run_folder`.

    Returns:
        "step", "train_seconds", "best_step" and "results"; "stopped" and "step" if a signal ended it.
    """
    # ---- Model, data, what trains and what it is held against -----------------------------------------
    settings = RunConfig.from_config(config)
    setup = Setup.open(settings, run_folder)
    optimizer = optimizers.make_optimizer(settings.optim, settings.steps, settings.learner.updates)
    checkpoints = Checkpoints(run_folder.path, about=run_folder.about, grace=settings.grace_seconds)
    begun = _begin(setup, optimizer, layout, checkpoints)
    frozen, meta = begun.frozen, begun.meta
    from_zero = optimizers.began_from_zero(meta)
    optimizer = optimizers.make_optimizer(
        settings.optim, settings.steps, settings.learner.updates, from_zero=from_zero
    )
    reference = _reference(setup, begun, layout)
    loop = RunLoop(run_folder, checkpoints, stop, begun, settings.steps, settings.save_every)
    # Host copies, and what the first step takes over: they would keep their memory for the whole run.
    setup.forget_start()
    del begun

    # ---- The two compiled functions, and what happens every K steps -------------------------------------
    own = OwnRewards.open(settings, setup.tokenizer, stop, run_folder)
    rollout, learn = _programs(setup, optimizer, layout, stop, own.functions)
    selection = ModelSelection.open(setup, loop, frozen, layout)
    selection.resume(meta.get("best"), meta.get("first_look"))
    log = StepLog(setup, loop, frozen, meta)
    groups = GroupRecords(setup, run_folder)
    if processes.is_main():  # groups that were saved after the checkpoint come again
        report.save_groups(run_folder.path, resume_step=loop.start or -1)
    loop.keep("best", lambda: selection.best)
    loop.keep("first_look", lambda: selection.first_recall)
    loop.every(settings.eval.every, groups.save, before_save=True)  # resumed, it has none to show
    loop.every(settings.eval.every, selection.evaluate_at)
    loop.end_early_if(lambda step: selection.should_stop_early(step, settings.learner.patience))

    # ---- The loop -----------------------------------------------------------------------------------------
    make_batch = _batches(setup, layout, own)
    with loop:
        loader = loading.step_loader(make_batch, loop.start, settings.steps, poll=stop.poll)
        for step, batch in loop.steps(loader):
            shown, rows = batch.pop("shown"), batch.pop("rows", [])
            batch = layout.batch(batch)
            samples = own.complete(rollout(loop.params, frozen, batch, step), batch, rows)
            jax.block_until_ready(samples["reward"])
            # A stop here costs nothing: the same step samples the same completions again.
            stop.check()
            log.end_rollout()
            state, learned = learn(loop.state, frozen, batch, samples, reference)
            row = jax.device_get({**rollout_metrics(samples), **learned})
            loop.finish_step(state)
            log.end_step(row, samples, batch)
            groups.remember(samples, batch, shown)
            del state, samples  # in the end they make room for the models that are compared
        del reference
        facts = _finish(setup, loop, frozen, layout, selection, run_folder)
        return {"step": loop.done, "train_seconds": round(log.seconds), **facts}
    return {"stopped": stop.requested, "step": loop.done}


# ---- Before the loop -------------------------------------------------------------------------------------


def _begin(setup: Setup, optimizer: Any, layout: Layout, checkpoints: Checkpoints) -> StartState:
    """The newest checkpoint that loads, or step 0 of the starting model."""
    return train_state(
        {"model": setup.start_params},
        setup.trainable,
        optimizer,
        layout,
        checkpoints,
        seed=setup.settings.seed,
        keep_start=setup.settings.loss.beta > 0,
    )


def _reference(setup: Setup, begun: StartState, layout: Layout) -> Tree | None:
    """Where the run starts, if a KL term holds it there: the base under the adapters, or a copy that stays."""
    if not setup.settings.loss.beta:
        return None
    base = setup.trainable.base_params(begun.frozen)
    if base is not None:
        return base
    # A copy: the first step takes over what trains.
    assert begun.train is not None, "`_begin` keeps it where there is a KL term"
    start = jax.tree.map(jnp.copy, layout.state(begun.train))
    return setup.trainable.merge(start, begun.frozen)["model"]


def _batches(setup: Setup, layout: Layout, own: OwnRewards) -> Callable[[int], Batch]:
    """The batches of the run's prompts, with what the user's rewards read of them, if there are any."""
    columns = own.columns if own.functions else None
    source, settings = setup.splits.train, setup.settings
    return make_batch_fn(settings, source, setup.prompts, setup.examples, layout, columns)


def _programs(
    setup: Setup, optimizer: Any, layout: Layout, stop: Stop, own: Sequence[OwnReward] = ()
) -> tuple:
    """The compiled halves of a step: (train, frozen, batch, step) -> samples, and what learns from them."""
    settings, tokenizer = setup.settings, setup.tokenizer
    special = tokenizers.special_ids(tokenizer, setup.model_config.text.vocab_size)
    sampled = with_turns(
        settings.rollout,
        setup.model_config,
        prompt_width=setup.prompts.width,
        max_completion=settings.max_completion,
        dtype=setup.trainable.dtype,
        shards=layout.shards,
        shares=group_shares(settings, layout.shards),
        device_memory=layouts.device_memory(),
    )
    rollout = make_rollout(
        sampled,
        setup.model_config,
        setup.prompts.images,
        special,
        answers.TokenBytes.from_tokenizer(tokenizer),
        setup.trainable,
        load_phrase_bank(None, setup.splits.lexicon),
        seed=settings.seed,
        max_completion=settings.max_completion,
        own=own,
    )
    learn = make_learn(
        settings.learner,
        settings.loss,
        setup.model_config,
        setup.prompts.images,
        special,
        optimizer,
        setup.trainable,
        max_completion=settings.max_completion,
        remat=settings.remat,
    )
    return layout.on_mesh(rollout, stop.unwatched), layout.on_mesh(learn, stop.unwatched)


# ---- After the loop --------------------------------------------------------------------------------------


def _finish(
    setup: Setup,
    loop: RunLoop,
    frozen: Tree,
    layout: Layout,
    selection: ModelSelection,
    run_folder: RunFolder,
) -> dict[str, Any]:
    """Export the parameters that were best out of distribution, and score them beside where RL started."""
    settings = setup.settings
    chosen, step = loop.take_params(), loop.done
    note = ""
    if best := loop.checkpoints.restore_best(chosen):
        chosen, _, step = best
        note = f", the best on the selection split of {setup.splits.out_of_distribution}."
    setup.export(run_folder, chosen, frozen)

    models = {}
    if settings.data.source == "phantom":
        # Of films, untrained weights tell nothing more, and large ones take minutes.
        untrained = pretrained.untrained_params(setup.model_config, settings.seed)
        models["base"] = layout.state(untrained)
    models["SFT"] = setup.start_model(frozen, layout)
    models["RL"] = setup.trainable.merge(chosen, frozen)["model"]
    note = f"RL model: step {step} of {settings.steps}{note}"
    table = evaluate_models(
        models, selection.reader, setup.splits, run_folder, settings, notes=[note]
    )
    return {"best_step": step, "results": {"table": table}}
