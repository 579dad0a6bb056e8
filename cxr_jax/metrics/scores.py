"""Statistics of label predictions: F1, Jaccard, bootstrap intervals, constant policies, image-use audit.

Pure NumPy. The conventions (what is left out, what an invalid answer is worth) stand in `label_counts.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels.taxonomy import BLANK_PRICE, CHEXPERT_14, INDEX
from cxr_jax.metrics.bootstrap import (
    DEFAULT,
    Bootstrap,
    Difference,
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
from cxr_jax.metrics.probability_scores import auroc, calibration

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
    "threshold_scores",
]

COMPARED = ("jaccard", "macro_f1")  # the metrics of paired differences
LONGEST_PRIOR = 8  # labels of the longest constant answer that is taken from the frequencies


# ---- Paired differences ----


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
    # Each row is counted once; all resamples are sums of these.
    counts = [row_counts(answers, reference) for answers in (first, second)]
    column_count = counts[0].shape[1]
    # Side by side, so that one resample draws the same rows for both.
    units = sum_by_group(np.concatenate(counts, axis=1), reference.groups)

    def difference(sums: np.ndarray) -> np.ndarray:
        return METRICS[metric](sums[..., column_count:], subset) - METRICS[metric](
            sums[..., :column_count], subset
        )

    lower_bound, upper_bound = percentile_interval(difference(resample(units, bootstrap)))
    return Difference(float(difference(units.sum(0))), float(lower_bound), float(upper_bound))


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
    checked_rows = check_rows(Answers(reference.truth), reference)
    truth, known = checked_rows.truth, checked_rows.known
    if prior is None:
        frequency = ratio((truth & known).sum(0), known.sum(0))
    else:
        # Labels that the prior does not know, NaN, come last.
        frequency = np.asarray(prior, float)
    # Stable: of equally frequent labels the first of the 14, on every machine.
    by_frequency = np.argsort(-np.nan_to_num(frequency), kind="stable")
    named_labels: dict[str, ArrayLike] = {
        "No Finding": np.array([INDEX["No Finding"]]),
        "all labels": np.arange(LABEL_COUNT),
    }
    named_labels |= {
        f"top-{length} prior": by_frequency[:length] for length in range(1, LONGEST_PRIOR + 1)
    }
    return {
        policy_name: np.isin(np.arange(LABEL_COUNT), label_indices)
        for policy_name, label_indices in named_labels.items()
    }


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
    predictions = constant_predictions(reference, prior)
    truth_shape = np.shape(reference.truth)
    counts = {
        policy_name: row_counts(Answers(np.broadcast_to(labels, truth_shape)), reference)
        for policy_name, labels in predictions.items()
    }
    # ---- Every policy: points alone ----
    policies: dict[str, dict[str, Any]] = {}
    for policy_name, counts_of_policy in counts.items():
        total_counts = counts_of_policy.sum(0)
        policies[policy_name] = {
            "labels": [CHEXPERT_14[label] for label in np.flatnonzero(predictions[policy_name])],
            **{
                metric: number_or_none(compute(total_counts)) for metric, compute in METRICS.items()
            },
        }
    # ---- The best ones: with intervals ----
    result: dict[str, Any] = {"policies": policies}
    for metric in COMPARED:
        # An undefined score, None, is never the best.
        scores = {policy_name: policy[metric] for policy_name, policy in policies.items()}
        best_policy = max(
            scores,
            key=lambda policy_name: -1.0 if scores[policy_name] is None else scores[policy_name],
        )
        units = sum_by_group(counts[best_policy], reference.groups)
        samples = resample(units, bootstrap)
        result[f"best_{metric}"] = {
            "policy": best_policy,
            "labels": policies[best_policy]["labels"],
            **{
                policy_name: estimate(compute(units.sum(0)), compute(samples))
                for policy_name, compute in METRICS.items()
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
    # The real image is what the others are held against.
    if "real" not in answers:
        raise ValueError("predictions must hold 'real'")
    real_answers = answers["real"]
    result: dict[str, dict[str, Any]] = {}
    for image_name, shown_answers in answers.items():
        total_counts = row_counts(shown_answers, reference).sum(0)
        result[image_name] = {
            metric: number_or_none(METRICS[metric](total_counts)) for metric in COMPARED
        }
        if image_name == "real":
            continue
        # A label that the reference does not know may change: it enters no score.
        known = check_rows(shown_answers, reference).known
        # Same in every label that is known: one difference makes it another answer.
        is_same = np.asarray(shown_answers.labels, bool) == np.asarray(real_answers.labels, bool)
        result[image_name]["same_answer"] = float((is_same | ~known).all(1).mean())
        for metric in COMPARED:
            drop = paired_bootstrap(
                metric, shown_answers, real_answers, reference, bootstrap=bootstrap
            )
            result[image_name][f"drop_{metric}"] = drop.as_estimate()
    return result


# ---- Probabilities as answers ----


def threshold_scores(
    probabilities: ArrayLike,
    thresholds: ArrayLike,
    reference: Reference,
    *,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, Any]:
    """Score the answers that name each label whose probability is at least its threshold.

    Args:
        probabilities: float [N, 14].
        thresholds: one, or float [14]; chosen on other images than these.
        reference: what is so.
        bootstrap: how the intervals are made.

    Returns:
        `thresholds` by label; `per_label` F1 {value, lo, hi}; `macro_f1` and `micro_f1` as in `summary`.
    """
    limits = np.broadcast_to(np.asarray(thresholds, float), (LABEL_COUNT,))
    named = np.asarray(probabilities, float) >= limits
    found = _scores(Answers(named, np.ones(len(named), bool)), reference, bootstrap)
    return {
        "thresholds": dict(zip(CHEXPERT_14, limits.tolist(), strict=True)),
        "per_label": {label: row["f1"] for label, row in found["per_label"].items()},
        "macro_f1": found["macro_f1"],
        "micro_f1": found["micro_f1"],
    }


# ---- Everything of one model on one set ----


def _per_label(total_counts: np.ndarray, resampled_counts: np.ndarray) -> dict[str, dict[str, Any]]:
    """Counts, precision, recall and F1 of each label; samples: the resampled counts."""
    true_positive, false_positive, false_negative, known, blank_named = label_counts(total_counts)
    # F1 alone has an interval: precision and recall are there to explain it.
    f1_scores, f1_samples = label_f1(total_counts), label_f1(resampled_counts)
    named, positive = true_positive + false_positive, true_positive + false_negative
    precision = ratio(true_positive, named + BLANK_PRICE * blank_named)
    recall = ratio(true_positive, positive)
    # What is left of the known cells.
    negative_and_right = known - true_positive - false_positive - false_negative
    return {
        label_name: {
            "tp": int(true_positive[label_index]),
            "fp": int(false_positive[label_index]),
            "fn": int(false_negative[label_index]),
            "tn": int(negative_and_right[label_index]),
            "n_known": int(known[label_index]),
            "n_pos": int(positive[label_index]),
            "n_pred": int(named[label_index]),
            "n_blank_named": int(blank_named[label_index]),
            "precision": number_or_none(precision[label_index]),
            "recall": number_or_none(recall[label_index]),
            "f1": estimate(f1_scores[label_index], f1_samples[:, label_index]),
        }
        for label_index, label_name in enumerate(CHEXPERT_14)
    }


def _by_subset(
    metric: str, total_counts: np.ndarray, resampled_counts: np.ndarray
) -> dict[str, dict[str, Any]]:
    """A metric on each of the SUBSETS, with the labels that enter it: for macro-F1 only those that have one."""
    compute, has_f1 = METRICS[metric], np.isfinite(label_f1(total_counts))
    by_subset = {}
    for subset, in_subset in IN_SUBSET.items():
        entering_labels = in_subset & has_f1 if metric == "macro_f1" else in_subset
        label_names = [
            label_name
            for label_name, is_entering in zip(CHEXPERT_14, entering_labels, strict=True)
            if is_entering
        ]
        subset_score = estimate(compute(total_counts, subset), compute(resampled_counts, subset))
        by_subset[subset] = {**subset_score, "labels": label_names}
    return by_subset


def _over_constant(
    answers: Answers, reference: Reference, constants: Mapping[str, Any], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Paired gain over the best constant policy (chosen on these very rows, which favours the policy)."""
    gains = {}
    for metric in COMPARED:
        best_policy = constants[f"best_{metric}"]
        # The constant answer as predictions: the same labels in every row.
        constant_labels = np.tile(
            np.isin(CHEXPERT_14, best_policy["labels"]), (np.shape(reference.truth)[0], 1)
        )
        paired_gain = paired_bootstrap(
            metric, Answers(constant_labels), answers, reference, bootstrap=bootstrap
        )
        gains[metric] = {"policy": best_policy["policy"], **paired_gain.as_estimate()}
    return gains


