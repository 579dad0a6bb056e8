"""Which images are scored, part by part, and the numbers of a set of real rows with a reader that is known."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.data.sources import label_table, manifest, phantom, splits
from cxr_jax.data.sources.base import ENDLESS
from cxr_jax.errors import UserError
from cxr_jax.evaluation import scored_sets, set_scores
from cxr_jax.evaluation.reader import Readings, Samples
from cxr_jax.evaluation.set_scores import SetAnswers, Unit
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.scores import Bootstrap, Reference

COUNT = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two films of each of twelve studies, by way of a label table: the columns of subgroups come through."""
    folder = tmp_path_factory.mktemp("films")
    lines = ["image,PatientID,StudyID,Sex,Age,AP/PA,Source," + ",".join(CHEXPERT_14)]
    for row in range(COUNT):
        Image.fromarray(np.full((32, 32), 5 * row, np.uint8)).save(folder / f"{row}.png")
        states = ["1" if (row // 2 + place) % 3 == 0 else "0" for place in range(14)]
        states[0] = "0"
        states[4] = "" if row % 2 else states[4]
        sex = "" if row < 4 else "FM"[row // 2 % 2]
        about = [f"{row}.png", f"p{row // 4}", f"s{row // 2}", sex, str(20 + 3 * row), "AP"]
        lines.append(",".join([*about, "here", *states]))
    (folder / "labels.csv").write_text("\n".join(lines))
    assert label_table.main([str(folder / "labels.csv"), str(folder / "rows.jsonl")]) == 0
    rows = manifest.load_rows(folder / "rows.jsonl", folder)
    return manifest.FilesSource(rows, 8)


def test_examples_are_drawn_and_not_the_first_rows():
    chosen = scored_sets.choose_examples(1000, 100, seed=3)
    assert len(set(chosen)) == 100 and (np.diff(chosen) > 0).all()
    assert 400 < chosen.mean() < 600 and chosen.max() > 900
    np.testing.assert_array_equal(chosen, scored_sets.choose_examples(1000, 100, seed=3))
    assert set(chosen) != set(scored_sets.choose_examples(1000, 100, seed=4))
    for count in (0, 7, 8):
        np.testing.assert_array_equal(scored_sets.choose_examples(7, count, 0), np.arange(7))
    np.testing.assert_array_equal(scored_sets.choose_examples(ENDLESS, 5, 9), np.arange(5))
    with pytest.raises(UserError, match=r"config\.eval\.n_final=0"):
        scored_sets.choose_examples(ENDLESS, 0, 0)


def test_a_set_comes_in_parts_with_all_that_is_known_of_it(source):
    scored = scored_sets.open_scored_set("films", source, 10, seed=1)
    polls = []
    parts = list(scored.parts(4, lambda: polls.append(1)))
    assert [len(batch["image"]) for _, batch in parts] == [4, 4, 2] and len(polls) == 3
    assert np.concatenate([places for places, _ in parts]).tolist() == list(range(10))
    facts = scored_sets.facts_of([scored_sets.without_images(batch) for _, batch in parts])
    whole = source.batch(scored.examples)
    for name, values in facts.items():
        np.testing.assert_array_equal(values, whole[name])
    np.testing.assert_array_equal(scored.images(np.array([7, 2])), whole["image"][[7, 2]])
    rows = [source.rows[example] for example in scored.examples]
    assert scored.ids == [row.id for row in rows] and scored.patients == [row.group for row in rows]
    for row, sex, age in zip(rows, scored.columns["sex"], scored.columns["age"], strict=True):
        number = int(row.id.removesuffix(".png"))
        assert sex == ("unknown" if number < 4 else "FM"[number // 2 % 2])
        assert age == (
            "<40"
            if 20 + 3 * number < 40
            else "40-60"
            if 20 + 3 * number < 60
            else "60-75"
            if 20 + 3 * number <= 75
            else ">75"
        )
    line = scored_sets.protocol(scored, "study", "blank=unknown, uncertain=unknown")
    studies, patients = len(set(scored.studies)), len(set(scored.patients))
    assert line == (
        f"films: 10 images of {studies} studies of {patients} patients; views: AP 10; "
        "blank=unknown, uncertain=unknown; unit study; intervals by patients"
    )


def test_phantoms_are_no_patients():
    scored = scored_sets.open_scored_set("A", phantom.PhantomSource("A", "test"), 3, seed=0)
    assert scored.patients is None is scored.studies and not scored.columns
    assert scored.ids == ["A-0", "A-1", "A-2"]
    assert scored_sets.protocol(scored, "image", "") == (
        "A: 3 images; all labels known; unit image; intervals by images"
    )


@pytest.mark.parametrize("unit_name", ["image", "study"])
def test_numbers_of_a_reader_that_is_known(source, unit_name):
    """It names what is there on the first film of a study, and nothing on the second."""
    scored = scored_sets.open_scored_set("films", source, 0, seed=0)
    batch = source.batch(scored.examples)
    facts = scored_sets.without_images(batch)
    unit = Unit.of_set(scored, facts, unit_name)
    named = facts["solution"] & (np.arange(COUNT) % 2 == 0)[:, None]
    readings = Readings(
        tokens=np.zeros((COUNT, 1), int),
        lengths=np.ones(COUNT, int),
        answer=named,
        valid=np.ones(COUNT, bool),
        log_odds=np.where(named, 3.0, -3.0).astype(np.float32),
    )
    settings = EvaluationConfig.with_defaults(bootstrap=50, unit=unit_name)
    fitted = set_scores.fit_recalibration(unit, readings, settings)
    answers = SetAnswers(readings, {}, {"trace_answer": np.ones(COUNT)}, fitted)
    summary = set_scores.summarise(unit, answers, settings)
    json.dumps(summary, allow_nan=False)
    count = COUNT if unit_name == "image" else COUNT // 2
    assert (summary["n"], summary["n_units"], summary["unit"]) == (count, 6, "patient")
    assert (summary["scored"], summary["n_images"]) == (unit_name, COUNT)
    # As a study all is found; image by image half of it.
    recall = summary["per_label"]["Edema"]["recall"]
    assert recall == (0.5 if unit_name == "image" else 1)
    assert summary["calibration"]["per_label"]["Edema"]["auroc"]["value"] == (
        0.75 if unit_name == "image" else 1
    )
    at_thresholds = summary["recalibrated"]["at_thresholds"]["per_label"]
    assert at_thresholds["Edema"]["value"] == pytest.approx(2 / 3 if unit_name == "image" else 1)
    assert set(summary["subgroups"]) == {"sex", "age"}

    # A model beside itself differs in nothing, and without probabilities fewer numbers are compared.
    rows = set_scores.compare("films", ("old", "new"), {"old": readings, "new": readings}, unit, 20)
    assert {row["metric"] for row in rows} >= {"jaccard", "macro_f1", "mean_auroc", "ece_mean"}
    assert all(row["diff"] == row["lo"] == row["hi"] == 0 for row in rows)
    bare = readings._replace(log_odds=None)
    rows = set_scores.compare("films", ("old", "new"), {"old": bare, "new": readings}, unit, 20)
    assert [row["metric"] for row in rows] == ["jaccard", "macro_f1", "micro_f1"]


def test_scores_of_several_completions_equal_loops():
    generator = np.random.default_rng(0)
    truth, known = generator.random((2, 9, 14)) < 0.3
    known[:, :3], known[4] = True, False
    answer = np.where(generator.random((9, 3, 14)) < 0.9, truth[:, None], True)
    valid = generator.random((9, 3)) < 0.8
    samples = Samples(answer, valid, generator.normal(size=(9, 3, 14)).astype(np.float32))
    found = set_scores.sampled_scores(samples, Reference(truth, known), Bootstrap(5))
    means, best, majority, exact = [], [], [], []
    for row in np.flatnonzero(known.any(1)):

        def score(labels, is_valid=True, row=row):
            said, real = (set(np.flatnonzero(x & known[row])) for x in (labels, truth[row]))
            return float(is_valid) * (len(said & real) / len(said | real) if said | real else 1)

        each = [score(answer[row, place], valid[row, place]) for place in range(3)]
        means.append(np.mean(each))
        best.append(max(each))
        exact.append([one == 1 for one in each])
        majority.append(score((answer[row] & valid[row][:, None]).sum(0) >= 2, valid[row].any()))
    wanted = {"mean_at_k": means, "best_at_k": best, "majority_at_k": majority}
    wanted |= {"exact_at_1": exact, "pass_at_k": [any(row) for row in exact]}
    for name, values in wanted.items():
        assert found[name]["value"] == pytest.approx(np.mean(values)), name
    assert found["traces"] == 3 and 0 < found["exact_at_1"]["value"] < found["pass_at_k"]["value"]
    json.dumps(found, allow_nan=False)


def test_rows_that_would_train_are_scored_on_request(source):
    """Beside the test rows; other sets stay, and several sources are refused in one line."""
    rows = source.rows
    test, train = (manifest.FilesSource(part, 32) for part in (rows[:4], rows[4:]))
    other = phantom.PhantomSource("A", "test")
    run = splits.Splits(
        train=train,
        select={"files": test},
        test={"files": test, "named": other},
        out_of_distribution="files",
    )
    joined = splits.with_train_rows(run).test
    assert [*joined] == ["files", "named"] and joined["named"] is other
    assert sorted(row.id for row in joined["files"].rows) == sorted(row.id for row in rows)
    with pytest.raises(UserError, match="include_train"):
        splits.with_train_rows(dataclasses.replace(run, train=other))
