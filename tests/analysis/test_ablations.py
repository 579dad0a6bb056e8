"""The table and plot of ablation runs, from small folders made by hand; and what the arms change."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ET

import pytest
from places import ROOT

from cxr_jax import rewards
from experiments.analysis import ablation_runs, ablations

GRPO = ROOT / "experiments" / "ablations" / "grpo.py"


def make_run(
    folder,
    arm,
    seed,
    reached,
    *,
    sft=0.8,
    model="phantom",
    sha="a" * 40,
    paired=None,
    folder_name=None,
    **config,
):
    """A finished run whose RL model scores `reached` on A and 0.1 less on B. config: section=..., section__key=..."""
    path = folder / (folder_name or f"{arm}_s{seed}")
    path.mkdir(parents=True)
    score = lambda v: {
        "n": 1000,
        "jaccard": {"value": v},
        "macro_f1": {"all": {"value": v / 2}},
        "trace": {"trace_findings": {"value": v - 0.05}, "trace_false": {"value": 1 - v}},
    }
    models = {
        m: {"A": score(v), "B": score(v - 0.1)}
        for m, v in (("base", 0.0), ("SFT", sft), ("RL", reached))
    }
    diff = reached - sft if paired is None else paired
    comparisons = [
        {
            "a": "SFT",
            "b": "RL",
            "set": s,
            "metric": m,
            "diff": diff * f,
            "lo": diff * f - 0.01,
            "hi": diff * f + 0.01,
        }
        for s in "AB"
        for m, f in (("jaccard", 1.0), ("macro_f1", 0.5))
    ]
    (path / "evaluation.json").write_text(
        json.dumps({"models": models, "comparisons": comparisons})
    )
    whole = {
        "task": "rl",
        "model": model,
        "seed": seed,
        "steps": 4,
        "max_completion": 208,
        "rl": {"group_size": 8},
        "data": {"source": "phantom", "hospital": "A", "ood_hospital": "B", "seed": seed + 1},
        "eval": {"n": 8, "n_final": 1000, "select_by": "jaccard"},
    }
    for name, value in config.items():
        section, _, key = name.partition("__")
        whole[section] = value if not key else {**whole[section], key: value}
    (path / "config.json").write_text(
        json.dumps({"config": whole, "git_sha": sha, "git_dirty": None})
    )
    rows = [
        {"step": i, "kind": "eval", "eval/B/jaccard": reached - 0.1 - 0.01 * abs(i - 2)}
        for i in (0, 2, 4)
    ]
    for i in range(1, 9):
        row = {
            "step": i,
            "kind": "train",
            "entropy": i / 10,
            "completions/mean_length": 100 + i,
            "step_time": 60 / i,
        }
        rows.append({**row, "frac_reward_zero_std": i / 8})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def _table(text):
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {
        row[0]: dict(zip(rows[0], row, strict=True)) for row in rows if row[0] not in ("arm", "---")
    }


def _run(runs, capsys, out):
    code = ablations.main([str(runs), "-o", str(out)])
    return code, capsys.readouterr()


@pytest.fixture
def study(tmp_path):
    runs = tmp_path / "runs"
    for seed, (base, kl) in enumerate([(0.90, 0.88), (0.91, 0.90), (0.92, 0.89)]):
        make_run(runs, "base", seed, base)
        make_run(runs, "kl", seed, kl)
    make_run(runs, "g4", 1, 0.95, paired=0.123)
    make_run(runs, "from_scratch", 0, 0.2, model="random:phantom", sft=0.0)
    return runs


def test_the_table(study, tmp_path, capsys):
    out = tmp_path / "docs" / "ablations"
    out.parent.mkdir()
    code, said = _run(study, capsys, out)
    assert code == 0 and str(out) in said.out
    text = (tmp_path / "docs" / "ablations.md").read_text()
    rows = _table(text)
    assert [*rows] == [
        "SFT only",
        "base",
        "g4",
        "kl",
        "from_scratch †",
    ]  # base, then by what they reach on B
    assert rows["SFT only"]["A: Jaccard"] == "0.800" and rows["SFT only"]["B: macro-F1"] == "0.350"
    # 0.10, 0.11, 0.12: mean 0.11, standard deviation 0.01, t(2) = 4.303: 0.11 +- 4.303 * 0.01 / sqrt(3)
    assert rows["base"]["B: Jaccard"] == "+0.110 [+0.085, +0.135]<br>+0.100, +0.110, +0.120"
    assert rows["base"]["A: macro-F1"].startswith("+0.055 [")
    assert rows["kl"]["B: Jaccard, arm - base"].endswith("<br>-0.020, -0.010, -0.030")
    assert rows["base"]["B: Jaccard, arm - base"] == ""
    assert (
        rows["g4"]["seeds"] == "1" and rows["g4"]["B: Jaccard"] == "+0.123"
    )  # as the paired comparison says
    assert rows["g4"]["B: Jaccard, arm - base"] == "+0.040"  # over equal seeds: 0.95 - 0.91
    assert rows["from_scratch †"]["B: Jaccard"] == "-0.600"  # against the SFT model of the others
    assert rows["base"]["B: trace = truth"] == "0.760<br>0.750, 0.760, 0.770"
    assert rows["base"]["A: false sentences"] == "0.09<br>0.10, 0.09, 0.08"
    assert rows["base"]["peak on B"].split("<br>")[1] == "0.810 at 2"
    end = {
        "length": "106",
        "entropy": "0.600",
        "groups without variance": "0.75",
        "s a step": "13.5",
    }
    assert end.items() <= rows["base"].items()  # means of steps 4 to 8, the median of all
    assert "All runs are of commit aaaaaaa." in text and "1,000 test images" in text
    assert "±0.010 on A, ±0.010 on B" in text


def test_the_plot_and_what_stands_around_the_table(study, tmp_path, capsys):
    page = tmp_path / "a.md"
    page.write_text(f"# Mine\n\n{ablations.BEGIN}\nold\n{ablations.END}\n\nReading.\n")
    assert _run(study, capsys, tmp_path / "a")[0] == 0
    first = page.read_text()
    assert first.startswith("# Mine\n") and first.endswith("\n\nReading.\n") and "old" not in first
    assert (
        _run(study, capsys, tmp_path / "a")[0] == 0 and page.read_text() == first
    )  # once more changes nothing
    svg = ET.fromstring((tmp_path / "a.svg").read_text())
    words = "".join(svg.itertext())
    assert (
        "RL - SFT on hospital A" in words
        and "RL - SFT on hospital B" in words
        and "from_scratch" in words
    )
    lines = [e for e in svg.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3  # base, g4, kl; what began elsewhere would leave them no room
    assert "‹ −0.6" in words
    page.write_text("no markers\n")
    code, said = _run(study, capsys, tmp_path / "a")
    assert code == 2 and page.read_text() == "no markers\n" and "has no lines" in said.err


def test_what_a_reader_must_know_of_the_runs_is_said(tmp_path, capsys):
    make_run(tmp_path, "base", 0, 0.9)
    make_run(tmp_path, "base", 1, 0.9, sha="b" * 40, rl={"group_size": 8, "beta": 0.1})
    (tmp_path / "kl_s0").mkdir()
    code, said = _run(tmp_path, capsys, tmp_path / "a")
    assert code == 0
    for text in (said.err, (tmp_path / "a.md").read_text()):
        assert "not all of one commit (aaaaaaa: base_s0; bbbbbbb: base_s1)" in text
        assert "Not finished, left out: kl_s0." in text
        assert "Only one of base_s0 and base_s1 has config.rl.beta." in text


@pytest.mark.parametrize(
    "second, message",
    [
        (
            dict(arm="kl", seed=0, eval__n_final=500),
            "config.eval.n_final is 1000 in base_s0, but 500 in kl_s0",
        ),
        (
            dict(arm="base", seed=1, rl={"group_size": 4}),
            "config.rl.group_size is 8 in base_s0, but 4 in base_s1",
        ),
        (
            dict(arm="base", seed=0, folder_name="base_s00"),
            "a second run of arm base, seed 0, beside base_s0",
        ),
        (dict(arm="base", seed=1, folder_name="base_s2"), "base_s2: its config.seed is 1"),
        (dict(arm="base", seed=1, task="sft"), "base_s1: not a run of RL on phantoms"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_line(tmp_path, capsys, second, message):
    make_run(tmp_path, "base", 0, 0.9)
    make_run(tmp_path, reached=0.9, **second)
    code, said = _run(tmp_path, capsys, tmp_path / "a")
    assert code == 2 and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "a.md").exists()


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        code, said = _run(folder, capsys, tmp_path / "a")
        assert code == 2 and re.fullmatch(r"error: .*\n", said.err)
    path = make_run(tmp_path, "base", 0, 0.9)
    (path / "config.json").write_text("[]")
    assert "is not the config of a run" in _run(tmp_path, capsys, tmp_path / "a")[1].err


# The arms ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo():
    spec = importlib.util.spec_from_file_location("ablations_grpo", GRPO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _flat(config):
    return ablation_runs.flatten(config.to_dict())


def test_an_arm_differs_from_base_in_what_it_says_and_nothing_else(grpo):
    base = _flat(grpo.get_config("base"))
    assert base == _flat(grpo.rl.get_config("phantom")) == _flat(grpo.get_config())
    for arm, changes in grpo.ARMS.items():
        config = _flat(grpo.get_config(arm))
        differ = {
            name for name in base.keys() | config.keys() if base.get(name) != config.get(name)
        }
        assert config.keys() == base.keys(), (
            arm
        )  # a key that experiments/rl.py does not have would do nothing
        assert bool(differ) == bool(changes), arm
        if "preset" in changes:
            assert all(name.startswith("rl.") for name in differ), arm
        else:
            assert differ <= changes.keys() and all(
                config[name] == value for name, value in changes.items()
            ), arm


def test_groups_of_other_sizes_make_as_many_completions(grpo):
    for arm in ("g4", "g16"):
        r = grpo.get_config(arm).rl
        assert r.group_size * r.prompts_per_step == 128 and r.group_size != 8


def test_the_reward_without_the_trace(grpo):
    weights = grpo.get_config("answers").rl.reward_weights.to_dict()
    paid = {name for name, weight in weights.items() if weight}
    assert set(rewards.CHECKED) - paid == {"trace_answer", "trace_findings", "trace_coverage"}
    assert grpo.get_config("published").rl.reward_weights.to_dict() == rewards.weights(
        rewards.PUBLISHED
    )
