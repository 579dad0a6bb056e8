"""Statistics of per-finding probabilities: AUROC, average precision, Brier score, calibration error, with intervals.

docs/evaluation.md defines each number. Every interval is that of patients drawn with replacement. AUROC and average
precision are functions of ranks: the rows of a label are sorted once, and a resample is one row of weights, so that
all resamples together are a few sums along sorted rows, and no loop. Calibration error is a sum of absolute values,
which resampling pushes up and folds: its interval holds the sign that each bin has in the set (`ece_interval`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.bootstrap import (
    DEFAULT,
    Bootstrap,
    Difference,
    Interval,
    draw_weights,
    estimate,
    number_or_none,
    percentile_interval,
    unit_of_rows,
)
from cxr_jax.metrics.label_counts import LABEL_COUNT, Answers, Reference, check_rows, ratio

BINS = 15  # of equal width, for calibration
FEW = 10  # positives, or negatives, below which a label says little and is named beside every mean
RANKED = ("auroc", "average_precision")  # need an order alone
CALIBRATED = ("brier", "ece")  # need probabilities
OVERALL = ("mean_auroc", "mean_average_precision", "ece", "ece_mean", "brier", "brier_mean")
_HELD = "held "  # before the name of a calibration error that keeps the signs of the set's bins


def auroc(probability: ArrayLike, truth: ArrayLike) -> float | None:
    """Compute the area under the ROC curve by ranks (Mann-Whitney; ties share their rank).

    Returns:
        None without both classes.

    Raises:
        ValueError: for a NaN.
    """
    ranks = _sort_label(_checked(probability), np.asarray(truth, bool))
    return number_or_none(_ranked_scores(ranks, np.ones((1, len(ranks.rows))))[0][0])


def average_precision(probability: ArrayLike, truth: ArrayLike) -> float | None:
    """Compute the area under the steps of precision over recall, ties in one step: sum of (R_k - R_k-1) P_k.

    Returns:
        None without both classes.

    Raises:
        ValueError: for a NaN.
    """
    ranks = _sort_label(_checked(probability), np.asarray(truth, bool))
    return number_or_none(_ranked_scores(ranks, np.ones((1, len(ranks.rows))))[1][0])


def _checked(probability: ArrayLike) -> np.ndarray:
    values = np.asarray(probability, float)
    # It would rank above every number.
    if np.isnan(values).any():
        raise ValueError("a probability of a known label is not a number")
    return values


# ---- Ranks, under any weights ----


class _Ranks(NamedTuple):
    """The rows of a label in the order of their probability: those that are negative, then those that are positive.

    Attributes:
        rows: int [N], the places of the rows, negatives first.
        negatives: how many of them are negative.
        below, up_to: int [P], of each positive: negatives with a smaller probability, and with one as large at most.
        positives_below: int [P], positives with a smaller probability.
    """

    rows: np.ndarray
    negatives: int
    below: np.ndarray
    up_to: np.ndarray
    positives_below: np.ndarray


def _sort_label(probability: np.ndarray, truth: np.ndarray) -> _Ranks:
    # Once a label: all resamples have the same order.
    order = np.argsort(probability, kind="stable")
    negative_rows, positive_rows = order[~truth[order]], order[truth[order]]
    negatives, positives = probability[negative_rows], probability[positive_rows]
    return _Ranks(
        rows=np.concatenate([negative_rows, positive_rows]),
        negatives=len(negative_rows),
        below=np.searchsorted(negatives, positives, "left"),
        up_to=np.searchsorted(negatives, positives, "right"),
        positives_below=np.searchsorted(positives, positives, "left"),
    )


def _ranked_scores(ranks: _Ranks, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision [S] under weights [S, N] of the rows in the order of `ranks.rows`."""
    negative_weight = _sums_before(weights[:, : ranks.negatives])
    positive_weights = weights[:, ranks.negatives :]
    positive_weight = _sums_before(positive_weights)
    # The weight of all that is below a positive is one place of these sums.
    negatives, positives = negative_weight[:, -1:], positive_weight[:, -1:]
    # Pairs in which the positive ranks higher, ties as halves.
    below = negative_weight[:, ranks.below]
    won_pairs = positive_weights * (below + negative_weight[:, ranks.up_to]) / 2
    # Precision where the threshold is the probability of each positive: all that is not below is called.
    true_calls = positives - positive_weight[:, ranks.positives_below]
    precision = ratio(true_calls, true_calls + negatives - below)
    # Average precision is defined without negatives, too, but says nothing there.
    pairs, has_pairs = (positives * negatives)[:, 0], (negatives > 0)[:, 0]
    called = np.where(positive_weights > 0, positive_weights * precision, 0).sum(1)
    return (
        ratio(won_pairs.sum(1), pairs),
        np.where(has_pairs, ratio(called, positives[:, 0]), np.nan),
    )


