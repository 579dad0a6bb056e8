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


def nice_ticks(lowest: float, highest: float, tick_count: int = 5) -> list[float]:
    """Choose about `tick_count` round values (1, 2, 2.5, 5 times a power of ten) from lowest to highest."""
    if not highest > lowest:
        return [lowest]
    # The smallest round step that is not below the even one.
    even_step = (highest - lowest) / tick_count
    power_of_ten = 10.0 ** math.floor(math.log10(even_step))
    tick_step = next(
        factor * power_of_ten
        for factor in (1, 2, 2.5, 5, 10)
        if factor * power_of_ten >= even_step * (1 - 1e-9)
    )
    # A tick on the very limit stays, whatever the rounding of the division.
    first_multiple, last_multiple = (
        math.ceil(lowest / tick_step - 1e-9),
        math.floor(highest / tick_step + 1e-9),
    )
    return [
        round(multiple * tick_step, 12) for multiple in range(first_multiple, last_multiple + 1)
    ]


def number(value: float) -> str:
    """Write a short tick or readout label."""
    magnitude = abs(value)
    if value and (magnitude >= 1e5 or magnitude < 1e-3):
        written = f"{value:.3g}"
    elif magnitude < 100:
        written = f"{value:.4f}".rstrip("0").rstrip(".")
    else:
        written = f"{value:.0f}"
    return written.replace("-", "−", 1) if written.startswith("-") else written


def smooth(points: Points, window: int) -> Points:
    """Compute the centred running mean over `window` points (fewer at the ends)."""
    half_window, smoothed = window // 2, []
    for index, (position, _) in enumerate(points):
        neighbours = [
            value for _, value in points[max(0, index - half_window) : index + half_window + 1]
        ]
        smoothed.append((position, sum(neighbours) / len(neighbours)))
    return smoothed


def thin(points: Points, most_points: int = MAX_POINTS) -> Points:
    """Keep at most `most_points` points, evenly chosen, the last one among them."""
    if len(points) <= most_points:
        return points
    # Evenly by place, not by step: a long run logs at equal distances.
    return [
        points[round(index * (len(points) - 1) / (most_points - 1))] for index in range(most_points)
    ]


def _limits(values: Sequence[float], floor_zero: bool) -> tuple[float, float]:
    """The ends of the vertical axis, with some room around the values."""
    lowest, highest = min(values), max(values)
    if floor_zero and lowest >= 0:
        lowest = 0.0
    # Flat is constant up to the rounding of a running mean.
    is_flat = highest - lowest <= 1e-9 * max(abs(highest), abs(lowest))
    padding = max(abs(highest) * 0.1, 1e-3) if is_flat else (highest - lowest) * 0.06
    return (lowest if floor_zero and lowest == 0 else lowest - padding), highest + padding


# ---- Elements ----


def draw_line(start_x: float, end_x: float, start_y: float, end_y: float, attributes: str) -> str:
    """Draw a line from (x1, y1) to (x2, y2). attributes: our own text, as written in SVG."""
    coordinates = (
        f'x1="{_place(start_x)}" x2="{_place(end_x)}" y1="{_place(start_y)}" y2="{_place(end_y)}"'
    )
    return f"<line {attributes} {coordinates}/>"


def draw_text(anchor_x: float, baseline: float, content: str, attributes: str = "") -> str:
    """Draw a text, escaped. attributes: our own text, as written in SVG."""
    attributes = f" {attributes}" if attributes else ""
    return (
        f'<text x="{_place(anchor_x)}" y="{_place(baseline)}"{attributes}>{escape(content)}</text>'
    )


def _place(coordinate: float) -> str:
    """A coordinate: whole numbers as they are, others to a tenth of a unit."""
    return str(coordinate) if isinstance(coordinate, int) else f"{coordinate:.1f}"


def _mark(position: int, center_x: float, center_y: float, color: str) -> str:
    """Dots for the first series, squares for the second, ...: lines can be told apart without colour."""
    if position % 2 == 0:
        return f'<circle cx="{center_x:.1f}" cy="{center_y:.1f}" r="3.2" fill="{color}"/>'
    return (
        f'<rect x="{center_x - 3:.1f}" y="{center_y - 3:.1f}" width="6" height="6" fill="{color}"/>'
    )


