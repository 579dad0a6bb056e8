"""Calibration and thresholds, fitted on a selection split and used on a test set.

A model's probability of naming a finding is near 0 or 1 once its trace is written, so a map of its log-odds is fitted:
Platt's (a slope and an offset a label; J. Platt 1999, with his targets), or one temperature for all labels (C. Guo et
al. 2017, arXiv 1706.04599).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.label_counts import LABEL_COUNT, Answers, Reference, check_rows, ratio
from cxr_jax.metrics.probability_scores import FEW

METHODS = ("platt", "temperature", "none")
NO_THRESHOLD = 0.5  # of a label without a positive to choose by
_STEPS, _LEAST_MOVE = 50, 1e-10  # of Newton's method, which needs about ten
_LEAST_SLOPE = 1e-3  # so that no map turns the order of a model's probabilities round
_PRIOR = 1e-2  # weight that holds slopes to 1 and offsets to 0: separable labels have no finite fit


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """A map of log-odds, and thresholds of probabilities that have gone through it.

    Attributes:
        method: of METHODS.
        slopes, offsets: float [14].
        thresholds: float [14], of the probability; by the best F1.
        images: how many it was fitted on.
        pooled: labels with fewer than FEW positives or negatives there, which have the temperature of all labels.
    """

    method: str
    slopes: np.ndarray
    offsets: np.ndarray
    thresholds: np.ndarray
    images: int
    pooled: tuple[str, ...] = ()

    def probabilities(self, log_odds: ArrayLike) -> np.ndarray:
        """Map log-odds [N, 14] of naming to calibrated probabilities."""
        return _sigmoid(self.slopes * np.asarray(log_odds, float) + self.offsets)

    def about(self) -> dict[str, Any]:
        """Say what was fitted, as results hold it."""
        return {
            "method": self.method,
            "fitted_on": self.images,
            "slopes": dict(zip(CHEXPERT_14, self.slopes.tolist(), strict=True)),
            "offsets": dict(zip(CHEXPERT_14, self.offsets.tolist(), strict=True)),
            "pooled": list(self.pooled),
        }


def fit(log_odds: ArrayLike, reference: Reference, method: str = "platt") -> Recalibration:
    """Fit calibration and thresholds on a selection split.

    Args:
        log_odds: float [N, 14] of naming each label.
        reference: what is so.
        method: of METHODS.

    Raises:
        ValueError: for log-odds of a known label that are no finite number.
    """
    assert method in METHODS
    values = np.asarray(log_odds, float)
    checked = check_rows(Answers(reference.truth), reference)
    truth, known = checked.truth, checked.known
    # One would make every slope NaN.
    if not np.isfinite(values[known]).all():
        raise ValueError("log-odds of a known label are not finite")
    slopes, offsets, pooled = np.ones(LABEL_COUNT), np.zeros(LABEL_COUNT), []
    # All labels together first: it is what labels with few positives fall back on.
    if method != "none":
        slopes[:], _ = _logistic(values[known], truth[known], with_offset=False)
    if method == "platt":
        for label, name in enumerate(CHEXPERT_14):
            rows = known[:, label]
            positives = truth[rows, label].sum()
            # Too few of a class to tell two numbers by.
            if min(positives, rows.sum() - positives) < FEW:
                pooled.append(name)
                continue
            slopes[label], offsets[label] = _logistic(
                values[rows, label], truth[rows, label], with_offset=True
            )
    # Thresholds are of what comes out of the map, on the images that it was fitted on.
    mapped = _sigmoid(slopes * values + offsets)
    thresholds = [
        best_threshold(mapped[known[:, label], label], truth[known[:, label], label])
        for label in range(LABEL_COUNT)
    ]
    return Recalibration(
        method=method,
        slopes=slopes,
        offsets=offsets,
        thresholds=np.array(thresholds),
        images=len(truth),
        pooled=tuple(pooled),
    )


def _sigmoid(values: np.ndarray) -> np.ndarray:
    # By logs: exp of a large negative number would overflow on the other side.
    return np.exp(-np.logaddexp(0, -values))


def _logistic(values: np.ndarray, truth: np.ndarray, *, with_offset: bool) -> tuple[float, float]:
    """Slope and offset of a logistic regression, by Newton's method."""
    if not len(values):
        return 1.0, 0.0
    positives, negatives = truth.sum(), (~truth).sum()
    # Platt's targets: a class is never certain, however well it is separated.
    targets = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    features = np.stack([values, np.ones(len(values))], axis=1)[:, : 1 + with_offset]
    start = np.array([1.0, 0.0])[: 1 + with_offset]

    def loss(weights: np.ndarray) -> float:
        scores = features @ weights
        cross_entropy = (np.logaddexp(0, scores) - targets * scores).sum()
        return cross_entropy + _PRIOR / 2 * ((weights - start) ** 2).sum()

    weights, least = start.copy(), loss(start)
    for _ in range(_STEPS):
        predicted = _sigmoid(features @ weights)
        gradient = features.T @ (predicted - targets) + _PRIOR * (weights - start)
        spread = predicted * (1 - predicted)
        hessian = (features * spread[:, None]).T @ features + _PRIOR * np.eye(len(weights))
        step_taken = np.linalg.solve(hessian, gradient)
        # Where the curve is flat a whole move overshoots; the loss is convex, so a short one always helps.
        while np.abs(step_taken).max() >= _LEAST_MOVE and loss(weights - step_taken) > least:
            step_taken = step_taken / 2
        if np.abs(step_taken).max() < _LEAST_MOVE:
            break
        weights = weights - step_taken
        least = loss(weights)
    slope, offset = float(weights[0]), float(weights[1]) if with_offset else 0.0
    # A map that turns the order round says that the model is worse than chance there: the share of positives is all
    # that is left to say, and the order stays the model's.
    if slope < _LEAST_SLOPE:
        share = targets.mean()
        return _LEAST_SLOPE, float(np.log(share / (1 - share))) if with_offset else 0.0
    return slope, offset


def best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Choose the threshold with the best F1, half-way between two probabilities; the highest one of several.

    Args:
        probabilities: float [N].
        truth: bool [N].

    Returns:
        0.5 without a positive.
    """
    if not truth.any():
        return NO_THRESHOLD
    # Only between two values does it matter where the threshold lies.
    values = np.unique(probabilities)[::-1]
    ordered = np.argsort(-probabilities, kind="stable")
    # What is called if the threshold lies just below each value.
    called = np.searchsorted(-probabilities[ordered], -values, side="right")
    true_calls = np.cumsum(truth[ordered])[called - 1]
    place = int(np.argmax(ratio(2 * true_calls, called + truth.sum())))
    below = values[place + 1] if place + 1 < len(values) else 0.0
    middle = (values[place] + below) / 2
    # Between neighbours in float64 there may be no middle.
    return float(middle if below < middle <= values[place] else values[place])
