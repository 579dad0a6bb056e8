"""AUC of several readers in several arms: Obuchowski and Rockette's analysis with Hillis' degrees of freedom.

Obuchowski and Rockette 1995 (the model), DeLong 1988 (one way to its covariances), Hillis 2007 (degrees of freedom).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike
from scipy import stats

from cxr_jax.errors import UserError

DESIGNS = ("readers and cases", "cases", "readers")
LEAST_CASES = 10  # of a kind; an AUC over fewer says nothing


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """Covariance of two AUCs of the same cases, by what else the two have in common.

    Attributes:
        error: of an AUC with itself, averaged.
        same_reader: another arm, the same reader (Cov1).
        same_arm: another reader, the same arm (Cov2).
        neither: both differ (Cov3).
    """

    error: float
    same_reader: float
    same_arm: float
    neither: float


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The difference of two arms' mean AUC: first less second."""

    first: int
    second: int
    estimate: float
    standard_error: float
    degrees: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Whether arms differ in AUC.

    Attributes:
        auc: float [arms, readers].
        f_value, degrees, p_value: the test that all arms are equal; degrees are (numerator, denominator).
        contrasts: of each pair of arms.
    """

    auc: np.ndarray
    covariances: Covariances
    f_value: float
    degrees: tuple[float, float]
    p_value: float
    contrasts: tuple[Contrast, ...]


# ---- AUCs and how they vary together ---------------------------------------------------------------


def _placements(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the other kind that each case is on the right side of: [arms, readers, positives], [.., negatives]."""
    positives, negatives = scores[..., truth], scores[..., ~truth]
    # A tie is half a win, as the trapezoidal area has it.
    wins = (positives[..., :, None] > negatives[..., None, :]) + 0.5 * (
        positives[..., :, None] == negatives[..., None, :]
    )
    return wins.mean(-1), wins.mean(-2)


