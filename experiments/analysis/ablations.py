"""Runs of experiments/ablations/grpo.py as a table and a plot: `python -m experiments.analysis.ablations RUNS`.

RUNS holds one folder a run, named ARM_sSEED, each as `cxr_jax.main` leaves it (config.json, metrics.jsonl,
evaluation.json; formats: metrics/run_log.py and report/records.py). Writes a .md page, between its two marker lines if
the file is there, and a .svg (ablations_plot.py), docs/ablations.* unless --out says another. Runs that are not
finished are left out and named.
Runs that cannot be compared (one arm and seed twice, another n_final, another config in one arm) are an error.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code
from cxr_jax.report.curves import points
from experiments.analysis import ablations_plot
from experiments.analysis.ablation_runs import (
    BASE,
    INTERVAL_FROM,
    LAST,
    METRICS,
    Run,
    Study,
    estimate,
    load,
)

BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"
TRACE = {  # term -> (title, format)
    "trace_findings": ("trace = truth", ".3f"),
    "trace_false": ("false sentences", ".2f"),
}
Values = Sequence[float | None]  # one a seed

# ---- Cells ----


def _mean(values: Values, form: str) -> str:
    return "-" if not values or None in values else f"{np.mean(values):{form}}"


def _with_seeds(values: Values, form: str) -> str:
    """The mean, and each seed's value below it."""
    mean = _mean(values, form)
    if mean == "-" or len(values) == 1:
        return mean
    return f"{mean}<br>{', '.join(f'{value:{form}}' for value in values)}"


def _with_interval(values: Values) -> str:
    """The mean difference with its interval, and each seed's value below."""
    text = _with_seeds(values, "+.3f")
    if text == "-":
        return text
    mean = estimate(values)
    if mean["lo"] is None:
        return text
    return text.replace("<br>", f" [{mean['lo']:+.3f}, {mean['hi']:+.3f}]<br>")


def _against_base(study: Study, arm: str) -> str:
    """The RL models of an arm against those of `base` with equal seeds, on the other hospital."""
    base_runs = {run.seed: run for run in study.arms.get(BASE, ())}
    if arm == BASE or not base_runs:
        return ""
    differences = []
    for run in study.arms[arm]:
        if run.seed not in base_runs:
            continue
        ours = run.score("RL", study.outside, "jaccard")
        theirs = base_runs[run.seed].score("RL", study.outside, "jaccard")
        differences.append(None if ours is None or theirs is None else ours - theirs)
    return _with_interval(differences)


def _peak(study: Study, arm: str) -> str:
    """The best Jaccard on the selection images of the other hospital, and its step, of each seed."""
    peaks = []
    for run in study.arms[arm]:
        curve = points(run.rows, "eval", f"eval/{study.outside}/jaccard")
        if not curve:
            return "-"
        step, value = max(curve, key=lambda point: point[1])
        peaks.append(f"{value:.3f} at {step}")
    return "<br>".join(peaks)


# ---- The table ----


def columns(study: Study, arm: str) -> dict[str, str]:
    """Return heading -> what it says of an arm."""
    runs = study.arms[arm]
    cells = {"seeds": ", ".join(str(run.seed) for run in runs)}
    for set_name in (study.inside, study.outside):
        for metric, title in METRICS.items():
            differences = study.differences(arm, set_name, metric)
            cells[f"{set_name}: {title}"] = _with_interval(differences)
    cells[f"{study.outside}: Jaccard, arm - base"] = _against_base(study, arm)
    for term, (title, form) in TRACE.items():
        for set_name in (study.inside, study.outside):
            scores = [run.score("RL", set_name, term) for run in runs]
            cells[f"{set_name}: {title}"] = _with_seeds(scores, form)

    def mean_of(value: Callable[[Run], float | None], form: str) -> str:
        return _mean([value(run) for run in runs], form)

    cells["length"] = mean_of(lambda run: run.end("completions/mean_length"), ".0f")
    cells["entropy"] = mean_of(lambda run: run.end("entropy"), ".3f")
    cells["groups without variance"] = mean_of(lambda run: run.end("frac_reward_zero_std"), ".2f")
    cells["s a step"] = mean_of(Run.step_seconds, ".1f")
    cells[f"peak on {study.outside}"] = _peak(study, arm)
    return cells


