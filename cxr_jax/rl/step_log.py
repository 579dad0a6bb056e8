"""What an RL step leaves for people: its line of metrics, its alarms, and groups of completions side by side."""

import sys
import time
from typing import Any

import jax

from cxr_jax import report
from cxr_jax.data.sources.base import Batch, epoch_of
from cxr_jax.evaluation.model_selection import constant_baselines
from cxr_jax.metrics.alarms import Alarms
from cxr_jax.metrics.model_flops import ModelFlops, peak_of
from cxr_jax.metrics.progress import Compilations, Progress
from cxr_jax.report.group_records import TRUTH_ARRAYS, groups_of
from cxr_jax.rl.losses import has_flat_gradients
from cxr_jax.rl.rollout import one_row_each, tokens_of_step
from cxr_jax.runtime import processes
from cxr_jax.runtime.run_folder import RunFolder
from cxr_jax.runtime.signals import Skips
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import optimizer as optimizers
from cxr_jax.training.run_loop import RunLoop
from cxr_jax.training.setup import Setup


class StepLog:
    """Times each step, writes its line, rings alarms, and ends a run whose gradients are not finite.

    Attributes:
        seconds: of all steps so far, those before a resume included; looks and saves do not count.
        tokens: completion tokens sampled so far.
    """

    def __init__(self, setup: Setup, loop: RunLoop, frozen: Tree, meta: dict[str, Any]) -> None:
        """Go on from what the checkpoint kept; what constant answers earn is logged beside the reward.

        Args:
            frozen: the parameters that do not train.
            meta: of the checkpoint; {} of a new run.
        """
        settings, train = setup.settings, setup.splits.train
        self._loop, self._baselines = loop, constant_baselines(train)
        self._use = DeviceUse(setup, loop.params, frozen)
        from_zero = optimizers.began_from_zero(meta)
        self._learning_rate = optimizers.learning_rate(
            settings.optim, settings.steps, from_zero=from_zero
        )
        loop.keep("from_zero", lambda: from_zero)
        self.seconds: float = meta.get("seconds", 0.0)
        self.tokens: int = meta.get("num_tokens", 0)
        # Alarms compare with the first step of the run, not of the process.
        self._alarms = Alarms(meta.get("first", {}))
        self._compilations = Compilations()
        self._progress = Progress(
            settings.steps,
            start=loop.start,
            show=("reward", "rewards/accuracy/mean"),
            unit="completions",
            stream=sys.stdout,
        )
        self._rows, self._prompts = (
            len(train),
            settings.rollout.prompts_per_step * settings.rollout.oversample,
        )
        updates = settings.learner.updates
        self._skips = Skips(settings.max_skipped, loop.start, loop.skipped, updates)
        self._sampled = 0.0
        loop.keep("seconds", lambda: self.seconds)
        loop.keep("num_tokens", lambda: self.tokens)
        loop.keep("first", lambda: self._alarms.first)

    def end_rollout(self) -> None:
        """Note when the completions are sampled and scored."""
        self._sampled = time.monotonic()

    def end_step(self, metrics: Tree, samples: Tree, batch: Tree) -> None:
        """Write the line of the step that has just become whole.

        Raises:
            RunFailedError: after too many steps in a row whose gradients were not finite.
        """
        done, began = self._loop.done, self._loop.step_began
        row = {name: float(value) for name, value in metrics.items()}
        passed = time.monotonic() - began
        sampled, rollout_seconds = int(samples["lengths"].sum()), self._sampled - began
        self.tokens += sampled
        # Before compilations are counted: its own small program is one of the first step's.
        row |= self._use.metrics(samples, batch, passed, passed - rollout_seconds)
        row |= {
            "num_tokens": self.tokens,
            "learning_rate": float(self._learning_rate(done - 1)),
            "step_time": passed,
            "perf/rollout_seconds": rollout_seconds,
            # Its metrics have been fetched: the update is over.
            "perf/learner_seconds": passed - rollout_seconds,
            "perf/tokens_per_second": sampled / passed,
            "perf/rollout_tokens_per_second": sampled / rollout_seconds,
            "perf/data_wait_share": self._loop.data_wait / passed,
            "perf/compilations": self._compilations.count(),
        }
        row |= {f"constant/{name}": value for name, value in self._baselines.items()}
        row |= self._loop.times.shares()
        # What was drawn counts, learned from or not.
        row |= epoch_of(done * self._prompts, self._rows)
        row |= self._alarms(row)
        self._loop.metrics.write(done, row, kind="train")
        self._progress.update(done, row, items=samples["reward"].size)
        self._skips.look(done, int(row["skipped_steps"]))
        self.seconds += time.monotonic() - began