def _picture(
    title: str, dimensions: tuple[int, int], elements: Sequence[str], attributes: str = ""
) -> Markup:
    """The whole <svg>; size: width and height."""
    accessible_name = f'role="img" aria-label="{escape(title)}"'
    content = "".join(elements)
    return Markup(
        f'<svg {attributes}viewBox="0 0 {dimensions[0]} {dimensions[1]}" {accessible_name}>{content}</svg>'
    )


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

    def x(self, train_step: float) -> float:
        run_share = (train_step - self.first) / (self.last - self.first)
        return self.left + run_share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        range_share = (value - self.low) / (self.high - self.low)
        return self.floor - range_share * (self.height - self.top - self.bottom)

    def path(self, points: Points) -> str:
        return " ".join(
            f"{self.x(train_step):.1f},{self.y(value):.1f}" for train_step, value in points
        )

    def draw(self) -> list[str]:
        """The grid, the ticks with their numbers, and the axis."""
        elements = []
        for tick_value in nice_ticks(self.low, self.high):
            grid_y = self.y(tick_value)
            elements.append(draw_line(self.left, self.end, grid_y, grid_y, 'class="grid"'))
            elements.append(
                draw_text(self.left - 6, grid_y + 4, number(tick_value), 'text-anchor="end"')
            )
        for train_step in nice_ticks(self.first, self.last, 6):
            if train_step == int(train_step):
                tick_x = self.x(train_step)
                elements.append(
                    draw_line(tick_x, tick_x, self.floor, self.floor + 4, 'class="tick"')
                )
                elements.append(
                    draw_text(tick_x, self.floor + 17, number(train_step), 'text-anchor="middle"')
                )
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
        for train_step, value in series.points:
            elements.append(_mark(position, axes.x(train_step), axes.y(value), series.color))
    return elements


def _readout(series: Sequence[Series], axes: _Axes) -> str:
    """What the script needs to say the values under the pointer, as JSON."""
    line_readouts = [
        {
            "name": chart_line.name,
            "color": chart_line.color,
            "points": [
                [train_step, float(f"{value:.5g}")] for train_step, value in thin(chart_line.points)
            ],
        }
        for chart_line in series
    ]
    readout = {
        "x": [axes.first, axes.last],
        "px": [axes.left, axes.end],
        "width": axes.width,
        "series": line_readouts,
    }
    return json.dumps(readout, separators=(",", ":"))


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
    series = [chart_line for chart_line in series if chart_line.points]
    train_steps = [train_step for chart_line in series for train_step, _ in chart_line.points]
    values = [
        value for chart_line in series for _, value in chart_line.points + (chart_line.faint or [])
    ]
    values += [reference.value for reference in references]
    first_step, last_step = min(train_steps), max(train_steps)
    last_step = last_step if last_step > first_step else first_step + 1
    axes = _Axes(width, height, first_step, last_step, *_limits(values, floor_zero))

    # ---- From the back to the front: axes, references, lines, cursor ----
    elements = axes.draw()
    for reference in references:
        reference_y = axes.y(reference.value)
        dash_attributes = (
            f'stroke="{reference.color}" stroke-width="1.5" stroke-dasharray="{reference.dash}"'
        )
        elements.append(draw_line(axes.left, axes.end, reference_y, reference_y, dash_attributes))
    for position, chart_line in enumerate(series):
        elements += _draw_series(position, chart_line, axes)
    elements.append(draw_line(0, 0, axes.top, axes.floor, 'class="cursor" visibility="hidden"'))
    readout = f'data-chart="{escape(_readout(series, axes))}"'
    return _picture(title, (width, height), elements, f'class="chart" {readout} ')


def legend(
    series: Sequence[Series], references: Sequence[Reference] = (), note: str = ""
) -> Markup:
    """Draw the legend of a line chart, in HTML."""
    entries = []
    for position, chart_line in enumerate(series):
        marker = _mark(position, 11, 6, chart_line.color) if chart_line.marks else ""
        line_sample = draw_line(0, 22, 6, 6, f'stroke="{chart_line.color}" stroke-width="2.5"')
        entries.append((chart_line.name, line_sample + marker))
    for reference in references:
        dash_attributes = (
            f'stroke="{reference.color}" stroke-width="1.5" stroke-dasharray="{reference.dash}"'
        )
        entries.append((reference.name, draw_line(0, 22, 6, 6, dash_attributes)))
    entry_markup = "".join(
        f'<span><svg width="22" height="12" aria-hidden="true">{sample}</svg>{escape(entry_name)}</span>'
        for entry_name, sample in entries
    )
    if note:
        entry_markup += f'<span class="muted">{escape(note)}</span>'
    return Markup(f'<div class="legend">{entry_markup}</div>')


