"""metrics/scores.py against loops that spell the definitions out."""

import json

import numpy as np
import pytest

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference


def make(seed, n, unknown=0.2, invalid=0.1):
    rng = np.random.default_rng(seed)
    truth = rng.random((n, 14)) < rng.random(14) * 0.6
    pred = np.where(rng.random((n, 14)) < 0.7, truth, rng.random((n, 14)) < 0.3)
    return pred, truth, rng.random((n, 14)) >= unknown, rng.random(n) >= invalid


def asked(pred, truth, known=None, valid=None):
    """The arguments of `summary`."""
    return Answers(pred, valid), Reference(truth, known)


def brute(pred, truth, known, valid, drop=()):
    """(mean Jaccard, macro-F1, micro-F1, {label: (tp, fp, fn, tn)}) by plain loops over Python sets."""
    jaccards, cells = [], {name: [0, 0, 0, 0] for name in CHEXPERT_14}
    for p, t, k, ok in zip(pred, truth, known, valid, strict=True):
        said = {i for i in range(14) if p[i] and k[i] and ok}
        real = {i for i in range(14) if t[i] and k[i]}
        if k.any():
            jaccards.append(
                0.0 if not ok else len(said & real) / len(said | real) if said | real else 1.0
            )
        for i, name in enumerate(CHEXPERT_14):
            if k[i]:
                cells[name][{(1, 1): 0, (1, 0): 1, (0, 1): 2, (0, 0): 3}[i in said, i in real]] += 1
    keep = [c for name, c in cells.items() if name not in drop]
    f1 = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn, _ in keep if tp + fn]
    tp, fp, fn = (sum(c[i] for c in keep) for i in range(3))
    return (
        np.mean(jaccards) if jaccards else None,
        np.mean(f1) if f1 else None,
        2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
        cells,
    )


def same(a, b):
    return a is None and b is None or a is not None and b is not None and abs(a - b) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 17, 60])
@pytest.mark.parametrize("unknown", [0.0, 0.3, 0.9])
def test_points_equal_brute_force(n, unknown):
    for seed in range(4):
        data = make(seed, n, unknown)
        out = scores.summary(*asked(*data), bootstrap=Bootstrap(10))
        for subset, drop in scores.SUBSETS.items():
            jaccard, macro, micro, cells = brute(*data, drop=drop)
            assert same(out["jaccard"]["value"], jaccard)
            assert same(out["macro_f1"][subset]["value"], macro)
            assert same(out["micro_f1"][subset]["value"], micro)
        for name, (tp, fp, fn, tn) in cells.items():
            row = out["per_label"][name]
            assert (row["tp"], row["fp"], row["fn"], row["tn"]) == (tp, fp, fn, tn)
            assert same(row["precision"], tp / (tp + fp) if tp + fp else None)
            assert same(row["recall"], tp / (tp + fn) if tp + fn else None)
        assert out["macro_f1"]["all"]["labels"] == [m for m, c in cells.items() if c[0] + c[2]]
        json.dumps(out, allow_nan=False)


@pytest.mark.parametrize("clustered", [False, True])
def test_interval_equals_a_loop_over_resamples(clustered):
    pred, truth, known, valid = make(3, 40)
    groups = np.repeat(np.arange(16), 3)[:40] if clustered else np.arange(40)
    out = scores.summary(
        Answers(pred, valid),
        Reference(truth, known, groups if clustered else None),
        bootstrap=Bootstrap(50),
    )
    names = np.unique(groups)
    rng, jaccards, macros = np.random.default_rng(0), [], []
    for draw in rng.integers(len(names), size=(50, len(names))):
        rows = np.concatenate([np.flatnonzero(groups == names[i]) for i in draw])
        jaccard, macro, _, _ = brute(pred[rows], truth[rows], known[rows], valid[rows])
        jaccards.append(jaccard)
        macros.append(macro)
    for got, samples in ((out["jaccard"], jaccards), (out["macro_f1"]["all"], macros)):
        np.testing.assert_allclose(
            [got["lo"], got["hi"]], np.percentile(samples, [2.5, 97.5]), atol=1e-12
        )


