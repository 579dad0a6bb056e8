"""The difference of two arms read by the same readers on the same cases, both drawn at random.

Each reader's difference on each case is one cell of a table without replicates. Its two-way mean squares give the
variance of the mean, and Satterthwaite the degrees of freedom: with six readers, infinity would be a lie.
"""

from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike
from scipy import stats

from cxr_jax.errors import UserError

_ROUNDS = 200  # of filling empty cells; each halves what is left to change, or better


@dataclass(frozen=True, kw_only=True)
class PairedContrast:
    """A mean difference, its interval and its two-sided test, and of how many readers and pairs they are."""

    readers: int
    pairs: int  # none where arms see different cases
    estimate: float
    standard_error: float
    degrees: float
    low: float
    high: float
    p_value: float

    def one_sided(self, boundary: float, direction: int) -> float:
        """Give the p value against a difference that lies on the wrong side of `boundary`.

        Args:
            direction: 1 if the difference is hoped to be larger than the boundary, -1 if smaller.
        """
        if self.standard_error <= 0:
            return float(direction * (self.estimate - boundary) <= 0)
        statistic = direction * (self.estimate - boundary) / self.standard_error
        return float(stats.t.sf(statistic, self.degrees))


def contrast(differences: ArrayLike, level: float = 0.95) -> PairedContrast:
    """Estimate the mean of a table of differences, readers and cases at random.

    Args:
        differences: [readers, cases]; NaN where a reader skipped a case. Empty cells are filled by the additive model
            and cost a degree of freedom each (Yates 1933).
        level: of the interval.

    Raises:
        UserError: for a table with fewer than two readers or cases, or an empty row or column.
    """
    table = np.array(differences, float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise UserError("a paired contrast needs two readers and two cases or more")
    is_empty = np.isnan(table)
    if is_empty.all(0).any() or is_empty.all(1).any():
        raise UserError("a paired contrast: a reader or a case has no pair at all")
    # From here on the table is full; what was filled in costs degrees below.
    table = _fill(table, is_empty)

    # ---- Two-way mean squares ----
    reader_count, case_count = table.shape
    estimate = float(table.mean())
    by_reader = table.mean(1) - estimate
    by_case = table.mean(0) - estimate
    residual = table - estimate - by_reader[:, None] - by_case[None, :]
    # A filled cell agrees with its row and column: it is no evidence.
    residual_degrees = (reader_count - 1) * (case_count - 1) - int(is_empty.sum())
    if residual_degrees < 1:
        raise UserError("a paired contrast: too many pairs are missing")
    of_readers = case_count * float((by_reader**2).sum()) / (reader_count - 1)
    of_cases = reader_count * float((by_case**2).sum()) / (case_count - 1)
    of_error = float((residual**2).sum()) / residual_degrees

    # ---- Their combination, and how much it is worth ----
    combined = of_readers + of_cases - of_error
    # Where chance makes it tiny, the larger of the two alone is the safe side.
    combined = max(combined, of_readers, of_cases, 0.0) if combined < of_error else combined
    # Satterthwaite: as many degrees as a chi squared of the same mean and variance has.
    worth = (
        of_readers**2 / (reader_count - 1)
        + of_cases**2 / (case_count - 1)
        + of_error**2 / residual_degrees
    )
    degrees = combined**2 / worth if worth > 0 else float(residual_degrees)
    standard_error = float(np.sqrt(combined / table.size))
    counts = reader_count, int((~is_empty).sum())
    return _by_student(estimate, standard_error, degrees, level, counts)


def _by_student(
    estimate: float, standard_error: float, degrees: float, level: float, counts: tuple[int, int]
) -> PairedContrast:
    """Interval and p-value of an estimate by Student's t with so many degrees of freedom."""
    reach = float(stats.t.ppf(0.5 + level / 2, degrees)) * standard_error
    # Without any spread: certain of the mean, whatever it is.
    p_value = float(estimate == 0)
    if standard_error > 0:
        p_value = float(2 * stats.t.sf(abs(estimate) / standard_error, degrees))
    return PairedContrast(
        readers=counts[0],
        pairs=counts[1],
        estimate=estimate,
        standard_error=standard_error,
        degrees=float(degrees),
        low=estimate - reach,
        high=estimate + reach,
        p_value=p_value,
    )


def _fill(table: np.ndarray, is_empty: np.ndarray) -> np.ndarray:
    """Fill empty cells with what row, column and mean predict, until that no longer changes."""
    if not is_empty.any():
        return table
    filled = np.where(is_empty, np.nanmean(table), table)
    for _ in range(_ROUNDS):
        predicted = filled.mean(1, keepdims=True) + filled.mean(0, keepdims=True) - filled.mean()
        filled = np.where(is_empty, predicted, table)
    return filled


def contrast_of_readers(per_reader: ArrayLike, level: float = 0.95) -> PairedContrast:
    """Estimate the mean of one difference a reader: for designs in which arms see different cases (split)."""
    values = np.asarray(per_reader, float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise UserError("a contrast of readers needs one difference of each, two readers or more")
    # One number a reader: what cases add to it is part of how readers differ.
    degrees = len(values) - 1
    estimate, standard_error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    return _by_student(estimate, standard_error, degrees, level, (len(values), 0))
