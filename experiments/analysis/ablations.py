"""Runs of experiments/ablations/grpo.py as a table and a plot: `python -m experiments.analysis.ablations RUNS`.

RUNS holds one folder a run, named ARM_sSEED, each as `cxr_jax.main` leaves it (config.json, metrics.jsonl,
evaluation.json; formats: metrics/run_log.py and report/records.py). Writes a .md page, between its two marker lines if
the file is there, and a .svg (ablations_plot.py), docs/ablations.* unless --out says another. Runs that are not
finished are left out and named.
Runs that cannot be compared (one arm and seed twice, another n_final, another config in one arm) are an error.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code
from cxr_jax.metrics import run_log
from cxr_jax.report.curves import points
from experiments.analysis import ablations_plot, seeds

BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"
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


@dataclass
class Run:
    """One run's folder: its config (flat: dotted names), code, evaluation.json and lines of metrics.jsonl."""

    name: str
    arm: str
    seed: int
    config: dict
    code: str
    evaluation: dict
    rows: list

    def score(self, model: str, set_name: str, metric: str) -> float | None:
        """Of the test images. metric: "jaccard", "macro_f1" or the name of a term of the trace."""
        scores = self.evaluation["models"][model][set_name]
        if metric == "jaccard":
            return scores[metric]["value"]
        return (scores[metric]["all"] if metric in METRICS else scores["trace"][metric])["value"]

    def comparison(self, set_name: str, metric: str) -> dict | None:
        """The paired difference RL - SFT over the test images, {diff, lo, hi, ...}."""
        wanted = {"a": "SFT", "b": "RL", "set": set_name, "metric": metric}
        found = (c for c in self.evaluation["comparisons"] if wanted.items() <= c.items())
        return next(found, None)

    def end(self, name: str) -> float | None:
        """Mean of a training metric over the last steps."""
        values = [v for _, v in points(self.rows, "train", name)[-LAST:]]
        return float(np.mean(values)) if values else None


@dataclass
class Study:
    """All finished runs by arm and seed: `base` first, then the arms by what they reach on the other hospital.

    notes: what a reader has to know of the runs.
    """

    arms: dict[str, list[Run]]
    notes: list[str]

    def __post_init__(self):
        self.sft = self.arms.get(BASE, next(iter(self.arms.values())))[
            0
        ]  # whose SFT model is the first row
        self.start = self.sft.config["model"]
        self.inside, self.outside = (
            self.sft.config["data.hospital"],
            self.sft.config["data.ood_hospital"],
        )
        reached = lambda runs: np.mean(
            [run.score("RL", self.outside, "jaccard") or 0.0 for run in runs]
        )
        place = {arm: (arm != BASE, -reached(runs), arm) for arm, runs in self.arms.items()}
        self.arms = {arm: self.arms[arm] for arm in sorted(place, key=place.get)}

    def difference(self, run: Run, set_name: str, metric: str) -> float | None:
        """RL - SFT of a run on a test set; where it began elsewhere, its RL model against the other arms' SFT model."""
        if run.config["model"] == self.start and (paired := run.comparison(set_name, metric)):
            return paired["diff"]
        a, b = self.sft.score("SFT", set_name, metric), run.score("RL", set_name, metric)
        return None if a is None or b is None else b - a

    def differences(self, arm: str, set_name: str, metric: str) -> list:
        return [self.difference(run, set_name, metric) for run in self.arms[arm]]

    def elsewhere(self, arm: str) -> bool:
        """Whether an arm did not start from the SFT model."""
        return self.arms[arm][0].config["model"] != self.start

    def curve(self, arm: str) -> list:
        """[(step, mean over the seeds of the Jaccard index on the selection images of the other hospital)]."""
        curves = [
            dict(points(r.rows, "eval", f"eval/{self.outside}/jaccard")) for r in self.arms[arm]
        ]
        steps = sorted(set.intersection(*map(set, curves)))
        return [(step, float(np.mean([curve[step] for curve in curves]))) for step in steps]


def estimate(values: list) -> dict:
    """value: the mean; lo, hi: its 95 % t-interval over the seeds, None from fewer than INTERVAL_FROM."""
    mean, n = float(np.mean(values)), len(values)
    if n < INTERVAL_FROM:
        return {"value": mean, "lo": None, "hi": None}
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
    return {"value": mean, "lo": mean - half, "hi": mean + half}


# Reading -------------------------------------------------------------------------------------------


def _flat(config: dict, prefix="") -> dict:
    out = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _run(folder: Path, arm: str, seed: int) -> Run:
    evaluation = seeds.load(str(folder))
    try:
        saved = json.loads((folder / "config.json").read_text())
        config = _flat(saved["config"])
        code = (saved.get("git_sha") or "unknown")[:7]
        if saved.get("git_dirty"):
            code += f" with uncommitted changes {saved['git_dirty'][:6]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / 'config.json'}: is not the config of a run") from e
    if config.get("task") != "rl" or config.get("data.source") != "phantom":
        raise UserError(f"{folder}: not a run of RL on phantoms")
    if not {"SFT", "RL"} <= evaluation.get("models", {}).keys():
        raise UserError(f"{folder}: its evaluation.json does not have the models SFT and RL")
    if config["seed"] != seed:
        raise UserError(f"{folder}: its config.seed is {config['seed']}")
    return Run(folder.name, arm, seed, config, code, evaluation, run_log.read(folder))


