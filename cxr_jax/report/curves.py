"""The report's training curves: which metrics are drawn, how, and in which chart."""

import re

from cxr_jax.metrics.alarms import ALARMS
from cxr_jax.report.svg import PALETTE, Reference, Series, event_strip, legend, line_chart, smooth
from cxr_jax.report.tables import esc, set_name

_EVAL = re.compile(r"^(?:eval/)?([^/]+)/(jaccard|macro_f1)$")
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
}
SHORT = {
    "sampling/sampling_logp_difference/mean": "mean",
    "sampling/sampling_logp_difference/max": "max",
}
SETS = {  # which images the held-out curves show: they are used to choose a step
    "phantom": "Held-out curves use selection images, disjoint from the test images of the tables above.",
    "files": "Held-out curves use selection files, of other patients than the tables above (unless they are too few).",
}
HIDDEN = {"step", "time", "step_time", "num_tokens"}


def points(rows, kind, name) -> list:
    """[(step, value)] of one metric, by step; where a step was logged twice, the later line counts."""
    found = {}
    for row in rows:
        value = row.get(name)
        if (
            row.get("kind") == kind
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            found[row["step"]] = value
    return sorted(found.items())


def _series(name, data, color, marks=False):
    if marks or len(data) < SMOOTH_FROM:
        return Series(name, data, color, marks=marks)
    return Series(name, smooth(data, max(5, len(data) // 25)), color, faint=data)


def _figure(title, series, references=(), floor_zero=False):
    series = [s for s in series if s.points]
    if not series:
        return ""
    note = "faint: each step; line: running mean" if any(s.faint for s in series) else ""
    chart = line_chart(title, series, references, floor_zero=floor_zero)
    return f"<figure><h3>{esc(title)}</h3>{chart}{legend(series, references, note)}</figure>"


def _names(rows, kind):
    return list(dict.fromkeys(name for row in rows if row.get("kind") == kind for name in row))


def _constant(models, name, metric):
    for sets in models.values():
        if name in sets:
            return sets[name]["constants"][f"best_{metric}"][metric]["value"]
    return None


def _eval_figures(rows, models):
    found = [(n, m) for n in _names(rows, "eval") if (m := _EVAL.match(n))]
    sets = list(dict.fromkeys(m[1] for _, m in found))
    out = []
    for metric, name in (("macro_f1", "macro-F1"), ("jaccard", "Jaccard")):
        title = f"{name} on held-out images"
        series, references = [], []
        for name, m in found:
            if m[2] != metric:
                continue
            color = PALETTE[sets.index(m[1]) % len(PALETTE)]
            series.append(_series(set_name(m[1]), points(rows, "eval", name), color, marks=True))
            value = _constant(models, m[1], metric)
            if value is not None:
                references.append(
                    Reference(f"best constant answer, {set_name(m[1])}", value, color)
                )
        out.append(_figure(title, series, references, floor_zero=True))
    return out


def _train_figures(rows):
    names = _names(rows, "train")
    terms = {m[1]: points(rows, "train", n) for n in names if (m := _TERM.match(n))}
    moving = {n: p for n, p in terms.items() if not _is_flat(p) and n not in ACCURACY}
    figure = lambda title, chosen, references=(), floor=False: _figure(
        title,
        [_series(n, p, PALETTE[i % len(PALETTE)]) for i, (n, p) in enumerate(chosen.items())],
        references,
        floor,
    )
    constant = [
        Reference(title, level[-1][1], PALETTE[4], dash)
        for name, (title, dash) in CONSTANT.items()
        if (level := points(rows, "train", name))
    ]
    out = [
        _figure(
            "Reward of sampled completions",
            [_series("reward", points(rows, "train", "reward"), PALETTE[2])],
        ),
        figure(
            "Accuracy of sampled completions",
            {n: p for n, p in terms.items() if n in ACCURACY},
            constant,
            True,
        ),
        figure(
            "Reward terms: form and length",
            {n: p for n, p in moving.items() if not n.startswith("trace_")},
        ),
        figure("Reward terms: trace", {n: p for n, p in moving.items() if n.startswith("trace_")}),
    ]
    for title, (metrics, floor) in MAIN.items():
        lines = {SHORT.get(n, n.split("/")[-1]): points(rows, "train", n) for n in metrics}
        out.append(figure(title, {n: p for n, p in lines.items() if p}, floor=floor))
    return [*out, _alarms(rows)]


def _alarms(rows) -> str:
    """When each alarm rang (those of alarms.ALARMS at every step, and those of a look), or that none did."""
    found = {}
    for kind in ("train", "eval"):
        found |= {n: points(rows, kind, n) for n in _names(rows, kind) if n.startswith("alarms/")}
    if not found:
        return ""
    rang = {n.removeprefix("alarms/"): [x for x, v in p if v] for n, p in found.items()}
    rang = {n: at for n, at in rang.items() if at}
    if rang:
        steps = [x for p in found.values() for x, _ in p]
        body = event_strip(
            "Alarms", [(n.replace("_", " "), at) for n, at in rang.items()], min(steps), max(steps)
        )
        for n, at in rang.items():
            text = f"{len(at)} of {len(found[f'alarms/{n}'])} times, first at step {at[0]}"
            advice = f": {ALARMS[n][1]}" if n in ALARMS else ""
            body += f'<p class="small"><b>{esc(n.replace("_", " "))}</b> {esc(text + advice)}</p>'
    else:
        body = f"<p>None of the {len(found)} alarms rang.</p>"
    more = '<p class="muted small">An alarm says where to look. It is no verdict.</p>'
    return f"<figure><h3>Alarms</h3>{body}{more}</figure>"


def _is_flat(data) -> bool:
    """A term that never moves hides others: it is folded away."""
    return len({value for _, value in data}) < 2


def _other_figures(rows):
    """Every other numeric training metric, small and folded away."""
    skip = HIDDEN | {n for metrics, _ in MAIN.values() for n in metrics} | {"reward"}
    out = []
    for name in _names(rows, "train"):
        data, term = points(rows, "train", name), _TERM.match(name)
        drawn = term and (term[1] in ACCURACY or not _is_flat(data))
        if name in skip or drawn or name.startswith(("constant/", "alarms/")):
            continue
        if len(data) > 1:
            out.append(_figure(name, [_series(name, data, PALETTE[4])]))
    return out


def section(rows, models, kind="phantom") -> str:
    """HTML of all curves of metrics.jsonl lines; `models` give the constant answers' dashed lines."""
    main = [f for f in _eval_figures(rows, models) + _train_figures(rows) if f]
    if not main:
        return '<p class="muted">No training curve was recorded.</p>'
    others = [f for f in _other_figures(rows) if f]
    folded = f'<div class="two">{"".join(others)}</div>'
    more = f"<details><summary>{len(others)} more curves</summary>{folded}</details>"
    text = (
        "Dashed: what the best constant answer would score. Move over a chart to read its values."
    )
    return (
        f'<p>{SETS[kind]} {text}</p><div class="two">{"".join(main)}</div>{more if others else ""}'
    )
