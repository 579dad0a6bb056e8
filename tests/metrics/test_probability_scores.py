"""metrics/probability_scores.py against loops that spell the definitions out, one pair and one resample at a time."""

import json
import os

import numpy as np
import pytest
from places import ROOT

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import probability_scores, scores
from cxr_jax.metrics.scores import Bootstrap, Reference


def plain_auroc(probability, truth):
    positives = [p for p, t in zip(probability, truth, strict=True) if t]
    negatives = [p for p, t in zip(probability, truth, strict=True) if not t]
    pairs = [(a > b) + 0.5 * (a == b) for a in positives for b in negatives]
    return sum(pairs) / len(pairs) if pairs else None


def plain_average_precision(probability, truth):
    if not any(truth) or all(truth):
        return None
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(probability), reverse=True):
        called = [t for p, t in zip(probability, truth, strict=True) if p >= threshold]
        recall = sum(called) / sum(truth)
        area += (recall - recall_before) * sum(called) / len(called)
        recall_before = recall
    return area


def plain_ece(cells, bins):
    """cells: (probability, truth)."""
    gap = 0.0
    for place in range(bins):
        inside = [(p, t) for p, t in cells if min(int(p * bins), bins - 1) == place]
        if inside:
            gap += abs(sum(p for p, _ in inside) - sum(t for _, t in inside))
    return gap / len(cells)


def plain_gaps(cells, bins=15):
    """Sum of probability minus truth of each bin."""
    return [
        sum(p - t for p, t in cells if min(int(p * bins), bins - 1) == place)
        for place in range(bins)
    ]


def cells_by_label(probabilities, truth, known):
    return [
        [(float(p), bool(t)) for p, t, k in zip(*column, strict=True) if k]
        for column in zip(probabilities.T, truth.T, known.T, strict=True)
    ]


def plain_held(drawn, whole):
    """Calibration errors of a resample whose bins keep the signs that they have in the whole set."""
    held = lambda some, every: (
        sum(
            gap * np.sign(of_set)
            for gap, of_set in zip(plain_gaps(some), plain_gaps(every), strict=True)
        )
        / len(some)
    )
    pairs = list(zip(cells_by_label(*drawn), cells_by_label(*whole), strict=True))
    both = [held(some, every) for some, every in pairs if {t for _, t in some} == {False, True}]
    pooled = [[cell for cells in side for cell in cells] for side in zip(*pairs, strict=True)]
    return {"ece": held(*pooled), "ece_mean": float(np.mean(both))}


def plain_ece_limits(value, raw, held, floor=0.0):
    """Percentiles of the held errors; what resampling adds on average widens the side that it is on."""
    low, high = np.percentile(held, [2.5, 97.5])
    bias = np.mean(raw) - value
    if floor is None:
        return [low - max(bias, 0), high - min(bias, 0)]
    return [max(low - max(bias, 0), floor), high]


def plain(probabilities, truth, known, bins=15):
    """Every number of a set, None where it is undefined."""
    label_cells = cells_by_label(probabilities, truth, known)
    split = [tuple(zip(*cells, strict=True)) if cells else ((), ()) for cells in label_cells]
    areas = [plain_auroc(*cells) for cells in split]
    precisions = [plain_average_precision(*cells) for cells in split]
    eces = [plain_ece(cells, bins) if cells else None for cells in label_cells]
    briers = [
        sum((p - t) ** 2 for p, t in cells) / len(cells) if cells else None for cells in label_cells
    ]
    both = [place for place, area in enumerate(areas) if area is not None]
    mean = lambda values: float(np.mean([values[place] for place in both])) if both else None
    every_cell = [cell for cells in label_cells for cell in cells]
    return {
        "auroc": areas,
        "average_precision": precisions,
        "ece_by_label": eces,
        "brier_by_label": briers,
        "mean_auroc": mean(areas),
        "mean_average_precision": mean(precisions),
        "ece": plain_ece(every_cell, bins),
        "ece_mean": mean(eces),
        "brier": sum((p - t) ** 2 for p, t in every_cell) / len(every_cell),
        "brier_mean": mean(briers),
    }


def make(seed, count, kind="plain"):
    generator = np.random.default_rng(seed)
    probabilities = generator.random((count, 14))
    truth = generator.random((count, 14)) < probabilities * generator.random(14)
    known = generator.random((count, 14)) < 0.8
    known[:, 3] = False  # a label of which nothing is known
    if kind == "tied":
        probabilities = np.round(probabilities * 8) / 8
    if kind == "constant":
        probabilities[:] = 0.25
    if kind == "edges":
        probabilities = generator.choice([0.0, 1.0, 1 / 15, 14 / 15, 1e-300], (count, 14))
    return probabilities, truth, known