def load(folder) -> Study:
    """Every run of a folder. UserError if there is none, or if two do not belong into one table."""
    folder, runs, unfinished = Path(folder), {}, []
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if not (name := re.fullmatch(r"(.+)_s(\d+)", path.name)):
            continue
        arm, seed = name[1], int(name[2])
        if not (path / "evaluation.json").exists():
            unfinished.append(path.name)
            continue
        if (arm, seed) in runs:
            raise UserError(
                f"{path}: a second run of arm {arm}, seed {seed}, beside {runs[arm, seed].name}"
            )
        runs[arm, seed] = _run(path, arm, seed)
    if not runs:
        raise UserError(f"{folder}: holds no finished run in a folder named ARM_sSEED")
    _check_comparable(folder, list(runs.values()))
    arms = {}
    for arm, seed in sorted(runs):
        arms.setdefault(arm, []).append(runs[arm, seed])
    return Study(arms, _notes(list(runs.values()), unfinished))


def _check_comparable(folder, runs):
    """UserError where runs differ in what SAME names, or runs of one arm in anything that both their configs have."""
    of_arm = {}
    for run in runs:
        first = of_arm.setdefault(run.arm, run)
        common = sorted((first.config.keys() & run.config.keys()) - {*BY_SEED})
        for other, name in [(runs[0], name) for name in SAME] + [(first, name) for name in common]:
            a, b = other.config.get(name), run.config.get(name)
            if a != b:
                raise UserError(
                    f"{folder}: config.{name} is {a!r} in {other.name}, but {b!r} in {run.name}"
                )


def _notes(runs, unfinished) -> list[str]:
    notes, of, of_arm = [], {}, {}
    for (
        run
    ) in runs:  # a key that one code knew and another did not: nothing tells what the other did
        first = of_arm.setdefault(run.arm, run)
        odd = sorted(first.config.keys() ^ run.config.keys())
        odd = [f"config.{name}" for name in odd if first.config.get(name) or run.config.get(name)]
        if odd:
            notes.append(f"Only one of {first.name} and {run.name} has {', '.join(odd)}.")
    for run in runs:
        of.setdefault(run.code, []).append(run.name)
    if len(of) > 1:
        found = "; ".join(f"{code}: {', '.join(names)}" for code, names in of.items())
        notes.append(f"The runs are not all of one commit ({found}).")
    else:
        notes.append(f"All runs are of commit {next(iter(of))}.")
    if unfinished:
        notes.append(f"Not finished, left out: {', '.join(unfinished)}.")
    return notes


# The table -----------------------------------------------------------------------------------------


def _mean(values: list, form: str) -> str:
    return "-" if not values or None in values else f"{np.mean(values):{form}}"


def _with_seeds(values: list, form: str) -> str:
    """The mean, and each seed's value below it."""
    mean = _mean(values, form)
    return (
        mean
        if mean == "-" or len(values) == 1
        else f"{mean}<br>{', '.join(f'{v:{form}}' for v in values)}"
    )


def _difference(values: list) -> str:
    """The mean with its interval, and each seed's value below."""
    text = _with_seeds(values, "+.3f")
    if text == "-" or (e := estimate(values))["lo"] is None:
        return text
    return text.replace("<br>", f" [{e['lo']:+.3f}, {e['hi']:+.3f}]<br>")


def _against_base(study: Study, arm: str) -> str:
    seeds_of_base = {run.seed: run for run in study.arms.get(BASE, ())}
    if arm == BASE or not seeds_of_base:
        return ""
    score = lambda run: run.score("RL", study.outside, "jaccard")
    pairs = [
        (score(run), score(seeds_of_base[run.seed]))
        for run in study.arms[arm]
        if run.seed in seeds_of_base
    ]
    return _difference([None if None in pair else pair[0] - pair[1] for pair in pairs])


def _peak(study: Study, arm: str) -> str:
    peaks = []
    for run in study.arms[arm]:
        looks = points(run.rows, "eval", f"eval/{study.outside}/jaccard")
        if not looks:
            return "-"
        step, value = max(looks, key=lambda look: look[1])
        peaks.append(f"{value:.3f} at {step}")
    return "<br>".join(peaks)


def _step_seconds(run: Run) -> float | None:
    times = [t for _, t in points(run.rows, "train", "step_time")]
    return float(np.median(times)) if times else None


