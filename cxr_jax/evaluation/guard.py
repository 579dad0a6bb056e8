"""Model selection while a run goes: looks at held-out sets, the best step, lost recall, early stop."""

import numpy as np

from cxr_jax import rewards
from cxr_jax.data.sources.splits import held_out
from cxr_jax.metrics import scores as metrics_scores
from cxr_jax.runtime import processes

LOST_RECALL = 0.25  # a label whose recall fell by more than this is said to be lost


class ModelSelection:
    """Looks at the selection splits every K steps, logs per-label scores, keeps the best-by-OOD parameters.

    model_of: from what trains to the parameters of the whole model; best, first: what these attributes were in a run
    that is resumed.
    """

    def __init__(
        self, config, reader, sources, metrics, checkpoints, model_of, best=None, first=None
    ):
        self.config, self.reader, self.metrics, self.checkpoints = (
            config,
            reader,
            metrics,
            checkpoints,
        )
        self.model_of, self.best, self.first = model_of, best, first
        self.data = {
            name: held_out(s, config.eval.n, reader.poll) for name, s in sources.select.items()
        }
        self.ood = sources.out_of_distribution

    def look(self, step: int, train) -> dict:
        """Scores what trains at `step` on the selection splits; saves it if the best so far out of distribution."""
        row, params = {}, self.model_of(train)
        for name, data in self.data.items():
            got = self.reader.read(params, data["image"], data["texts"])
            s = metrics_scores.summary(
                got["pred"], data["solution"], known=data["known"], valid=got["valid"], n_boot=20
            )
            row[f"eval/{name}/jaccard"] = s["jaccard"]["value"]
            row |= {f"eval/{name}/{m}": s[m]["all"]["value"] for m in ("macro_f1", "micro_f1")}
            row[f"eval/{name}/valid_format"] = float(got["valid"].mean())
            row[f"eval/{name}/mean_length"] = float(got["lengths"].mean())
            row |= {
                f"eval/{name}/{k}": float(v.mean()) for k, v in self.reader.trace(got, data).items()
            }
            for label, v in s["per_label"].items():
                row |= {
                    f"eval/{name}/{label}/{m}": v[m]
                    for m in ("precision", "recall", "f1")
                    if v[m] is not None
                }
        row["alarms/lost_recall"] = self._lost(row)
        self.metrics.write(step, row, kind="eval")
        score = (
            row[f"eval/{self.ood}/{self.config.eval.select_by}"] or 0.0
        )  # None: undefined on so few examples
        value = lambda name: "-" if row[name] is None else f"{row[name]:.3f}"
        shown = ", ".join(
            f"{n} Jaccard {value(f'eval/{n}/jaccard')} macro-F1 {value(f'eval/{n}/macro_f1')}"
            for n in self.data
        )
        print(f"  step {step} on the selection splits: {shown}", flush=True)
        if processes.of_main(self.best is None or score > self.best["score"]):
            self.best = {"score": score, "step": step}
            self.checkpoints.save_best(step, train, self.best)
        return row

    def _lost(self, row: dict) -> int:
        """How many labels lost recall out of distribution since the first look, named aloud: a mean can hide it."""
        recall = {
            k: v
            for k, v in row.items()
            if k.startswith(f"eval/{self.ood}/") and k.endswith("/recall")
        }
        self.first = self.first or recall
        lost = sorted(k for k, v in recall.items() if v < self.first.get(k, 0.0) - LOST_RECALL)
        for name in lost:
            label = name.split("/")[2]
            print(
                f"  alarm: recall of {label} on {self.ood} fell from {self.first[name]:.2f} to {recall[name]:.2f}: "
                f"see eval/{self.ood}/{label}/* and the samples whose answer leaves it out",
                flush=True,
            )
        return len(lost)

    def stale(self, step: int) -> bool:
        """Whether the last `config.rl.patience` looks until `step` were no better out of distribution; says so."""
        patience = self.config.rl.patience
        if not (
            patience and self.best and step - self.best["step"] >= patience * self.config.eval.every
        ):
            return False
        print(
            f"  stopped early: the last {patience} looks were no better on {self.ood} than step {self.best['step']}",
            flush=True,
        )
        return True


def constant_baselines(sources, n: int = 2000) -> dict:
    """Jaccard of the constant policies on the training stream: what a reward must beat to mean anything."""
    truth = sources.train.solutions(np.arange(min(n, len(sources.train))))
    p = metrics_scores.constant_policies(truth, n_boot=20)["policies"]
    best = max(p, key=lambda k: p[k]["jaccard"])
    return {
        "no_finding": p["No Finding"]["jaccard"],
        "all_labels": p["all labels"]["jaccard"],
        "best": p[best]["jaccard"],
        "modal_share": float(rewards.modal_share(truth)),
    }
