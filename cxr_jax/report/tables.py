"""The report's tables and the sentences above them, from the summaries of an evaluation.

`models` is `evaluation.json`'s {model: {test set: metrics.scores.summary}} throughout, in the order base, SFT, RL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.probability_scores import OVERALL
from cxr_jax.metrics.scores import SUBSETS
from cxr_jax.report import svg
from cxr_jax.report.markup import interval, muted, render, set_title

METRICS = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "jaccard": "Jaccard"}
HEADLINES = ("macro_f1", "jaccard")  # what sentences and plots are about
SUBSET_TITLES = {
    "all": "all 14 labels",
    "without_no_finding": "without No Finding",
    "without_support_devices": "without Support Devices",
    "findings_only": "without both",
}
# A subset without a title would be missing from the page in silence.
assert SUBSET_TITLES.keys() == SUBSETS.keys()


def set_names(models: Mapping) -> list[str]:
    """Return the names of all test sets, in the order of their first mention."""
    return list(dict.fromkeys(set_name for summaries in models.values() for set_name in summaries))


def first_summary(models: Mapping, set_name: str) -> dict:
    """Return a summary of that set: what concerns the set alone (constants, counts) is the same in all."""
    return next(summaries[set_name] for summaries in models.values() if set_name in summaries)


def overall(summary: Mapping, metric: str) -> dict:
    """Return the estimate of a metric over all labels."""
    return summary["jaccard"] if metric == "jaccard" else summary[metric]["all"]


def _with_part(models: Mapping, part_name: str) -> list[tuple[str, str, dict]]:
    """(model, test set, summary) of all summaries that have a part: "trace", "audit" or "calibration"."""
    return [
        (model_name, set_name, summary)
        for model_name, summaries in models.items()
        for set_name, summary in summaries.items()
        if summary.get(part_name)
    ]


# ---- Sentences: what the numbers allow to say ----


class Change(NamedTuple):
    """A difference of one metric, and what its interval allows to say of it."""

    metric: str
    value: float | None
    interval: str
    remark: str


@dataclass(frozen=True)
class Verdict:
    """The last model's scores on one test set, and its gains over the best constant answer there."""

    set_name: str
    model: str
    scores: dict[str, dict]
    gains: list[Change]


@dataclass(frozen=True)
class Comparison:
    """The paired differences of two models on one test set."""

    new: str
    old: str
    set_name: str
    changes: list[Change]


def _change(metric: str, estimate: Mapping) -> Change:
    """estimate: holds "diff" or "value", "lo" and "hi"."""
    difference = estimate["diff"] if "diff" in estimate else estimate["value"]
    metric_title = METRICS.get(metric, metric)
    # Undefined on one side: there is nothing to say of it.
    if difference is None:
        return Change(metric_title, None, "", "")
    # An interval that reaches over 0 shows nothing, however large the difference.
    if estimate["lo"] is None or estimate["lo"] <= 0 <= estimate["hi"]:
        remark = " (the interval includes 0: no difference shown)"
    else:
        remark = " (worse)" if estimate["hi"] < 0 else ""
    return Change(metric_title, difference, interval(estimate, sign="+"), remark)


def _verdicts(models: Mapping) -> list[Verdict]:
    # The models stand in the order in which they were trained: the last one is the result.
    last_model = list(models)[-1]
    verdicts = []
    for set_name, summary in models[last_model].items():
        scores = {METRICS[metric]: overall(summary, metric) for metric in HEADLINES}
        # Only a summary that was held against constant answers has gains.
        gain_by_metric = summary.get("over_constant")
        gains = (
            [_change(metric, gain_by_metric[metric]) for metric in HEADLINES]
            if gain_by_metric
            else []
        )
        verdicts.append(Verdict(set_name, last_model, scores, gains))
    return verdicts


def _comparisons(evaluation: Mapping) -> list[Comparison]:
    """The metrics of one pair of models on one set stand in one sentence."""
    changes_by_pair: dict[tuple[str, str, str], list[Change]] = {}
    # Differences of probabilities stand in a section of their own.
    of_answers = [
        comparison
        for comparison in evaluation.get("comparisons", ())
        if comparison["metric"] not in OVERALL
    ]
    for comparison in of_answers:
        # As the sentence names them: the newer model first.
        model_pair = comparison["b"], comparison["a"], comparison["set"]
        changes_by_pair.setdefault(model_pair, []).append(_change(comparison["metric"], comparison))
    return [Comparison(*model_pair, changes) for model_pair, changes in changes_by_pair.items()]


# ---- The headline: plots and tables ----


class ConstantAnswer(NamedTuple):
    """The best constant answer by one metric; interval: None where none was computed for that metric."""

    policy: str
    value: float | None
    interval: str | None


def _forests(models: Mapping) -> dict[str, Markup]:
    """Interval plots of macro-F1 and Jaccard, with the best constant answer of each set."""
    plots = {}
    for metric in HEADLINES:
        set_groups = []
        # A set has the same colour in both plots.
        for position, set_name in enumerate(set_names(models)):
            estimates = {
                model_name: overall(summaries[set_name], metric)
                for model_name, summaries in models.items()
                if set_name in summaries
            }
            constants = first_summary(models, set_name)["constants"]
            set_group = svg.ForestGroup(
                heading=set_title(set_name),
                color=svg.PALETTE[position % len(svg.PALETTE)],
                estimates=estimates,
                constant=constants[f"best_{metric}"][metric]["value"],
            )
            set_groups.append(set_group)
        plots[METRICS[metric]] = svg.forest(METRICS[metric], set_groups)
    return plots


