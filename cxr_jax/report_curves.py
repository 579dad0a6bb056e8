"""The report's training curves: which metrics are drawn, how, and in which chart."""

import re

from cxr_jax.report_svg import PALETTE, Reference, Series, legend, line_chart, smooth
from cxr_jax.report_tables import esc, set_name

_EVAL = re.compile(r"^(?:eval/)?([^/]+)/(jaccard|macro_f1)$")
_TERM = re.compile(r"^rewards/([^/]+)/mean$")
SMOOTH_FROM = 60  # points; from here on a running mean is drawn over the faint raw line
MAIN = {  # name -> (title, floor at zero)
    "completions/mean_length": ("Completion length (tokens)", True),
    "entropy": ("Entropy (nats a token)", True),
    "loss": ("Loss", False),
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
        if row.get("kind") == kind and isinstance(value, (int, float)) and not isinstance(value, bool):
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
                references.append(Reference(f"best constant answer, {set_name(m[1])}", value, color))
        out.append(_figure(title, series, references, floor_zero=True))
    return out


def _train_figures(rows):
    names = _names(rows, "train")
    level = points(rows, "train", "constant/best")
    constant = [Reference("best constant answer (accuracy)", level[-1][1], "#6b6b6b")] if level else []
    terms = {m[1]: points(rows, "train", n) for n in names if (m := _TERM.match(n))}
    terms = {n: p for n, p in terms.items() if not _is_flat(p)}
    of_trace = {n: p for n, p in terms.items() if n.startswith("trace_")}
    figure = lambda title, chosen: _figure(
        title, [_series(n, p, PALETTE[i % len(PALETTE)]) for i, (n, p) in enumerate(chosen.items())]
    )
    reward = _series("reward", points(rows, "train", "reward"), PALETTE[2])
    out = [
        _figure("Reward of sampled completions", [reward], constant),
        figure("Reward terms: answer and length", {n: p for n, p in terms.items() if n not in of_trace}),
        figure("Reward terms: trace", of_trace),
    ]
    for name, (title, floor) in MAIN.items():
        series = _series(name.split("/")[-1], points(rows, "train", name), PALETTE[6])
        out.append(_figure(title, [series], floor_zero=floor))
    return out


def _is_flat(data) -> bool:
    """A term that never moves hides others: it is folded away."""
    return len({value for _, value in data}) < 2


def _other_figures(rows):
    """Every other numeric training metric, small and folded away."""
    skip = HIDDEN | set(MAIN) | {"reward"}
    out = []
    for name in _names(rows, "train"):
        data = points(rows, "train", name)
        if name in skip or (_TERM.match(name) and not _is_flat(data)) or name.startswith("constant/"):
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
    text = "Dashed: what the best constant answer would score. Move over a chart to read its values."
    return f'<p>{SETS[kind]} {text}</p><div class="two">{"".join(main)}</div>{more if others else ""}'
