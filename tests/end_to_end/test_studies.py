"""Runs on phantom studies of several films, from config to the audit of each film."""

import json

import fast_compile
import pytest
import tiny_model
from forked import calls

from experiments.analysis import second_image

pytestmark = pytest.mark.slow

SMALL = [
    "--config.steps=1",
    "--config.save_every=1",
    "--config.eval.every=1",
    "--config.eval.bootstrap=10",
    "--config.eval.cases=1",
    *(f"--config.eval.{key}=2" for key in ("n", "n_final", "batch_size")),
]
SFT = [
    "--config=experiments/sft.py",
    "--config.batch_size=2",
    "--config.locate_steps=0",
    "--config.max_completion=256",
]
VIEWS = "frontal,lateral"


def test_a_run_trains_on_studies_and_audits_each_film(tmp_path, capsys):
    folder = str(tmp_path / "run")
    model = f"--config.model={tiny_model.phantom_folder()}"
    flags = [*SFT, *SMALL, model, f"--config.data.views={VIEWS}", f"--workdir={folder}"]
    [(code, _, errors)] = calls([flags], timeout=900, env=fast_compile.environment())
    assert code == 0, errors
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for by_set in evaluation["models"].values():
        for summary in by_set.values():
            assert {*summary["audit"]} == {"real", "blank", "swapped", "swapped lateral"}
    assert second_image.main([folder, f"--views={VIEWS}", "-n", "2"]) == 0
    assert "| without lateral |" in capsys.readouterr().out