def test_interval_covers_a_known_spread():
    """Mean of N independent 0/1 Jaccards: the interval must be about +-1.96 sqrt(p q / N)."""
    rng = np.random.default_rng(0)
    truth = np.zeros((2000, 14), bool)
    truth[:, 0] = True
    pred = truth & (rng.random(2000) < 0.7)[:, None]
    out = scores.summary(*asked(pred, truth))["jaccard"]
    half = 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert abs((out["hi"] - out["lo"]) / 2 - half) < 0.15 * half
    assert out["lo"] < out["value"] < out["hi"]


def test_patients_widen_the_interval():
    pred, truth, _, _ = make(1, 50, 0, 0)
    pred, truth, groups = (np.repeat(x, 8, axis=0) for x in (pred, truth, np.arange(50)))
    width = lambda out: out["jaccard"]["hi"] - out["jaccard"]["lo"]
    by_patient = scores.summary(Answers(pred), Reference(truth, groups=groups))
    assert width(by_patient) > 2 * width(scores.summary(*asked(pred, truth)))
    named = Reference(truth, groups=[f"p{g}" for g in groups])
    assert scores.summary(Answers(pred), named, bootstrap=Bootstrap(5))["n_units"] == 50


def test_paired_difference():
    truth = make(5, 120, 0, 0)[1]
    rng = np.random.default_rng(1)
    a = truth ^ (rng.random(truth.shape) < 0.25)
    b = truth ^ (rng.random(truth.shape) < 0.10)
    known = rng.random(truth.shape) < 0.9
    valid_a = rng.random(120) < 0.95
    for metric, place in (("jaccard", 0), ("macro_f1", 1)):
        diff, lo, hi = scores.paired_bootstrap(
            metric,
            Answers(a, valid_a),
            Answers(b),
            Reference(truth, known),
            bootstrap=Bootstrap(40),
        )
        ones = np.ones(120, bool)
        assert same(
            diff, brute(b, truth, known, ones)[place] - brute(a, truth, known, valid_a)[place]
        )
        loop = [
            brute(b[i], truth[i], known[i], ones)[place]
            - brute(a[i], truth[i], known[i], valid_a[i])[place]
            for i in np.random.default_rng(0).integers(120, size=(40, 120))
        ]
        np.testing.assert_allclose([lo, hi], np.percentile(loop, [2.5, 97.5]), atol=1e-12)
        assert lo > 0
        assert scores.paired_bootstrap(metric, Answers(a), Answers(a), Reference(truth)) == (
            0,
            0,
            0,
        )
    with pytest.raises(ValueError, match="jaccard"):
        scores.paired_bootstrap("accuracy", Answers(a), Answers(b), Reference(truth))


def test_constant_policies():
    _, truth, known, _ = make(2, 90, 0.1, 0)
    out = scores.constant_policies(Reference(truth, known), bootstrap=Bootstrap(20))
    assert list(out["policies"]) == [
        "No Finding",
        "all labels",
        *(f"top-{k} prior" for k in range(1, 9)),
    ]
    ones = np.ones(90, bool)
    for policy in out["policies"].values():
        pred = np.tile(np.isin(CHEXPERT_14, policy["labels"]), (90, 1))
        jaccard, macro, micro, _ = brute(pred, truth, known, ones)
        assert (
            same(policy["jaccard"], jaccard)
            and same(policy["macro_f1"], macro)
            and same(policy["micro_f1"], micro)
        )
    for metric in ("jaccard", "macro_f1"):
        best = out[f"best_{metric}"]
        assert best[metric]["value"] == max(p[metric] for p in out["policies"].values())
        assert best[metric]["lo"] <= best[metric]["value"] <= best[metric]["hi"]
    prior = np.zeros(14)
    prior[[3, 10]] = 0.2, 0.5
    given = scores.constant_predictions(Reference(truth), prior=prior)
    assert np.flatnonzero(given["top-1 prior"]).tolist() == [10]
    assert np.flatnonzero(given["top-2 prior"]).tolist() == [3, 10]


