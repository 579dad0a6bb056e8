"""The report's inline SVG: line charts over training steps, marks of events, and interval (forest) plots.

Drawn in Python so that the page is complete without its script; the script only adds the hover readout.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cxr_jax.report.markup import escape

PALETTE = ("#1f5fa8", "#b4560f", "#2a7d4f", "#8a3f8f", "#6b6b6b", "#a31f34", "#00798c", "#7a6a00")
BLUE, ORANGE = PALETTE[:2]
MAX_POINTS = 400
WIDTH = 520  # units of a chart's own coordinates; the page scales it to the column

Points = list[tuple[float, float]]  # (step, value)


@dataclass
class Series:
    """One line. faint: the values before smoothing, drawn below it; marks: a dot a point."""

    name: str
    points: Points
    color: str
    faint: Points | None = None
    marks: bool = False


@dataclass
class Reference:
    """A dashed horizontal line."""

    name: str
    value: float
    color: str
    dash: str = "6 4"


@dataclass(frozen=True, kw_only=True)
class ForestGroup:
    """The intervals of one heading. estimates: name -> {value, lo, hi}; constant: a dashed line, None for none."""

    heading: str
    color: str
    estimates: Mapping[str, Mapping]
    constant: float | None


# ---- Numbers ----


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round tick values (1, 2, 2.5, 5 times a power of ten) that lie in [low, high], about `count` of them."""
    if not high > low:
        return [low]
    # The smallest round step that is not below the even one.
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)
    )
    # A tick on the very limit stays, whatever the rounding of the division.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(multiple * step, 12) for multiple in range(first, last + 1)]


def number(value: float) -> str:
    """Write a short tick or readout label."""
    size = abs(value)
    if value and (size >= 1e5 or size < 1e-3):
        text = f"{value:.3g}"
    elif size < 100:
        text = f"{value:.4f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:.0f}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def smooth(points: Points, window: int) -> Points:
    """Compute the centred running mean over `window` points (fewer at the ends)."""
    half, smoothed = window // 2, []
    for index, (step, _) in enumerate(points):
        part = [value for _, value in points[max(0, index - half) : index + half + 1]]
        smoothed.append((step, sum(part) / len(part)))
    return smoothed


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """Keep at most `limit` points, evenly chosen, the last one among them."""
    if len(points) <= limit:
        return points
    # Evenly by place, not by step: a long run logs at equal distances.
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def _limits(values: Sequence[float], floor_zero: bool) -> tuple[float, float]:
    """The ends of the vertical axis, with some room around the values."""
    low, high = min(values), max(values)
    if floor_zero and low >= 0:
        low = 0.0
    # Flat is constant up to the rounding of a running mean.
    is_flat = high - low <= 1e-9 * max(abs(high), abs(low))
    pad = max(abs(high) * 0.1, 1e-3) if is_flat else (high - low) * 0.06
    return (low if floor_zero and low == 0 else low - pad), high + pad


# ---- Elements ----


def draw_line(x1: float, x2: float, y1: float, y2: float, attributes: str) -> str:
    """Draw a line from (x1, y1) to (x2, y2). attributes: our own text, as written in SVG."""
    ends = f'x1="{_place(x1)}" x2="{_place(x2)}" y1="{_place(y1)}" y2="{_place(y2)}"'
    return f"<line {attributes} {ends}/>"


def draw_text(x: float, y: float, content: str, attributes: str = "") -> str:
    """Draw a text, escaped. attributes: our own text, as written in SVG."""
    attributes = f" {attributes}" if attributes else ""
    return f'<text x="{_place(x)}" y="{_place(y)}"{attributes}>{escape(content)}</text>'


def _place(coordinate: float) -> str:
    """A coordinate: whole numbers as they are, others to a tenth of a unit."""
    return str(coordinate) if isinstance(coordinate, int) else f"{coordinate:.1f}"


def _mark(position: int, x: float, y: float, color: str) -> str:
    """Dots for the first series, squares for the second, ...: lines can be told apart without colour."""
    if position % 2 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>'
    return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{color}"/>'


def _picture(
    title: str, size: tuple[int, int], elements: Sequence[str], attributes: str = ""
) -> Markup:
    """The whole <svg>; size: width and height."""
    label = f'role="img" aria-label="{escape(title)}"'
    content = "".join(elements)
    return Markup(f'<svg {attributes}viewBox="0 0 {size[0]} {size[1]}" {label}>{content}</svg>')


# ---- Line charts ----