def _sft_columns(study: Study) -> dict[str, str]:
    """What the SFT model alone scores, under the headings that it has."""
    forms = {metric: (title, ".3f") for metric, title in METRICS.items()} | TRACE
    return {
        f"{set_name}: {title}": _mean([study.sft.score("SFT", set_name, metric)], form)
        for set_name in (study.inside, study.outside)
        for metric, (title, form) in forms.items()
    }


def table(study: Study) -> str:
    """Write the Markdown table: SFT alone, then a row an arm."""
    rows = {arm: columns(study, arm) for arm in study.arms}
    headings = list(next(iter(rows.values())))
    sft = _sft_columns(study)
    lines = [
        ["arm", *headings],
        ["---"] * (1 + len(headings)),
        ["SFT only", *(sft.get(heading, "") for heading in headings)],
    ]
    for arm, cells in rows.items():
        mark = " †" if study.began_elsewhere(arm) else ""
        lines.append([arm + mark, *cells.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- The page ----


def _over_images(study: Study) -> str:
    """How wide the intervals over images are: what the seeds' spread does not show."""
    halves = []
    for set_name in (study.inside, study.outside):
        widths = []
        for run in (run for runs in study.arms.values() for run in runs):
            paired = run.comparison(set_name, "jaccard")
            if paired and None not in (paired["lo"], paired["hi"]):
                widths.append((paired["hi"] - paired["lo"]) / 2)
        if widths:
            halves.append(f"±{np.median(widths):.3f} on {set_name}")
    if not halves:
        return ""
    return f" One run's interval over images is about {', '.join(halves)} in Jaccard."


def section(study: Study, plot: str) -> str:
    """Write what stands between the markers. plot: the name of the picture's file."""
    images = study.sft.evaluation["models"]["SFT"][study.outside]["n"]
    notes = [
        f"Phantom results. SFT only: scores. Arms, Jaccard and macro-F1: RL - SFT on the same {images:,} test images a "
        f"hospital. {study.outside} is out of distribution; the step of a run was chosen on other images of it. "
        f"Mean over seeds [95 % t-interval over seeds, from {INTERVAL_FROM} seeds on], and below it each seed in order."
        + _over_images(study),
        "Arm - base: RL models of equal seeds. trace = truth: trace_findings; false sentences: of a trace "
        "(docs/rewards.md), both of the RL model. Length (tokens), entropy (nats a token) and groups without variance: "
        f"of training, mean of the last {LAST} steps. Seconds: the median step. Peak: the best Jaccard on the "
        "selection images, and its step.",
    ]
    if any(map(study.began_elsewhere, study.arms)):
        notes.append(
            "†: did not start from the SFT model; compared with it all the same, not paired."
        )
    picture = f"![RL - SFT by arm, and Jaccard on {study.outside} in training]({plot})"
    return "\n\n".join([table(study), *notes, *study.notes, picture])


def write(study: Study, path: Path) -> list[Path]:
    """Write `path` with .md and with .svg.

    Raises:
        UserError: for a page without the markers, or one that cannot be written.
    """
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
        plot.write_text(ablations_plot.draw(study))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error
    return [page, plot]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = ArgumentParser("experiments.analysis.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("runs", help="the folder of the runs' folders")
    parser.add_argument(
        "-o", "--out", default="docs/ablations", help="where to write, without .md and .svg"
    )

    def tabulate() -> None:
        args = parser.parse_args(argv)
        study = load(args.runs)
        print("wrote " + ", ".join(map(str, write(study, Path(args.out)))))
        for note in study.notes:
            print(note, file=sys.stderr)

    return exit_code(tabulate, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
