"""The plot of ablations.py: RL - SFT by arm on both hospitals, and the curves of training, as one SVG file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cxr_jax.report.markup import escape
from cxr_jax.report.svg import PALETTE, Series, draw_line, draw_text, line_chart, nice_ticks, number
from experiments.analysis.ablation_runs import Study, estimate

WIDTH, GAP, NAMES, EDGE = 1040, 20, 110, 20
ROW, HEAD, FOOT = 34, 46, 30
CURVES = 320
COLORS = (*PALETTE, "#c2185b", "#4b3f1e", "#5e8c31", "#3949ab")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.strong{font-weight:600}.grid{stroke:#ddd}"
    ".axis,.tick{stroke:#888}.zero{stroke:#444}"
)
MEAN_SIZE, SEED_SIZE = 4.5, 1.8  # of marks


class Mark(NamedTuple):
    """How a metric is drawn. shift: below the middle of its row."""

    title: str
    color: str
    shift: int


MARKS = {"jaccard": Mark("Jaccard", PALETTE[0], -6), "macro_f1": Mark("macro-F1", PALETTE[1], 6)}


class Differences(NamedTuple):
    """RL - SFT of each seed, and their mean {value, lo, hi}."""

    values: list[float]
    mean: dict[str, float | None]


@dataclass(frozen=True)
class _Panel:
    """Where differences lie in the picture of one hospital; what is off its ends stands at them."""

    left: float
    width: float
    low: float
    high: float

    def x(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.left + (inside - self.low) / (self.high - self.low) * self.width


def draw(study: Study) -> str:
    """Return the text of the file."""
    panel_width = (WIDTH - NAMES - GAP - EDGE) / 2
    forest_height = HEAD + ROW * len(study.arms) + FOOT
    elements = [_legend()]
    for row, arm in enumerate(study.arms):
        elements.append(draw_text(4, HEAD + ROW * (row + 0.5) + 4, arm, 'class="strong"'))
    for position, set_name in enumerate((study.inside, study.outside)):
        left = NAMES + position * (panel_width + GAP)
        elements.append(_forest(study, set_name, left, panel_width))
    curves, height = _curves(study, forest_height + 20)
    title = f"RL - SFT by arm on hospitals {study.inside} and {study.outside}, and training curves"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(elements)}{curves}</svg>\n'
    )


# ---- Differences by arm ----


def _mark(metric: str, x: float, y: float, size: float, opacity: float = 1.0) -> str:
    """A dot for Jaccard, a square for macro-F1. size: half of its width."""
    paint = f'fill="{MARKS[metric].color}" opacity="{opacity}"'
    if metric == "jaccard":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {paint}/>'
    side = f'width="{2 * size}" height="{2 * size}"'
    return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" {side} {paint}/>'


def _legend() -> str:
    elements, x = [], NAMES
    for metric, mark in MARKS.items():
        elements.append(_mark(metric, x + 5, 14, MEAN_SIZE) + draw_text(x + 15, 18, mark.title))
        x += 90
    note = (
        "large: mean over seeds; bar: 95 % t-interval over seeds, from three on; small: each seed"
    )
    return "".join([*elements, draw_text(x, 18, note)])


def _differences(study: Study, set_name: str) -> dict[tuple[str, str], Differences]:
    """(arm, metric) -> differences, where all seeds have one."""
    differences = {}
    for arm in study.arms:
        for metric in MARKS:
            values = study.differences(arm, set_name, metric)
            if None not in values:
                differences[arm, metric] = Differences(values, estimate(values))
    return differences


def _limits(
    study: Study, differences: Mapping[tuple[str, str], Differences]
) -> tuple[float, float]:
    """The ends of a panel.

    An arm that began elsewhere can be far off: it would leave no room to tell the others apart.
    """
    near = []
    for (arm, _), (values, mean) in differences.items():
        if not study.began_elsewhere(arm):
            near += values
            near += [] if mean["lo"] is None else [mean["lo"], mean["hi"]]
    if not near:
        near = [value for values, _ in differences.values() for value in values]
    near.append(0.0)
    pad = max(0.05 * (max(near) - min(near)), 0.005)
    return min(near) - pad, max(near) + pad


def _forest(study: Study, set_name: str, left: float, width: float) -> str:
    """One panel: the differences of all arms on a hospital."""
    differences = _differences(study, set_name)
    panel = _Panel(left, width, *_limits(study, differences))
    bottom = HEAD + ROW * len(study.arms)
    title = f"RL - SFT on hospital {set_name}"
    elements = [draw_text(left, HEAD - 8, title, 'class="strong"')]
    for value in nice_ticks(panel.low, panel.high, 6):
        kind, x = "zero" if value == 0 else "grid", panel.x(value)
        elements.append(draw_line(x, x, HEAD, bottom, f'class="{kind}"'))
        elements.append(draw_text(x, bottom + 16, number(value), 'text-anchor="middle"'))
    for row, arm in enumerate(study.arms):
        for metric, mark in MARKS.items():
            if (arm, metric) in differences:
                y = HEAD + ROW * (row + 0.5) + mark.shift
                elements += _row(metric, differences[arm, metric], panel, y)
    return "".join(elements)


def _row(metric: str, differences: Differences, panel: _Panel, y: float) -> Sequence[str]:
    """One arm by one metric: interval, seeds and mean; of a mean off the panel, an arrow with its number."""
    values, mean = differences
    color = MARKS[metric].color
    if not panel.low <= mean["value"] <= panel.high:
        anchor, x, arrow = "end", panel.left + panel.width - 4, "› "
        if mean["value"] < panel.low:
            anchor, x, arrow = "start", panel.left + 4, "‹ "
        text = f"{arrow}{number(round(mean['value'], 3))}"
        return [draw_text(x, y + 4, text, f'text-anchor="{anchor}" style="fill:{color}"')]
    elements = []
    if mean["lo"] is not None:
        bar = f'stroke="{color}" stroke-width="3" opacity=".35"'
        elements.append(draw_line(panel.x(mean["lo"]), panel.x(mean["hi"]), y, y, bar))
    elements += [_mark(metric, panel.x(value), y, SEED_SIZE, 0.7) for value in values]
    elements.append(_mark(metric, panel.x(mean["value"]), y, MEAN_SIZE))
    return elements


# ---- Curves of training ----


def _curves(study: Study, top: int) -> tuple[str, int]:
    """(SVG, height of the whole file) of the mean curve of each arm that began at the SFT model, with a legend."""
    title = f"Jaccard on selection images of hospital {study.outside}, mean over seeds"
    series = []
    for position, arm in enumerate(study.arms):
        if not study.began_elsewhere(arm) and (curve := study.curve(arm)):
            series.append(Series(arm, curve, COLORS[position % len(COLORS)], marks=True))
    if not series:
        return "", top
    # A chart inside the picture has its own place and size.
    chart = str(line_chart(title, series, width=WIDTH, height=CURVES))
    place = f'<svg x="0" y="{top + 22}" width="{WIDTH}" height="{CURVES}" '
    elements = [draw_text(4, top + 12, title, 'class="strong"'), chart.replace("<svg ", place, 1)]

    # ---- The legend, in as many lines as it needs ----
    x, y = 56, top + CURVES + 42
    for line in series:
        if x > WIDTH - 120:
            x, y = 56, y + 20
        stroke = f'stroke="{line.color}" stroke-width="3"'
        elements.append(draw_line(x, x + 24, y - 4, y - 4, stroke))
        elements.append(draw_text(x + 30, y, line.name))
        x += 125
    if left_out := [arm for arm in study.arms if study.began_elsewhere(arm)]:
        y += 20
        ends = [
            f"{arm} (ends at {curve[-1][1]:.3f})" for arm in left_out if (curve := study.curve(arm))
        ]
        listed = ", ".join(ends or left_out)
        elements.append(draw_text(56, y, f"Not drawn, as it began elsewhere: {listed}"))
    return "".join(elements), y + 16
