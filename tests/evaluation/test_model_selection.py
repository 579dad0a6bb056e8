"""ModelSelection: which step is the best out of distribution, when to stop, what was lost; without a model."""

import types

import numpy as np
import pytest

from cxr_jax.config.sections import EvaluationConfig
from cxr_jax.evaluation import model_selection
from cxr_jax.evaluation import run as evaluation_run
from cxr_jax.evaluation.reader import Readings
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.rewards import terms

EDEMA, EFFUSION = CHEXPERT_14.index("Edema"), CHEXPERT_14.index("Pleural Effusion")
N = 8


class Reader:
    """Answers what it is told to: `answers` bool [N, 14] for every set."""

    poll = None
    valid = True

    def read(self, params, images, texts, row_names=()):
        count = len(images)
        return Readings(None, np.full(count, 50), params, np.full(count, self.valid))

    def score_traces(self, readings, data):
        return {name: np.ones(len(data["solution"])) for name in terms.TRACE_TERMS}


@pytest.fixture
def world(monkeypatch):
    truth = np.zeros((N, 14), bool)
    truth[:4, EDEMA] = truth[4:, EFFUSION] = True
    data = {
        "image": np.zeros((N, 2, 2)),
        "texts": [""] * N,
        "solution": truth,
        "known": np.ones_like(truth),
    }
    monkeypatch.setattr(model_selection, "held_out", lambda source, n, poll: data)
    log = types.SimpleNamespace(rows=[], best=[])
    loop = types.SimpleNamespace(
        params_to_use=None,
        metrics=types.SimpleNamespace(write=lambda step, row, kind: log.rows.append(row)),
        checkpoints=types.SimpleNamespace(
            save_best=lambda step, params, meta: log.best.append(step)
        ),
    )
    settings = EvaluationConfig.with_defaults(n=N, every=10, select_by="jaccard")
    splits = types.SimpleNamespace(select={"A": None, "B": None}, out_of_distribution="B")

    def make():
        return model_selection.ModelSelection(settings, Reader(), splits, loop, lambda train: train)

    def look(selection, step, answers):
        loop.params_to_use = answers
        selection.evaluate_at(step)

    return make, look, log, truth


def without(truth, label):
    wrong = truth.copy()
    wrong[:, label] = False
    return wrong


def test_the_best_look_is_kept_and_a_run_that_stalls_is_ended(world, capsys):
    make, look, log, truth = world
    selection = make()
    for step, answers in (
        (0, without(truth, EDEMA)),
        (10, truth),
        (20, truth),
        (30, without(truth, EDEMA)),
    ):
        look(selection, step, answers)
        assert selection.should_stop_early(step, patience=2) == (step == 30)
    assert log.best == [0, 10] and selection.best == {
        "score": 1.0,
        "step": 10,
    }  # no better is not better
    assert capsys.readouterr().out.count("no better on B than step 10") == 1
    resumed = make()
    resumed.resume(selection.best, selection.first_recall)
    assert resumed.should_stop_early(30, patience=2)
    assert not selection.should_stop_early(1000, patience=0)


def test_right_answers_without_the_format_ring_at_looks_and_in_evaluations(world, capsys):
    make, look, log, truth = world
    selection = make()
    unread = np.zeros_like(truth)
    for valid, answers, rings in (
        (True, truth, False),
        (False, truth, True),
        (False, truth, True),
        (False, unread, False),
    ):
        selection.reader.valid = valid
        look(selection, 0, answers)
        assert log.rows[-1]["alarms/format_never_held"] == (2 if rings else 0)
        readings = Readings(None, np.full(N, 50), answers, np.full(N, valid))
        capsys_before = capsys.readouterr().out
        evaluation_run._warn_of_format("SFT on A", readings, truth)
        said = capsys.readouterr().out
        assert said.startswith("alarm: format never held by SFT on A: ") == rings
        assert said.count("\n") == rings
        # The look says it once a process.
        first = valid is False and rings and len(log.rows) == 2
        assert capsys_before.count("alarm: format never held on A, B: ") == first


def test_a_label_that_is_lost_out_of_distribution_is_named(world, capsys):
    make, look, log, truth = world
    selection = make()
    look(selection, 0, truth)
    look(selection, 10, without(truth, EDEMA))
    out = capsys.readouterr().out
    assert "recall of Edema on B fell from 1.00 to 0.00" in out and "Effusion" not in out
    assert [row["alarms/lost_recall"] for row in log.rows] == [0, 1]
    resumed = make()
    resumed.resume(selection.best, selection.first_recall)
    look(resumed, 20, without(truth, EFFUSION))
    assert "recall of Pleural Effusion on B fell from 1.00 to 0.00" in capsys.readouterr().out
