"""The figures of a study's report as inline SVG: a forest, lines of readers, bars of kinds, cells of confidence."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

# Told apart by people who see no red and green, and dark enough on white.
COLORS = {"manual": "#5b6470", "labels": "#b4560f", "report": "#8a3f8f", "full": "#1f5fa8"}
_WIDTH, _ROW, _LEFT, _RIGHT = 860, 46, 330, 210


class Bar(NamedTuple):
    """One estimate of a forest: what it is, its interval, its null, and what to print behind it."""

    title: str
    estimate: float
    low: float
    high: float
    null: float
    text: str
    supported: bool


def _text(
    left_edge: float,
    y: float,
    content: object,
    *,
    size: int = 13,
    anchor: str = "start",
    weight: int = 400,
    fill: str = "#1c2530",
) -> str:
    return (
        f'<text x="{left_edge:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{fill}">{escape(content)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def forest(bars: Sequence[Bar]) -> Markup:
    """Draw intervals, each row on a scale of its own, since measures differ; the null is a dashed line."""
    parts = []
    # Room for words on both sides.
    plot = _WIDTH - _LEFT - _RIGHT
    for number, bar in enumerate(bars):
        # Rows of one height; scales differ, so no axis is shared.
        middle = number * _ROW + _ROW / 2
        reach = max(abs(bar.low - bar.null), abs(bar.high - bar.null)) * 1.15 or 1.0

        def place(reader_value: float, bar: Bar = bar, reach: float = reach) -> float:
            return _LEFT + plot * (
                0.5 + 0.5 * max(-1.0, min(1.0, (reader_value - bar.null) / reach))
            )

        # Colour repeats what the words say, and says nothing alone.
        color = "#1f7a4d" if bar.supported else "#1c2530"
        parts.append(_text(_LEFT - 14, middle + 4, bar.title, anchor="end"))
        parts.append(
            f'<line x1="{place(bar.null):.1f}" x2="{place(bar.null):.1f}" y1="{middle - 20:.1f}" '
            f'y2="{middle + 20:.1f}" stroke="#9aa4b0" stroke-dasharray="4 3"/>'
            f'<line x1="{place(bar.low):.1f}" x2="{place(bar.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" '
            f'stroke="{color}" stroke-width="2.5"/>'
            f'<circle cx="{place(bar.estimate):.1f}" cy="{middle:.1f}" r="5.5" fill="{color}"/>'
        )
        parts.append(_text(_WIDTH - _RIGHT + 14, middle + 4, bar.text, fill=color))
    return _svg(_WIDTH, len(bars) * _ROW, parts, "Estimates with 95 % intervals")


def reader_lines(values: Mapping[str, Sequence[float]], unit: str) -> Markup:
    """Draw a line for each reader over the arms, on a logarithmic axis."""
    arms = list(values)
    # A reader who signed nothing in an arm has no point there.
    every_value = [
        reader_value
        for series in values.values()
        for reader_value in series
        if reader_value and reader_value > 0
    ]
    if not every_value:
        return Markup("")
    low, high = math.log(min(every_value) * 0.92), math.log(max(every_value) * 1.08)
    width, height, left, top, bottom = 560, 300, 60, 16, 36

    def across(place: int) -> float:
        return left + (width - left - 30) * (place + 0.5) / len(arms)

    def down(reader_value: float) -> float:
        return top + (height - top - bottom) * (1 - (math.log(reader_value) - low) / (high - low))

    parts = []
    # Round seconds that lie on the axis.
    for tick in (5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 600):
        if low <= math.log(tick) <= high:
            parts.append(
                f'<line x1="{left}" x2="{width - 10}" y1="{down(tick):.1f}" y2="{down(tick):.1f}" stroke="#e3e7ec"/>'
            )
            parts.append(_text(left - 8, down(tick) + 4, f"{tick} {unit}", size=14, anchor="end"))
    for reader in range(len(values[arms[0]])):
        # Arms that a reader has no time in are left out of his line.
        points = [
            (across(place), down(values[arm_name][reader]))
            for place, arm_name in enumerate(arms)
            if values[arm_name][reader] and values[arm_name][reader] > 0
        ]
        line_number = " ".join(f"{left_edge:.1f},{y:.1f}" for left_edge, y in points)
        parts.append(
            f'<polyline points="{line_number}" fill="none" stroke="#8d99a8" stroke-width="1.6"/>'
        )
        parts += [
            f'<circle cx="{left_edge:.1f}" cy="{y:.1f}" r="3.4" fill="#1f5fa8"/>'
            for left_edge, y in points
        ]
        if points:
            parts.append(_text(points[-1][0] + 8, points[-1][1] + 4, reader + 1, size=13))
    parts += [
        _text(across(place), height - 12, arm_name, size=15, anchor="middle", weight=600)
        for place, arm_name in enumerate(arms)
    ]
    return _svg(width, height, parts, "Each reader's mean over the arms")


def kind_bars(kinds: Mapping[str, Mapping[str, Any]], arms: Sequence[str], name: str) -> Markup:
    """Draw shares by kind of planted error and arm, with their intervals and counts."""
    width, group, left = 560, 28 * len(arms) + 22, 96
    parts = []
    # Behind the bars stand counts.
    scale = width - left - 120
    for row_height, (error_kind, of_arms) in enumerate(kinds.items()):
        top = row_height * group
        parts.append(
            _text(left - 14, top + group / 2, error_kind, size=15, anchor="end", weight=600)
        )
        for line_number, arm_name in enumerate(arms):
            rate = of_arms[arm_name][name]
            y = top + 8 + line_number * 28
            color = COLORS.get(arm_name, "#444")
            if not rate["total"]:
                parts.append(_text(left, y + 14, f"{arm_name}: none", size=11))
                continue
            # The bar is the share, the thin line Wilson's interval.
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{scale * rate["share"]:.1f}" height="18" fill="{color}" '
                f'opacity="0.85"/><line x1="{left + scale * rate["low"]:.1f}" x2="{left + scale * rate["high"]:.1f}" '
                f'y1="{y + 9:.1f}" y2="{y + 9:.1f}" stroke="#10161d" stroke-width="1.6"/>'
            )
            told = f"{arm_name} {rate['events']}/{rate['total']}"
            parts.append(_text(left + scale + 12, y + 14, told, size=14))
    return _svg(width, len(kinds) * group, parts, "Shares by kind of planted error")


def confidence_bars(counts: Mapping[str, Sequence[int]], points: Sequence[str]) -> Markup:
    """Draw the shares of the points of the scale, one bar an arm, from the least to the most confident."""
    width, left, row_height = 860, 96, 40
    shades = ("#7a2e1c", "#b4560f", "#d99a5b", "#c9ced6", "#8fb3d6", "#4d86bf", "#1f5fa8")
    parts = []
    for line_number, (arm_name, of_arm) in enumerate(counts.items()):
        # Shares of the arm: arms may have unequal numbers.
        total, left_edge = sum(of_arm), float(left)
        parts.append(
            _text(left - 14, line_number * row_height + 24, arm_name, anchor="end", weight=600)
        )
        for number, count in enumerate(of_arm):
            breadth = (width - left - 10) * count / max(total, 1)
            parts.append(
                f'<rect x="{left_edge:.1f}" y="{line_number * row_height + 6}" width="{breadth:.1f}" height="28" '
                f'fill="{shades[number]}"><title>{escape(points[number])}: {count}</title></rect>'
            )
            if breadth > 26:
                dark = number in (0, 1, 5, 6)
                fill = "#ffffff" if dark else "#10161d"
                parts.append(
                    _text(
                        left_edge + breadth / 2,
                        line_number * row_height + 25,
                        count,
                        size=12,
                        anchor="middle",
                        fill=fill,
                    )
                )
            left_edge += breadth
    height = len(counts) * row_height + 30
    # The legend has every point's words, since colours alone mean nothing.
    step = (width - left) / len(points)
    for number, point in enumerate(points):
        left_edge = left + number * step
        parts.append(
            f'<rect x="{left_edge:.0f}" y="{height - 20}" width="12" height="12" fill="{shades[number]}"/>'
        )
        parts.append(_text(left_edge + 17, height - 9, point, size=11))
    return _svg(width, height, parts, "Confidence by arm")
