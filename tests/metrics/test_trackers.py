"""Trackers by name: numbers reach them, texts and images do not, and a missing package is one line."""

import sys
import types

import pytest

from cxr_jax.errors import UserError
from cxr_jax.metrics import trackers
from cxr_jax.metrics.run_log import MetricsWriter


class FakeRun:
    """What `wandb.init` gives."""

    def __init__(self, settings):
        self.settings, self.rows, self.files, self.ended = settings, [], [], False

    def define_metric(self, *names, **settings):
        pass

    def log(self, row):
        self.rows.append(row)

    def save(self, path, base_path, policy):
        self.files.append(path)

    def finish(self):
        self.ended = True


@pytest.fixture
def wandb(monkeypatch):
    """A package of that name, and the runs that were begun in it."""
    runs = []

    def init(**settings):
        runs.append(FakeRun(settings))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init, module.Settings = init, lambda **settings: settings
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs


def test_wandb_gets_numbers_offline_and_nothing_else(tmp_path, wandb):
    trackers.check(("tensorboard", "wandb"))
    row = {"loss": 0.5, "note": "a report", "list": [1], "bad": float("nan"), "flag": True}
    with MetricsWriter(tmp_path, trackers=("wandb",), numbers={"steps": 3}) as writer:
        writer.write(1, row)
        writer.write(1, {"A/jaccard": 0.25}, kind="eval")
    (run,) = wandb
    assert run.settings["mode"] == "offline" and run.settings["dir"] == str(tmp_path / "wandb")
    assert run.settings["config"] == {"steps": 3}
    sent = run.settings["settings"]
    assert sent["console"] == "off" and not sent["save_code"] and sent["x_disable_meta"]
    assert run.rows == [
        {"step": 1, "train/loss": 0.5, "train/flag": True},
        {"step": 1, "eval/A/jaccard": 0.25},
    ]
    assert run.ended and run.files == []
    # A run that resumes is the same one there, and its name tells no path.
    MetricsWriter(tmp_path, resume_step=1, trackers=("wandb",)).close()
    assert wandb[1].settings["id"] == run.settings["id"] and tmp_path.name not in run.settings["id"]
    MetricsWriter(tmp_path / "other", trackers=("wandb",)).close()
    assert wandb[2].settings["id"] != run.settings["id"]


def test_a_users_variable_says_online(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    MetricsWriter(tmp_path, trackers=("wandb",)).close()
    assert wandb[0].settings["mode"] == "online"


def test_files_are_handed_over_only_where_it_is_allowed(tmp_path, wandb):
    resolved = {"steps": 3, "model": "/home/me", "rl": {"lr": 0.5, "on": True, "names": ["a"]}}
    kept = trackers.Tracking.of_run(resolved)
    assert kept.files == () and kept.numbers == {"steps": 3, "rl.lr": 0.5, "rl.on": True}
    assert kept.names == ("tensorboard",)
    allowed = trackers.Tracking.of_run({"allow_upload": True, "trackers": ["wandb"]})
    assert allowed.files == ("report.html", "samples.jsonl") and allowed.names == ["wandb"]
    writer = MetricsWriter(tmp_path, trackers=("wandb",))
    writer.close([tmp_path / "report.html"])
    assert wandb[0].files == [str(tmp_path / "report.html")]


def test_one_that_breaks_is_left_out_and_the_run_goes_on(tmp_path, wandb, caplog):
    with MetricsWriter(tmp_path, trackers=("wandb",)) as writer:
        wandb[0].log = None  # not callable: raises
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
    assert [record.message.split(":")[0] for record in caplog.records] == ["wandb switched off"]
    sys.modules["wandb"].init = None
    with MetricsWriter(tmp_path, trackers=("wandb",)) as writer:
        writer.write(3, {"loss": 1.0})
    assert caplog.records[-1].message.startswith("no wandb: ")


@pytest.mark.parametrize(
    "names, said",
    [
        (("aim",), "'aim' is not one of tensorboard, wandb, mlflow"),
        ("wandb", "must be a tuple of texts"),
        ((3,), "must be a tuple of texts"),
        (("mlflow",), "mlflow is not installed: pip install 'cxr_jax[mlflow]'"),
    ],
)
def test_what_cannot_track_is_refused(names, said, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refusal:
        trackers.check(names)
    assert said in str(refusal.value) and str(refusal.value).startswith("config.trackers")
