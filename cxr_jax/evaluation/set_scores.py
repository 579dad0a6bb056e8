"""The numbers of one model on one set, and of two models on the same one, in the unit that is scored.

docs/evaluation.md says what each number is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.data.sources.base import Batch
from cxr_jax.evaluation.reader import Readings, Samples
from cxr_jax.evaluation.scored_sets import ScoredSet
from cxr_jax.metrics import probability_scores, recalibration, scores
from cxr_jax.metrics.bootstrap import estimate_mean
from cxr_jax.metrics.recalibration import Recalibration
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.metrics.study_units import Studies
from cxr_jax.metrics.subgroups import subgroup_scores

COMPARED = ("jaccard", "macro_f1", "micro_f1")  # of answers; all numbers of probabilities are


@dataclass(frozen=True)
class SetAnswers:
    """What a model answers to the images of a set, and to other images in their place.

    Attributes:
        real: the readings of the images.
        other_images: "blank", "swapped" .. -> what is answered, see `film_use.OtherImages`.
        trace_terms: term -> float [N], of the traces.
        recalibration: of the probabilities, or None.
        samples: of `config.eval.traces` completions an image, or None.
        covered: places that were read with covers, int [n], and what is answered by name (`occlusion.CoverAudit`).
        boxed: the same of films whose boxes were covered (`occlusion.BoxAudit`).
    """

    real: Readings
    other_images: Mapping[str, Answers]
    trace_terms: Mapping[str, np.ndarray]
    recalibration: Recalibration | None = None
    samples: Samples | None = None
    covered: tuple[np.ndarray, Mapping[str, Answers]] | None = None
    boxed: tuple[np.ndarray, Mapping[str, Answers]] | None = None


@dataclass(frozen=True)
class Unit:
    """What is scored of a set: its images, or the studies that they are of.

    Attributes:
        reference: what is so of each unit, with its patient.
        columns: what divides the set -> the part of each unit.
        films: what is so of each image.
        studies: None where images are the unit.
    """

    reference: Reference
    columns: Mapping[str, Any]
    films: Reference
    studies: Studies | None = None

    @classmethod
    def of_set(cls, scored_set: ScoredSet, facts: Batch, unit: str) -> "Unit":
        """Tell what is so of each unit of a set. unit: "image" or "study"."""
        patients = None if scored_set.patients is None else np.array(scored_set.patients)
        # The patients come from the set: a batch does not know them.
        film_reference = Reference.from_batch(facts)
        reference = replace(film_reference, groups=patients)
        if unit == "image" or scored_set.studies is None:
            return cls(reference, scored_set.columns, reference)
        # All that follows is of studies: truth, patients, parts.
        studies = Studies.from_names(scored_set.studies)
        columns = studies.columns(scored_set.columns)
        return cls(studies.reference(reference), columns, reference, studies)

    def answers(self, answers: Answers) -> Answers:
        """Give the answers of each unit."""
        return answers if self.studies is None else self.studies.answers(answers)

    def log_odds(self, readings: Readings) -> np.ndarray | None:
        """Give the log-odds of each unit, or None without: those of the image with the largest."""
        if readings.log_odds is None or self.studies is None:
            return readings.log_odds
        return self.studies.largest(readings.log_odds)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Give the mean of a value of images over each unit."""
        return values if self.studies is None else self.studies.mean(values)


def _named(readings: Readings) -> Answers:
    return Answers(readings.answer, readings.valid)


def _probabilities(log_odds: np.ndarray | None) -> np.ndarray | None:
    return None if log_odds is None else 1 / (1 + np.exp(-log_odds.astype(float)))


def fit_recalibration(
    unit: Unit, readings: Readings, settings: EvaluationConfig
) -> Recalibration | None:
    """Fit calibration and thresholds on a selection split; None without probabilities."""
    # Without them there is nothing to map, and answers need no thresholds.
    log_odds = unit.log_odds(readings)
    if log_odds is None:
        return None
    return recalibration.fit(log_odds, unit.reference, settings.calibration)


def summarise(unit: Unit, answers: SetAnswers, settings: EvaluationConfig) -> dict[str, Any]:
    """Compute everything that is printed about one model on one set.

    Returns:
        `scores.summary`, and "scored": "image" or "study", "n_images", "subgroups" where a set has some
        (`subgroups.subgroup_scores`), and with a recalibration "recalibrated": what was fitted (`Recalibration.about`),
        "calibration" of the mapped probabilities, and "at_thresholds" (`scores.threshold_scores`). "covered" and
        "boxed", see `cover_scores`; "sampled", see `sampled_scores`.
    """
    bootstrap, log_odds = Bootstrap(settings.bootstrap), unit.log_odds(answers.real)
    named, probabilities = unit.answers(_named(answers.real)), _probabilities(log_odds)
    summary = scores.summary(
        named,
        unit.reference,
        other_images={name: unit.answers(given) for name, given in answers.other_images.items()},
        trace={name: unit.mean(values) for name, values in answers.trace_terms.items()},
        probabilities=probabilities,
        bootstrap=bootstrap,
    )
    # What the counts are counts of.
    summary |= {
        "scored": "image" if unit.studies is None else "study",
        "n_images": len(answers.real.answer),
    }
    # Of phantoms nothing is known that would divide them.
    if unit.columns:
        summary["subgroups"] = subgroup_scores(
            named, unit.reference, unit.columns, probabilities=probabilities, bootstrap=bootstrap
        )
    # Fitted elsewhere, shown here beside the numbers before it.
    if answers.recalibration is not None and log_odds is not None:
        mapped = answers.recalibration.probabilities(log_odds)
        summary["recalibrated"] = {
            **answers.recalibration.about(),
            "calibration": scores.calibration(mapped, unit.reference, bootstrap=bootstrap),
            "at_thresholds": scores.threshold_scores(
                mapped, answers.recalibration.thresholds, unit.reference, bootstrap=bootstrap
            ),
        }
    if answers.samples is not None:
        summary["sampled"] = sampled_scores(answers.samples, unit.films, bootstrap)
    for name, covered in (("covered", answers.covered), ("boxed", answers.boxed)):
        if covered is not None and len(covered[0]):
            summary[name] = cover_scores(answers.real, covered, unit.films, bootstrap)
    return summary