def _sums_before(weights: np.ndarray) -> np.ndarray:
    """The sum of the first k weights of each row, k = 0..n: [S, n + 1]."""
    sums = np.zeros((len(weights), weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


# ---- Every number, under any weights ----


class _Cells(NamedTuple):
    """What all resamples of a set share.

    Attributes:
        unit_of_row: int [N].
        known: int rows of each of the 14 labels.
        ranks: of the known rows of each label.
        sums: float [U, 14, 3 + bins], or None for ranks alone: of each unit and label squared error,
            cells and positives, then the gap (probability - truth) of each bin.
        bins: float [U, 3, bins], of all labels together: cells, probability, positives.
    """

    unit_of_row: np.ndarray
    known: list[np.ndarray]
    ranks: list[_Ranks]
    sums: np.ndarray | None
    bins: np.ndarray | None


def _cells_of(probabilities: np.ndarray, reference: Reference, bins: int | None) -> _Cells:
    """The cells of a set; bins: None for ranks alone."""
    checked_rows = check_rows(Answers(reference.truth), reference)
    truth, known = checked_rows.truth, checked_rows.known
    if probabilities.shape != truth.shape:
        raise ValueError(f"probabilities {probabilities.shape} for truth {truth.shape}")
    if not np.isfinite(probabilities[known]).all():
        raise ValueError("a probability of a known label is not a number")
    unit_of_row = unit_of_rows(len(truth), reference.groups)
    known_rows = [np.flatnonzero(known[:, label]) for label in range(LABEL_COUNT)]
    ranks = [
        _sort_label(probabilities[rows, label], truth[rows, label])
        for label, rows in enumerate(known_rows)
    ]
    if bins is None or why_no_calibration(probabilities, reference):
        return _Cells(unit_of_row, known_rows, ranks, None, None)

    unit_count = unit_of_row.max() + 1
    sums = np.zeros((unit_count, LABEL_COUNT, 3 + bins))
    by_bin = np.zeros((unit_count, 3, bins))
    for label, rows in enumerate(known_rows):
        predicted, observed = probabilities[rows, label], truth[rows, label].astype(float)
        in_bin = np.eye(bins)[bin_of(predicted, bins)]
        # The gap of a bin is a sum over its cells, so it can be resampled; its absolute value is taken afterwards.
        gaps = (predicted - observed)[:, None] * in_bin
        totals = np.stack([(predicted - observed) ** 2, np.ones(len(rows)), observed], axis=1)
        # Unlike +=, this adds all rows of a patient.
        np.add.at(sums[:, label], unit_of_row[rows], np.concatenate([totals, gaps], axis=1))
        # Pooled bins have their cells of all labels, for the plot, too.
        by_row = np.stack([in_bin, predicted[:, None] * in_bin, observed[:, None] * in_bin], axis=1)
        np.add.at(by_bin, unit_of_row[rows], by_row)
    return _Cells(unit_of_row, known_rows, ranks, sums, by_bin)


def bin_of(probabilities: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Number the bin [k / bins, (k + 1) / bins) of each probability; 1 belongs to the last one."""
    return np.minimum((probabilities * bins).astype(int), bins - 1)


def why_no_calibration(probabilities: ArrayLike, reference: Reference) -> str | None:
    """Say in one line why values are no probabilities, None where they are."""
    known = check_rows(Answers(reference.truth), reference).known
    # What stands in a cell that nobody knows is never looked at.
    values = np.asarray(probabilities, float)[known]
    outside = values[(values < 0) | (values > 1)]
    if not len(outside):
        return None
    # One of them is shown, for whoever made them to recognise logits or percent.
    furthest = outside[np.argmax(np.abs(outside - 0.5))]
    return (
        f"no ECE and no Brier score: {len(outside):,} of {len(values):,} values are outside 0..1 "
        f"({furthest:.3g}), so they are no probabilities; AUROC and average precision need none"
    )


def _scores_of(cells: _Cells, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every number under weights [S, U]: RANKED and CALIBRATED as [S, 14], OVERALL as [S], "bins" as [S, 3, bins].

    Calibration errors stand there twice: as they are, and "held ", with the signs that the bins have in the whole set.
    """
    by_label = np.full((2, len(weights), LABEL_COUNT), np.nan)
    for label, (rows, ranks) in enumerate(zip(cells.known, cells.ranks, strict=True)):
        # A label of which nothing is known has no number.
        if len(rows):
            # Each row has the weight of its patient.
            row_weights = weights[:, cells.unit_of_row[rows[ranks.rows]]]
            by_label[:, :, label] = _ranked_scores(ranks, row_weights)
    scores = dict(zip(RANKED, by_label, strict=True))
    # A mean has the labels with both classes, in a resample those that have both there.
    has_both = np.isfinite(scores["auroc"])
    scores |= {f"mean_{metric}": _mean_where(scores[metric], has_both) for metric in RANKED}
    if cells.sums is None or cells.bins is None:
        return scores

    # All of these are functions of sums over units: one product for all labels, then [S, 14, 3 + bins].
    sums = (weights @ cells.sums.reshape(len(cells.sums), -1)).reshape(
        len(weights), *cells.sums.shape[1:]
    )
    count, gaps = sums[..., 1], sums[..., 3:]
    scores["brier"] = ratio(sums[..., 0], count)
    of_bins = (weights @ cells.bins.reshape(len(cells.bins), -1)).reshape(
        len(weights), *cells.bins.shape[1:]
    )
    pooled_gaps, pooled_count = of_bins[:, 1] - of_bins[:, 2], of_bins[:, 0].sum(-1)
    # The signs of the set itself: what a resample changes in a bin then counts, whichever way it goes.
    signs, pooled_signs = np.sign(cells.sums[..., 3:].sum(0)), np.sign(_pooled_gaps(cells.bins))
    for prefix, of_labels, of_all in (
        ("", np.abs(gaps), np.abs(pooled_gaps)),
        (_HELD, gaps * signs, pooled_gaps * pooled_signs),
    ):
        scores[f"{prefix}ece"] = ratio(of_labels.sum(-1), count)
        scores[f"{prefix}ece_mean"] = _mean_where(scores[f"{prefix}ece"], has_both)
        scores[f"{prefix}pooled_ece"] = ratio(of_all.sum(-1), pooled_count)
    return scores | {
        "pooled_brier": ratio(sums[..., 0].sum(-1), count.sum(-1)),
        "brier_mean": _mean_where(scores["brier"], has_both),
        "bins": of_bins,
    }


def _pooled_gaps(of_units: np.ndarray) -> np.ndarray:
    """Mean probability minus share of positives, times cells, of each bin: from [U, 3, bins] to [bins]."""
    totals = of_units.sum(0)
    return np.asarray(totals[1] - totals[2])


def _mean_where(values: np.ndarray, entering: np.ndarray) -> np.ndarray:
    return ratio(np.where(entering, values, 0).sum(-1), entering.sum(-1))


def _sampled(cells: _Cells, bootstrap: Bootstrap) -> tuple[dict, dict]:
    """Every number of the set itself, and of each resample, as `_scores_of` gives them (without the axis S)."""
    unit_count = cells.unit_of_row.max() + 1
    # The set itself is the resample that draws every patient once.
    point = {
        name: values[0] for name, values in _scores_of(cells, np.ones((1, unit_count))).items()
    }
    drawn = [_scores_of(cells, weights) for weights in draw_weights(unit_count, bootstrap)]
    return point, {name: np.concatenate([part[name] for part in drawn]) for name in point}


def ece_interval(value: float, resampled: np.ndarray, held: np.ndarray) -> Interval:
    """Compute the 95 % interval of a calibration error, or NaN where it is undefined.

    Percentiles of the error itself miss it: noise in a bin adds to an absolute value, so all resamples lie above, and
    where a bin's gap changes sign its spread is folded. Held signs are the derivative of the absolute value at the
    set's own bins, where it has one (Z. Fang and A. Santos, Review of Economic Studies 86, 2019); the lower end goes
    down by the bias that resampling shows (B. Efron and R. Tibshirani, 1993, chapter 10), never below 0.

    Args:
        value: of the set itself.
        resampled: float [S], on each resample.
        held: float [S], on each resample with the signs of the set.
    """
    low, high = percentile_interval(held)
    if not np.isfinite(low):
        return Interval(low, high)
    bias = np.nanmean(resampled) - value
    return Interval(max(low - max(bias, 0.0), 0.0), high)


def _estimate(name: str, point: Mapping, drawn: Mapping, place: Any = ...) -> dict[str, Any]:
    """{value, lo, hi} of a number of `_scores_of`, of a label by its place."""
    value, resampled = point[name][place], drawn[name][(slice(None), place)]
    held = drawn.get(_HELD + name)
    if held is None:
        return estimate(value, resampled)
    low, high = ece_interval(float(value), resampled, held[(slice(None), place)])
    return {"value": number_or_none(value), "lo": number_or_none(low), "hi": number_or_none(high)}


def label_areas(
    probabilities: ArrayLike, reference: Reference, bootstrap: Bootstrap = DEFAULT
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the AUROC of each label, [14], and on each resample, [S, 14]; NaN without both classes.

    Args:
        probabilities: float [N, 14].
        reference: what is so.
        bootstrap: how the resamples are drawn.
    """
    cells = _cells_of(np.asarray(probabilities, float), reference, None)
    point, drawn = _sampled(cells, bootstrap)
    return point["auroc"], drawn["auroc"]


# ---- What is reported ----


def calibration(
    probabilities: ArrayLike,
    reference: Reference,
    *,
    bins: int = BINS,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, Any]:
    """Hold per-finding probabilities against the truth: discrimination and calibration, with intervals by patient.

    Args:
        probabilities: float [N, 14]; values outside 0..1 are ranked, but not held for probabilities.
        reference: what is so; `groups` are the patients.
        bins: of equal width, for ECE.
        bootstrap: how the intervals are made.

    Returns:
        Plain numbers: `ece` (pooled: |mean probability - share of positives| of each bin, weighted by count, over all
        known cells), `ece_mean` (mean over labels of the label's own), `brier` (pooled), `brier_mean`, `mean_auroc`,
        `mean_average_precision` (means are over `labels`: those with both classes), `auroc` and `average_precision` by
        label (None where one class is missing), `bins` as given. With intervals, {value, lo, hi}: `estimates` of the
        six, `per_label` of each label with `n_known` and `n_pos`. `few`: those of `labels` with fewer than FEW
        positives or negatives. `reliability`: of each bin that has a cell `low`, `high`, `n`, `probability` (mean) and
        `share` (of positives, with its interval). `refused`: why there is no ECE and no Brier score, or None.
    """
    values = np.asarray(probabilities, float)
    cells = _cells_of(values, reference, bins)
    point, drawn = _sampled(cells, bootstrap)
    # Numbers that values outside 0..1 do not have are None, and not left out: who reads the results finds every key.
    estimates = {
        name: _estimate(_key(name), point, drawn) if _key(name) in point else None
        for name in OVERALL
    }
    per_label = _per_label(cells, point, drawn)
    # The labels that a mean is over are said with it, and those of them that say little.
    scored = [label for label, row in per_label.items() if row["auroc"]["value"] is not None]
    return {
        **{name: None if found is None else found["value"] for name, found in estimates.items()},
        **{
            metric: {label: row[metric]["value"] for label, row in per_label.items()}
            for metric in RANKED
        },
        "bins": bins,
        "labels": scored,
        "few": [
            label
            for label in scored
            if min(per_label[label]["n_pos"], per_label[label]["n_neg"]) < FEW
        ],
        "estimates": estimates,
        "per_label": per_label,
        "reliability": _reliability(point["bins"], drawn["bins"]) if "bins" in point else [],
        "refused": why_no_calibration(values, reference),
    }


def _key(name: str) -> str:
    """The name of a number of OVERALL within `_scores_of`, where `ece` and `brier` are those of labels."""
    return f"pooled_{name}" if name in CALIBRATED else name


def _per_label(cells: _Cells, point: Mapping, drawn: Mapping) -> dict[str, dict[str, Any]]:
    per_label = {}
    for place, label in enumerate(CHEXPERT_14):
        known, negatives = len(cells.known[place]), cells.ranks[place].negatives
        per_label[label] = {
            "n_known": known,
            "n_pos": known - negatives,
            "n_neg": negatives,
            **{
                metric: _estimate(metric, point, drawn, place)
                for metric in (*RANKED, *CALIBRATED)
                if metric in point
            },
        }
    return per_label


def _reliability(point: np.ndarray, drawn: np.ndarray) -> list[dict[str, Any]]:
    """The bins that hold a cell, from point [3, bins] and drawn [S, 3, bins]."""
    bins = point.shape[-1]
    count, probability, positives = point
    # A bin that a resample leaves empty has no share there.
    shares = ratio(drawn[:, 2], drawn[:, 0])
    return [
        {
            "low": place / bins,
            "high": (place + 1) / bins,
            "n": int(count[place]),
            "probability": float(probability[place] / count[place]),
            "share": estimate(positives[place] / count[place], shares[:, place]),
        }
        for place in np.flatnonzero(count)
    ]


def paired_differences(
    first: ArrayLike,
    second: ArrayLike,
    reference: Reference,
    *,
    bins: int = BINS,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, Difference]:
    """Compute second - first of every number of OVERALL that both have, on the same resamples of patients.

    Args:
        first: float [N, 14], what is subtracted.
        second: float [N, 14], what it is subtracted from.
        reference: what is so.
        bins: of ECE.
        bootstrap: how the intervals are made.
    """
    # Both draw by the same seed from the same patients, so the resamples are the same ones.
    sampled = [
        _sampled(_cells_of(np.asarray(values, float), reference, bins), bootstrap)
        for values in (first, second)
    ]
    differences = {}
    for name in OVERALL:
        key = _key(name)
        # Where one of the two has no probabilities, ranks alone can be compared.
        if all(key in point for point, _ in sampled):
            point, drawn = (sampled[1][part][key] - sampled[0][part][key] for part in (0, 1))
            held = (
                sampled[1][1][_HELD + key] - sampled[0][1][_HELD + key]
                if _HELD + key in sampled[0][1]
                else None
            )
            differences[name] = Difference(float(point), *_difference_interval(point, drawn, held))
    return differences


def _difference_interval(value: float, resampled: np.ndarray, held: np.ndarray | None) -> Interval:
    """The interval of a difference; of calibration errors as `ece_interval` has it, wider on the side of its bias."""
    if held is None:
        return percentile_interval(resampled)
    low, high = percentile_interval(held)
    if not np.isfinite(low):
        return Interval(low, high)
    # The model whose bins are the noisier gains more from resampling: which one is not known beforehand.
    bias = float(np.nanmean(resampled)) - value
    return Interval(low - max(bias, 0.0), high - min(bias, 0.0))
