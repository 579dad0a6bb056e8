"""Scores of parts of a test set (by view, sex, age, source), and the largest gap between two parts.

docs/evaluation.md defines each number. All parts are scored on the same resamples of patients, so that a gap has an
interval although one patient may have films in both parts.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.bootstrap import (
    DEFAULT,
    Bootstrap,
    estimate,
    number_or_none,
    percentile_interval,
    resample,
    sum_by_group,
    unit_of_rows,
)
from cxr_jax.metrics.label_counts import (
    LABEL_COUNT,
    METRICS,
    Answers,
    Reference,
    check_rows,
    label_f1,
    ratio,
    row_counts,
)
from cxr_jax.metrics.probability_scores import label_areas

UNKNOWN = "unknown"  # the part of rows of which nothing is known
FEW_PATIENTS = 10  # below which a part is listed, but compared with no other
# As fairness reports of chest films cut it: below 40, 40 to 60, 60 to 75, above.
_AGE_LIMITS = ((40, "<40"), (60, "40-60"), (75, "60-75"), (float("inf"), ">75"))


def age_group(age: float | None) -> str:
    """Name the part of an age in years: <40, 40-60 (40 to 59), 60-75 (60 to 75), >75; or UNKNOWN."""
    if age is None or not np.isfinite(age) or age < 0:
        return UNKNOWN
    if age == _AGE_LIMITS[2][0]:
        return _AGE_LIMITS[2][1]
    return next(name for limit, name in _AGE_LIMITS if age < limit)


def _age_place(name: str) -> int:
    """The place of a part in the order of ages; the same for parts of anything else."""
    ages = [age for _, age in _AGE_LIMITS]
    return ages.index(name) if name in ages else 0


class _Part(NamedTuple):
    """What is known of one part; samples: on each resample, NaN where undefined."""

    name: str
    n: int
    n_units: int
    n_pos: np.ndarray  # int [14]
    points: dict[str, np.ndarray]  # metric -> [] or by label [14]
    samples: dict[str, np.ndarray]  # metric -> [S] or [S, 14]


def subgroup_scores(
    answers: Answers,
    reference: Reference,
    columns: Mapping[str, Sequence[str]],
    *,
    probabilities: ArrayLike | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, dict[str, Any]]:
    """Score every part of a set.

    Args:
        answers: of N rows.
        reference: what is so.
        columns: what divides the set ("sex") -> the part of each row ("F"), UNKNOWN where nobody knows.
        probabilities: float [N, 14], for AUROC.
        bootstrap: how the intervals are made.

    Returns:
        For each column that has two parts at least: `parts`, name -> {`n`, `n_units` (patients), `n_pos` by label,
        and {value, lo, hi} of `jaccard`, `macro_f1`, `micro_f1`, and `mean_auroc` with probabilities}, the largest
        first, ages in their order; `gaps`, metric -> {`high`, `low` (names of parts), value, lo, hi, `labels`} of the
        largest difference between two known parts of at least FEW_PATIENTS patients. Of metrics that are means over
        labels both parts have the same `labels` there: those that have one in both.
    """
    by_column = {}
    for column, part_of_row in columns.items():
        names = np.asarray(part_of_row, str)
        row_count_of = {name: int((names == name).sum()) for name in dict.fromkeys(names.tolist())}
        # One part alone is the set itself.
        if len(row_count_of) < 2:
            continue
        # What is unknown comes last, however much of it there is.
        in_order = sorted(
            row_count_of, key=lambda name: (name == UNKNOWN, _age_place(name), -row_count_of[name])
        )
        subgroup_list = [
            _score_part(name, names == name, answers, reference, probabilities, bootstrap)
            for name in in_order
        ]
        by_column[column] = {
            "parts": {part.name: _described(part) for part in subgroup_list},
            "gaps": _gaps(
                [
                    part
                    for part in subgroup_list
                    if part.name != UNKNOWN and part.n_units >= FEW_PATIENTS
                ]
            ),
        }
    return by_column


def _score_part(
    name: str,
    is_inside: np.ndarray,
    answers: Answers,
    reference: Reference,
    probabilities: ArrayLike | None,
    bootstrap: Bootstrap,
) -> _Part:
    checked = check_rows(answers, reference)
    # Rows of other parts have no known label, so they add nothing; they stay, and with them the units of a resample.
    part_reference = replace(
        reference,
        truth=checked.truth,
        known=checked.known & is_inside[:, None],
        blank=checked.blank & is_inside[:, None],
    )
    units = sum_by_group(row_counts(answers, part_reference), reference.groups)
    total_counts, resampled_counts = units.sum(0), resample(units, bootstrap)
    points = {
        "jaccard": METRICS["jaccard"](total_counts),
        "micro_f1": METRICS["micro_f1"](total_counts),
    }
    samples = {
        "jaccard": METRICS["jaccard"](resampled_counts),
        "micro_f1": METRICS["micro_f1"](resampled_counts),
    }
    # By label, so that two parts can be compared on the labels that both have.
    points["macro_f1"], samples["macro_f1"] = label_f1(total_counts), label_f1(resampled_counts)
    if probabilities is not None:
        points["mean_auroc"], samples["mean_auroc"] = label_areas(
            probabilities, part_reference, bootstrap
        )
    # A patient with films in two parts is one of the patients of both.
    patients = unit_of_rows(len(is_inside), reference.groups)[is_inside]
    return _Part(
        name=name,
        n=int(is_inside.sum()),
        n_units=len(np.unique(patients)),
        n_pos=(checked.truth & checked.known & is_inside[:, None]).sum(0),
        points=points,
        samples=samples,
    )


def _mean(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean over those of the labels [14] that have a value; a number that has no labels is itself."""
    if values.shape[-1:] != (LABEL_COUNT,):
        return values
    entering = np.isfinite(values) & labels
    return ratio(np.where(entering, values, 0).sum(-1), entering.sum(-1))


