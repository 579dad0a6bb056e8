"""Parts of a test set, studies, and calibration that is fitted apart."""

import json

import numpy as np
import pytest

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import probability_scores, recalibration, scores, subgroups
from cxr_jax.metrics.bootstrap import Bootstrap
from cxr_jax.metrics.label_counts import Answers, Reference
from cxr_jax.metrics.study_units import Studies


def make(seed, count):
    generator = np.random.default_rng(seed)
    probabilities = generator.random((count, 14))
    truth = generator.random((count, 14)) < probabilities
    known = generator.random((count, 14)) < 0.8
    return probabilities, truth, known


# ---- Parts ----


def test_a_part_is_scored_as_if_it_were_the_set():
    probabilities, truth, known = make(0, 90)
    generator = np.random.default_rng(1)
    views = generator.choice(["AP", "PA", subgroups.UNKNOWN], 90)
    answers = Answers(probabilities > 0.6, generator.random(90) < 0.9)
    patients = np.arange(90) // 2
    found = subgroups.subgroup_scores(
        answers,
        Reference(truth, known, patients),
        {"view": views, "sex": ["F"] * 90},
        probabilities=probabilities,
        bootstrap=Bootstrap(20),
    )
    assert list(found) == ["view"]  # of one sex alone there is nothing to compare
    assert list(found["view"]["parts"])[-1] == subgroups.UNKNOWN
    for name, part in found["view"]["parts"].items():
        rows = np.flatnonzero(views == name)
        alone = scores.summary(
            Answers(answers.labels[rows], answers.valid[rows]),
            Reference(truth[rows], known[rows]),
            probabilities=probabilities[rows],
            bootstrap=Bootstrap(1),
        )
        assert part["n"] == len(rows) and part["n_units"] == len(set(patients[rows]))
        assert part["jaccard"]["value"] == pytest.approx(alone["jaccard"]["value"])
        assert part["macro_f1"]["value"] == pytest.approx(alone["macro_f1"]["all"]["value"])
        assert part["micro_f1"]["value"] == pytest.approx(alone["micro_f1"]["all"]["value"])
        assert part["mean_auroc"]["value"] == pytest.approx(alone["calibration"]["mean_auroc"])
        for label, row in alone["per_label"].items():
            assert part["n_pos"][label] == row["n_pos"]
    json.dumps(found, allow_nan=False)


def test_a_gap_is_found_and_has_its_interval():
    """A reader that is right on 19 of 20 labels of men and on 12 of 20 of women; three patients are too few."""
    generator = np.random.default_rng(2)
    truth = generator.random((600, 14)) < 0.3
    sexes = np.array(["M", "F"])[np.arange(600) % 2]
    sexes[:3] = "X"
    is_right = generator.random((600, 14)) < np.where(sexes == "M", 0.95, 0.6)[:, None]
    found = subgroups.subgroup_scores(
        Answers(np.where(is_right, truth, ~truth)),
        Reference(truth, groups=np.arange(600)),
        {"sex": sexes},
        bootstrap=Bootstrap(200),
    )["sex"]
    for gap in found["gaps"].values():
        assert (gap["high"], gap["low"]) == ("M", "F") and 0 < gap["lo"] < gap["value"] < gap["hi"]
    parts = found["parts"]
    difference = parts["M"]["jaccard"]["value"] - parts["F"]["jaccard"]["value"]
    assert found["gaps"]["jaccard"]["value"] == pytest.approx(difference)
    # The interval is that of the difference of independent parts.
    widths = [parts[sex]["jaccard"]["hi"] - parts[sex]["jaccard"]["lo"] for sex in "MF"]
    gap = found["gaps"]["jaccard"]
    assert gap["hi"] - gap["lo"] == pytest.approx(np.hypot(*widths), rel=0.25)


def test_parts_are_compared_on_the_labels_of_both():
    """A reader that is right everywhere: a label that one part alone has must not make a gap."""
    truth = np.zeros((40, 14), bool)
    truth[:, 2] = np.arange(40) % 2 == 0
    truth[:20, 4] = True
    labels = truth.copy()
    labels[:20, 4] = np.arange(20) < 2  # wrong on a label of which the other part has no positive
    gap = subgroups.subgroup_scores(
        Answers(labels),
        Reference(truth),
        {"source": ["a"] * 20 + ["b"] * 20},
        bootstrap=Bootstrap(5),
    )["source"]["gaps"]["macro_f1"]
    assert gap["labels"] == [CHEXPERT_14[2]] and gap["value"] == 0