class DeviceUse:
    """The share of the devices' peak that steps make use of; nothing where the peak is not known."""

    def __init__(self, setup: Setup, train: Tree, frozen: Tree) -> None:
        """Count what a token costs.

        Args:
            train: what trains.
            frozen: the other parameters.
        """
        self._peak = peak_of(jax.devices()[0].device_kind, jax.device_count())
        self._settings, self._model_config = setup.settings, setup.model_config
        model = setup.trainable.merge(train, frozen)["model"]
        self._flops = ModelFlops.of(model, train, setup.model_config.vision.merge_unit)

    def metrics(
        self, samples: Tree, batch: Tree, seconds: float, learner_seconds: float
    ) -> dict[str, float]:
        """Give "perf/mfu" of a whole step and "perf/learner_mfu" of its update."""
        if self._peak is None:
            return {}
        learner, loss = self._settings.learner, self._settings.loss
        counts = jax.device_get(
            tokens_of_step(
                samples,
                batch,
                image_token_id=self._model_config.image_token_id,
                flat_groups_count=has_flat_gradients(loss),
            )
        )
        # Before several updates the policy's log-probs are computed once, and the reference's once a step.
        passes = int(learner.updates > 1) + int(loss.beta > 0)
        learned = learner.num_iterations * self._flops.of_update(counts["learned"])
        learned += passes * self._flops.of_forward(counts["learned"])
        whole = learned + self._flops.of_forward(counts["sampled"])
        return {
            "perf/mfu": whole / (seconds * self._peak),
            "perf/learner_mfu": learned / (learner_seconds * self._peak),
        }


class GroupRecords:
    """Keeps the groups of the newest step for the report: completions of one prompt side by side."""

    def __init__(self, setup: Setup, run_folder: RunFolder) -> None:
        self._setup, self._run_folder = setup, run_folder
        self._latest: tuple[Tree, Batch, dict] | None = None

    def remember(self, samples: Tree, batch: Batch, shown: dict[str, Any]) -> None:
        """Hold on to a step's rollout until the next one, in case it is to be shown."""
        self._latest = samples, batch, shown

    def save(self, step: int) -> None:
        """Choose groups of the newest step and write them into the run's folder."""
        assert self._latest is not None
        samples, batch, shown = self._latest
        source = self._setup.splits.train
        samples = processes.gather_to_host(samples)
        shown_rows = self._rows_of_prompts(processes.gather_to_host(batch), len(samples["reward"]))
        groups = groups_of(
            samples,
            shown_rows,
            self._setup.tokenizer,
            step=step,
            lexicon=self._setup.splits.lexicon,
            weights=dict(self._setup.settings.rollout.reward_weights),
            set_name=source.name,
            **shown,
        )
        if processes.is_main():
            report.save_groups(self._run_folder.path, groups)

    def _rows_of_prompts(self, batch: Batch, prompts: int) -> dict[str, Any]:
        """What a page shows of a batch, a row a prompt; over many devices the batch has several."""
        images, row_count = self._setup.prompts.images, len(batch["known"])
        shown: dict[str, Any] = one_row_each({name: batch[name] for name in TRUTH_ARRAYS}, prompts)
        # Pictures: those of packed rows are put together again.
        rows = range(0, row_count, row_count // prompts)
        shown["image"] = [images.picture(batch, row) for row in rows]
        if "opened" in batch["prompts"]:
            shown["prompts"] = one_row_each({"opened": batch["prompts"]["opened"]}, prompts)
        return shown
