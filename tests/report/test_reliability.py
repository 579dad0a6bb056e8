"""Sections on probabilities, subgroups and covered images, from the numbers that an evaluation writes."""

import re

import numpy as np
import pytest

from cxr_jax import report
from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.evaluation import set_scores
from cxr_jax.evaluation.reader import Readings, Samples
from cxr_jax.evaluation.set_scores import SetAnswers, Unit
from cxr_jax.metrics.scores import Answers, Reference
from cxr_jax.report.text_table import text_table
from cxr_jax.rewards.terms import TRACE_TERMS

HOSTILE = '<script>alert(1)</script>"'
COUNT = 60


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    generator = np.random.default_rng(0)
    truth = generator.random((COUNT, 14)) < 0.4
    truth[:, 12] = np.arange(COUNT) < 3
    reference = Reference(truth, groups=np.arange(COUNT) // 2)
    parts = {"source": [HOSTILE, "b"] * (COUNT // 2), "sex": ["F"] * 30 + ["M"] * 30}
    unit = Unit(reference, parts, reference)
    settings = EvaluationConfig.with_defaults(bootstrap=20)

    def readings(noise):
        log_odds = np.where(truth, 2.0, -2.0) + generator.normal(0, noise, truth.shape)
        valid = np.ones(COUNT, bool)
        tokens = np.zeros((COUNT, 1), int)
        return Readings(
            tokens, np.ones(COUNT, int), log_odds > 0, valid, log_odds=log_odds.astype(np.float32)
        )

    read = {"old": readings(4), "new": readings(1)}
    tables = {}
    for model, of_model in read.items():
        terms = {name: np.ones(COUNT) for name in TRACE_TERMS}
        places = np.arange(5)
        answers = SetAnswers(
            of_model,
            {name: Answers(~truth) for name in ("blank", "swapped")},
            terms,
            set_scores.fit_recalibration(unit, of_model, settings),
            samples=Samples(
                np.repeat(of_model.answer[:, None], 2, axis=1),
                np.ones((COUNT, 2), bool),
                np.repeat(of_model.log_odds[:, None], 2, axis=1),
            ),
            covered=(places, {"noise": Answers(~truth[:5]), "covered 1": Answers(truth[:5])}),
        )
        tables[model] = {"A": set_scores.summarise(unit, answers, settings)}
    comparisons = set_scores.compare("A", ("old", "new"), read, unit, 20)
    remarks = report.Remarks(protocol=("A: 60 images; unit image",))
    folder = tmp_path_factory.mktemp("run")
    report.write_report(
        folder, title="x", tables=tables, comparisons=comparisons, remarks=remarks, kind="files"
    )
    return (
        (folder / "report.html").read_text(),
        tables,
        text_table(tables, comparisons, "files", remarks),
    )


def test_the_page_has_every_number_and_names_few_positives(page):
    text, tables, _ = page
    plain = re.sub(r"<[^>]*>", " ", text)
    for summary in (of_model["A"] for of_model in tables.values()):
        for calibration in (summary["calibration"], summary["recalibrated"]["calibration"]):
            for name in ("mean_auroc", "ece", "ece_mean", "brier"):
                estimate = calibration["estimates"][name]
                assert f"{estimate['value']:.3f}" in plain and f"[{estimate['lo']:.3f}" in plain
        assert f"{summary['sampled']['pass_at_k']['value']:.3f}" in plain
    assert "Fracture (n+ 3 of 60)" in plain
    assert text.count('aria-label="Reliability') == 4
    assert "What is scored: A: 60 images; unit image." in plain
    for title in ("What its probabilities are worth", "For whom it works", "largest gap"):
        assert title in plain
    assert "covered 1" in plain and HOSTILE not in text


def test_the_terminal_says_before_and_after_and_what_is_scored(page):
    lines = page[2].splitlines()
    assert "scored: A: 60 images; unit image" in lines
    of_new = next(line for line in lines if line.startswith("new on A: AUROC"))
    assert "few: Fracture n+ 3" in of_new and of_new.count("calibrated") == 3
    assert any(line.startswith("new on A, 2 sampled: Jaccard mean") for line in lines)
    assert any(line.startswith("new - old on A: mean_auroc +") for line in lines)
