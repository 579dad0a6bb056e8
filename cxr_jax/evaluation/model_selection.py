"""Model selection while a run goes: looks at held-out sets, the best step, lost recall, early stop."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cxr_jax import rewards
from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.data.sources.base import Batch, Source
from cxr_jax.data.sources.splits import Splits, held_out
from cxr_jax.evaluation.reader import Reader
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.runtime import processes
from cxr_jax.runtime.layout import Layout
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.run_loop import RunLoop
from cxr_jax.training.setup import Setup

LOST_RECALL = 0.25  # a label whose recall fell by more than this is said to be lost
LOOK = Bootstrap(20)  # its intervals are not shown


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
        # Once, before the first step: every look reads the same images, so that looks compare.
        self.data = {
            name: held_out(source, settings.n, reader.poll)
            for name, source in splits.select.items()
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
            setup.splits.train.lexicon,
            poll=loop.stop.check,
            layout=layout,
        )

        # What trains may be adapters alone; a reader wants the whole model.
        def model_of(train: Tree) -> Tree:
            return setup.trainable.merge(train, frozen)["model"]

        return cls(settings.eval, reader, setup.splits, loop, model_of)

    def resume(self, best: dict | None, first_recall: dict | None) -> None:
        """Go on from what a run that is resumed had found."""
        self.best, self.first_recall = best, first_recall

    def evaluate_at(self, step: int) -> dict[str, Any]:
        """Score what trains after `step`, log it, and save it if it is the best so far out of distribution."""
        # All sets go into one row of the metrics, each under its own name.
        row: dict[str, Any] = {}
        train = self.loop.params
        params = self.model_of(train)
        for name, data in self.data.items():
            row |= self._score(name, params, data)
        row["alarms/lost_recall"] = self._count_lost_labels(row)
        self.loop.metrics.write(step, row, kind="eval")
        self._print(step, row)

        # None, an undefined score of very few examples, counts as 0.
        score = row[f"eval/{self.out_of_distribution}/{self.settings.select_by}"] or 0.0
        # All processes must decide alike: a save needs every one of them.
        if processes.from_main(self.best is None or score > self.best["score"]):
            self.best = {"score": score, "step": step}
            self.loop.checkpoints.save_best(step, train, self.best)
        return row

    def _score(self, name: str, params: Tree, data: Batch) -> dict[str, Any]:
        """The metrics `eval/<name>/*` of one selection split."""
        # Greedy, in the order of the images, so that a second look at the same weights is the same.
        readings = self.reader.read(params, data["image"], data["texts"])
        summary = scores.summary(
            Answers(readings.answer, readings.valid),
            Reference(data["solution"], data["known"]),
            bootstrap=LOOK,
        )
        # The sums that a run is judged by, and two that tell why: broken answers, and their length.
        row = {
            "jaccard": summary["jaccard"]["value"],
            "macro_f1": summary["macro_f1"]["all"]["value"],
            "micro_f1": summary["micro_f1"]["all"]["value"],
            "valid_format": float(readings.valid.mean()),
            "mean_length": float(readings.lengths.mean()),
        }
        # Terms of the trace, which the answer alone does not show.
        traces = self.reader.score_traces(readings, data)
        row |= {term: float(values.mean()) for term, values in traces.items()}
        # Label by label; a metric that is undefined, for want of positives, is left out.
        for label, of_label in summary["per_label"].items():
            for metric in ("precision", "recall", "f1"):
                if of_label[metric] is not None:
                    row[f"{label}/{metric}"] = of_label[metric]
        return {f"eval/{name}/{key}": value for key, value in row.items()}

    def _count_lost_labels(self, row: dict[str, Any]) -> int:
        """Count the labels that lost recall out of distribution since the first look; name each: a mean hides it."""
        # Out of distribution only, as the choice of the best step is.
        prefix = f"eval/{self.out_of_distribution}/"
        recall = {
            name: value
            for name, value in row.items()
            if name.startswith(prefix) and name.endswith("/recall")
        }
        # The first look of the run, or that of the run which is resumed.
        self.first_recall = self.first_recall or recall
        first = self.first_recall
        # A label that had no recall at first cannot lose any.
        lost = sorted(n for n, value in recall.items() if value < first.get(n, 0.0) - LOST_RECALL)
        for name in lost:
            label = name.split("/")[2]
            print(
                f"  alarm: recall of {label} on {self.out_of_distribution} fell from {first[name]:.2f} "
                f"to {recall[name]:.2f}: see {prefix}{label}/* and the samples whose answer leaves it out",
                flush=True,
            )
        return len(lost)

    def _print(self, step: int, row: dict[str, Any]) -> None:
        # Undefined is shown as a dash, and not as zero.
        def shown(name: str) -> str:
            return "-" if row[name] is None else f"{row[name]:.3f}"

        sets = ", ".join(
            f"{name} Jaccard {shown(f'eval/{name}/jaccard')} "
            f"macro-F1 {shown(f'eval/{name}/macro_f1')}"
            for name in self.data
        )
        print(f"  step {step} on the selection splits: {sets}", flush=True)

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


def constant_baselines(source: Source, count: int = 2000) -> dict[str, float]:
    """Score constant policies on the training stream by Jaccard: what a reward must beat to mean anything."""
    # The first examples stand for the stream, which may have no end.
    truth = source.solutions(np.arange(min(count, len(source))))
    policies = scores.constant_policies(Reference(truth), bootstrap=LOOK)["policies"]
    return {
        "no_finding": policies["No Finding"]["jaccard"],
        "all_labels": policies["all labels"]["jaccard"],
        "best": max(policy["jaccard"] for policy in policies.values()),
        "modal_share": float(rewards.modal_share(truth)),
    }
