"""Statistics of label predictions: F1, Jaccard, bootstrap intervals, constant policies, image-use audit.

Pure NumPy. The conventions (what is left out, what an invalid answer is worth) stand in `label_counts.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX
from cxr_jax.metrics.bootstrap import (
    Bootstrap,
    estimate,
    estimate_mean,
    number_or_none,
    percentile_interval,
    resample,
    sum_by_group,
)
from cxr_jax.metrics.label_counts import (
    IN_SUBSET,
    LABEL_COUNT,
    METRICS,
    SUBSETS,
    Answers,
    Reference,
    check_rows,
    jaccard_rows,
    label_counts,
    label_f1,
    ratio,
    row_counts,
)

__all__ = [
    "SUBSETS",
    "Answers",
    "Bootstrap",
    "Reference",
    "auroc",
    "calibration",
    "constant_policies",
    "constant_predictions",
    "image_use_audit",
    "jaccard_rows",
    "paired_bootstrap",
    "summary",
]

COMPARED = ("jaccard", "macro_f1")  # the metrics of paired differences
LONGEST_PRIOR = 8  # labels of the longest constant answer that is taken from the frequencies
DEFAULT = Bootstrap()


# ---- Paired differences ----


class Difference(NamedTuple):
    """A paired difference with its 95 % percentile interval; NaN where the metric is undefined."""

    value: float
    low: float
    high: float

    def as_estimate(self) -> dict[str, float | None]:
        """Return {value, lo, hi}, None where undefined."""
        names = ("value", "lo", "hi")
        return dict(zip(names, map(number_or_none, self), strict=True))


def paired_bootstrap(
    metric: str,
    first: Answers,
    second: Answers,
    reference: Reference,
    *,
    subset: str = "all",
    bootstrap: Bootstrap = DEFAULT,
) -> Difference:
    """Compute metric(second) - metric(first) on the same rows, with its interval.

    Both answers are resampled with the same weights.

    Args:
        metric: one of METRICS.
        first: what is subtracted.
        second: what it is subtracted from.
        reference: what is so.
        subset: one of SUBSETS (not used by Jaccard).
        bootstrap: how the interval is made.

    Raises:
        ValueError: if `metric` is none of these, or the shapes do not agree.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    counts = [row_counts(answers, reference) for answers in (first, second)]
    width = counts[0].shape[1]
    # Side by side, so that one resample draws the same rows for both.
    units = sum_by_group(np.concatenate(counts, axis=1), reference.groups)

    def difference(sums: np.ndarray) -> np.ndarray:
        return METRICS[metric](sums[..., width:], subset) - METRICS[metric](
            sums[..., :width], subset
        )

    low, high = percentile_interval(difference(resample(units, bootstrap)))
    return Difference(float(difference(units.sum(0))), float(low), float(high))


# ---- Constant policies ----


def constant_predictions(
    reference: Reference, prior: ArrayLike | None = None
) -> dict[str, np.ndarray]:
    """List the answers that ignore the image: policy name -> bool [14].

    No Finding; all 14 labels; the k most frequent labels for k = 1..8.

    Args:
        reference: what is so.
        prior: float [14] frequencies (of the training set, say); None: those of the truth itself, which favours the
            policy and makes the bar higher.
    """
    _, truth, known, _ = check_rows(Answers(reference.truth), reference)
    if prior is None:
        frequency = ratio((truth & known).sum(0), known.sum(0))
    else:
        frequency = np.asarray(prior, float)
    # Stable: of equally frequent labels the first of the 14, on every machine.
    order = np.argsort(-np.nan_to_num(frequency), kind="stable")
    labels: dict[str, ArrayLike] = {
        "No Finding": np.array([INDEX["No Finding"]]),
        "all labels": np.arange(LABEL_COUNT),
    }
    labels |= {f"top-{length} prior": order[:length] for length in range(1, LONGEST_PRIOR + 1)}
    return {name: np.isin(np.arange(LABEL_COUNT), named) for name, named in labels.items()}


def constant_policies(
    reference: Reference, *, prior: ArrayLike | None = None, bootstrap: Bootstrap = DEFAULT
) -> dict[str, Any]:
    """Score every constant policy, and find the best ones (ties: the first named).

    Args:
        reference: what is so.
        prior: as for `constant_predictions`.
        bootstrap: how the intervals of the best are made.

    Returns:
        {"policies": {name: {"labels", "jaccard", "macro_f1", "micro_f1"}}, "best_jaccard": {...},
        "best_macro_f1": {...}}; the two best hold the name under "policy" and estimates with intervals.
    """
    named = constant_predictions(reference, prior)
    shape = np.shape(reference.truth)
    counts = {
        name: row_counts(Answers(np.broadcast_to(labels, shape)), reference)
        for name, labels in named.items()
    }
    policies: dict[str, dict[str, Any]] = {}
    for name, rows in counts.items():
        total = rows.sum(0)
        policies[name] = {
            "labels": [CHEXPERT_14[label] for label in np.flatnonzero(named[name])],
            **{metric: number_or_none(compute(total)) for metric, compute in METRICS.items()},
        }
    result: dict[str, Any] = {"policies": policies}
    for metric in COMPARED:
        scores = {name: policy[metric] for name, policy in policies.items()}
        best = max(scores, key=lambda name: -1.0 if scores[name] is None else scores[name])
        units = sum_by_group(counts[best], reference.groups)
        samples = resample(units, bootstrap)
        result[f"best_{metric}"] = {
            "policy": best,
            "labels": policies[best]["labels"],
            **{
                name: estimate(compute(units.sum(0)), compute(samples))
                for name, compute in METRICS.items()
            },
        }
    return result