def columns(study: Study) -> dict[str, Callable[[str], str]]:
    """Heading -> what it says of an arm."""
    of = lambda value, form, cell=_mean: (
        lambda arm: cell([value(run) for run in study.arms[arm]], form)
    )
    out = {"seeds": lambda arm: ", ".join(str(run.seed) for run in study.arms[arm])}
    for set_name in (study.inside, study.outside):
        for metric, title in METRICS.items():
            out[f"{set_name}: {title}"] = lambda arm, s=set_name, m=metric: _difference(
                study.differences(arm, s, m)
            )
    out[f"{study.outside}: Jaccard, arm - base"] = lambda arm: _against_base(study, arm)
    for term, title, form in (
        ("trace_findings", "trace = truth", ".3f"),
        ("trace_false", "false sentences", ".2f"),
    ):
        for set_name in (study.inside, study.outside):
            value = lambda run, s=set_name, t=term: run.score("RL", s, t)
            out[f"{set_name}: {title}"] = of(value, form, _with_seeds)
    out["length"] = of(lambda run: run.end("completions/mean_length"), ".0f")
    out["entropy"] = of(lambda run: run.end("entropy"), ".3f")
    out["groups without variance"] = of(lambda run: run.end("frac_reward_zero_std"), ".2f")
    out["s a step"] = of(_step_seconds, ".1f")
    out[f"peak on {study.outside}"] = lambda arm: _peak(study, arm)
    return out


def table(study: Study) -> str:
    """The Markdown table: SFT alone, then a row an arm."""
    cells = columns(study)
    lines = [["arm", *cells], ["---"] * (1 + len(cells))]
    sft = {}
    for set_name in (study.inside, study.outside):
        for name, title, form in (
            ("jaccard", "Jaccard", ".3f"),
            ("macro_f1", "macro-F1", ".3f"),
            ("trace_findings", "trace = truth", ".3f"),
            ("trace_false", "false sentences", ".2f"),
        ):
            sft[f"{set_name}: {title}"] = _mean([study.sft.score("SFT", set_name, name)], form)
    lines.append(["SFT only", *(sft.get(title, "") for title in cells)])
    for arm in study.arms:
        lines.append(
            [arm + (" †" if study.elsewhere(arm) else ""), *(cell(arm) for cell in cells.values())]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _over_images(study: Study) -> str:
    """How wide the intervals over images are: what the seeds' spread does not show."""
    halves = {}
    for set_name in (study.inside, study.outside):
        found = [
            run.comparison(set_name, "jaccard") for runs in study.arms.values() for run in runs
        ]
        wide = [(c["hi"] - c["lo"]) / 2 for c in found if c and None not in (c["lo"], c["hi"])]
        if wide:
            halves[set_name] = f"±{np.median(wide):.3f} on {set_name}"
    return (
        f" One run's interval over images is about {', '.join(halves.values())} in Jaccard."
        if halves
        else ""
    )


def section(study: Study, plot: str) -> str:
    """What stands between the markers."""
    n = study.sft.evaluation["models"]["SFT"][study.outside]["n"]
    notes = [
        f"Phantom results. SFT only: scores. Arms, Jaccard and macro-F1: RL - SFT on the same {n:,} test images a "
        f"hospital. {study.outside} is out of distribution; the step of a run was chosen on other images of it. "
        f"Mean over seeds [95 % t-interval over seeds, from {INTERVAL_FROM} seeds on], and below it each seed in order."
        + _over_images(study),
        "Arm - base: RL models of equal seeds. trace = truth: trace_findings; false sentences: of a trace "
        "(docs/rewards.md), both of the RL model. Length (tokens), entropy (nats a token) and groups without variance: "
        f"of training, mean of the last {LAST} steps. Seconds: the median step. Peak: the best Jaccard on the "
        "selection images, and its step.",
        *study.notes,
    ]
    if any(map(study.elsewhere, study.arms)):
        notes.insert(
            2, "†: did not start from the SFT model; compared with it all the same, not paired."
        )
    picture = f"![RL - SFT by arm, and Jaccard on {study.outside} in training]({plot})"
    return "\n\n".join([table(study), *notes, picture])


def write(study: Study, path: Path) -> list[Path]:
    """Write `path` with .md and with .svg. UserError for a page without the markers, or one that cannot be written."""
    page, plot = path.with_name(path.name + ".md"), path.with_name(path.name + ".svg")
    try:
        text = page.read_text() if page.exists() else f"# Ablations\n\n{BEGIN}\n{END}\n"
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise UserError(
                f"{page}: has no lines {BEGIN} and {END} for the table to stand between"
            )
        page.write_text(f"{before}{BEGIN}\n\n{section(study, plot.name)}\n\n{END}{after}")
        plot.write_text(ablations_plot.draw(study, estimate))
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be written ({e.strerror})") from e
    return [page, plot]


def main(argv=None) -> int:
    parser = ArgumentParser("experiments.analysis.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("runs", help="the folder of the runs' folders")
    parser.add_argument(
        "-o", "--out", default="docs/ablations", help="where to write, without .md and .svg"
    )

    def tabulate():
        args = parser.parse_args(argv)
        study = load(args.runs)
        print("wrote " + ", ".join(map(str, write(study, Path(args.out)))))
        for note in study.notes:
            print(note, file=sys.stderr)

    return exit_code(tabulate, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