def near(ours, theirs):
    return theirs is None and ours is None or ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("kind", ["plain", "tied", "constant", "edges"])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_every_number_equals_its_definition(kind, count):
    for seed in range(4):
        probabilities, truth, known = make(seed, count, kind)
        known[0, 0] = True  # at least one cell
        wanted = plain(probabilities, truth, known)
        found = scores.calibration(
            probabilities, Reference(truth, known), bootstrap=Bootstrap(3, seed)
        )
        for name in probability_scores.OVERALL:
            assert near(found[name], wanted[name]), (name, seed)
            assert near(found["estimates"][name]["value"], wanted[name])
        for place, (label, row) in enumerate(found["per_label"].items()):
            assert near(found["auroc"][label], wanted["auroc"][place])
            assert near(row["average_precision"]["value"], wanted["average_precision"][place])
            assert near(row["ece"]["value"], wanted["ece_by_label"][place])
            assert near(row["brier"]["value"], wanted["brier_by_label"][place])
            assert row["n_pos"] == (truth & known)[:, place].sum()
            assert row["n_neg"] == (~truth & known)[:, place].sum()
            assert (label in found["labels"]) == (row["n_pos"] > 0 < row["n_neg"])
        assert sum(bin_["n"] for bin_ in found["reliability"]) == known.sum()
        json.dumps(found, allow_nan=False)
        column = known[:, 5]
        assert near(
            probability_scores.average_precision(probabilities[column, 5], truth[column, 5]),
            wanted["average_precision"][5],
        )


def test_intervals_equal_a_loop_over_resamples_of_patients():
    """The rows of the drawn patients, written out and scored one resample after the other."""
    probabilities, truth, known = make(3, 40, "tied")
    groups = [f"p{place // 3}" for place in range(40)]
    bootstrap = Bootstrap(30, 4)
    names = np.unique(groups)
    rows_of = {name: [row for row, group in enumerate(groups) if group == name] for name in names}
    other = np.clip(probabilities + np.random.default_rng(0).normal(0, 0.2, truth.shape), 0, 1)
    drawn, held = [], []
    sets = [(values, truth, known) for values in (probabilities, other)]
    for draw in np.random.default_rng(4).integers(len(names), size=(30, len(names))):
        rows = np.concatenate([rows_of[names[unit]] for unit in draw])
        resampled = [tuple(column[rows] for column in whole) for whole in sets]
        drawn.append([plain(*of_model) for of_model in resampled])
        held.append([plain_held(*pair) for pair in zip(resampled, sets, strict=True)])

    reference = Reference(truth, known, groups)
    found = scores.calibration(probabilities, reference, bootstrap=bootstrap)
    paired = probability_scores.paired_differences(
        probabilities, other, reference, bootstrap=bootstrap
    )
    limits = lambda values: pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-12)
    for name in probability_scores.OVERALL:
        interval = found["estimates"][name]
        point = plain(*sets[1])[name] - plain(*sets[0])[name]
        raw = [one[name] for one, _ in drawn], [two[name] - one[name] for one, two in drawn]
        wanted = limits(raw[0]), limits(raw[1])
        if name.startswith("ece"):
            kept = [one[name] for one, _ in held], [two[name] - one[name] for one, two in held]
            wanted = (
                pytest.approx(plain_ece_limits(interval["value"], raw[0], kept[0]), abs=1e-12),
                pytest.approx(plain_ece_limits(point, raw[1], kept[1], floor=None), abs=1e-12),
            )
        assert [interval["lo"], interval["hi"]] == wanted[0]
        assert [paired[name].low, paired[name].high] == wanted[1]
        assert paired[name].value == pytest.approx(point, abs=1e-12)
    for place, label in enumerate(CHEXPERT_14):
        # A resample that has one class alone has no area, and does not count.
        areas = [one["auroc"][place] for one, _ in drawn if one["auroc"][place] is not None]
        interval = found["per_label"][label]["auroc"]
        if areas:
            assert [interval["lo"], interval["hi"]] == limits(areas)
        else:
            assert interval == {"value": None, "lo": None, "hi": None}