# ---- Image-use audit ----


def image_use_audit(
    answers: Mapping[str, Answers], reference: Reference, *, bootstrap: Bootstrap = DEFAULT
) -> dict[str, dict[str, Any]]:
    """Ask whether the answer depends on the image: the same prompts, answered with the real and with other images.

    Args:
        answers: "real", and any other name: "blank", "swapped", ..
        reference: always that of the real image.
        bootstrap: how the intervals are made.

    Returns:
        For each name its Jaccard and macro-F1, and for each but "real": `same_answer` (share of rows answered exactly
        as with the real image) and `drop_jaccard`, `drop_macro_f1` (real minus this one, paired interval). A model
        that reads has drops with lo > 0.

    Raises:
        ValueError: if there is no "real".
    """
    if "real" not in answers:
        raise ValueError("predictions must hold 'real'")
    real = answers["real"]
    result: dict[str, dict[str, Any]] = {}
    for name, shown in answers.items():
        total = row_counts(shown, reference).sum(0)
        result[name] = {metric: number_or_none(METRICS[metric](total)) for metric in COMPARED}
        if name == "real":
            continue
        # A label that the reference does not know may change: it enters no score.
        known = check_rows(shown, reference).known
        is_same = np.asarray(shown.labels, bool) == np.asarray(real.labels, bool)
        result[name]["same_answer"] = float((is_same | ~known).all(1).mean())
        for metric in COMPARED:
            drop = paired_bootstrap(metric, shown, real, reference, bootstrap=bootstrap)
            result[name][f"drop_{metric}"] = drop.as_estimate()
    return result


# ---- Calibration ----


