"""Model selection while a run goes: looks at held-out sets, the best step, lost recall, early stop."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cxr_jax import rewards
from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.data.sources.base import Batch, Source
from cxr_jax.data.sources.splits import Splits, held_out
from cxr_jax.evaluation.reader import Reader, Readings
from cxr_jax.metrics import alarms, scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.models.image_batches import images_of
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.run_loop import RunLoop
from cxr_jax.training.setup import Setup

LOST_RECALL = 0.25  # a label whose recall fell by more than this is said to be lost
LOOK_BOOTSTRAP = Bootstrap(20)  # its intervals are not shown


class ModelSelection:
    """Looks at the selection splits every so many steps and keeps the parameters that are best out of distribution.

    Attributes:
        best: {"score", "step"} of the best look so far, None before the first.
        first_recall: recall of each label at the first look; a later fall is held against it.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        reader: Reader,
        splits: Splits,
        loop: RunLoop,
        model_of: Callable[[Tree], Tree],
    ) -> None:
        """Draw or read the images of the selection splits.

        Args:
            loop: whose parameters are looked at.
            model_of: from what trains to the parameters of the whole model.
        """
        self.settings, self.reader = settings, reader
        self.loop, self.model_of = loop, model_of
        self.best: dict[str, Any] | None = None
        self.first_recall: dict[str, float] | None = None
        self.out_of_distribution = splits.out_of_distribution
        self._said_formatless = False
        # Once, before the first step: every look reads the same images, so that looks compare.
        self.data = {
            split_name: held_out(source, settings.n, reader.poll)
            for split_name, source in splits.select.items()
        }

    @classmethod
    def open(cls, setup: Setup, loop: RunLoop, frozen: Tree, layout: Layout) -> "ModelSelection":
        """Set up the choice of a run: a reader of its prompts, which a stop interrupts."""
        settings = setup.settings
        reader = Reader(
            setup.model_config,
            setup.tokenizer,
            setup.prompts,
            settings.eval.batch_size,
            setup.trainable.dtype,
            setup.splits.lexicon,
            poll=loop.stop.check,
            unwatched=loop.stop.unwatched,
            layout=layout,
        )

        # What trains may be adapters alone; a reader wants the whole model.
        def model_of(trained: Tree) -> Tree:
            return setup.trainable.merge(trained, frozen)["model"]

        return cls(settings.eval, reader, setup.splits, loop, model_of)

    def resume(self, best: dict | None, first_recall: dict | None) -> None:
        """Go on from what a run that is resumed had found."""
        self.best, self.first_recall = best, first_recall

    def evaluate_at(self, step: int) -> dict[str, Any]:
        """Score what trains after `step`, log it, and save it if it is the best so far out of distribution."""
        # All sets go into one row of the metrics, each under its own name.
        log_metrics: dict[str, Any] = {}
        trained = self.loop.params_to_use
        params = self.model_of(trained)
        formatless = []
        for split_name, held_out_batch in self.data.items():
            # Greedy, in the order of the images, so that a second look at the same weights is the same.
            readings = self.reader.read(
                params,
                images_of(held_out_batch),
                held_out_batch["texts"],
                held_out_batch.get("ids", ()),
            )
            log_metrics |= self._score(split_name, readings, held_out_batch)
            if readings.has_answers_without_format(held_out_batch["solution"]):
                formatless.append(split_name)
        log_metrics["alarms/lost_recall"] = self._count_lost_labels(log_metrics)
        log_metrics["alarms/format_never_held"] = len(formatless)
        self._say_formatless(formatless)
        self.loop.metrics.write(step, log_metrics, kind="eval")
        self._print(step, log_metrics)

        # None, an undefined score of very few examples, counts as 0.
        selection_score = (
            log_metrics[f"eval/{self.out_of_distribution}/{self.settings.select_by}"] or 0.0
        )
        # All processes must decide alike: a save needs every one of them.
        if processes.from_main(self.best is None or selection_score > self.best["score"]):
            self.best = {"score": selection_score, "step": step}
            self.loop.checkpoints.save_best(step, trained, self.best)
        return log_metrics

    def _score(self, split_name: str, readings: Readings, held_out_batch: Batch) -> dict[str, Any]:
        """The metrics `eval/<name>/*` of one selection split."""
        summary = scores.summary(
            Answers(readings.answer, readings.valid),
            Reference.from_batch(held_out_batch),
            bootstrap=LOOK_BOOTSTRAP,
        )
        # The sums that a run is judged by, and two that tell why: broken answers, and their length.
        split_metrics = {
            "jaccard": summary["jaccard"]["value"],
            "macro_f1": summary["macro_f1"]["all"]["value"],
            "micro_f1": summary["micro_f1"]["all"]["value"],
            "valid_format": float(readings.valid.mean()),
            "mean_length": float(readings.lengths.mean()),
        }
        # Terms of the trace, which the answer alone does not show.
        traces = self.reader.score_traces(readings, held_out_batch)
        split_metrics |= {
            trace_term: float(term_values.mean()) for trace_term, term_values in traces.items()
        }
        # Label by label; a metric that is undefined, for want of positives, is left out.
        for label, of_label in summary["per_label"].items():
            for metric in ("precision", "recall", "f1"):
                if of_label[metric] is not None:
                    split_metrics[f"{label}/{metric}"] = of_label[metric]
        return {
            f"eval/{split_name}/{metric_name}": value
            for metric_name, value in split_metrics.items()
        }

    def _count_lost_labels(self, log_metrics: dict[str, Any]) -> int:
        """Count the labels that lost recall out of distribution since the first look; name each: a mean hides it."""
        # Out of distribution only, as the choice of the best step is.
        prefix = f"eval/{self.out_of_distribution}/"
        current_recall = {
            metric_name: label_recall
            for metric_name, label_recall in log_metrics.items()
            if metric_name.startswith(prefix) and metric_name.endswith("/recall")
        }
        # The first look of the run, or that of the run which is resumed.
        self.first_recall = self.first_recall or current_recall
        first_recall = self.first_recall
        # A label that had no recall at first cannot lose any.
        lost_recalls = sorted(
            metric_name
            for metric_name, label_recall in current_recall.items()
            if label_recall < first_recall.get(metric_name, 0.0) - LOST_RECALL
        )
        for metric_name in lost_recalls:
            label_name = metric_name.split("/")[2]
            fall = f"from {first_recall[metric_name]:.2f} to {current_recall[metric_name]:.2f}"
            print(
                f"  alarm: recall of {label_name} on {self.out_of_distribution} fell {fall}: "
                f"see {prefix}{label_name}/* and the samples whose answer leaves it out",
                flush=True,
            )
        return len(lost_recalls)

    def _say_formatless(self, formatless: list[str]) -> None:
        """Say once a process on which sets answers are right and no text holds the format."""
        if formatless and not self._said_formatless:
            self._said_formatless = True
            sets = ", ".join(formatless)
            print(f"  alarm: format never held on {sets}: {alarms.FORMAT_NEVER_HELD}", flush=True)

    def _print(self, step: int, log_metrics: dict[str, Any]) -> None:
        # Undefined is shown as a dash, and not as zero.
        def shown(name: str) -> str:
            return "-" if log_metrics[name] is None else f"{log_metrics[name]:.3f}"

        split_scores = ", ".join(
            f"{name} Jaccard {shown(f'eval/{name}/jaccard')} "
            f"macro-F1 {shown(f'eval/{name}/macro_f1')}"
            for name in self.data
        )
        print(f"  step {step} on the selection splits: {split_scores}", flush=True)

    def should_stop_early(self, step: int, patience: int) -> bool:
        """Tell, and say, whether the last `patience` looks until `step` were no better; 0 is endless patience."""
        # Before the first best there is nothing to be patient about.
        if not patience or not self.best:
            return False
        # A look is due every so many steps, so steps stand for looks.
        if step - self.best["step"] < patience * self.settings.every:
            return False
        print(
            f"  stopped early: the last {patience} looks were no better on {self.out_of_distribution} "
            f"than step {self.best['step']}",
            flush=True,
        )
        return True


def constant_baselines(source: Source, example_count: int = 2000) -> dict[str, float]:
    """Score constant policies on the training stream by Jaccard: what a reward must beat to mean anything."""
    # The first examples stand for the stream, which may have no end.
    indices = np.arange(min(example_count, len(source)))
    truth = source.solutions(indices)
    # Under the mask that rewards have, or a constant answer would seem to earn less than it does.
    known, hedged = source.masks(indices)
    reference = Reference(truth, known, blank=~known & ~hedged)
    policies = scores.constant_policies(reference, bootstrap=LOOK_BOOTSTRAP)["policies"]
    return {
        "no_finding": policies["No Finding"]["jaccard"],
        "all_labels": policies["all labels"]["jaccard"],
        "best": max(policy["jaccard"] for policy in policies.values()),
        "modal_share": float(rewards.modal_share(truth)),
    }
