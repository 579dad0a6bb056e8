"""Every script of examples/ runs as its first lines say, and prints what it promises."""

import json

import fast_compile
import pytest
import tiny_model
from forked import calls
from places import ROOT

from cxr_jax.labels import CHEXPERT_14

# The smallest run of train_on_rows.py: completions are cut, which shows in the metrics and fails nothing.
SMALL_RUN = ["max_completion=16", "rl.prompts_per_step=2", "rl.group_size=2", "eval.n=1"]


def run_example(name, *flags) -> str:
    [(code, out, err)] = calls(
        [flags], timeout=600, module=f"examples/{name}", env=fast_compile.environment()
    )
    assert code == 0, err
    return out


def test_every_script_has_a_test_here():
    for path in ROOT.glob("examples/*.py"):
        assert f"test_{path.stem}" in globals()


def test_score_completions():
    lines = run_example("score_completions.py").splitlines()
    columns = lines[0].split()
    rows = {line[:18].strip(): line[18:].split() for line in lines[1:4]}
    published, checked = columns.index("published"), columns.index("checked")
    honest, silent, opposite = (
        rows[name] for name in ("honest", "says nothing", "says the opposite")
    )
    assert honest[published] == silent[published] == opposite[published] == "1.00"
    assert float(honest[checked]) > float(silent[checked])
    assert lines[-1].split("  ")[-1].strip() == (
        "Cardiomegaly 0, Pneumothorax 1, Pleural Effusion 0"
    )


def test_read_a_film():
    printed = run_example("read_a_film.py", "--samples=1")
    assert "<think>" in printed and "<answer>" in printed
    assert all(f"%  {label}\n" in printed for label in CHEXPERT_14)
    assert printed.splitlines()[-1] == "Research use only. Not for diagnosis."


@pytest.mark.slow
def test_train_on_rows(tmp_path):
    model = f"model={tiny_model.phantom_folder()}"
    flags = [f"--config.{setting}" for setting in (model, *SMALL_RUN)]
    printed = run_example("train_on_rows.py", f"--folder={tmp_path}", *flags)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 16
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "hf").is_dir()
    assert "metrics.jsonl" in printed.splitlines()[-1]


@pytest.mark.slow
def test_own_rewards(tmp_path):
    """A user's compiled reward, a user's Python reward and a run from Python, in one."""
    printed = run_example("own_rewards.py", f"--folder={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [1, 2]
    for row in trained:
        mean_length = row["completions/mean_length"]
        assert row["rewards/short/mean"] == pytest.approx(1 - mean_length / 16, abs=1e-6)
        assert 0 <= row["rewards/names_what_is_there/mean"] <= 1
    records = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    group = next(record for record in records if record["kind"] == "group")
    assert group["weights"]["short"] == 0.5 and group["weights"]["names_what_is_there"] == 1.0
    for completion in group["completions"]:
        named = [label.lower() in completion["text"].lower() for label in group["truth"]]
        assert completion["terms"]["names_what_is_there"] == pytest.approx(sum(named) / len(named))
    assert "names_what_is_there" in (tmp_path / "report.html").read_text()
    assert "step 2, report report.html" in printed