# ---- Events and intervals ----


def event_strip(
    title: str,
    events: Mapping[str, Sequence[float]],
    first_step: float,
    last_step: float,
    *,
    width: int = WIDTH,
) -> Markup:
    """Draw when something was so: a row a name, a mark a step, over the steps first to last."""
    left_margin, right_margin, row_height = 200, 12, 24
    height = row_height * len(events) + 40
    step_span = max(1, last_step - first_step)
    mark_width = max(2.0, min(10.0, 0.8 * (width - left_margin - right_margin) / step_span))

    def place(train_step: float) -> float:
        return left_margin + (train_step - first_step) / step_span * (
            width - left_margin - right_margin
        )

    elements = []
    for train_step in nice_ticks(first_step, last_step, 6):
        if train_step == int(train_step):
            tick_x = place(train_step)
            elements.append(draw_line(tick_x, tick_x, 4, height - 36, 'class="grid"'))
            elements.append(
                draw_text(tick_x, height - 22, number(train_step), 'text-anchor="middle"')
            )
    for row_index, (event_name, event_steps) in enumerate(events.items()):
        row_top = 4 + row_height * row_index
        elements.append(draw_text(4, row_top + 16, event_name))
        for train_step in event_steps:
            elements.append(
                f'<rect x="{place(train_step) - mark_width / 2:.1f}" y="{row_top + 4}" width="{mark_width:.1f}" '
                f'height="{row_height - 8}" fill="{PALETTE[5]}"/>'
            )
    elements.append(
        draw_text(
            (left_margin + width - right_margin) / 2, height - 4, "step", 'text-anchor="middle"'
        )
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
    left_margin, right_margin, row_height, head_height = 92, 50, 24, 26
    axis_end = _forest_limit(groups)
    height = sum(head_height + row_height * len(group.estimates) for group in groups) + 30

    def place(value: float) -> float:
        return left_margin + value / axis_end * (width - left_margin - right_margin)

    elements = []
    for value in nice_ticks(0, axis_end, 6):
        x = place(value)
        elements.append(draw_line(x, x, 4, height - 26, 'class="grid"'))
        elements.append(draw_text(x, height - 10, number(value), 'text-anchor="middle"'))
    row_top = 4
    for group in groups:
        heading = f'class="strong" fill="{group.color}"'
        elements.append(draw_text(4, row_top + 17, group.heading, heading))
        row_top += head_height
        if group.constant is not None:
            x, dash_end = place(group.constant), row_top + row_height * len(group.estimates) - 2
            dash_attributes = f'stroke="{group.color}" stroke-width="1.5" stroke-dasharray="5 4"'
            elements.append(draw_line(x, x, row_top - 8, dash_end, dash_attributes))
            constant_note = f"best constant {group.constant:.2f}"
            elements.append(draw_text(x + 5, row_top - 5, constant_note, 'class="small"'))
        for estimate_name, estimate in group.estimates.items():
            elements += _forest_row(
                estimate_name, estimate, group.color, place, row_top + row_height / 2, width
            )
            row_top += row_height
    return _picture(title, (width, height), elements)


def _forest_row(
    estimate_name: str,
    estimate: Mapping,
    color: str,
    place: Callable[[float], float],
    row_middle: float,
    width: int,
) -> list[str]:
    """The name, the interval with its point, and the value as a number at the right."""
    elements = [draw_text(16, row_middle + 4, estimate_name)]
    if estimate["value"] is None:
        return [*elements, draw_text(width - 4, row_middle + 4, "no value", 'text-anchor="end"')]
    if estimate["lo"] is not None:
        interval_stroke = f'stroke="{color}" stroke-width="3" opacity=".45"'
        elements.append(
            draw_line(
                place(estimate["lo"]),
                place(estimate["hi"]),
                row_middle,
                row_middle,
                interval_stroke,
            )
        )
    elements.append(
        f'<circle cx="{place(estimate["value"]):.1f}" cy="{row_middle:.1f}" r="4.5" fill="{color}"/>'
    )
    written_value = f"{estimate['value']:.3f}"
    elements.append(
        draw_text(width - 4, row_middle + 4, written_value, 'class="strong" text-anchor="end"')
    )
    return elements
