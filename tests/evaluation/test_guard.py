"""evaluate.Guard: which step is the best out of distribution, when to stop, what was lost; without a model."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from cxr_jax.evaluation import guard as evaluation_guard
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.rewards import terms

EDEMA, EFFUSION = CHEXPERT_14.index("Edema"), CHEXPERT_14.index("Pleural Effusion")
N = 8


class Reader:
    """Answers what it is told to: `answers` bool [N, 14] for every set."""

    poll = None

    def read(self, params, images, texts):
        return {
            "pred": params,
            "valid": np.ones(len(images), bool),
            "lengths": np.full(len(images), 50),
        }

    def trace(self, read, data):
        return {name: np.ones(len(data["solution"])) for name in terms.TRACE_TERMS}


@pytest.fixture
def guard(monkeypatch):
    truth = np.zeros((N, 14), bool)
    truth[:4, EDEMA] = truth[4:, EFFUSION] = True
    data = {
        "image": np.zeros((N, 2, 2)),
        "texts": [""] * N,
        "solution": truth,
        "known": np.ones_like(truth),
    }
    monkeypatch.setattr(evaluation_guard, "held_out", lambda source, n, poll: data)
    log = types.SimpleNamespace(rows=[], best=[])
    metrics = types.SimpleNamespace(write=lambda step, row, kind: log.rows.append(row))
    checkpoints = types.SimpleNamespace(save_best=lambda step, params, meta: log.best.append(step))
    config = ConfigDict(dict(eval=dict(n=N, every=10, select_by="jaccard"), rl=dict(patience=2)))
    sources = types.SimpleNamespace(select={"A": None, "B": None}, out_of_distribution="B")
    made = lambda **kept: evaluation_guard.ModelSelection(
        config, Reader(), sources, metrics, checkpoints, lambda train: train, **kept
    )
    return made, log, truth, config


def without(truth, label):
    wrong = truth.copy()
    wrong[:, label] = False
    return wrong


def test_the_best_look_is_kept_and_a_run_that_stalls_is_ended(guard, capsys):
    made, log, truth, config = guard
    g = made()
    for step, answers in (
        (0, without(truth, EDEMA)),
        (10, truth),
        (20, truth),
        (30, without(truth, EDEMA)),
    ):
        g.look(step, answers)
        assert g.stale(step) == (step == 30)
    assert log.best == [0, 10] and g.best == {"score": 1.0, "step": 10}  # no better is not better
    assert capsys.readouterr().out.count("no better on B than step 10") == 1
    resumed = made(best=g.best, first=g.first)
    assert resumed.stale(30)
    config.rl.patience = 0
    assert not g.stale(1000)


def test_a_label_that_is_lost_out_of_distribution_is_named(guard, capsys):
    made, log, truth, _ = guard
    g = made()
    g.look(0, truth)
    g.look(10, without(truth, EDEMA))
    out = capsys.readouterr().out
    assert "recall of Edema on B fell from 1.00 to 0.00" in out and "Effusion" not in out
    assert [row["alarms/lost_recall"] for row in log.rows] == [0, 1]
    made(best=g.best, first=g.first).look(20, without(truth, EFFUSION))
    assert "recall of Pleural Effusion on B fell from 1.00 to 0.00" in capsys.readouterr().out