@pytest.mark.parametrize(
    ("age", "name"),
    [
        (0, "<40"),
        (39.9, "<40"),
        (40, "40-60"),
        (59, "40-60"),
        (60, "60-75"),
        (75, "60-75"),
        (75.1, ">75"),
        (None, "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_ages(age, name):
    assert subgroups.age_group(age) == name


# ---- Studies ----


def test_studies_are_what_their_films_are_together():
    names = ["a", "b", "a", "c", "b"]
    studies = Studies.from_names(names)
    generator = np.random.default_rng(3)
    labels, truth, known, blank = generator.random((4, 5, 14)) < 0.5
    valid, groups = np.array([1, 0, 1, 0, 1], bool), ["p", "q", "p", "r", "q"]
    joined = studies.answers(Answers(labels, valid))
    reference = studies.reference(Reference(truth, known, groups, blank))
    largest = studies.largest(generator.normal(size=(5, 14)) * 0 + np.arange(5)[:, None])
    for place, name in enumerate("abc"):
        films = [film for film, of in enumerate(names) if of == name]
        for label in range(14):
            assert joined.labels[place, label] == any(labels[f, label] and valid[f] for f in films)
            assert reference.truth[place, label] == any(
                truth[f, label] and known[f, label] for f in films
            )
            assert reference.known[place, label] == any(known[f, label] for f in films)
            all_blank = all(blank[f, label] and not known[f, label] for f in films)
            assert reference.blank[place, label] == all_blank
        assert joined.valid[place] == any(valid[film] for film in films)
        assert largest[place, 0] == max(films)
    assert list(reference.groups) == ["p", "q", "r"]
    assert studies.mean([1, 2, 3, 4, 6]).tolist() == [2, 4, 4]
    assert studies.columns({"sex": ["F", "M", "F", "M", "M"]}) == {"sex": ["F", "M", "M"]}


# ---- Calibration ----


def overconfident(seed, count):
    """Log-odds that are three times too large, and shifted for one label; the truth follows the right ones."""
    generator = np.random.default_rng(seed)
    right = generator.normal(-0.5, 1.5, (count, 14))
    truth = generator.random((count, 14)) < 1 / (1 + np.exp(-right))
    log_odds = 3 * right
    log_odds[:, 1] += 4
    return log_odds, truth


@pytest.mark.parametrize("method", recalibration.METHODS)
def test_a_map_that_is_fitted_apart_undoes_overconfidence(method):
    found = recalibration.fit(
        *overconfident(0, 2000)[:1], Reference(overconfident(0, 2000)[1]), method
    )
    log_odds, truth = overconfident(1, 2000)
    before, after = (
        scores.calibration(values, Reference(truth), bootstrap=Bootstrap(2))
        for values in (1 / (1 + np.exp(-log_odds)), found.probabilities(log_odds))
    )
    if method == "platt":
        assert np.allclose(found.slopes, 1 / 3, atol=0.06) and abs(found.offsets[1] + 4 / 3) < 0.3
        assert after["ece_mean"] < 0.03 < 0.1 < before["ece_mean"] and not found.pooled
    if method == "temperature":
        assert len(set(found.slopes)) == 1 and not found.offsets.any()
        assert after["ece"] < 0.5 * before["ece"]
    if method == "none":
        assert after["ece"] == pytest.approx(before["ece"], abs=1e-9)
    # A map of each label keeps its order, and with it what needs ranks alone.
    assert after["mean_auroc"] == pytest.approx(before["mean_auroc"], abs=1e-9)
    json.dumps(found.about(), allow_nan=False)


def test_odd_selection_splits_have_a_fit():
    """Separable, one class alone, nothing known, one image: finite numbers, and the temperature of all labels."""
    log_odds, truth = overconfident(2, 60)
    truth[:, 0], truth[:, 2] = True, False
    truth[:, 3] = log_odds[:, 3] > 0
    known = np.ones_like(truth)
    known[:, 5] = False
    found = recalibration.fit(log_odds, Reference(truth, known))
    assert np.isfinite(found.slopes).all() and np.isfinite(found.offsets).all()
    assert {CHEXPERT_14[label] for label in (0, 2, 5)} <= set(found.pooled)
    assert found.thresholds[2] == found.thresholds[5] == 0.5
    assert found.slopes[0] == found.slopes[2]
    recalibration.fit(log_odds[:1], Reference(truth[:1]))
    nothing = recalibration.fit(log_odds, Reference(truth, np.zeros_like(truth)))
    assert (nothing.slopes == 1).all()


def test_a_model_worse_than_chance_is_not_turned_round():
    log_odds, truth = overconfident(3, 400)
    for method in ("platt", "temperature"):
        found = recalibration.fit(-log_odds, Reference(truth), method)
        assert (found.slopes > 0).all()
        mapped = found.probabilities(-log_odds)
        assert (np.diff(mapped[np.argsort(-log_odds[:, 7]), 7]) >= 0).all()
        if method == "platt":
            assert np.allclose(mapped.mean(0), truth.mean(0), atol=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_the_threshold_is_the_best_of_all(tied):
    generator = np.random.default_rng(4)
    for count in (1, 2, 5, 40):
        probabilities = generator.random(count)
        probabilities = np.round(probabilities, 1) if tied else probabilities
        truth = generator.random(count) < 0.4
        found = recalibration.best_threshold(probabilities, truth)
        if not truth.any():
            assert found == 0.5
            continue

        def score(threshold, probabilities=probabilities, truth=truth):
            called = probabilities >= threshold
            return 2 * (called & truth).sum() / (called.sum() + truth.sum())

        assert score(found) == max(map(score, [0, *probabilities]))
    assert probability_scores.FEW == 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_odds_that_are_no_number_are_not_fitted(value):
    log_odds = np.zeros((4, len(CHEXPERT_14)))
    log_odds[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        recalibration.fit(log_odds, Reference(np.zeros(log_odds.shape, bool)), method="platt")


def test_an_age_below_zero_is_unknown():
    assert subgroups.age_group(-1) == subgroups.UNKNOWN
