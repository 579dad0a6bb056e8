"""Label predictions as counts: what a row adds to F1 and Jaccard, and the metrics of sums of rows.

Every metric here is a function of sums over rows, so a row (or a patient) is reduced once to a short vector of counts,
and a bootstrap of any metric is one matrix product of resampling weights with those vectors (`bootstrap.py`).

Conventions, used everywhere:
- A cell whose label the reference does not know (uncertain, blank) is left out of every number, but for one thing: a
  label that is named where the reference is blank counts as BLANK_PRICE of a false positive.
- A completion that could not be parsed predicts nothing (its positives count as missed) and has Jaccard 0, even where
  the truth is empty: no answer never earns a point.
- Jaccard of two empty sets is 1. A row with no known label carries no Jaccard at all.
- A label without a known positive has no F1. Macro-F1 is the mean over the labels that have one (again in each
  bootstrap resample, so the interval is that of the number that is printed); micro-F1 pools all labels.
- An undefined number is NaN here and None in the results.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.labels.taxonomy import BLANK_PRICE, CHEXPERT_14

LABEL_COUNT = len(CHEXPERT_14)
SUBSETS = {  # name -> labels that are left out
    "all": (),
    "without_no_finding": ("No Finding",),
    "without_support_devices": ("Support Devices",),
    "findings_only": ("No Finding", "Support Devices"),
}
# As masks, which cut label columns [.., 14].
IN_SUBSET = {
    name: np.array([label not in left_out for label in CHEXPERT_14])
    for name, left_out in SUBSETS.items()
}


@dataclass(frozen=True)
class Answers:
    """What a model answers on N images.

    Attributes:
        labels: bool [N, 14] in the order of `CHEXPERT_14`: the labels that are named.
        valid: bool [N], False where the completion could not be parsed; None: all could.
    """

    labels: ArrayLike
    valid: ArrayLike | None = None


@dataclass(frozen=True)
class Reference:
    """What is so on N images.

    Attributes:
        truth: bool [N, 14] in the order of `CHEXPERT_14`.
        known: bool [N, 14], False where the reference does not say; None: all is known.
        groups: [N] patient ids, so that a bootstrap draws patients, not images; None: every image is its own.
        blank: bool [N, 14], the cells outside `known` of which nobody said anything; None: none of them.
    """

    truth: ArrayLike
    known: ArrayLike | None = None
    groups: ArrayLike | None = None
    blank: ArrayLike | None = None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> "Reference":
        """Take the truth of a batch of `data.sources.base`: what is neither known nor hedged is blank."""
        blank = ~batch["known"] & ~batch["hedged"] if "hedged" in batch else None
        return cls(batch["solution"], batch["known"], blank=blank)


class CheckedRows(NamedTuple):
    """Answers and reference as arrays whose shapes agree."""

    labels: np.ndarray
    truth: np.ndarray
    known: np.ndarray
    valid: np.ndarray
    blank: np.ndarray


def check_rows(answers: Answers, reference: Reference) -> CheckedRows:
    """Return the arrays, with what was left out filled in.

    Raises:
        ValueError: if there is no row, or the shapes do not agree.
    """
    labels, truth = np.asarray(answers.labels, bool), np.asarray(reference.truth, bool)
    known, valid, blank = np.ones_like(truth), np.ones(len(truth), bool), np.zeros_like(truth)
    if reference.known is not None:
        known = np.asarray(reference.known, bool)
    if reference.blank is not None:
        blank = np.asarray(reference.blank, bool)
    if answers.valid is not None:
        valid = np.asarray(answers.valid, bool)
    # The truth first: the other shapes are held against it.
    if truth.ndim != 2 or truth.shape[1] != LABEL_COUNT or len(truth) == 0:
        raise ValueError(f"truth must be [N, {LABEL_COUNT}] with N >= 1, got {list(truth.shape)}")
    is_per_cell = all(cells.shape == truth.shape for cells in (labels, known, blank))
    if not is_per_cell or valid.shape != truth.shape[:1]:
        shapes = {
            "pred": labels.shape,
            "truth": truth.shape,
            "known": known.shape,
            "valid": valid.shape,
            "blank": blank.shape,
        }
        raise ValueError(f"shapes do not agree: {shapes}")
    return CheckedRows(labels, truth, known, valid, blank & ~known)


# ---- Rows -> counts ----


def jaccard_rows(answers: Answers, reference: Reference) -> np.ndarray:
    """Compute the Jaccard index of each row's label sets: float64 [N]; NaN where the row has no known label."""
    labels, truth, known, valid, blank = check_rows(answers, reference)
    named_labels = labels & valid[:, None]  # what could not be parsed names nothing
    shared_count = (named_labels & truth & known).sum(1)
    union_count = ((named_labels | truth) & known).sum(1)
    union_count = union_count + BLANK_PRICE * (named_labels & blank).sum(1)
    # Two empty sets agree; what could not be parsed earns nothing all the same.
    either = np.where(union_count == 0, 1.0, union_count)
    row_scores = np.where(union_count == 0, 1.0, shared_count / either) * valid
    return np.where(known.any(1), row_scores, np.nan)


