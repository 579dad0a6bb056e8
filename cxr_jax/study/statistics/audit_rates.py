"""Rates of what was detected, flagged or left wrong, by kind of planted error; exact McNemar; Holm's step-down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Rate:
    """A share with Wilson's interval; None where nothing was counted."""

    events: int
    total: int
    share: float | None
    low: float | None
    high: float | None


def rate(flags: ArrayLike, level: float = 0.95) -> Rate:
    """Count how often a flag is up; the interval takes rows as independent, so it describes and does not test."""
    # Wilson's interval stays inside 0..1 where all or none are up.
    values = np.asarray(flags, bool)
    events, total = int(values.sum()), len(values)
    if not total:
        return Rate(0, 0, None, None, None)
    interval = stats.binomtest(events, total).proportion_ci(level, method="wilson")
    return Rate(events, total, events / total, float(interval.low), float(interval.high))


def rates_by(keys: Sequence[object], flags: ArrayLike) -> dict[object, Rate]:
    """Count a flag apart for each key, keys in the order of their first row."""
    # Kinds keep the order in which they are met, which is that of the protocol.
    values = np.asarray(flags, bool)
    rows_of: dict[object, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    return {key: rate(values[rows]) for key, rows in rows_of.items()}


@dataclass(frozen=True)
class McNemar:
    """Pairs of which only the first, or only the second, is up, and the exact two-sided p value."""

    first_only: int
    second_only: int
    p_value: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Test two paired flags by the binomial distribution of the pairs that differ."""
    first_flags, second_flags = np.asarray(first, bool), np.asarray(second, bool)
    first_only = int((first_flags & ~second_flags).sum())
    second_only = int((~first_flags & second_flags).sum())
    # Pairs that agree say nothing of the difference.
    differing = first_only + second_only
    # Without a pair that differs there is nothing against equality.
    p_value = float(stats.binomtest(first_only, differing).pvalue) if differing else 1.0
    return McNemar(first_only, second_only, p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values of several hypotheses so that any false rejection stays rare (Holm 1979).

    Returns:
        The adjusted values, in the order of `p_values`.
    """
    # Step by step: the smallest against all hypotheses, the next against one less.
    adjusted: dict[str, float] = {}
    largest = 0.0
    # From the smallest up; none may come out below one before it.
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
