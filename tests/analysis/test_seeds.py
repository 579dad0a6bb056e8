"""The side-by-side table of several seeds."""

import json

import pytest

from cxr_jax.errors import UserError
from experiments.analysis import seeds


def _run(folder, sft, rl):
    folder.mkdir()
    entry = lambda v: {"A": {"jaccard": {"value": v}, "macro_f1": {"all": {"value": v / 2}}}}
    both = [
        {"a": "SFT", "b": "RL", "set": "A", "metric": m, "diff": rl - sft, "lo": -1.0, "hi": 1.0}
        for m in ("jaccard", "macro_f1")
    ]
    data = {"models": {"SFT": entry(sft), "RL": entry(rl)}, "comparisons": both}
    (folder / "evaluation.json").write_text(json.dumps(data))
    return str(folder)


def test_rows_and_mean_difference(tmp_path):
    runs = [_run(tmp_path / "a", 0.50, 0.52), _run(tmp_path / "b", 0.50, 0.56)]
    text = "\n".join(seeds.lines(runs))
    assert "SFT 0.500  RL 0.520  RL - SFT +0.0200 [-1.0000, +1.0000]" in text
    assert "SFT 0.250  RL 0.280" in text  # macro-F1 is read from its "all" subset
    assert text.count("mean difference over 2 runs: +0.0400") == 2


def test_unfinished_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not a finished run"):
        seeds.lines([str(tmp_path)])