def _described(part: _Part) -> dict[str, Any]:
    # Each part by itself has the labels that it has a number of.
    every_label = np.ones(LABEL_COUNT, bool)
    return {
        "n": part.n,
        "n_units": part.n_units,
        "n_pos": dict(zip(CHEXPERT_14, part.n_pos.tolist(), strict=True)),
        **{
            metric: estimate(
                _mean(part.points[metric], every_label), _mean(part.samples[metric], every_label)
            )
            for metric in part.points
        },
    }


def _gaps(subgroup_list: Iterable[_Part]) -> dict[str, dict[str, Any]]:
    """The largest difference of each metric between two parts."""
    gaps: dict[str, dict[str, Any]] = {}
    for first, second in itertools.combinations(subgroup_list, 2):
        for metric in first.points:
            # Means over different labels would differ even for a model that is right everywhere alike.
            common_labels = np.ones(LABEL_COUNT, bool)
            if first.points[metric].shape == (LABEL_COUNT,):
                common_labels = np.isfinite(first.points[metric]) & np.isfinite(
                    second.points[metric]
                )
            points = [_mean(part.points[metric], common_labels) for part in (first, second)]
            difference = float(points[0] - points[1])
            if (
                not np.isfinite(difference)
                or abs(difference) <= gaps.get(metric, {"value": -1})["value"]
            ):
                continue
            # Named by who is ahead, so that a gap is never negative.
            high, low = (first, second) if difference >= 0 else (second, first)
            gap_samples = _mean(high.samples[metric], common_labels) - _mean(
                low.samples[metric], common_labels
            )
            lower_bound, upper_bound = percentile_interval(gap_samples)
            gaps[metric] = {
                "high": high.name,
                "low": low.name,
                "value": abs(difference),
                "lo": number_or_none(lower_bound),
                "hi": number_or_none(upper_bound),
                "labels": [
                    label for label, is_in in zip(CHEXPERT_14, common_labels, strict=True) if is_in
                ],
            }
    return gaps