def auroc(probability: ArrayLike, truth: ArrayLike) -> float | None:
    """Compute the area under the ROC curve by ranks (Mann-Whitney; ties share their rank).

    Returns:
        None without both classes.
    """
    probability, truth = np.asarray(probability, float), np.asarray(truth, bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    # The rank of a value is the middle of the places that it and its equals take.
    _, index, count = np.unique(probability, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[index]
    wins = rank[truth].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def calibration(
    probabilities: ArrayLike, reference: Reference, *, bins: int = 15
) -> dict[str, Any]:
    """Hold per-finding probabilities against the truth: ECE, Brier and AUROC.

    Args:
        probabilities: float [N, 14].
        reference: what is so.
        bins: of equal width, for ECE.

    Returns:
        `ece`: |mean probability - share of positives| of each bin, weighted by count, over all known cells. `brier`:
        mean squared error over the same cells. `auroc`: per label (None where one class is missing); `mean_auroc`:
        over the labels that have one. `bins`: as given.
    """
    _, truth, known, _ = check_rows(Answers(reference.truth), reference)
    probabilities = np.asarray(probabilities, float)
    said, true = probabilities[known], truth[known].astype(float)
    # A probability of 1 belongs to the last bin.
    bin_of_cell = np.minimum((said * bins).astype(int), bins - 1)
    gap = np.abs(np.bincount(bin_of_cell, said - true, bins))
    areas = {}
    for label, name in enumerate(CHEXPERT_14):
        rows = known[:, label]
        areas[name] = auroc(probabilities[rows, label], truth[rows, label])
    defined = [area for area in areas.values() if area is not None]
    return {
        "ece": number_or_none(gap.sum() / said.size) if said.size else None,
        "brier": number_or_none(np.mean((said - true) ** 2)) if said.size else None,
        "mean_auroc": float(np.mean(defined)) if defined else None,
        "auroc": areas,
        "bins": bins,
    }


# ---- Everything of one model on one set ----


def _per_label(total: np.ndarray, samples: np.ndarray) -> dict[str, dict[str, Any]]:
    """Counts, precision, recall and F1 of each label; samples: the resampled counts."""
    true_positive, false_positive, false_negative, known = label_counts(total)
    f1, f1_samples = label_f1(total), label_f1(samples)
    named, positive = true_positive + false_positive, true_positive + false_negative
    precision, recall = ratio(true_positive, named), ratio(true_positive, positive)
    negative_and_right = known - true_positive - false_positive - false_negative
    return {
        name: {
            "tp": int(true_positive[label]),
            "fp": int(false_positive[label]),
            "fn": int(false_negative[label]),
            "tn": int(negative_and_right[label]),
            "n_known": int(known[label]),
            "n_pos": int(positive[label]),
            "n_pred": int(named[label]),
            "precision": number_or_none(precision[label]),
            "recall": number_or_none(recall[label]),
            "f1": estimate(f1[label], f1_samples[:, label]),
        }
        for label, name in enumerate(CHEXPERT_14)
    }


def _by_subset(metric: str, total: np.ndarray, samples: np.ndarray) -> dict[str, dict[str, Any]]:
    """A metric on each of the SUBSETS, with the labels that enter it: for macro-F1 only those that have one."""
    compute, has_f1 = METRICS[metric], np.isfinite(label_f1(total))
    result = {}
    for subset, kept in IN_SUBSET.items():
        enters = kept & has_f1 if metric == "macro_f1" else kept
        labels = [name for name, is_in in zip(CHEXPERT_14, enters, strict=True) if is_in]
        score = estimate(compute(total, subset), compute(samples, subset))
        result[subset] = {**score, "labels": labels}
    return result


def _over_constant(
    answers: Answers, reference: Reference, constants: Mapping[str, Any], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Paired gain over the best constant policy (chosen on these very rows, which favours the policy)."""
    gains = {}
    for metric in COMPARED:
        best = constants[f"best_{metric}"]
        labels = np.tile(np.isin(CHEXPERT_14, best["labels"]), (np.shape(reference.truth)[0], 1))
        gain = paired_bootstrap(metric, Answers(labels), answers, reference, bootstrap=bootstrap)
        gains[metric] = {"policy": best["policy"], **gain.as_estimate()}
    return gains


def _scores(answers: Answers, reference: Reference, bootstrap: Bootstrap) -> dict[str, Any]:
    """The scores of a summary, and what their intervals are made from."""
    units = sum_by_group(row_counts(answers, reference), reference.groups)
    # Every metric is computed on the same resamples.
    total, samples = units.sum(0), resample(units, bootstrap)
    jaccard = METRICS["jaccard"]
    return {
        "n": np.shape(reference.truth)[0],
        "n_units": len(units),
        "unit": "row" if reference.groups is None else "patient",
        "n_boot": bootstrap.samples,
        "seed": bootstrap.seed,
        "parse_failure_rate": float((~np.asarray(answers.valid)).mean()),
        "jaccard": estimate(jaccard(total), jaccard(samples)),
        "macro_f1": _by_subset("macro_f1", total, samples),
        "micro_f1": _by_subset("micro_f1", total, samples),
        "per_label": _per_label(total, samples),
    }


def summary(
    answers: Answers,
    reference: Reference,
    *,
    prior: ArrayLike | None = None,
    other_images: Mapping[str, Answers] | None = None,
    probabilities: ArrayLike | None = None,
    trace: Mapping[str, ArrayLike] | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, Any]:
    """Compute everything that is printed about one model on one test set.

    Args:
        answers: with the real images.
        reference: what is so.
        prior: of the constant policies, as for `constant_predictions`.
        other_images: name -> answers with other images, for the audit.
        probabilities: float [N, 14], for the calibration.
        trace: term -> values float [N] of the traces.
        bootstrap: how the intervals are made.

    Returns:
        A dict that JSON can hold. Keys: `n`, `n_units` and `unit` (what the bootstrap draws), `n_boot`, `seed`,
        `parse_failure_rate`; `jaccard` {value, lo, hi}; `macro_f1` and `micro_f1`, each {subset: {value, lo, hi,
        labels}} for the SUBSETS (`labels`: those that enter the number); `per_label`; `constants` (see
        `constant_policies`); `over_constant` (paired gain over the best of them); and where they are given `audit`,
        `trace` ({term: {value, lo, hi}} of the mean) and `calibration`.
    """
    # ---- Scores, with intervals over the units ----
    rows = check_rows(answers, reference)
    answers = Answers(rows.labels, rows.valid)
    reference = Reference(rows.truth, rows.known, reference.groups)
    result = _scores(answers, reference, bootstrap)

    # ---- What a reader that never looks would score ----
    constants = constant_policies(reference, prior=prior, bootstrap=bootstrap)
    result["constants"] = constants
    result["over_constant"] = _over_constant(answers, reference, constants, bootstrap)

    # ---- What not every caller has ----
    if other_images:
        shown = {"real": answers, **other_images}
        result["audit"] = image_use_audit(shown, reference, bootstrap=bootstrap)
    if trace is not None:
        result["trace"] = {
            term: estimate_mean(values, reference.groups, bootstrap)
            for term, values in trace.items()
        }
    if probabilities is not None:
        result["calibration"] = calibration(probabilities, reference)
    return result