@dataclass(frozen=True)
class _Axes:
    """Where steps and values lie in a picture of width x height."""

    width: int
    height: int
    first: float
    last: float
    low: float
    high: float

    left = 56
    right = 12
    top = 10
    bottom = 42

    @property
    def end(self) -> int:
        """Where the steps end, to the right."""
        return self.width - self.right

    @property
    def floor(self) -> int:
        """Where the values begin, at the bottom."""
        return self.height - self.bottom

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.floor - share * (self.height - self.top - self.bottom)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)

    def draw(self) -> list[str]:
        """The grid, the ticks with their numbers, and the axis."""
        elements = []
        for value in nice_ticks(self.low, self.high):
            y = self.y(value)
            elements.append(draw_line(self.left, self.end, y, y, 'class="grid"'))
            elements.append(draw_text(self.left - 6, y + 4, number(value), 'text-anchor="end"'))
        for step in nice_ticks(self.first, self.last, 6):
            if step == int(step):
                x = self.x(step)
                elements.append(draw_line(x, x, self.floor, self.floor + 4, 'class="tick"'))
                elements.append(draw_text(x, self.floor + 17, number(step), 'text-anchor="middle"'))
        elements.append(draw_line(self.left, self.end, self.floor, self.floor, 'class="axis"'))
        middle = (self.left + self.width - self.right) / 2
        elements.append(draw_text(middle, self.height - 3, "step", 'text-anchor="middle"'))
        return elements


def _draw_series(position: int, series: Series, axes: _Axes) -> list[str]:
    elements = []
    if series.faint:
        elements.append(
            f'<polyline points="{axes.path(thin(series.faint))}" fill="none" stroke="{series.color}" opacity=".25"/>'
        )
    elements.append(
        f'<polyline points="{axes.path(thin(series.points))}" fill="none" stroke="{series.color}" stroke-width="2" '
        'stroke-linejoin="round"/>'
    )
    if series.marks or len(series.points) == 1:
        for step, value in series.points:
            elements.append(_mark(position, axes.x(step), axes.y(value), series.color))
    return elements


def _readout(series: Sequence[Series], axes: _Axes) -> str:
    """What the script needs to say the values under the pointer, as JSON."""
    lines = [
        {
            "name": line.name,
            "color": line.color,
            "points": [[step, float(f"{value:.5g}")] for step, value in thin(line.points)],
        }
        for line in series
    ]
    data = {
        "x": [axes.first, axes.last],
        "px": [axes.left, axes.end],
        "width": axes.width,
        "series": lines,
    }
    return json.dumps(data, separators=(",", ":"))


def line_chart(
    title: str,
    series: Sequence[Series],
    references: Sequence[Reference] = (),
    *,
    floor_zero: bool = False,
    width: int = WIDTH,
    height: int = 256,
) -> Markup:
    """Draw axes, labelled ticks and a polyline a series; its points go along for the readout."""
    # ---- What the axes span ----
    series = [line for line in series if line.points]
    steps = [step for line in series for step, _ in line.points]
    values = [value for line in series for _, value in line.points + (line.faint or [])]
    values += [reference.value for reference in references]
    first, last = min(steps), max(steps)
    last = last if last > first else first + 1
    axes = _Axes(width, height, first, last, *_limits(values, floor_zero))

    # ---- From the back to the front: axes, references, lines, cursor ----
    elements = axes.draw()
    for reference in references:
        y = axes.y(reference.value)
        dashes = (
            f'stroke="{reference.color}" stroke-width="1.5" stroke-dasharray="{reference.dash}"'
        )
        elements.append(draw_line(axes.left, axes.end, y, y, dashes))
    for position, line in enumerate(series):
        elements += _draw_series(position, line, axes)
    elements.append(draw_line(0, 0, axes.top, axes.floor, 'class="cursor" visibility="hidden"'))
    readout = f'data-chart="{escape(_readout(series, axes))}"'
    return _picture(title, (width, height), elements, f'class="chart" {readout} ')


def legend(
    series: Sequence[Series], references: Sequence[Reference] = (), note: str = ""
) -> Markup:
    """Draw the legend of a line chart, in HTML."""
    items = []
    for position, line in enumerate(series):
        mark = _mark(position, 11, 6, line.color) if line.marks else ""
        stroke = draw_line(0, 22, 6, 6, f'stroke="{line.color}" stroke-width="2.5"')
        items.append((line.name, stroke + mark))
    for reference in references:
        dashes = (
            f'stroke="{reference.color}" stroke-width="1.5" stroke-dasharray="{reference.dash}"'
        )
        items.append((reference.name, draw_line(0, 22, 6, 6, dashes)))
    cells = "".join(
        f'<span><svg width="22" height="12" aria-hidden="true">{sample}</svg>{escape(name)}</span>'
        for name, sample in items
    )
    if note:
        cells += f'<span class="muted">{escape(note)}</span>'
    return Markup(f'<div class="legend">{cells}</div>')