def areas(scores: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """Compute empirical AUCs, ties counted half.

    Args:
        scores: [arms, readers, cases]; higher is more suspicious.
        truth: bool [cases].

    Returns:
        float [arms, readers].
    """
    return _placements(np.asarray(scores, float), np.asarray(truth, bool))[0].mean(-1)


def covariance_matrix(scores: ArrayLike, truth: ArrayLike, method: str = "jackknife") -> np.ndarray:
    """Estimate the covariances of all AUCs that come from one set of cases.

    Args:
        scores: [arms, readers, cases].
        truth: bool [cases].
        method: "jackknife" or "delong".

    Returns:
        float [arms * readers, arms * readers], arms outermost.
    """
    values, is_positive = np.asarray(scores, float), np.asarray(truth, bool)
    of_positives, of_negatives = _placements(values, is_positive)
    # Arms and readers on one axis: the model tells them apart only when covariances are averaged.
    of_positives = of_positives.reshape(-1, of_positives.shape[-1])
    of_negatives = of_negatives.reshape(-1, of_negatives.shape[-1])
    positive_count, negative_count = of_positives.shape[-1], of_negatives.shape[-1]
    # The two kinds of case are independent samples, each with its own share of the variance.
    if method == "delong":
        return np.cov(of_positives) / positive_count + np.cov(of_negatives) / negative_count
    if method != "jackknife":
        raise UserError(f"method: {method!r} is unknown, use jackknife or delong")
    # The area without one case follows from that case's placement: nothing has to be counted again.
    area = of_positives.mean(-1, keepdims=True)
    without_positive = (area * positive_count - of_positives) / (positive_count - 1)
    without_negative = (area * negative_count - of_negatives) / (negative_count - 1)
    left_out = np.concatenate([without_positive, without_negative], axis=-1)
    case_count = left_out.shape[-1]
    # The jackknife's (n - 1) / n, out of numpy's 1 / (n - 1).
    return np.cov(left_out) * (case_count - 1) ** 2 / case_count


def average_covariances(matrix: np.ndarray, arm_count: int, reader_count: int) -> Covariances:
    """Average a covariance matrix of AUCs by what two of them have in common."""
    # The matrix has arms outermost, readers within.
    arm = np.repeat(np.arange(arm_count), reader_count)
    reader = np.tile(np.arange(reader_count), arm_count)
    same_arm = arm[:, None] == arm[None, :]
    same_reader = reader[:, None] == reader[None, :]

    def mean_of(mask: np.ndarray) -> float:
        # One arm or one reader has no pairs that differ in it.
        return float(matrix[mask].mean()) if mask.any() else 0.0

    return Covariances(
        error=mean_of(same_arm & same_reader),
        same_reader=mean_of(~same_arm & same_reader),
        same_arm=mean_of(same_arm & ~same_reader),
        neither=mean_of(~same_arm & ~same_reader),
    )


# ---- The tests -------------------------------------------------------------------------------------


def compare_arms(
    scores: ArrayLike,
    truth: ArrayLike,
    *,
    method: str = "jackknife",
    design: str = "readers and cases",
    level: float = 0.95,
) -> Comparison:
    """Compare the AUC of arms in which the same readers read the same cases.

    Args:
        scores: [arms, readers, cases], no missing values; higher is more suspicious.
        truth: bool [cases].
        method: of the covariances, "jackknife" or "delong".
        design: what is drawn at random: "readers and cases" (RRRC), "cases" (FRRC: these readers alone) or "readers"
            (RRFC: these cases alone).
        level: of the intervals.

    Raises:
        UserError: for a missing score, an unknown design, fewer than two arms or readers, or fewer than ten cases of
            a kind.
    """
    # Imputed scores would make the readers more alike than they are, so nothing is filled in.
    values, is_positive = np.asarray(scores, float), np.asarray(truth, bool)
    if values.ndim != 3 or min(values.shape[:2]) < 2 or values.shape[2] != len(is_positive):
        raise UserError("AUC: scores are [arms, readers, cases], two arms and readers or more")
    if not np.isfinite(values).all():
        raise UserError("AUC: a score is missing; every reader scores every case in every arm")
    fewest = int(min(is_positive.sum(), (~is_positive).sum()))
    if fewest < LEAST_CASES:
        raise UserError(f"AUC: only {fewest} cases of a kind, {LEAST_CASES} are needed")
    matrix = covariance_matrix(values, is_positive, method)
    covariances = average_covariances(matrix, *values.shape[:2])
    return compare_areas(areas(values, is_positive), covariances, design=design, level=level)


def compare_areas(
    auc: ArrayLike,
    covariances: Covariances,
    *,
    design: str = "readers and cases",
    level: float = 0.95,
) -> Comparison:
    """Compare arms by their AUCs and what is known of these; see `compare_arms`.

    Args:
        auc: [arms, readers].
    """
    if design not in DESIGNS:
        raise UserError(f"design: {design!r} is unknown, use one of {', '.join(DESIGNS)}")
    # ---- Mean squares of arms and of what readers do differently in them ----
    table = np.asarray(auc, float)
    arm_count, reader_count = table.shape
    # Readers are averaged first: each counts alike, however many cases he scored.
    arm_means = table.mean(1)
    of_arms = reader_count * float(np.var(arm_means, ddof=1))
    residual = table - arm_means[:, None] - table.mean(0) + table.mean()
    residual_degrees = (arm_count - 1) * (reader_count - 1)
    of_residual = float((residual**2).sum()) / residual_degrees

    denominator, degrees = _denominator(
        of_residual, residual_degrees, covariances, design, reader_count
    )

    # ---- All arms at once, then each pair with the same error ----
    f_value = of_arms / denominator if denominator > 0 else np.inf * (of_arms > 0)
    # With all degrees in the world, F times its numerator's degrees is a chi squared.
    if np.isinf(degrees):
        p_value = float(stats.chi2.sf(f_value * (arm_count - 1), arm_count - 1))
    else:
        p_value = float(stats.f.sf(f_value, arm_count - 1, degrees))
    standard_error = float(np.sqrt(2 / reader_count * max(denominator, 0.0)))
    contrasts = tuple(
        _contrast(arm_means, first, second, standard_error, degrees, level)
        for first in range(arm_count)
        for second in range(first + 1, arm_count)
    )
    return Comparison(
        auc=table,
        covariances=covariances,
        f_value=float(f_value),
        degrees=(arm_count - 1, float(degrees)),
        p_value=p_value,
        contrasts=contrasts,
    )


def _denominator(
    of_residual: float,
    residual_degrees: int,
    covariances: Covariances,
    design: str,
    reader_count: int,
) -> tuple[float, float]:
    """What the arms' mean square is held against, and its degrees of freedom."""
    shared = covariances.same_arm - covariances.neither
    if design == "cases":
        own = covariances.error - covariances.same_reader
        return own + (reader_count - 1) * max(shared, 0.0), np.inf
    if design == "readers":
        # These cases are all there are: nothing of theirs is error.
        return of_residual, residual_degrees
    # Hillis: negative estimates of the cases' share are cut at nothing.
    denominator = of_residual + reader_count * max(shared, 0.0)
    if of_residual <= 0:
        return denominator, residual_degrees
    return denominator, residual_degrees * (denominator / of_residual) ** 2


def _contrast(
    arm_means: np.ndarray,
    first: int,
    second: int,
    standard_error: float,
    degrees: float,
    level: float,
) -> Contrast:
    """Compare two arms with the error and the degrees of all."""
    estimate = float(arm_means[first] - arm_means[second])
    # Student's t with infinite degrees is the normal distribution, for scipy too.
    reach = float(stats.t.ppf(0.5 + level / 2, degrees)) * standard_error
    p_value = 1.0
    if standard_error > 0:
        p_value = float(2 * stats.t.sf(abs(estimate) / standard_error, degrees))
    return Contrast(
        first=first,
        second=second,
        estimate=estimate,
        standard_error=standard_error,
        degrees=float(degrees),
        low=estimate - reach,
        high=estimate + reach,
        p_value=p_value,
    )


def score_table(
    arms: Sequence[object], readers: Sequence[object], cases: Sequence[object], scores: ArrayLike
) -> np.ndarray:
    """Lay out rows of one score each as [arms, readers, cases], each axis sorted; what is missing is NaN."""
    arm_names, arm_index = np.unique(np.asarray(arms), return_inverse=True)
    reader_names, reader_index = np.unique(np.asarray(readers), return_inverse=True)
    case_names, case_index = np.unique(np.asarray(cases), return_inverse=True)
    # What no row fills stays missing, and is refused later.
    table = np.full((len(arm_names), len(reader_names), len(case_names)), np.nan)
    table[arm_index, reader_index, case_index] = np.asarray(scores, float)
    return table