def test_image_use_audit():
    _, truth, _, _ = make(4, 200, 0, 0)
    reads = {
        "real": Answers(truth),
        "blank": Answers(np.zeros_like(truth)),
        "swapped": Answers(np.roll(truth, 1, axis=0)),
    }
    out = scores.image_use_audit(reads, Reference(truth), bootstrap=Bootstrap(100))
    assert out["real"] == {"jaccard": 1.0, "macro_f1": 1.0}
    for name in ("blank", "swapped"):
        assert out[name]["drop_jaccard"]["lo"] > 0 and out[name]["same_answer"] < 0.3
    deaf = scores.image_use_audit(
        dict.fromkeys(reads, reads["blank"]), Reference(truth), bootstrap=Bootstrap(20)
    )
    assert (
        deaf["swapped"]["drop_jaccard"] == {"value": 0, "lo": 0, "hi": 0}
        and deaf["swapped"]["same_answer"] == 1
    )
    with pytest.raises(ValueError, match="real"):
        scores.image_use_audit({"blank": Answers(truth)}, Reference(truth))


def test_gain_over_the_best_constant():
    pred, truth, known, valid = make(6, 150, 0.1, 0.05)
    out = scores.summary(*asked(pred, truth, known, valid), bootstrap=Bootstrap(30))
    for metric, value in (("jaccard", out["jaccard"]), ("macro_f1", out["macro_f1"]["all"])):
        gain, best = out["over_constant"][metric], out["constants"][f"best_{metric}"]
        assert gain["policy"] == best["policy"] and gain["lo"] <= gain["value"] <= gain["hi"]
        assert same(gain["value"], value["value"] - best[metric]["value"])


def test_edges():
    none = np.zeros((3, 14), bool)
    out = scores.summary(*asked(none, none), bootstrap=Bootstrap(5))
    assert out["jaccard"]["value"] == 1 and out["macro_f1"]["all"] == {
        "value": None,
        "lo": None,
        "hi": None,
        "labels": [],
    }
    out = scores.summary(*asked(none, none, valid=[True, True, False]), bootstrap=Bootstrap(5))
    assert out["jaccard"]["value"] == pytest.approx(2 / 3) and out[
        "parse_failure_rate"
    ] == pytest.approx(1 / 3)
    out = scores.summary(*asked(~none, ~none, known=none), bootstrap=Bootstrap(5))
    assert out["jaccard"]["value"] is None and out["micro_f1"]["all"]["value"] is None
    assert all(
        row["n_known"] == 0 and row["f1"]["value"] is None for row in out["per_label"].values()
    )
    json.dumps(out, allow_nan=False)
    one = scores.summary(*asked(~none[:1], ~none[:1]))
    assert one["macro_f1"]["all"] == {"value": 1, "lo": 1, "hi": 1, "labels": list(CHEXPERT_14)}
    for bad in (none[:0], none[:, :13], none[0]):
        with pytest.raises(ValueError):
            scores.summary(*asked(bad, bad))
    with pytest.raises(ValueError, match="shapes"):
        scores.summary(*asked(none, none, valid=[True]))


def test_calibration_against_loops():
    rng = np.random.default_rng(0)
    p = np.round(rng.random((80, 14)), 1)
    truth = rng.random((80, 14)) < p
    known = rng.random((80, 14)) < 0.8
    out = scores.calibration(p, Reference(truth, known), bins=10)
    ece = 0.0
    for b in range(10):
        cell = known & (np.minimum((p * 10).astype(int), 9) == b)
        ece += (
            abs(p[cell].mean() - truth[cell].mean()) * cell.sum() / known.sum() if cell.any() else 0
        )
    assert out["ece"] == pytest.approx(ece) and out["brier"] == pytest.approx(
        ((p - truth)[known] ** 2).mean()
    )
    pos, neg = p[known[:, 4] & truth[:, 4], 4], p[known[:, 4] & ~truth[:, 4], 4]
    pairs = [(a > b) + 0.5 * (a == b) for a in pos for b in neg]
    assert out["auroc"][CHEXPERT_14[4]] == pytest.approx(np.mean(pairs))
    assert scores.auroc([0.1, 0.2], [True, True]) is None


def test_deterministic():
    data = make(0, 2000)
    out = scores.summary(*asked(*data))
    assert out == scores.summary(*asked(*data))
    assert out != scores.summary(*asked(*data), bootstrap=Bootstrap(seed=1))