def row_counts(answers: Answers, reference: Reference) -> np.ndarray:
    """Count each row: float64 [N, 72].

    The columns: true positive, false positive, false negative, known and named-though-blank flags of the 14 labels,
    then Jaccard and its weight (0 or 1).
    """
    labels, truth, known, valid, blank = check_rows(answers, reference)
    # A mean of sums needs the sum and how many enter it: Jaccard goes along with its weight.
    jaccard = jaccard_rows(answers, reference)
    named_labels = labels & valid[:, None]
    label_flags = [
        named_labels & truth & known,
        named_labels & ~truth & known,
        ~named_labels & truth & known,
        known,
        named_labels & blank,
    ]
    # A row without a known label carries neither a score nor a weight.
    is_scored = np.isfinite(jaccard)
    columns = [*label_flags, np.where(is_scored, jaccard, 0.0)[:, None], is_scored[:, None]]
    return np.concatenate(columns, axis=1).astype(float)


class LabelCounts(NamedTuple):
    """The label columns of counts, each [..., 14]."""

    true_positive: np.ndarray
    false_positive: np.ndarray
    false_negative: np.ndarray
    known: np.ndarray
    blank_named: np.ndarray


def label_counts(counts: np.ndarray) -> LabelCounts:
    """Cut counts [..., 72] into those of the labels."""
    return LabelCounts(
        *(
            counts[..., block_index * LABEL_COUNT : (block_index + 1) * LABEL_COUNT]
            for block_index in range(len(LabelCounts._fields))
        )
    )


# ---- Counts -> metrics ----


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, NaN where there is nothing to divide by."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), np.nan)


def label_f1(counts: np.ndarray) -> np.ndarray:
    """Compute F1 of each label, [..., 14]; NaN without a known positive."""
    true_positive, false_positive, false_negative, _, blank_named = label_counts(counts)
    # F1 from counts: 2 TP / (2 TP + FP + FN).
    errors = false_positive + false_negative + BLANK_PRICE * blank_named
    f1_scores = ratio(2 * true_positive, 2 * true_positive + errors)
    return np.where(true_positive + false_negative > 0, f1_scores, np.nan)


def _jaccard(counts: np.ndarray, subset: str = "all") -> np.ndarray:
    """The mean over the rows that have one; it does not know subsets."""
    return ratio(counts[..., -2], counts[..., -1])


def _macro_f1(counts: np.ndarray, subset: str = "all") -> np.ndarray:
    # Over the labels that have an F1 in these very counts: in a resample they can be fewer.
    f1_scores = label_f1(counts)[..., IN_SUBSET[subset]]
    return ratio(np.nansum(f1_scores, -1), np.isfinite(f1_scores).sum(-1))


def _micro_f1(counts: np.ndarray, subset: str = "all") -> np.ndarray:
    true_positive, false_positive, false_negative, _, blank_named = (
        label_columns[..., IN_SUBSET[subset]].sum(-1) for label_columns in label_counts(counts)
    )
    errors = false_positive + false_negative + BLANK_PRICE * blank_named
    return ratio(2 * true_positive, 2 * true_positive + errors)


# One signature for all, so that a metric can be chosen by name.
METRICS = {"jaccard": _jaccard, "macro_f1": _macro_f1, "micro_f1": _micro_f1}
