"""On-policy GRPO: rollout -> reward -> advantage -> select -> update, guarded by an out-of-distribution set.

One model program samples (`rollout`) and learns (`learner`). `config.rl.micro_batches` bounds the memory: the prompts
of a step are sampled, and the groups learned from, in that many turns, which changes nothing but rounding. A step is
whole or it never was: it ends after its last update, a checkpoint holds what is between two steps, and a step that a
kill has cut is done again from its own keys, to the same completions. So there are no pending rollouts to save.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from cxr_jax import report
from cxr_jax.data import loading
from cxr_jax.data.sources import base as sources_base
from cxr_jax.data.sources import splits
from cxr_jax.evaluation import guard as evaluation_guard
from cxr_jax.evaluation import reader as evaluation_reader
from cxr_jax.evaluation import run as evaluation_run
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.labels import answers
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.metrics.alarms import Alarms
from cxr_jax.metrics.progress import Compilations, Progress
from cxr_jax.metrics.run_log import MetricsWriter
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl import patches
from cxr_jax.report import group_records
from cxr_jax.rl import checks
from cxr_jax.rl.learner import make_learn
from cxr_jax.rl.rollout import make_rollout, rollout_metrics
from cxr_jax.runtime import processes
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.layout import ONE_DEVICE
from cxr_jax.runtime.signals import Skips, StoppedError
from cxr_jax.training import optimizer, targets, train_state
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import export, pretrained

check = checks.check


def make_batch_fn(config, source, prompts, completions=None, layout=ONE_DEVICE):
    """step -> numpy batch of one RL step, of its rows those that this process makes: images, solutions, encoded
    prompts; with config.rl.replay_weight "replay", too: examples as SFT has them, whose targets `completions`
    (`batching.Completions`) encodes. "shown": texts of all rows for people, no part of a program's input."""

    def examples(indices):
        indices = indices[layout.rows_of(len(indices))]
        batch = source.batch(indices)
        texts = source.about(indices)["prompts"]
        return (
            batch,
            indices,
            {"image": np.asarray(batch["image"]), "prompts": prompts.encode(texts)},
        )

    def make(step: int) -> dict:
        r = config.rl
        indices = sources_base.indices_of(
            step, r.prompts_per_step * r.oversample, len(source), config.data.seed
        )
        batch, _, out = examples(indices)
        out["shown"] = source.about(indices)
        out |= {k: np.asarray(batch[k]) for k in ("solution", "known", "hedged", "sides")}
        if r.replay_weight:
            indices = sources_base.indices_of(step, r.replay_batch, len(source), config.data.seed)
            batch, indices, out["replay"] = examples(indices)
            out["replay"] |= completions.encode(source.targets(batch, indices))
        return out

    return make