def _failure_share(
    answers: Answers, reference: Reference, unit_count: int, bootstrap: Bootstrap
) -> dict[str, float | None]:
    """The share of answers that could not be parsed, with its interval."""
    failed = ~np.asarray(answers.valid)
    share = estimate_mean(failed, reference.groups, bootstrap)
    # All alike: no resample differs, and the exact (Clopper-Pearson) limit of so many patients says what may be.
    limit = 1 - 0.025 ** (1 / unit_count)
    if not failed.any():
        share["hi"] = limit
    elif failed.all():
        share["lo"] = 1 - limit
    return share


def _scores(answers: Answers, reference: Reference, bootstrap: Bootstrap) -> dict[str, Any]:
    """The scores of a summary, and what their intervals are made from."""
    units = sum_by_group(row_counts(answers, reference), reference.groups)
    # Every metric is computed on the same resamples.
    total_counts, resampled_counts = units.sum(0), resample(units, bootstrap)
    # Jaccard knows no subsets: a row has one set of labels.
    jaccard = METRICS["jaccard"]
    return {
        "n": np.shape(reference.truth)[0],
        "n_units": len(units),
        "unit": "row" if reference.groups is None else "patient",
        "n_boot": bootstrap.samples,
        "seed": bootstrap.seed,
        "parse_failure_rate": float((~np.asarray(answers.valid)).mean()),
        "parse_failures": _failure_share(answers, reference, len(units), bootstrap),
        "jaccard": estimate(jaccard(total_counts), jaccard(resampled_counts)),
        "macro_f1": _by_subset("macro_f1", total_counts, resampled_counts),
        "micro_f1": _by_subset("micro_f1", total_counts, resampled_counts),
        "per_label": _per_label(total_counts, resampled_counts),
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
        `parse_failure_rate`, `parse_failures` (that with its interval); `jaccard` {value, lo, hi}; `macro_f1` and
        `micro_f1`, each {subset: {value, lo, hi, labels}} for the SUBSETS (`labels`: those that enter the number);
        `per_label`; `constants` (see `constant_policies`); `over_constant` (paired gain over the best of them); and
        where they are given `audit`, `trace` ({term: {value, lo, hi}} of the mean) and `calibration`.
    """
    # ---- Scores, with intervals over the units ----
    # Checked once, with what was left out filled in; all that follows may rely on it.
    checked_rows = check_rows(answers, reference)
    answers = Answers(checked_rows.labels, checked_rows.valid)
    reference = Reference(
        checked_rows.truth, checked_rows.known, reference.groups, checked_rows.blank
    )
    result = _scores(answers, reference, bootstrap)

    # ---- What a reader that never looks would score ----
    constants = constant_policies(reference, prior=prior, bootstrap=bootstrap)
    result["constants"] = constants
    result["over_constant"] = _over_constant(answers, reference, constants, bootstrap)

    # ---- What not every caller has ----
    if other_images:
        shown_answers = {"real": answers, **other_images}
        result["audit"] = image_use_audit(shown_answers, reference, bootstrap=bootstrap)
    if trace is not None:
        result["trace"] = {
            trace_term: estimate_mean(term_values, reference.groups, bootstrap)
            for trace_term, term_values in trace.items()
        }
    if probabilities is not None:
        result["calibration"] = calibration(probabilities, reference, bootstrap=bootstrap)
    return result
