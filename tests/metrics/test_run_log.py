"""run_log.py, progress.py: the file survives kills and resumes; the board may fail; the progress line is right."""

import io
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.metrics import run_log
from cxr_jax.metrics.progress import Progress, duration
from cxr_jax.metrics.run_log import MetricsWriter


def steps(workdir):
    return [row["step"] for row in run_log.read(workdir)]


def test_lines_are_strict_json(tmp_path):
    values = {
        "loss": jnp.float32(0.5),
        "bf16": jnp.bfloat16(2.0),
        "n": np.int64(3),
        "bad": float("nan"),
        "worse": np.float32("inf"),
        "ok": np.bool_(True),
        "hist": np.array([1.0, np.nan]),
        "note": "text",
    }
    with MetricsWriter(tmp_path, trackers=()) as w:
        w.write(1, values)
        w.write(np.int32(2), {"A/jaccard": 0.25}, kind="eval")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n") and "NaN" not in text and "Infinity" not in text
    first, second = run_log.read(tmp_path)
    assert {k: first[k] for k in values} == {
        "loss": 0.5,
        "bf16": 2.0,
        "n": 3,
        "bad": None,
        "worse": None,
        "ok": True,
        "hist": [1.0, None],
        "note": "text",
    }
    assert (first["step"], first["kind"], second["kind"], second["A/jaccard"]) == (
        1,
        "train",
        "eval",
        0.25,
    )


def test_each_line_is_on_disk_at_once(tmp_path):
    w = MetricsWriter(tmp_path, trackers=())
    for step in range(3):
        w.write(step, {"loss": 1.0})
        assert steps(tmp_path) == list(range(step + 1))  # the writer is still open
    w.close()
    w.close()


def test_resume_removes_later_and_torn_lines(tmp_path):
    with MetricsWriter(tmp_path, trackers=()) as w:
        for step in range(1, 6):
            w.write(step, {"loss": step})
        w.write(4, {"A/jaccard": 0.1}, kind="eval")
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "lo')  # killed here
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 4]
    with MetricsWriter(tmp_path, resume_step=3, trackers=()) as w:
        assert steps(tmp_path) == [1, 2, 3]
        w.write(4, {"loss": 40})
    assert [row["loss"] for row in run_log.read(tmp_path)] == [1, 2, 3, 40]
    MetricsWriter(tmp_path, trackers=()).close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    MetricsWriter(tmp_path, resume_step=-1, trackers=()).close()
    assert steps(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_each_change_of_a_config_has_one_line(tmp_path):
    there, back = "remat was 'none', now 'full'", "remat was 'full', now 'none'"
    history = [(2, there), (2, back), (4, there)]

    def logged(resume_step, changes):
        with MetricsWriter(tmp_path, resume_step=resume_step, trackers=()) as writer:
            writer.write_changes(changes)
            writer.write(5, {"loss": 1.0})
        rows = run_log.read(tmp_path)
        return [(row["step"], row["change"]) for row in rows if row["kind"] == "change"]

    assert logged(-1, history[:1]) == history[:1]
    assert logged(3, history) == history  # those that came since
    assert logged(4, history) == history  # resumed once more
    assert logged(3, history) == history  # from an earlier checkpoint than the change was made at
    with MetricsWriter(tmp_path, enabled=False) as writer:
        writer.write_changes(history)
    assert len(run_log.read(tmp_path)) == 4


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(UserError, match="line 2"):
        run_log.read(tmp_path)
    assert run_log.read(tmp_path / "nowhere") == []


def test_reserved_names_and_other_processes(tmp_path):
    with MetricsWriter(tmp_path, trackers=()) as w, pytest.raises(ValueError, match="step"):
        w.write(1, {"step": 2})
    with MetricsWriter(tmp_path / "other", enabled=False) as w:
        w.write(1, {"loss": 1})
    assert not (tmp_path / "other").exists()


def test_tensorboard_is_written_and_may_fail(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path / "a") as w:
        w.write(1, {"loss": 1.0, "note": "text", "hist": [1, 2]})
    assert any((tmp_path / "a" / "tensorboard").iterdir())
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsWriter(tmp_path / "b") as w:
        w.write(1, {"loss": 1.0})
    assert steps(tmp_path / "b") == [1]

    class Broken:
        def log(self, *_):
            raise OSError("disk full")

    with MetricsWriter(tmp_path / "c", trackers=()) as w:
        w._trackers = {"tensorboard": Broken()}
        w.write(1, {"loss": 1.0})
        w.write(2, {"loss": 1.0})
    assert steps(tmp_path / "c") == [1, 2]


def test_progress_lines():
    now, out = [0.0], io.StringIO()
    p = Progress(100, every_s=5, stream=out, clock=lambda: now[0])
    now[0] = 30.0  # the first step compiles
    p.update(1, {"loss": 2.0}, items=16)
    for step in range(2, 101):
        now[0] += 1.0
        p.update(step, {"loss": 1.0, "reward": jnp.float32(0.5), "other": 1}, items=16)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step   1/100   1.0%  loss 2"
    assert lines[1] == "step   6/100   6.0%  loss 1  reward 0.5  1 step/s  16 samples/s  ETA 1m 34s"
    assert lines[-1].endswith("done in 1m 39s") and lines[-1].startswith("step 100/100 100.0%")
    assert len(lines) == 21


def test_progress_by_steps_and_after_resume():
    now, out = [0.0], io.StringIO()
    p = Progress(50, start=40, every_s=1e9, every_steps=4, stream=out, clock=lambda: now[0])
    for step in range(41, 51):
        now[0] += 2.0
        p.update(step)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [
        "41/50",
        "45/50",
        "49/50",
        "50/50",
    ]
    assert "0.5 step/s" in out.getvalue()


def test_duration():
    assert [duration(s) for s in (9, 185, 7620)] == ["9s", "3m 05s", "2h 07m"]