def run(config, workdir, stop, layout) -> dict:
    """RL until `config.steps`, evaluating out of distribution as it goes; resumes from the workdir."""
    start_model = pretrained.load_starting_model(config.model, config.seed)
    model_config, tokenizer = start_model.config, start_model.tokenizer
    special = tokenizers.special_ids(tokenizer, model_config.text.vocab_size)
    table = answers.TokenBytes.from_tokenizer(tokenizer)
    sources = splits.open_splits(config)
    train_source = sources.train
    grid = patches.grid_of(train_source.size, model_config)
    prompts = inference_prompts.Prompts(
        tokenizer, model_config, grid, config.max_completion, texts=sources.prompts()
    )

    trainable = Trainable.from_config(config)
    tx = optimizer.make(
        config.optim, config.steps, config.rl.num_iterations * config.rl.minibatches
    )
    checkpoints = Checkpoints(workdir.path, about=workdir.about, grace=config.grace_seconds)
    state, train, frozen, meta, start = train_state.train_state(
        config,
        {"model": start_model.params},
        trainable,
        tx,
        layout,
        checkpoints,
        keep_start=config.rl.beta > 0,
    )
    reference = None
    if config.rl.beta:  # where the run starts: the base under the adapters, or a copy that stays
        reference = (
            trainable.base_params(frozen)
            or trainable.merge(jax.tree.map(jnp.copy, layout.state(train)), frozen)["model"]
        )
    del start_model, train  # host copies, and what the first step takes over
    meta = {"seconds": 0.0, "best": None, "num_tokens": 0, "first": {}, "first_look": None} | meta
    metrics = MetricsWriter(
        workdir.path, resume_step=start or -1, redo="eval", enabled=processes.is_main()
    )
    if processes.is_main():
        report.save_groups(workdir.path, resume_step=start or -1)
    progress = Progress(
        config.steps,
        start=start,
        show=("reward", "rewards/accuracy/mean"),
        unit="completions",
        stream=sys.stdout,
    )
    reader = evaluation_reader.Reader(
        model_config,
        tokenizer,
        prompts,
        batch_size=config.eval.batch_size,
        dtype=trainable.dtype,
        lexicon=train_source.lexicon,
        poll=stop.check,
        layout=layout,
    )
    model_of = lambda train: trainable.merge(train, frozen)["model"]
    guard = evaluation_guard.ModelSelection(
        config, reader, sources, metrics, checkpoints, model_of, meta["best"], meta["first_look"]
    )
    baselines = evaluation_guard.constant_baselines(sources)
    alarms = Alarms(meta["first"])

    bank = load_phrase_bank(None, train_source.lexicon)
    rollout = layout.on(make_rollout(config, model_config, grid, special, table, trainable, bank))
    learn = layout.on(make_learn(config, model_config, grid, special, tx, trainable))
    make = make_batch_fn(
        config, train_source, prompts, targets.Completions(tokenizer, config.max_completion), layout
    )
    loader = loading.step_loader(make, start, config.steps, poll=stop.poll)
    look_due = lambda step: step % config.eval.every == 0 or step == config.steps
    seconds, done = meta["seconds"], start
    compilations, skips = (
        Compilations(),
        Skips(
            config.max_skipped,
            start,
            int(state["skipped"]),
            config.rl.num_iterations * config.rl.minibatches,
        ),
    )

    def save():
        kept = {
            "seconds": seconds,
            "best": guard.best,
            "first": alarms.first,
            "first_look": guard.first,
        }
        checkpoints.save(done, state, {**meta, **kept})

    stop.unsaved = lambda: done - checkpoints.saved
    try:
        if look_due(start):
            guard.look(
                start, state["params"]
            )  # before the first step; or the checkpoint is older than its look
        for step in range(start, config.steps):
            if guard.stale(step):
                save()
                break
            stop.check()
            began = time.monotonic()
            batch = next(loader)
            shown, batch = batch.pop("shown"), layout.batch(batch)
            ro = rollout(state["params"], frozen, batch, step)
            jax.block_until_ready(ro["reward"])
            stop.check()  # the same step samples the same completions again
            sampled = time.monotonic()
            row = rollout_metrics(ro)
            state, learned = learn(state, frozen, batch, ro, reference)
            row = {k: float(v) for k, v in jax.device_get({**row, **learned}).items()}
            done = step + 1
            checkpoints.poll()
            meta["num_tokens"] += int(ro["lengths"].sum())
            row |= {
                "num_tokens": meta["num_tokens"],
                "learning_rate": float(optimizer.learning_rate(config.optim, config.steps)(step)),
                "step_time": time.monotonic() - began,
                "perf/rollout_seconds": sampled - began,
                "perf/data_wait_share": loader.last_wait / (time.monotonic() - began),
                "perf/compilations": compilations.count(),
                **{f"constant/{k}": v for k, v in baselines.items()},
            }
            row |= alarms(row)
            metrics.write(done, row, kind="train")
            progress.update(done, row, items=ro["reward"].size)
            skips.look(done, int(row["skipped_steps"]))
            seconds += time.monotonic() - began
            if look_due(
                done
            ):  # before the checkpoint: a run that resumes from it has no rollout to show
                groups = group_records.groups_of(
                    processes.gather_to_host(ro),
                    processes.gather_to_host(batch),
                    tokenizer,
                    step=done,
                    lexicon=train_source.lexicon,
                    weights=dict(config.rl.reward_weights),
                    set_name=train_source.name,
                    **shown,
                )
                if processes.is_main():
                    report.save_groups(workdir.path, groups)
            if done % config.save_every == 0 or done == config.steps:
                save()
            if look_due(done):
                guard.look(done, state["params"])
        last = state["params"]
        checkpoints.wait()
        if checkpoints.saved == done:
            state = reference = None  # they make room for the models that are compared
        results = finish(
            config,
            workdir,
            model_config,
            tokenizer,
            trainable,
            last,
            frozen,
            checkpoints,
            reader,
            sources,
            layout,
            done,
        )
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
    return {"step": done, "train_seconds": round(seconds), **results}


def finish(
    config,
    workdir,
    model_config,
    tokenizer,
    trainable,
    last,
    frozen,
    checkpoints,
    reader,
    sources,
    layout,
    steps,
) -> dict:
    """Exports the parameters that were best out of distribution, and scores them beside where RL started."""
    best = checkpoints.restore_best(last)
    chosen, step = (best[0], best[2]) if best else (last, steps)
    export.export(
        workdir,
        model_config,
        trainable.export_params(chosen, frozen),
        tokenizer,
        export.ExportFacts.from_config(config),
        trainable.export_adapters(chosen),
    )
    note = f"RL model: step {step} of {config.steps}"
    if best:
        note += f", the best on the selection split of {sources.out_of_distribution}."
    with layout.on_host():
        base = trainable.base_params(frozen) or pretrained.to_device(
            pretrained.load_starting_model(config.model, config.seed).params, config.dtype
        )
    base = layout.state(base)
    models = {"SFT": base, "RL": trainable.merge(chosen, frozen)["model"]}
    if (
        config.data.source == "phantom"
    ):  # of films, untrained weights tell nothing more, and large ones take minutes
        models = {
            "base": layout.state(pretrained.untrained_params(model_config, config.seed)),
            **models,
        }
    return {
        "best_step": step,
        "results": evaluation_run.full(workdir, config, models, reader, sources, notes=[note]),
    }
