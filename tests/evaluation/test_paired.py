"""Two runs compared by what they have saved: on units that both have, by patient, where the truth is one."""

import json
import types
import zipfile

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.evaluation import paired, predictions
from cxr_jax.evaluation.predictions import SetPredictions
from cxr_jax.evaluation.set_scores import SetAnswers, Unit
from cxr_jax.metrics import probability_scores, scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.metrics.study_units import Studies

COUNT = 60
GENERATOR = np.random.default_rng(0)
TRUTH = GENERATOR.random((COUNT, 14)) < 0.3
KNOWN = GENERATOR.random((COUNT, 14)) < 0.9
REFERENCE = Reference(TRUTH, KNOWN, np.arange(COUNT) // 3, ~KNOWN)


def answered(seed, model, rows=slice(None), reference=REFERENCE, weighs=True):
    generator = np.random.default_rng(seed)
    odds = (np.where(TRUTH, 1.0, -1.0) + generator.normal(0, 2, TRUTH.shape)).astype(np.float32)
    valid = generator.random(COUNT) < 0.9
    columns = {name: np.asarray(values)[rows] for name, values in vars(reference).items()}
    return SetPredictions(
        ids=np.array([f"film {place}" for place in range(COUNT)])[rows],
        protocol="a set: so many films",
        reference=Reference(**columns),
        answers={"base": Answers(odds[rows] > 1), model: Answers(odds[rows] > 0, valid[rows])},
        log_odds={model: odds[rows]} if weighs else {},
    )


@pytest.fixture
def runs(tmp_path):
    """Two runs; the second has other films, too, and in another order."""
    order = np.random.default_rng(5).permutation(COUNT)
    for name, of_set in (
        ("a", answered(1, "SFT", slice(0, 50))),
        ("b", answered(2, "RL", order[order > 9])),
    ):
        (tmp_path / name).mkdir()
        predictions.save(tmp_path / name, {"files": of_set})
    return [str(tmp_path / name) for name in "ab"]


def test_what_is_saved_is_read(tmp_path):
    of_set = answered(3, "m/x")
    predictions.save(tmp_path, {"A|b": of_set})
    read = predictions.load(tmp_path)["A|b"]
    assert read.protocol == of_set.protocol and read.ids.tolist() == of_set.ids.tolist()
    for name, values in vars(of_set.reference).items():
        np.testing.assert_array_equal(getattr(read.reference, name), values)
    assert [*read.answers] == ["base", "m/x"] and [*read.log_odds] == ["m/x"]
    np.testing.assert_array_equal(read.answers["m/x"].labels, of_set.answers["m/x"].labels)
    np.testing.assert_array_equal(read.answers["m/x"].valid, of_set.answers["m/x"].valid)
    assert np.asarray(read.answers["base"].valid).all()
    np.testing.assert_array_equal(read.log_odds["m/x"], of_set.log_odds["m/x"])


def test_differences_are_those_of_the_films_that_both_have(runs, capsys):
    assert paired.main([*runs, "--bootstrap=50", "--json"]) == 0
    rows = {row["metric"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    common = slice(10, 50)
    first, second = (answered(seed, model, common) for seed, model in ((1, "SFT"), (2, "RL")))
    reference = first.reference
    for metric in ("jaccard", "macro_f1", "micro_f1"):
        wanted = scores.paired_bootstrap(
            metric, first.answers["SFT"], second.answers["RL"], reference, bootstrap=Bootstrap(50)
        )
        row = rows[metric]
        assert [row["diff"], row["lo"], row["hi"]] == pytest.approx(wanted, abs=1e-12)
        assert (row["a"], row["b"], row["set"]) == ("SFT", "RL", "files")
    shares = [
        1 / (1 + np.exp(-one.log_odds[name].astype(float)))
        for one, name in ((first, "SFT"), (second, "RL"))
    ]
    wanted = probability_scores.paired_differences(*shares, reference, bootstrap=Bootstrap(50))
    assert rows.keys() - {"jaccard", "macro_f1", "micro_f1"} == wanted.keys()
    for metric, difference in wanted.items():
        row = rows[metric]
        assert [row["diff"], row["lo"], row["hi"]] == pytest.approx(difference, abs=1e-12)

    # As text: what is compared stands with it, and a model without probabilities is compared by answers.
    assert paired.main([*runs, "--bootstrap=5", "--model_a=base"]) == 0
    out = capsys.readouterr().out
    assert "files: 40 that both have, of 50 and 50; intervals draw 14 patients" in out
    assert "RL - base on files: jaccard" in out and "auroc" not in out and "scored: a set" in out
    # A run with itself: no difference, and both models have names.
    assert paired.main([runs[0], runs[0], "--bootstrap=5"]) == 0
    assert "SFT (B) - SFT (A) on files: jaccard +0.000 [+0.000, +0.000]" in capsys.readouterr().out


def test_what_is_no_pair_is_refused_in_one_line(runs, tmp_path, capsys):
    other = Reference(TRUTH ^ (np.arange(COUNT) == 20)[:, None], KNOWN, REFERENCE.groups, ~KNOWN)
    cases = {
        "differs in the runs": {"files": answered(2, "RL", reference=other)},
        "no set of one name (files and C)": {"C": answered(2, "RL")},
        "no film is in both": {"files": answered(2, "RL", slice(50, 60))},
    }
    for place, (message, sets) in enumerate(cases.items()):
        folder = tmp_path / f"case{place}"
        folder.mkdir()
        predictions.save(folder, sets)
        assert paired.main([runs[0], str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    # Sets of other names can be paired.
    assert paired.main([runs[0], str(tmp_path / "case1"), "--sets=files,C", "--bootstrap=3"]) == 0
    for flags in (["--sets=files,D"], ["--model_b=none"], ["--bootstrap=0"]):
        assert paired.main([*runs, *flags]) == 2
    assert paired.main([runs[0], str(tmp_path)]) == 2
    assert "evaluate again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["torn", "text", "format", "shapes"])
def test_damaged_files_are_refused(runs, tmp_path, damage):
    path = tmp_path / "a" / predictions.FILE
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-400])
    if damage == "text":
        path.write_text("no file of numbers")
    if damage in ("format", "shapes"):
        with np.load(path) as arrays:
            kept = dict(arrays)
        if damage == "format":
            kept["about"] = np.array(json.dumps({**json.loads(str(kept["about"])), "format": 2}))
        else:
            kept["0 valid 1"] = kept["0 valid 1"][1:]
        np.savez(path, **kept)
    with pytest.raises(UserError, match=str(path)):
        predictions.load(tmp_path / "a")
    assert zipfile.is_zipfile(tmp_path / "b" / predictions.FILE)


def test_studies_are_saved_as_studies():
    names = [f"study p{place // 4} s{place // 2}" for place in range(8)]
    studies = Studies.from_names(names)
    films = Reference(TRUTH[:8], groups=np.arange(8) // 4)
    unit = Unit(studies.reference(films), {}, films, studies)
    readings = types.SimpleNamespace(
        answer=TRUTH[:8], valid=np.ones(8, bool), log_odds=np.float32(np.arange(112).reshape(8, 14))
    )
    scored = types.SimpleNamespace(ids=[str(place) for place in range(8)], studies=names)
    found = predictions.of_set(scored, unit, {"m": SetAnswers(readings, {}, {})}, "line")
    assert found.ids.tolist() == names[::2]
    np.testing.assert_array_equal(found.log_odds["m"], readings.log_odds[1::2])
    np.testing.assert_array_equal(
        np.asarray(found.answers["m"].labels), TRUTH[0:8:2] | TRUTH[1:8:2]
    )
