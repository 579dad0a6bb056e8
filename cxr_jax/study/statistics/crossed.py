"""A bootstrap that draws readers and cases, each with replacement and both at once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Of a weighted table: (table [arms, readers, cases], weights [readers, cases]) -> one number.
Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class CrossedInterval:
    """The estimate of the table itself and the percentile interval of its resamples."""

    estimate: float
    low: float
    high: float


def mean_difference(first: int, second: int, *, is_paired: bool = True) -> Statistic:
    """Make the statistic: mean of one arm less that of another.

    Args:
        first: place of the arm.
        second: of the one that is taken off.
        is_paired: over pairs that are both there; else over whatever each arm has (a split study has no pairs).
    """

    def statistic(table: np.ndarray, weights: np.ndarray) -> float:
        if not is_paired:
            return _mean(table[first], weights) - _mean(table[second], weights)
        # A skipped case takes its pair with it.
        return _mean(table[first] - table[second], weights)

    return statistic


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean of what is there; NaN of nothing, which is no zero."""
    counted = weights * ~np.isnan(values)
    total = counted.sum()
    return float((np.nan_to_num(values) * counted).sum() / total) if total else math.nan


def crossed_bootstrap(
    table: np.ndarray,
    statistics: Sequence[Statistic],
    *,
    resamples: int = 4000,
    seed: int = 0,
    level: float = 0.95,
) -> list[CrossedInterval]:
    """Resample readers and cases of [arms, readers, cases] and give each statistic's percentile interval."""
    # Counts instead of copies: a resample is a pair of weight vectors.
    generator = np.random.default_rng(seed)
    reader_count, case_count = table.shape[1:]
    readers = generator.multinomial(
        reader_count, np.full(reader_count, 1 / reader_count), resamples
    )
    cases = generator.multinomial(case_count, np.full(case_count, 1 / case_count), resamples)
    ones = np.ones((reader_count, case_count))
    # The same draws for every statistic, so that their differences are not noise.
    intervals = []
    for statistic in statistics:
        # A reader drawn twice counts twice with each case, as often as that was drawn.
        values = [
            statistic(table, np.outer(reader_weights, case_weights).astype(float))
            for reader_weights, case_weights in zip(readers, cases, strict=True)
        ]
        # A resample that drew nothing of an arm says nothing of it.
        told = [each for each in values if math.isfinite(each)] or [math.nan]
        low, high = np.quantile(told, [0.5 - level / 2, 0.5 + level / 2])
        intervals.append(CrossedInterval(statistic(table, ones), float(low), float(high)))
    return intervals