def test_films_of_one_patient_are_one_observation():
    """200 patients with five equal films each: intervals are twice as wide at least, and those of 200 rows."""
    # 2,000 resamples: with 400 the ends of an interval are themselves 5 % of its width off.
    bootstrap = Bootstrap(2000)
    probabilities, truth, _ = make(1, 200)
    once = scores.calibration(probabilities, Reference(truth), bootstrap=bootstrap)
    five = [np.repeat(values, 5, axis=0) for values in (probabilities, truth)]
    patients = np.repeat(np.arange(200), 5)
    by_row, by_patient = (
        scores.calibration(five[0], Reference(five[1], groups=groups), bootstrap=bootstrap)
        for groups in (None, patients)
    )
    width = lambda found: found["hi"] - found["lo"]
    for name in probability_scores.OVERALL:
        row, patient = (found["estimates"][name] for found in (by_row, by_patient))
        assert width(patient) >= 2 * width(row), name
        assert width(patient) == pytest.approx(width(once["estimates"][name]), abs=1e-12)
    for label in CHEXPERT_14:
        row, patient = (found["per_label"][label] for found in (by_row, by_patient))
        # Of two patients both ends of what is possible are soon reached.
        if patient["n_pos"] < 5 * 3:
            continue
        for metric in (*probability_scores.RANKED, *probability_scores.CALIBRATED):
            # An error that may be none at all has an interval that ends at 0.
            if metric != "ece" or patient[metric]["lo"] > 0:
                assert width(patient[metric]) >= 2 * width(row[metric]), (label, metric)
    paired = [
        probability_scores.paired_differences(
            five[0], np.sqrt(five[0]), Reference(five[1], groups=groups), bootstrap=bootstrap
        )
        for groups in (None, patients)
    ]
    for name in probability_scores.OVERALL:
        assert paired[1][name].high - paired[1][name].low >= 2 * (
            paired[0][name].high - paired[0][name].low
        ), name


def test_the_interval_of_a_calibration_error_may_hold_none_at_all():
    """Probabilities that are right: percentiles of the error itself never reach down to what is so."""
    held, missed, reps = 0, 0, 20
    for seed in range(reps):
        generator = np.random.default_rng(seed)
        probabilities = generator.beta(0.5, 1.5, (200, 14))
        truth = generator.random((200, 14)) < probabilities
        reference = Reference(truth, np.eye(14, dtype=bool)[[2] * 200])
        found = scores.calibration(probabilities, reference, bootstrap=Bootstrap(200))
        cells = probability_scores._cells_of(probabilities, reference, 15)
        _, drawn = probability_scores._sampled(cells, Bootstrap(200))
        interval = found["per_label"][CHEXPERT_14[2]]["ece"]
        assert interval["lo"] <= interval["value"] <= interval["hi"]
        held += interval["lo"] < 0.005
        missed += np.percentile(drawn["ece"][:, 2], 2.5) > 0.02
    assert missed == reps and held >= 0.4 * reps


def test_values_above_one_are_ranked_but_are_no_probabilities():
    probabilities, truth, known = make(2, 60)
    wanted = scores.calibration(probabilities, Reference(truth, known), bootstrap=Bootstrap(20))
    found = scores.calibration(
        2.5 * probabilities, Reference(truth, known), bootstrap=Bootstrap(20)
    )
    for name in ("auroc", "average_precision", "mean_auroc", "labels"):
        assert found[name] == wanted[name]
    assert found["ece"] is None is found["brier"] and found["reliability"] == []
    assert "outside 0..1" in found["refused"] and "\n" not in found["refused"]
    assert wanted["refused"] is None
    # What nobody knows the truth of is not looked at.
    probabilities[~known] = 7
    assert (
        scores.calibration(probabilities, Reference(truth, known), bootstrap=Bootstrap(20))
        == wanted
    )
    with pytest.raises(ValueError, match="not a number"):
        scores.calibration(np.full((60, 14), np.nan), Reference(truth, known))


def test_labels_with_few_positives_are_named():
    probabilities, truth, _ = make(5, 100)
    truth[:, 2] = np.arange(100) < 9
    truth[:, 4] = np.arange(100) >= 9
    truth[:, 6] = np.arange(100) < 10
    few = scores.calibration(probabilities, Reference(truth), bootstrap=Bootstrap(2))["few"]
    assert {CHEXPERT_14[2], CHEXPERT_14[4]} <= set(few) and CHEXPERT_14[6] not in few


@pytest.mark.skipif(
    not os.environ.get("CHEXPERT_TEST_PREDICTIONS"),
    reason="CHEXPERT_TEST_PREDICTIONS names no folder of the public predictions",
)
def test_public_predictions_equal_scikit_learn(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/oracle"))
    import chexpert_predictions

    folder = os.environ["CHEXPERT_TEST_PREDICTIONS"]
    assert chexpert_predictions.main(folder) < chexpert_predictions.TOLERANCE


@pytest.mark.parametrize("score", [probability_scores.auroc, probability_scores.average_precision])
def test_what_is_no_number_has_no_rank(score):
    with pytest.raises(ValueError, match="not a number"):
        score([0.1, float("nan"), 0.3], [0, 1, 1])
    # Log-odds may be infinite and still have an order.
    assert score([0.1, float("inf"), 0.3], [0, 1, 1]) == 1
