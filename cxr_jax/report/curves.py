"""The report's training curves: which metrics are drawn, how, and in which chart."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from cxr_jax.metrics.alarms import ALARMS
from cxr_jax.report.markup import muted, render, set_title
from cxr_jax.report.svg import (
    PALETTE,
    Points,
    Reference,
    Series,
    event_strip,
    legend,
    line_chart,
    smooth,
)

LogRows = Sequence[Mapping]  # lines of metrics.jsonl

# The prefix may be left out: see `records.py` for the names.
_EVALUATED = re.compile(r"^(?:eval/)?([^/]+)/(jaccard|macro_f1)$")
_TERM = re.compile(r"^rewards/([^/]+)/mean$")
SMOOTH_FROM = 60  # points; from here on a running mean is drawn over the faint raw line
ACCURACY = ("accuracy", "accuracy_hard")  # drawn with what constant answers would earn
CONSTANT = {  # metric -> (name, dashes)
    "constant/best": ("best constant answer", "6 4"),
    "constant/no_finding": ("always No Finding", "2 3"),
    "constant/all_labels": ("always all labels", "9 3 2 3"),
}
MAIN = {  # title -> (metrics in one chart, floor at zero)
    "Completion length (tokens)": (
        ("completions/mean_length", "completions/min_length", "completions/max_length"),
        True,
    ),
    "Share of completions truncated, of groups without spread": (
        ("completions/clipped_ratio", "frac_reward_zero_std"),
        True,
    ),
    "Entropy (nats a token)": (("entropy",), True),
    "Sampler against learner (difference of log-probs)": (
        ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
        True,
    ),
    "Loss": (("loss",), False),
    "Share of the devices' peak (MFU)": (("perf/mfu", "perf/learner_mfu"), True),
    "Share of the time": (
        tuple(f"goodput/{kind}" for kind in ("step", "compile", "data", "look", "save", "start")),
        True,
    ),
}
SHORT = {  # metric -> its name in a legend, where the last part of the metric's says too little
    "sampling/sampling_logp_difference/mean": "mean",
    "sampling/sampling_logp_difference/max": "max",
}
HELD_OUT = {  # which images the held-out curves show: they are used to choose a step
    "phantom": "Held-out curves use selection images, disjoint from the test images of the tables above.",
    "files": "Held-out curves use selection files, of other patients than the tables above (unless they are too few).",
}
# Of the run, not of the model: they have no figure.
HIDDEN = {"step", "time", "step_time", "num_tokens"}


class Figure(NamedTuple):
    """A chart with its title and legend."""

    title: str
    chart: Markup
    legend: Markup


class RungAlarm(NamedTuple):
    """An alarm that rang: when, and what to do about it."""

    title: str
    text: str


@dataclass(frozen=True)
class AlarmFigure:
    """The alarms of a run: how many were watched, those that rang, and when."""

    count: int
    rang: list[RungAlarm]
    strip: Markup


# ---- Points of a metric ----


def points(log_rows: LogRows, kind: str, metric: str) -> Points:
    """Collect (step, value) of one metric, by step; where a step was logged twice, the later line counts."""
    value_by_step: dict[int, float] = {}
    for log_row in log_rows:
        logged: Any = log_row.get(metric)
        # True is an int in Python, but no value of a curve.
        is_number = isinstance(logged, (int, float)) and not isinstance(logged, bool)
        if log_row.get("kind") == kind and is_number:
            value_by_step[log_row["step"]] = logged
    return sorted(value_by_step.items())


def _names(log_rows: LogRows, line_kind: str) -> list[str]:
    """Every name on lines of a kind, in the order of first mention."""
    return list(
        dict.fromkeys(
            metric_name
            for log_row in log_rows
            if log_row.get("kind") == line_kind
            for metric_name in log_row
        )
    )


def _is_flat(data_points: Points) -> bool:
    """A term that never moves hides others: it is folded away."""
    return len({value for step, value in data_points}) < 2


def _series(
    line_name: str, data_points: Points, line_color: str, has_marks: bool = False
) -> Series:
    # What is marked was measured rarely, and is shown as it was measured.
    if has_marks or len(data_points) < SMOOTH_FROM:
        return Series(line_name, data_points, line_color, marks=has_marks)
    return Series(
        line_name,
        smooth(data_points, max(5, len(data_points) // 25)),
        line_color,
        faint=data_points,
    )


# ---- Figures ----


def _figure(
    title: str,
    series: Sequence[Series],
    references: Sequence[Reference] = (),
    floor_zero: bool = False,
) -> Figure | None:
    """A figure of the series that have points, None if none has."""
    series = [chart_line for chart_line in series if chart_line.points]
    if not series:
        return None
    # Only a line that has been smoothed has a faint one that needs explaining.
    is_smoothed = any(chart_line.faint for chart_line in series)
    smoothing_note = "faint: each step; line: running mean" if is_smoothed else ""
    chart = line_chart(title, series, references, floor_zero=floor_zero)
    return Figure(title, chart, legend(series, references, smoothing_note))


def _line_figure(
    title: str,
    named_points: Mapping[str, Points],
    references: Sequence[Reference] = (),
    floor_zero: bool = False,
) -> Figure | None:
    """A figure of named lines, in the colours of the palette by turns."""
    series = [
        _series(line_name, data_points, PALETTE[position % len(PALETTE)])
        for position, (line_name, data_points) in enumerate(named_points.items())
    ]
    return _figure(title, series, references, floor_zero)


def _best_constant(models: Mapping, set_name: str, metric: str) -> float | None:
    # Constants concern the set alone: any model that was evaluated on it has them.
    for summaries in models.values():
        if set_name in summaries:
            return summaries[set_name]["constants"][f"best_{metric}"][metric]["value"]
    return None


def _held_out_figures(log_rows: LogRows, models: Mapping) -> list[Figure | None]:
    """Macro-F1 and Jaccard on held-out images: a line a test set, in its colour, dashed its best constant answer."""
    # A set has one colour in both figures.
    held_out_curves = [
        (metric_name, name_match)
        for metric_name in _names(log_rows, "eval")
        if (name_match := _EVALUATED.match(metric_name))
    ]
    test_sets = list(dict.fromkeys(name_match[1] for _, name_match in held_out_curves))
    figures = []
    for metric, metric_title in (("macro_f1", "macro-F1"), ("jaccard", "Jaccard")):
        series, references = [], []
        for metric_name, name_match in held_out_curves:
            # Each metric has a figure of its own.
            if name_match[2] != metric:
                continue
            set_name = name_match[1]
            set_color = PALETTE[test_sets.index(set_name) % len(PALETTE)]
            data_points = points(log_rows, "eval", metric_name)
            series.append(_series(set_title(set_name), data_points, set_color, has_marks=True))
            constant = _best_constant(models, set_name, metric)
            if constant is not None:
                title = f"best constant answer, {set_title(set_name)}"
                references.append(Reference(title, constant, set_color))
        title = f"{metric_title} on held-out images"
        figures.append(_figure(title, series, references, floor_zero=True))
    return figures


def _constant_references(log_rows: LogRows) -> list[Reference]:
    """What constant answers earn on the training images, where it was logged."""
    references = []
    for metric, (answer_title, dash_pattern) in CONSTANT.items():
        # A dashed line has one level: the last that was logged.
        if level_points := points(log_rows, "train", metric):
            references.append(
                Reference(answer_title, level_points[-1][1], PALETTE[4], dash_pattern)
            )
    return references


def _training_figures(log_rows: LogRows) -> list[Figure | None]:
    # ---- The reward and its terms ----
    points_by_term = {
        name_match[1]: points(log_rows, "train", name)
        for name in _names(log_rows, "train")
        if (name_match := _TERM.match(name))
    }
    accuracy_terms = {
        name: data_points for name, data_points in points_by_term.items() if name in ACCURACY
    }
    # A term that never moves is folded away; those of accuracy have a figure of their own.
    form_terms: dict[str, Points] = {}
    trace_terms: dict[str, Points] = {}
    for name, data_points in points_by_term.items():
        if name not in ACCURACY and not _is_flat(data_points):
            (trace_terms if name.startswith("trace_") else form_terms)[name] = data_points
    reward = _series("reward", points(log_rows, "train", "reward"), PALETTE[2])
    figures = [
        _figure("Reward of sampled completions", [reward]),
        _line_figure(
            "Accuracy of sampled completions", accuracy_terms, _constant_references(log_rows), True
        ),
        _line_figure("Reward terms: form and length", form_terms),
        _line_figure("Reward terms: trace", trace_terms),
    ]

    # ---- How sampling and learning go ----
    # A metric that this run did not log leaves no entry in the legend.
    for title, (metrics, floor_zero) in MAIN.items():
        named_points = {
            SHORT.get(metric, metric.split("/")[-1]): points(log_rows, "train", metric)
            for metric in metrics
        }
        named_points = {
            name: data_points for name, data_points in named_points.items() if data_points
        }
        figures.append(_line_figure(title, named_points, floor_zero=floor_zero))
    return figures


def _other_figures(log_rows: LogRows, drawn_metrics: Collection[str]) -> list[Figure]:
    """Every other numeric training metric, small and folded away."""
    figures = []
    for metric_name in _names(log_rows, "train"):
        data_points, term_match = points(log_rows, "train", metric_name), _TERM.match(metric_name)
        # What stands above is not drawn twice.
        is_drawn_term = term_match and (term_match[1] in ACCURACY or not _is_flat(data_points))
        if (
            metric_name in drawn_metrics
            or is_drawn_term
            or metric_name.startswith(("constant/", "alarms/"))
        ):
            continue
        if len(data_points) > 1 and (
            figure := _figure(metric_name, [_series(metric_name, data_points, PALETTE[4])])
        ):
            figures.append(figure)
    return figures


def _alarms(log_rows: LogRows) -> AlarmFigure | None:
    """When each alarm rang: those of `alarms.ALARMS` at every step, and those of an evaluation."""
    # An alarm is a metric, too: 1 where it rang, 0 where it was quiet.
    watched = {}
    for line_kind in ("train", "eval"):
        for alarm_name in _names(log_rows, line_kind):
            if alarm_name.startswith("alarms/"):
                watched[alarm_name.removeprefix("alarms/")] = points(
                    log_rows, line_kind, alarm_name
                )
    if not watched:
        return None
    ringing_steps = {
        alarm_name: [train_step for train_step, is_ringing in data_points if is_ringing]
        for alarm_name, data_points in watched.items()
        if any(is_ringing for _, is_ringing in data_points)
    }
    # That none rang is told, too: alarms that were not watched look the same otherwise.
    if not ringing_steps:
        return AlarmFigure(len(watched), [], Markup())
    watched_steps = [
        train_step for data_points in watched.values() for train_step, _ in data_points
    ]
    event_steps = {
        alarm_name.replace("_", " "): alarm_steps
        for alarm_name, alarm_steps in ringing_steps.items()
    }
    alarms = []
    for alarm_name, alarm_steps in ringing_steps.items():
        occurrence = f"{len(alarm_steps)} of {len(watched[alarm_name])} times, first at step {alarm_steps[0]}"
        advice = f": {ALARMS[alarm_name].advice}" if alarm_name in ALARMS else ""
        alarms.append(RungAlarm(alarm_name.replace("_", " "), occurrence + advice))
    # The strip spans every step that was watched, so that a late alarm looks late.
    strip = event_strip("Alarms", event_steps, min(watched_steps), max(watched_steps))
    return AlarmFigure(len(watched), alarms, strip)


def section(log_rows: LogRows, models: Mapping, kind: str = "phantom") -> Markup:
    """Draw all curves of a run.

    Args:
        log_rows: the lines of metrics.jsonl.
        models: the summaries of evaluation.json, for the constant answers' dashed lines.
        kind: "phantom" or "files": which images the held-out curves show.
    """
    # Held-out scores first: they are what a run is for.
    figures = [figure for figure in _held_out_figures(log_rows, models) if figure]
    figures += [figure for figure in _training_figures(log_rows) if figure]
    alarms = _alarms(log_rows)
    if not figures and alarms is None:
        return muted("No training curve was recorded.")
    # Every other metric goes below, folded away.
    drawn_metrics = (
        HIDDEN | {"reward"} | {metric for metrics, _ in MAIN.values() for metric in metrics}
    )
    other_figures = _other_figures(log_rows, drawn_metrics)
    return render(
        "curves.html", held_out=HELD_OUT[kind], main=figures, alarms=alarms, others=other_figures
    )
