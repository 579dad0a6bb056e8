"""Runs of experiments/ablations/grpo.py, read from their folders: what `ablations.py` tabulates and plots."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from cxr_jax.errors import UserError
from cxr_jax.metrics import run_log
from cxr_jax.report.curves import points
from cxr_jax.report.svg import Points
from experiments.analysis import seeds

BASE = "base"
LAST = 5  # training steps at the end whose mean is "at the end": one step is 128 completions, and noisy
SAME = (  # what runs must share, whatever their arm, to stand in one table
    "steps",
    "max_completion",
    "data.source",
    "data.hospital",
    "data.ood_hospital",
    "eval.n",
    "eval.n_final",
    "eval.select_by",
)
BY_SEED = ("seed", "data.seed")
METRICS = {"jaccard": "Jaccard", "macro_f1": "macro-F1"}
INTERVAL_FROM = 3  # seeds


@dataclass(kw_only=True)
class Run:
    """One run's folder.

    Attributes:
        name: of the folder.
        arm: the first part of the name.
        seed: the second part of the name.
        config: flat, with dotted names.
        code: the commit, and whether files differed from it.
        evaluation: evaluation.json.
        rows: the lines of metrics.jsonl.
    """

    name: str
    arm: str
    seed: int
    config: dict[str, Any]
    code: str
    evaluation: dict[str, Any]
    rows: list[dict]

    def score(self, model: str, set_name: str, metric: str) -> float | None:
        """Return a score on the test images. metric: "jaccard", "macro_f1" or the name of a term of the trace."""
        summary = self.evaluation["models"][model][set_name]
        if metric == "jaccard":
            return summary[metric]["value"]
        if metric in METRICS:
            return summary[metric]["all"]["value"]
        return summary["trace"][metric]["value"]

    def comparison(self, set_name: str, metric: str) -> dict[str, Any] | None:
        """Return the paired difference RL - SFT over the test images, {diff, lo, hi, ...}; None if there is none."""
        wanted = {"a": "SFT", "b": "RL", "set": set_name, "metric": metric}
        for comparison in self.evaluation["comparisons"]:
            if wanted.items() <= comparison.items():
                return comparison
        return None

    def end(self, metric: str) -> float | None:
        """Return the mean of a training metric over the last steps."""
        values = [value for _, value in points(self.rows, "train", metric)[-LAST:]]
        return float(np.mean(values)) if values else None

    def step_seconds(self) -> float | None:
        """Return the median duration of a step."""
        seconds = [value for _, value in points(self.rows, "train", "step_time")]
        return float(np.median(seconds)) if seconds else None


@dataclass
class Study:
    """All finished runs by arm and seed: `base` first, then the arms by what they reach on the other hospital.

    Attributes:
        arms: arm -> its runs.
        notes: what a reader has to know of the runs.
        sft: the run whose SFT model is the first row.
        start: the model that it began at.
        inside: the hospital of training.
        outside: the other one.
    """

    arms: dict[str, list[Run]]
    notes: list[str]
    sft: Run = field(init=False)
    start: str = field(init=False)
    inside: str = field(init=False)
    outside: str = field(init=False)

    def __post_init__(self) -> None:
        """Find what all rows are held against, and put the arms in order."""
        first_arm = self.arms.get(BASE, next(iter(self.arms.values())))
        self.sft = first_arm[0]
        self.start = self.sft.config["model"]
        self.inside = self.sft.config["data.hospital"]
        self.outside = self.sft.config["data.ood_hospital"]
        self.arms = {arm: self.arms[arm] for arm in sorted(self.arms, key=self._place)}

    def _place(self, arm: str) -> tuple[bool, float, str]:
        reached = [run.score("RL", self.outside, "jaccard") or 0.0 for run in self.arms[arm]]
        return arm != BASE, -np.mean(reached), arm

    def difference(self, run: Run, set_name: str, metric: str) -> float | None:
        """Return RL - SFT of a run on a test set.

        Where it began elsewhere, its RL model is held against the other arms' SFT model.
        """
        if run.config["model"] == self.start and (paired := run.comparison(set_name, metric)):
            return paired["diff"]
        before = self.sft.score("SFT", set_name, metric)
        after = run.score("RL", set_name, metric)
        return None if before is None or after is None else after - before

    def differences(self, arm: str, set_name: str, metric: str) -> list[float | None]:
        """Return RL - SFT of each seed of an arm."""
        return [self.difference(run, set_name, metric) for run in self.arms[arm]]

    def began_elsewhere(self, arm: str) -> bool:
        """Say whether an arm did not start from the SFT model."""
        return self.arms[arm][0].config["model"] != self.start

    def curve(self, arm: str) -> Points:
        """Return (step, mean over the seeds of the Jaccard index on the selection images of the other hospital)."""
        metric = f"eval/{self.outside}/jaccard"
        curves = [dict(points(run.rows, "eval", metric)) for run in self.arms[arm]]
        steps = sorted(set.intersection(*map(set, curves)))
        return [(step, float(np.mean([curve[step] for curve in curves]))) for step in steps]


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean as "value", and its 95 % t-interval over the seeds as "lo", "hi".

    They are None from fewer than INTERVAL_FROM seeds.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < INTERVAL_FROM:
        return {"value": mean, "lo": None, "hi": None}
    half = float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(count))
    return {"value": mean, "lo": mean - half, "hi": mean + half}


# ---- Reading ----


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config with dotted names."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read_run(folder: Path, arm: str, seed: int) -> Run:
    evaluation = seeds.load(str(folder))
    try:
        saved = json.loads((folder / "config.json").read_text())
        config = flatten(saved["config"])
        code = (saved.get("git_sha") or "unknown")[:7]
        if saved.get("git_dirty"):
            code += f" with uncommitted changes {saved['git_dirty'][:6]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: is not the config of a run") from error
    if config.get("task") != "rl" or config.get("data.source") != "phantom":
        raise UserError(f"{folder}: not a run of RL on phantoms")
    if not {"SFT", "RL"} <= evaluation.get("models", {}).keys():
        raise UserError(f"{folder}: its evaluation.json does not have the models SFT and RL")
    if config["seed"] != seed:
        raise UserError(f"{folder}: its config.seed is {config['seed']}")
    return Run(
        name=folder.name,
        arm=arm,
        seed=seed,
        config=config,
        code=code,
        evaluation=evaluation,
        rows=run_log.read(folder),
    )


def load(folder: str | os.PathLike) -> Study:
    """Read every run of a folder.

    Raises:
        UserError: if there is none, or if two do not belong into one table.
    """
    folder, runs, unfinished = Path(folder), {}, []
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not (name := re.fullmatch(r"(.+)_s(\d+)", path.name)):
            continue
        arm, seed = name[1], int(name[2])
        if not (path / "evaluation.json").exists():
            unfinished.append(path.name)
            continue
        if (arm, seed) in runs:
            other = runs[arm, seed].name
            raise UserError(f"{path}: a second run of arm {arm}, seed {seed}, beside {other}")
        runs[arm, seed] = _read_run(path, arm, seed)
    if not runs:
        raise UserError(f"{folder}: holds no finished run in a folder named ARM_sSEED")
    _check_comparable(folder, list(runs.values()))
    arms: dict[str, list[Run]] = {}
    for arm, seed in sorted(runs):
        arms.setdefault(arm, []).append(runs[arm, seed])
    return Study(arms, _notes(list(runs.values()), unfinished))


def _check_comparable(folder: Path, runs: Sequence[Run]) -> None:
    """UserError where runs differ in what SAME names, or runs of one arm in anything that both their configs have."""
    first_of_arm: dict[str, Run] = {}
    for run in runs:
        first = first_of_arm.setdefault(run.arm, run)
        common = sorted((first.config.keys() & run.config.keys()) - {*BY_SEED})
        compared = [(runs[0], key) for key in SAME] + [(first, key) for key in common]
        for other, key in compared:
            theirs, ours = other.config.get(key), run.config.get(key)
            if theirs != ours:
                raise UserError(
                    f"{folder}: config.{key} is {theirs!r} in {other.name}, but {ours!r} in {run.name}"
                )


def _notes(runs: Sequence[Run], unfinished: Sequence[str]) -> list[str]:
    """What a reader has to know: keys that only one run has, other commits, runs left out."""
    notes = []
    first_of_arm: dict[str, Run] = {}
    # A key that one code knew and another did not: nothing tells what the other did.
    for run in runs:
        first = first_of_arm.setdefault(run.arm, run)
        keys = [
            f"config.{key}"
            for key in sorted(first.config.keys() ^ run.config.keys())
            if first.config.get(key) or run.config.get(key)
        ]
        if keys:
            notes.append(f"Only one of {first.name} and {run.name} has {', '.join(keys)}.")

    runs_of_code: dict[str, list[str]] = {}
    for run in runs:
        runs_of_code.setdefault(run.code, []).append(run.name)
    if len(runs_of_code) > 1:
        listed = "; ".join(f"{code}: {', '.join(names)}" for code, names in runs_of_code.items())
        notes.append(f"The runs are not all of one commit ({listed}).")
    else:
        notes.append(f"All runs are of commit {next(iter(runs_of_code))}.")
    if unfinished:
        notes.append(f"Not finished, left out: {', '.join(unfinished)}.")
    return notes
