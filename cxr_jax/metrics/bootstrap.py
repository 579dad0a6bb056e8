"""Percentile bootstrap of functions of sums over rows or patients."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

_HELD_WEIGHTS = (
    4_000_000  # resampling weights held at once: 32 MB, whatever the number of samples and of rows
)


@dataclass(frozen=True)
class Bootstrap:
    """How many resamples an interval is made from, and the seed of the draws."""

    samples: int = 1000
    seed: int = 0


DEFAULT = Bootstrap()


class Difference(NamedTuple):
    """A paired difference with its 95 % percentile interval; NaN where the metric is undefined."""

    value: float
    low: float
    high: float

    def as_estimate(self) -> dict[str, float | None]:
        """Return {value, lo, hi}, None where undefined."""
        # The keys of every estimate in the results.
        result_keys = ("value", "lo", "hi")
        return dict(zip(result_keys, map(number_or_none, self), strict=True))


class Interval(NamedTuple):
    """A 95 % interval; NaN where there is none."""

    low: float
    high: float


def unit_of_rows(row_count: int, groups: ArrayLike | None) -> np.ndarray:
    """Number the patients of rows from 0, in the order of their ids: int [N].

    Raises:
        ValueError: if there is not one id a row.
    """
    # Every row is a unit of its own.
    if groups is None:
        return np.arange(row_count)
    groups = np.asarray(groups)
    if groups.shape != (row_count,):
        raise ValueError(f"groups must have one id a row: {groups.shape} for {row_count} rows")
    # Ids are names or numbers; what is needed is the place of each one's patient.
    return np.unique(groups, return_inverse=True)[1]


def sum_by_group(row_counts: np.ndarray, groups: ArrayLike | None) -> np.ndarray:
    """Sum the row counts [N, K] of each patient, so that a resample draws patients.

    Raises:
        ValueError: if there is not one id a row.
    """
    if groups is None:
        return row_counts
    patient_index = unit_of_rows(len(row_counts), groups)
    patient_sums = np.zeros((patient_index.max() + 1, row_counts.shape[1]))
    # Unlike +=, this adds all rows of a patient.
    np.add.at(patient_sums, patient_index, row_counts)
    return patient_sums


def draw_weights(unit_count: int, bootstrap: Bootstrap) -> Iterator[np.ndarray]:
    """Draw units with replacement: how often each came in each resample, float64 [some samples, units] at a time.

    A function of the number of units and of `bootstrap` alone: whatever is computed with them on the same units is
    computed on the same resamples.
    """
    generator = np.random.default_rng(bootstrap.seed)
    # At least one: with very many units a single resample may exceed the limit.
    chunk_samples = max(1, _HELD_WEIGHTS // unit_count)
    for chunk_start in range(0, bootstrap.samples, chunk_samples):
        chunk_size = min(chunk_samples, bootstrap.samples - chunk_start)
        drawn_units = generator.integers(unit_count, size=(chunk_size, unit_count))
        # One count of all resamples of the chunk: those of resample i lie at i * unit_count.
        flat_places = drawn_units + np.arange(chunk_size)[:, None] * unit_count
        # How often each unit was drawn is all that a sum needs.
        weights = np.bincount(flat_places.ravel(), minlength=chunk_size * unit_count)
        yield weights.reshape(chunk_size, unit_count).astype(float)


def resample(units: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """Draw the units [N, K] with replacement: the sums of each resample, [samples, K] (multinomial weights)."""
    return np.concatenate([weights @ units for weights in draw_weights(len(units), bootstrap)])


def percentile_interval(samples: np.ndarray) -> Interval:
    """Take the 95 % percentile interval (Efron) of the finite samples."""
    # A resample without a positive of any label has no macro-F1.
    samples = samples[np.isfinite(samples)]
    if not samples.size:
        return Interval(np.nan, np.nan)
    return Interval(*np.percentile(samples, [2.5, 97.5]))


def number_or_none(value: np.ndarray | float) -> float | None:
    """Return a number as results hold it: None where it is undefined."""
    return float(value) if np.isfinite(value) else None


def estimate(point: np.ndarray | float, samples: np.ndarray) -> dict[str, float | None]:
    """Return {value, lo, hi} of a metric from its values on the resamples."""
    lower_bound, upper_bound = percentile_interval(samples)
    return {
        "value": number_or_none(point),
        "lo": number_or_none(lower_bound),
        "hi": number_or_none(upper_bound),
    }


def estimate_mean(
    values: ArrayLike, groups: ArrayLike | None, bootstrap: Bootstrap
) -> dict[str, float | None]:
    """Return {value, lo, hi} of the mean of values [N]."""
    values = np.asarray(values, float)
    # A mean is a ratio of two sums, and a resample of patients changes both.
    weighed_values = np.stack([values, np.ones(len(values))], axis=1)
    units = sum_by_group(weighed_values, groups)
    resampled_sums = resample(units, bootstrap)
    return estimate(
        units[:, 0].sum() / units[:, 1].sum(), resampled_sums[:, 0] / resampled_sums[:, 1]
    )