def sampled_scores(samples: Samples, films: Reference, bootstrap: Bootstrap) -> dict[str, Any]:
    """Score several completions of each image, image by image.

    Returns:
        "traces" (k), and {value, lo, hi} of "mean_at_k" (Jaccard of a completion, mean), "best_at_k" (of the best),
        "majority_at_k" (of the labels that more than half of the k name), "exact_at_1" (share of completions whose
        known labels are all right) and "pass_at_k" (share of images with one such); "calibration" of the mean
        probability over the k traces.
    """
    count = samples.valid.shape[1]
    # Each completion is scored as the only one would be.
    jaccard = np.stack(
        [
            scores.jaccard_rows(Answers(samples.answer[:, place], samples.valid[:, place]), films)
            for place in range(count)
        ],
        axis=1,
    )
    named = samples.answer & samples.valid[..., None]
    # Where none could be parsed there is no answer of a majority either.
    majority_jaccard = scores.jaccard_rows(
        Answers(2 * named.sum(1) > count, samples.valid.any(axis=1)), films
    )
    # A row with no known label has no score, and no completion of it is right.
    is_scored = np.isfinite(majority_jaccard)
    is_exact = (jaccard == 1)[is_scored]
    # A patient's images are drawn together, as everywhere.
    columns = {
        "mean_at_k": jaccard[is_scored].mean(1),
        "best_at_k": jaccard[is_scored].max(1),
        "majority_at_k": majority_jaccard[is_scored],
        "exact_at_1": is_exact.mean(1),
        "pass_at_k": is_exact.any(1),
    }
    groups = None if films.groups is None else np.asarray(films.groups)[is_scored]
    # The mean of probabilities, not of log-odds: k traces are k readers.
    mean_probability = (1 / (1 + np.exp(-samples.log_odds.astype(float)))).mean(1)
    return {
        "traces": count,
        **{name: estimate_mean(values, groups, bootstrap) for name, values in columns.items()},
        "calibration": scores.calibration(mean_probability, films, bootstrap=bootstrap),
    }


def cover_scores(
    readings: Readings,
    audited: tuple[np.ndarray, Mapping[str, Answers]],
    films: Reference,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Score answers to covered images, image by image.

    Args:
        readings: of the images as they are.
        audited: places that were read with covers, and what was answered.
        films: what is so of every image of the set.
        bootstrap: how the intervals are made.

    Returns:
        "n", the images that were read, and "images", as of `scores.image_use_audit`: drops are from these very images.
    """
    places, covered = audited
    real = Answers(readings.answer[places], readings.valid[places])
    # The same images of what is so.
    columns: dict[str, Any] = {
        name: None if values is None else np.asarray(values)[places]
        for name, values in vars(films).items()
    }
    reference = Reference(**columns)
    shown = {"real": real, **covered}
    return {
        "n": len(places),
        "images": scores.image_use_audit(shown, reference, bootstrap=bootstrap),
    }


def compare(
    set_name: str,
    model_pair: tuple[str, str],
    readings: Mapping[str, Readings],
    unit: Unit,
    resamples: int,
) -> list[dict[str, Any]]:
    """Bootstrap the paired differences, second minus first, of every score that both models have."""
    pair = [readings[model] for model in model_pair]
    return paired_rows(
        set_name,
        model_pair,
        [unit.answers(_named(of_model)) for of_model in pair],
        [unit.log_odds(of_model) for of_model in pair],
        unit.reference,
        resamples,
    )


def paired_rows(
    set_name: str,
    model_pair: tuple[str, str],
    answers: Sequence[Answers],
    log_odds: Sequence[np.ndarray | None],
    reference: Reference,
    resamples: int,
) -> list[dict[str, Any]]:
    """Bootstrap paired differences, second minus first.

    Args:
        set_name: for the rows.
        model_pair: names of both models, for the rows.
        answers: of both, to the units of `reference`.
        log_odds: of both, float [N, 14], or None.
        reference: what is so.
        resamples: of patients.

    Returns:
        Rows of evaluation.json's "comparisons": a, b, set, metric, diff, lo, hi.
    """
    bootstrap = Bootstrap(resamples)
    # On the same resamples of patients for both models, and for all scores.
    differences = {
        metric: scores.paired_bootstrap(
            metric, answers[0], answers[1], reference, bootstrap=bootstrap
        )
        for metric in COMPARED
    }
    # Only where both models have them.
    weighed = [_probabilities(values) for values in log_odds]
    if weighed[0] is not None and weighed[1] is not None:
        differences |= probability_scores.paired_differences(
            weighed[0], weighed[1], reference, bootstrap=bootstrap
        )
    model_names = {"a": model_pair[0], "b": model_pair[1], "set": set_name}
    return [
        {**model_names, "metric": metric, "diff": value, "lo": lower_bound, "hi": upper_bound}
        for metric, (value, lower_bound, upper_bound) in differences.items()
    ]