def _best_constant(summary: Mapping, metric: str) -> ConstantAnswer:
    constants = summary["constants"]
    # Only the best by Jaccard and by macro-F1 have intervals.
    if f"best_{metric}" in constants:
        # Their intervals were made with the summary.
        best_policy = constants[f"best_{metric}"]
        return ConstantAnswer(
            best_policy["policy"], best_policy[metric]["value"], interval(best_policy[metric])
        )
    # The other metric has points alone: the best by it is looked up here.
    scores = {policy_name: policy[metric] for policy_name, policy in constants["policies"].items()}
    policy = max(
        scores, key=lambda policy_name: -1.0 if scores[policy_name] is None else scores[policy_name]
    )
    return ConstantAnswer(policy, scores[policy], None)


def _highest(models: Mapping, set_name: str, metric: str) -> float | None:
    """The highest score of all models, None where none has one."""
    set_scores = [
        overall(summaries[set_name], metric)["value"]
        for summaries in models.values()
        if set_name in summaries
    ]
    return max((set_score for set_score in set_scores if set_score is not None), default=None)


def result(evaluation: Mapping) -> Markup:
    """Draw the headline: sentences, intervals, tables."""
    models = evaluation["models"]
    if not models:
        return muted("No evaluation was recorded.")
    test_sets = set_names(models)
    return render(
        "result.html",
        models=models,
        sets=test_sets,
        metrics=METRICS,
        subsets=SUBSET_TITLES,
        overall=overall,
        verdicts=_verdicts(models),
        comparisons=_comparisons(evaluation),
        forests=_forests(models),
        constants={
            set_name: [
                _best_constant(first_summary(models, set_name), metric) for metric in METRICS
            ]
            for set_name in test_sets
        },
        best={
            set_name: {metric: _highest(models, set_name, metric) for metric in METRICS}
            for set_name in test_sets
        },
        calibrated=_with_part(models, "calibration"),
    )


# ---- Image use ----


class ImageChange(NamedTuple):
    """A score with another image than the real one, and the change from the real one (None: not known)."""

    score: float | None
    difference: float | None
    interval: str


@dataclass(frozen=True)
class Audit:
    """The image-use audit of one model on one test set; changes: metric -> other image -> ImageChange."""

    model: str
    set_name: str
    real: dict[str, float | None]
    changes: dict[str, dict[str, ImageChange]]
    same_answer: dict[str, float | None]
    uses_image: bool


def _image_change(scores: Mapping, metric: str) -> ImageChange:
    # A drop may be missing, or undefined on very few images.
    drop = scores.get(f"drop_{metric}") or {}
    if drop.get("value") is None or drop.get("lo") is None:
        return ImageChange(scores.get(metric), None, "")
    # A drop is real minus other; the page shows other minus real.
    change = {"lo": -drop["hi"], "hi": -drop["lo"]}
    return ImageChange(scores.get(metric), -drop["value"], interval(change, sign="+"))


def _uses_image(audit: Mapping) -> bool:
    """Whether Jaccard falls with each of the other images, the interval clear of 0."""
    # All of them: one drop alone may come from what is odd about that image.
    drops = [scores["drop_jaccard"] for image_name, scores in audit.items() if image_name != "real"]
    return bool(drops) and all(drop["lo"] is not None and drop["lo"] > 0 for drop in drops)


def image_use(models: Mapping) -> Markup:
    """Draw the scores with real, blank and swapped images."""
    # One table a model and set, but only where the audit was made.
    audited = _with_part(models, "audit")
    if not audited:
        return muted("No image-use audit was recorded.")
    # Not every model needs to have seen every other image.
    image_names = dict.fromkeys(
        image_name for *_, summary in audited for image_name in summary["audit"]
    )
    other_images = [image_name for image_name in image_names if image_name != "real"]
    audits = []
    for model_name, set_name, summary in audited:
        audit = summary["audit"]
        changes = {
            metric: {
                image_name: _image_change(audit.get(image_name, {}), metric)
                for image_name in other_images
            }
            for metric in ("jaccard", "macro_f1")
        }
        same_answer = {
            image_name: audit.get(image_name, {}).get("same_answer") for image_name in other_images
        }
        uses_image = _uses_image(audit)
        audits.append(Audit(model_name, set_name, audit["real"], changes, same_answer, uses_image))
    return render("image_use.html", audits=audits, others=other_images, covered=_covered(models))


def _covered(models: Mapping) -> list[dict]:
    """The audits with covered images: model, set, how many, and by name the changes of each metric."""
    return [
        {
            "model": model_name,
            "set_name": set_name,
            "n": summary[part_name]["n"],
            "is_boxed": part_name == "boxed",
            "images": {
                image_name: {
                    "changes": {
                        metric: _image_change(scores, metric) for metric in ("jaccard", "macro_f1")
                    },
                    "same_answer": scores.get("same_answer"),
                }
                for image_name, scores in summary[part_name]["images"].items()
            },
        }
        for part_name in ("covered", "boxed")
        for model_name, set_name, summary in _with_part(models, part_name)
    ]


# ---- The trace, and label by label ----


def trace(models: Mapping) -> Markup:
    """Draw how the reasoning agrees with the answer and with the truth."""
    # The trace is read only where an evaluation was asked for it.
    traced = _with_part(models, "trace")
    if not traced:
        return muted("The traces were not read.")
    return render("trace.html", traced=traced)


def labels(models: Mapping) -> Markup:
    """Draw F1 of each label, and all counts folded below; nothing without a model."""
    if not models:
        return Markup()
    # A column a model, but only in the sets that it was evaluated on.
    columns_of = {
        set_name: {
            model_name: summaries[set_name]
            for model_name, summaries in models.items()
            if set_name in summaries
        }
        for set_name in set_names(models)
    }
    return render(
        "labels.html",
        labels=CHEXPERT_14,
        columns_of=columns_of,
        details=_with_part(models, "per_label"),
    )
