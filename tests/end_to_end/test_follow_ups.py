"""A run on conversations of phantoms, from the preset to the exported model."""

import json
import subprocess
import sys

import fast_compile
import pytest
from places import ROOT


@pytest.mark.slow
def test_a_few_steps_with_follow_ups_export_a_model(tmp_path):
    """Started as users start a run, and ended as Python ends: other whole runs of the tests are forks."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cxr_jax.main",
            "--config=experiments/sft.py:follow_ups",
            "--config.model=random:phantom",
            "--config.data.follow_ups=1.0",
            "--config.steps=2",
            "--config.locate_steps=0",
            "--config.batch_size=2",
            "--config.log_every=1",
            "--config.eval.every=2",
            *(f"--config.eval.{key}=2" for key in ("n", "n_final", "batch_size")),
            "--config.eval.bootstrap=10",
            f"--workdir={folder}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=fast_compile.environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert (folder / "hf" / "config.json").is_file()
