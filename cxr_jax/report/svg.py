"""The report's inline SVG: line charts over training steps, marks of events, and interval (forest) plots.

Drawn in Python so that the page is complete without its script; the script only adds the hover readout.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cxr_jax.report.markup import escape

# Dark enough to be read as text on white: headings have the colour of their lines.
PALETTE = ("#1f5fa8", "#b4560f", "#2a7d4f", "#8a3f8f", "#6b6b6b", "#a31f34", "#00798c", "#7a6a00")
BLUE, ORANGE = PALETTE[:2]
MAX_POINTS = 400  # of a line: about one for each unit of its width
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
    first_multiple = math.ceil(lowest / tick_step - 1e-9)
    last_multiple = math.floor(highest / tick_step + 1e-9)
    # Rounded, because 3 x 0.1 would be printed with all its digits.
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
    if written.startswith("-"):
        # The typographic minus, at the front alone: the exponent keeps its hyphen.
        written = written.replace("-", "−", 1)
    return written


def smooth(points: Points, window: int) -> Points:
    """Compute the centred running mean over `window` points (fewer at the ends)."""
    half_window, smoothed = window // 2, []
    values = [value for train_step, value in points]
    for index, (train_step, _) in enumerate(points):
        # A window that would reach over an end is cut there.
        neighbours = values[max(0, index - half_window) : index + half_window + 1]
        smoothed.append((train_step, sum(neighbours) / len(neighbours)))
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
    # A flat line gets a range of its own: no axis can be drawn over nothing.
    padding = max(abs(highest) * 0.1, 1e-3) if is_flat else (highest - lowest) * 0.06
    if floor_zero and lowest == 0:
        return lowest, highest + padding
    return lowest - padding, highest + padding


# ---- Elements ----


def draw_line(start_x: float, end_x: float, start_y: float, end_y: float, attributes: str) -> str:
    """Draw a line from (start_x, start_y) to (end_x, end_y). attributes: our own text, as written in SVG."""
    coordinates = (
        f'x1="{_place(start_x)}" x2="{_place(end_x)}" y1="{_place(start_y)}" y2="{_place(end_y)}"'
    )
    return f"<line {attributes} {coordinates}/>"


def draw_text(anchor_x: float, baseline: float, content: str, attributes: str = "") -> str:
    """Draw a text, escaped. attributes: our own text, as written in SVG."""
    if attributes:
        attributes = f" {attributes}"
    coordinates = f'x="{_place(anchor_x)}" y="{_place(baseline)}"'
    # The content alone may come from a run: a model's name, a label, an alarm.
    return f"<text {coordinates}{attributes}>{escape(content)}</text>"


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


def _dash_attributes(color: str, dash: str) -> str:
    """How a dashed line is drawn; dash: the lengths of a dash and of a gap."""
    return f'stroke="{color}" stroke-width="1.5" stroke-dasharray="{dash}"'


def draw_picture(
    title: str, dimensions: tuple[int, int], elements: Sequence[str], attributes: str = ""
) -> Markup:
    """The whole <svg>; dimensions: width and height."""
    width, height = dimensions
    # A screen reader says the title in place of the drawing.
    accessible_name = f'role="img" aria-label="{escape(title)}"'
    content = "".join(elements)
    view_box = f'viewBox="0 0 {width} {height}"'
    return Markup(f"<svg {attributes}{view_box} {accessible_name}>{content}</svg>")


# ---- Line charts ----


@dataclass(frozen=True)
class _Axes:
    """Where steps and values lie in a picture of width x height."""

    width: int
    height: int
    first_step: float
    last_step: float
    lowest: float
    highest: float

    # The margins: numbers stand at the left, numbers and the word "step" below.
    left_margin = 56
    right_margin = 12
    top_margin = 10
    bottom_margin = 42

    @property
    def end(self) -> int:
        """Where the steps end, to the right."""
        return self.width - self.right_margin

    @property
    def floor(self) -> int:
        """Where the values begin, at the bottom."""
        return self.height - self.bottom_margin

    def x(self, train_step: float) -> float:
        run_share = (train_step - self.first_step) / (self.last_step - self.first_step)
        return self.left_margin + run_share * (self.width - self.left_margin - self.right_margin)

    def y(self, value: float) -> float:
        range_share = (value - self.lowest) / (self.highest - self.lowest)
        # The coordinates of SVG grow downwards.
        return self.floor - range_share * (self.height - self.top_margin - self.bottom_margin)

    def path(self, points: Points) -> str:
        return " ".join(
            f"{self.x(train_step):.1f},{self.y(value):.1f}" for train_step, value in points
        )

    def draw(self) -> list[str]:
        """The grid, the ticks with their numbers, and the axis."""
        elements = []
        for tick_value in nice_ticks(self.lowest, self.highest):
            grid_y = self.y(tick_value)
            elements.append(draw_line(self.left_margin, self.end, grid_y, grid_y, 'class="grid"'))
            elements.append(
                draw_text(self.left_margin - 6, grid_y + 4, number(tick_value), 'text-anchor="end"')
            )
        for train_step in nice_ticks(self.first_step, self.last_step, 6):
            # A short run would get ticks between its steps, where nothing can be.
            if train_step == int(train_step):
                tick_x = self.x(train_step)
                elements.append(
                    draw_line(tick_x, tick_x, self.floor, self.floor + 4, 'class="tick"')
                )
                elements.append(
                    draw_text(tick_x, self.floor + 17, number(train_step), 'text-anchor="middle"')
                )
        elements.append(
            draw_line(self.left_margin, self.end, self.floor, self.floor, 'class="axis"')
        )
        middle = (self.left_margin + self.width - self.right_margin) / 2
        elements.append(draw_text(middle, self.height - 3, "step", 'text-anchor="middle"'))
        return elements


def _draw_series(position: int, series: Series, axes: _Axes) -> list[str]:
    """The faint line below, the line itself, and its marks."""
    elements = []
    # What was logged lies under what was smoothed.
    if series.faint:
        elements.append(
            f'<polyline points="{axes.path(thin(series.faint))}" fill="none" stroke="{series.color}" opacity=".25"/>'
        )
    elements.append(
        f'<polyline points="{axes.path(thin(series.points))}" fill="none" stroke="{series.color}" stroke-width="2" '
        'stroke-linejoin="round"/>'
    )
    # A polyline of one point draws nothing, so that a mark stands for it.
    if series.marks or len(series.points) == 1:
        for train_step, value in series.points:
            elements.append(_mark(position, axes.x(train_step), axes.y(value), series.color))
    return elements


def _readout(series: Sequence[Series], axes: _Axes) -> str:
    """What the script needs to say the values under the pointer, as JSON."""
    # Five digits are more than a reader needs, and keep the page small.
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
        "x": [axes.first_step, axes.last_step],
        "px": [axes.left_margin, axes.end],
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
    drawn_points = [point for chart_line in series for point in chart_line.points]
    faint_points = [point for chart_line in series for point in chart_line.faint or ()]
    train_steps = [train_step for train_step, value in drawn_points]
    values = [value for train_step, value in drawn_points + faint_points]
    values += [reference.value for reference in references]
    first_step, last_step = min(train_steps), max(train_steps)
    # One step alone spans nothing: the axis reaches to the next one.
    if last_step == first_step:
        last_step = first_step + 1
    axes = _Axes(width, height, first_step, last_step, *_limits(values, floor_zero))

    # ---- From the back to the front: axes, references, lines, cursor ----
    elements = axes.draw()
    for reference in references:
        reference_y = axes.y(reference.value)
        dashes = _dash_attributes(reference.color, reference.dash)
        elements.append(draw_line(axes.left_margin, axes.end, reference_y, reference_y, dashes))
    for position, chart_line in enumerate(series):
        elements += _draw_series(position, chart_line, axes)
    elements.append(
        draw_line(0, 0, axes.top_margin, axes.floor, 'class="cursor" visibility="hidden"')
    )
    # The script reads the points from the element itself.
    readout = f'data-chart="{escape(_readout(series, axes))}"'
    return draw_picture(title, (width, height), elements, f'class="chart" {readout} ')


def legend(
    series: Sequence[Series], references: Sequence[Reference] = (), note: str = ""
) -> Markup:
    """Draw the legend of a line chart, in HTML."""
    entries = []
    for position, chart_line in enumerate(series):
        # Colour alone does not tell lines apart for every reader, so the marks are repeated.
        marker = _mark(position, 11, 6, chart_line.color) if chart_line.marks else ""
        line_sample = draw_line(0, 22, 6, 6, f'stroke="{chart_line.color}" stroke-width="2.5"')
        entries.append((chart_line.name, line_sample + marker))
    for reference in references:
        dashes = _dash_attributes(reference.color, reference.dash)
        entries.append((reference.name, draw_line(0, 22, 6, 6, dashes)))
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
    # As wide as a step, but to be seen in a long run, and no block in a short one.
    mark_width = max(2.0, min(10.0, 0.8 * (width - left_margin - right_margin) / step_span))

    def place(train_step: float) -> float:
        plot_width = width - left_margin - right_margin
        return left_margin + (train_step - first_step) / step_span * plot_width

    # ---- The grid of steps ----
    elements = []
    for train_step in nice_ticks(first_step, last_step, 6):
        if train_step == int(train_step):
            tick_x = place(train_step)
            elements.append(draw_line(tick_x, tick_x, 4, height - 36, 'class="grid"'))
            elements.append(
                draw_text(tick_x, height - 22, number(train_step), 'text-anchor="middle"')
            )
    # ---- A row an event ----
    for row_index, (event_name, event_steps) in enumerate(events.items()):
        row_top = 4 + row_height * row_index
        elements.append(draw_text(4, row_top + 16, event_name))
        for train_step in event_steps:
            elements.append(
                f'<rect x="{place(train_step) - mark_width / 2:.1f}" y="{row_top + 4}" width="{mark_width:.1f}" '
                f'height="{row_height - 8}" fill="{PALETTE[5]}"/>'
            )
    middle = (left_margin + width - right_margin) / 2
    elements.append(draw_text(middle, height - 4, "step", 'text-anchor="middle"'))
    return draw_picture(title, (width, height), elements)


def _forest_limit(groups: Sequence[ForestGroup]) -> float:
    """Where the axis of an interval plot ends: a little beyond the highest value, at most 1."""
    values = [group.constant for group in groups]
    for group in groups:
        for estimate in group.estimates.values():
            values += [estimate["hi"], estimate["value"]]
    highest = max((value for value in values if value is not None), default=1.0)
    # Where all are 0, any range will do.
    return min(1.0, highest * 1.08) or 1.0


_NOTE_WIDTH = 125  # of the words beside a constant's line


def forest(title: str, groups: Sequence[ForestGroup], *, width: int = WIDTH) -> Markup:
    """Draw an interval plot: below each heading a row an estimate, and the constant as a dashed line."""
    left_margin, right_margin, row_height, head_height = 92, 50, 24, 26
    axis_end = _forest_limit(groups)
    height = sum(head_height + row_height * len(group.estimates) for group in groups) + 30

    def place(value: float) -> float:
        return left_margin + value / axis_end * (width - left_margin - right_margin)

    # ---- The grid of values ----
    elements = []
    for tick_value in nice_ticks(0, axis_end, 6):
        tick_x = place(tick_value)
        elements.append(draw_line(tick_x, tick_x, 4, height - 26, 'class="grid"'))
        elements.append(draw_text(tick_x, height - 10, number(tick_value), 'text-anchor="middle"'))

    # ---- From the top: a heading, its constant, its rows ----
    row_top = 4
    for group in groups:
        heading = f'class="strong" fill="{group.color}"'
        elements.append(draw_text(4, row_top + 17, group.heading, heading))
        row_top += head_height
        if group.constant is not None:
            # Dashed through all rows below, so that each can be held against it.
            constant_x = place(group.constant)
            dash_end = row_top + row_height * len(group.estimates) - 2
            dash_attributes = _dash_attributes(group.color, "5 4")
            elements.append(
                draw_line(constant_x, constant_x, row_top - 8, dash_end, dash_attributes)
            )
            constant_note = f"best constant {group.constant:.2f}"
            # To the right of the line where there is room, else to its left.
            note_x, anchor = constant_x + 5, "start"
            if note_x + _NOTE_WIDTH > width:
                note_x, anchor = constant_x - 5, "end"
            note_attributes = f'class="small" text-anchor="{anchor}"'
            elements.append(draw_text(note_x, row_top - 5, constant_note, note_attributes))
        for estimate_name, estimate in group.estimates.items():
            elements += _forest_row(
                estimate_name, estimate, group.color, place, row_top + row_height / 2, width
            )
            row_top += row_height
    return draw_picture(title, (width, height), elements)


def _forest_row(
    estimate_name: str,
    estimate: Mapping,
    color: str,
    place: Callable[[float], float],
    row_middle: float,
    width: int,
) -> list[str]:
    """The name, the interval with its point, and the value as a number at the right."""
    # Text is set by its baseline: 4 units below the middle it looks centred.
    elements = [draw_text(16, row_middle + 4, estimate_name)]
    # A score that no example defines has a row, too: its absence is a result.
    if estimate["value"] is None:
        return [*elements, draw_text(width - 4, row_middle + 4, "no value", 'text-anchor="end"')]
    if estimate["lo"] is not None:
        # Wide and pale below the point, so that neither hides the other.
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