# ---- Events and intervals ----


def event_strip(
    title: str,
    events: Mapping[str, Sequence[float]],
    first: float,
    last: float,
    *,
    width: int = WIDTH,
) -> Markup:
    """Draw when something was so: a row a name, a mark a step, over the steps first to last."""
    left, right, row_height = 200, 12, 24
    height = row_height * len(events) + 40
    span = max(1, last - first)
    mark_width = max(2.0, min(10.0, 0.8 * (width - left - right) / span))

    def place(step: float) -> float:
        return left + (step - first) / span * (width - left - right)

    elements = []
    for step in nice_ticks(first, last, 6):
        if step == int(step):
            x = place(step)
            elements.append(draw_line(x, x, 4, height - 36, 'class="grid"'))
            elements.append(draw_text(x, height - 22, number(step), 'text-anchor="middle"'))
    for row, (name, steps) in enumerate(events.items()):
        top = 4 + row_height * row
        elements.append(draw_text(4, top + 16, name))
        for step in steps:
            elements.append(
                f'<rect x="{place(step) - mark_width / 2:.1f}" y="{top + 4}" width="{mark_width:.1f}" '
                f'height="{row_height - 8}" fill="{PALETTE[5]}"/>'
            )
    elements.append(
        draw_text((left + width - right) / 2, height - 4, "step", 'text-anchor="middle"')
    )
    return _picture(title, (width, height), elements)


def _forest_limit(groups: Sequence[ForestGroup]) -> float:
    """Where the axis of an interval plot ends: a little beyond the highest value, at most 1."""
    values = [group.constant for group in groups]
    for group in groups:
        for estimate in group.estimates.values():
            values += [estimate["hi"], estimate["value"]]
    highest = max((value for value in values if value is not None), default=1.0)
    return min(1.0, highest * 1.08) or 1.0


def forest(title: str, groups: Sequence[ForestGroup], *, width: int = WIDTH) -> Markup:
    """Draw an interval plot: below each heading a row an estimate, and the constant as a dashed line."""
    left, right, row_height, head_height = 92, 50, 24, 26
    limit = _forest_limit(groups)
    height = sum(head_height + row_height * len(group.estimates) for group in groups) + 30

    def place(value: float) -> float:
        return left + value / limit * (width - left - right)

    elements = []
    for value in nice_ticks(0, limit, 6):
        x = place(value)
        elements.append(draw_line(x, x, 4, height - 26, 'class="grid"'))
        elements.append(draw_text(x, height - 10, number(value), 'text-anchor="middle"'))
    y = 4
    for group in groups:
        heading = f'class="strong" fill="{group.color}"'
        elements.append(draw_text(4, y + 17, group.heading, heading))
        y += head_height
        if group.constant is not None:
            x, end = place(group.constant), y + row_height * len(group.estimates) - 2
            dashes = f'stroke="{group.color}" stroke-width="1.5" stroke-dasharray="5 4"'
            elements.append(draw_line(x, x, y - 8, end, dashes))
            note = f"best constant {group.constant:.2f}"
            elements.append(draw_text(x + 5, y - 5, note, 'class="small"'))
        for name, estimate in group.estimates.items():
            elements += _forest_row(name, estimate, group.color, place, y + row_height / 2, width)
            y += row_height
    return _picture(title, (width, height), elements)


def _forest_row(
    name: str, estimate: Mapping, color: str, place: Callable[[float], float], y: float, width: int
) -> list[str]:
    """The name, the interval with its point, and the value as a number at the right."""
    elements = [draw_text(16, y + 4, name)]
    if estimate["value"] is None:
        return [*elements, draw_text(width - 4, y + 4, "no value", 'text-anchor="end"')]
    if estimate["lo"] is not None:
        bar = f'stroke="{color}" stroke-width="3" opacity=".45"'
        elements.append(draw_line(place(estimate["lo"]), place(estimate["hi"]), y, y, bar))
    elements.append(
        f'<circle cx="{place(estimate["value"]):.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
    )
    value = f"{estimate['value']:.3f}"
    elements.append(draw_text(width - 4, y + 4, value, 'class="strong" text-anchor="end"'))
    return elements
