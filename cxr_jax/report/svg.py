"""Two kinds of inline SVG for the report: a line chart over training steps, and an interval (forest) plot.

Drawn in Python so that the page is complete without its script; the script only adds the hover readout.
"""

import html
import json
import math
from dataclasses import dataclass

PALETTE = ("#1f5fa8", "#b4560f", "#2a7d4f", "#8a3f8f", "#6b6b6b", "#a31f34", "#00798c", "#7a6a00")
BLUE, ORANGE = PALETTE[:2]
MAX_POINTS = 400


@dataclass
class Series:
    """One line. `points`: [(step, value)]; `faint`: the values before smoothing; `marks`: a dot a point."""

    name: str
    points: list
    color: str
    faint: list | None = None
    marks: bool = False


@dataclass
class Reference:
    """A dashed horizontal line."""

    name: str
    value: float
    color: str
    dash: str = "6 4"


def nice_ticks(lo: float, hi: float, n: int = 5) -> list[float]:
    """Round tick values (1, 2, 2.5, 5 times a power of ten) that lie in [lo, hi], about n of them."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(lo / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(hi / step + 1e-9) + 1)]


def number(x: float) -> str:
    """A short tick or readout label."""
    if x and (abs(x) >= 1e5 or abs(x) < 1e-3):
        text = f"{x:.3g}"
    else:
        text = f"{x:.4f}".rstrip("0").rstrip(".") if abs(x) < 100 else f"{x:.0f}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def smooth(points: list, window: int) -> list:
    """Centred running mean over `window` points (fewer at the ends)."""
    half, out = window // 2, []
    for i, (x, _) in enumerate(points):
        part = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, sum(part) / len(part)))
    return out


def thin(points: list, limit: int = MAX_POINTS) -> list:
    """At most `limit` points, evenly chosen, the last one kept."""
    if len(points) <= limit:
        return points
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def _limits(values, floor_zero):
    lo, hi = min(values), max(values)
    if floor_zero and lo >= 0:
        lo = 0.0
    flat = hi - lo <= 1e-9 * max(
        abs(hi), abs(lo)
    )  # a constant, up to the rounding of a running mean
    pad = max(abs(hi) * 0.1, 1e-3) if flat else (hi - lo) * 0.06
    return (lo if floor_zero and lo == 0 else lo - pad), hi + pad


def line_chart(
    title: str, series: list[Series], references=(), *, floor_zero=False, width=520, height=256
) -> str:
    """<svg> with axes, labelled ticks and a polyline a series; its points go along for the readout."""
    left, right, top, bottom = 56, 12, 10, 42
    series = [s for s in series if s.points]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points + (s.faint or [])] + [r.value for r in references]
    x0, x1 = min(xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = _limits(ys, floor_zero)
    px = lambda x: left + (x - x0) / (x1 - x0) * (width - left - right)
    py = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
    path = lambda points: " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)

    out = []
    for y in nice_ticks(y0, y1):
        out.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
        )
        out.append(f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in nice_ticks(x0, x1, 6):
        if x == int(x):
            out.append(
                f'<line class="tick" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{height - bottom}" '
                f'y2="{height - bottom + 4}"/>'
            )
            out.append(
                f'<text x="{px(x):.1f}" y="{height - bottom + 17}" text-anchor="middle">{number(x)}</text>'
            )
    out.append(
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>'
    )
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 3}" text-anchor="middle">step</text>'
    )
    for r in references:
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(r.value):.1f}" y2="{py(r.value):.1f}" '
            f'stroke="{r.color}" stroke-width="1.5" stroke-dasharray="{r.dash}"/>'
        )
    for i, s in enumerate(series):
        if s.faint:
            out.append(
                f'<polyline points="{path(thin(s.faint))}" fill="none" stroke="{s.color}" opacity=".25"/>'
            )
        out.append(
            f'<polyline points="{path(thin(s.points))}" fill="none" stroke="{s.color}" stroke-width="2" '
            'stroke-linejoin="round"/>'
        )
        if s.marks or len(s.points) == 1:
            out += [_mark(i, px(x), py(y), s.color) for x, y in s.points]
    out.append(
        f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{height - bottom}" visibility="hidden"/>'
    )
    data = {
        "x": [x0, x1],
        "px": [left, width - right],
        "width": width,
        "series": [
            {
                "name": s.name,
                "color": s.color,
                "points": [[x, float(f"{y:.5g}")] for x, y in thin(s.points)],
            }
            for s in series
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" '
        f'data-chart="{html.escape(json.dumps(data, separators=(",", ":")))}">{"".join(out)}</svg>'
    )


def _mark(i, x, y, color):
    """Dots for the first series, squares for the second, ...: lines can be told apart without colour."""
    if i % 2 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>'
    return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{color}"/>'


def legend(series, references=(), note="") -> str:
    """HTML legend of a line chart."""
    items = []
    for i, s in enumerate(series):
        mark = _mark(i, 11, 6, s.color) if s.marks else ""
        items.append(
            (
                s.name,
                f'<line x1="0" x2="22" y1="6" y2="6" stroke="{s.color}" stroke-width="2.5"/>{mark}',
            )
        )
    for r in references:
        items.append(
            (
                r.name,
                f'<line x1="0" x2="22" y1="6" y2="6" stroke="{r.color}" stroke-width="1.5" '
                f'stroke-dasharray="{r.dash}"/>',
            )
        )
    cells = "".join(
        f'<span><svg width="22" height="12" aria-hidden="true">{draw}</svg>{html.escape(name)}</span>'
        for name, draw in items
    )
    return f'<div class="legend">{cells}{f"<span class=muted>{html.escape(note)}</span>" if note else ""}</div>'


def event_strip(title: str, rows: list, first: int, last: int, *, width=520) -> str:
    """When something was so: `rows` = [(name, steps)], a mark a step, over the steps first to last."""
    left, right, row = 200, 12, 24
    height = row * len(rows) + 40
    span = max(1, last - first)
    px = lambda x: left + (x - first) / span * (width - left - right)
    wide = max(2.0, min(10.0, 0.8 * (width - left - right) / span))
    out = []
    for x in nice_ticks(first, last, 6):
        if x == int(x):
            out.append(
                f'<line class="grid" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="4" y2="{height - 36}"/>'
            )
            out.append(
                f'<text x="{px(x):.1f}" y="{height - 22}" text-anchor="middle">{number(x)}</text>'
            )
    for i, (name, steps) in enumerate(rows):
        y = 4 + row * i
        out.append(f'<text x="4" y="{y + 16}">{html.escape(name)}</text>')
        out += [
            f'<rect x="{px(x) - wide / 2:.1f}" y="{y + 4}" width="{wide:.1f}" height="{row - 8}" fill="{PALETTE[5]}"/>'
            for x in steps
        ]
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
    )
    label = f'role="img" aria-label="{html.escape(title)}"'
    return f'<svg viewBox="0 0 {width} {height}" {label}>{"".join(out)}</svg>'


def forest(title: str, groups: list, *, width=520) -> str:
    """Interval plot: `groups` = [(heading, color, [(name, {value, lo, hi})], constant value or None)]."""
    left, right, row, head = 92, 50, 24, 26
    values = [
        v
        for _, _, rows, c in groups
        for _, e in rows
        for v in (e["hi"], e["value"])
        if v is not None
    ]
    values += [c for *_, c in groups if c is not None]
    top_x = min(1.0, (max(values) if values else 1.0) * 1.08) or 1.0
    px = lambda v: left + v / top_x * (width - left - right)
    height = sum(head + row * len(rows) for _, _, rows, _ in groups) + 30
    out, y = [], 4
    for x in nice_ticks(0, top_x, 6):
        out.append(
            f'<line class="grid" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="4" y2="{height - 26}"/>'
        )
        out.append(
            f'<text x="{px(x):.1f}" y="{height - 10}" text-anchor="middle">{number(x)}</text>'
        )
    for heading, color, rows, constant in groups:
        out.append(
            f'<text class="strong" x="4" y="{y + 17}" fill="{color}">{html.escape(heading)}</text>'
        )
        y += head
        if constant is not None:
            x, end = px(constant), y + row * len(rows) - 2
            out.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{end}" stroke="{color}" '
                'stroke-width="1.5" stroke-dasharray="5 4"/>'
            )
            out.append(
                f'<text class="small" x="{x + 5:.1f}" y="{y - 5}">best constant {constant:.2f}</text>'
            )
        for name, e in rows:
            out.append(_interval(name, e, color, px, y + row / 2, width))
            y += row
    label = f'role="img" aria-label="{html.escape(title)}"'
    return f'<svg viewBox="0 0 {width} {height}" {label}>{"".join(out)}</svg>'


def _interval(name, e, color, px, y, width):
    label = f'<text x="{16}" y="{y + 4:.1f}">{html.escape(name)}</text>'
    if e["value"] is None:
        return label + f'<text x="{width - 4}" y="{y + 4:.1f}" text-anchor="end">no value</text>'
    bar = ""
    if e["lo"] is not None:
        bar = (
            f'<line x1="{px(e["lo"]):.1f}" x2="{px(e["hi"]):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{color}" stroke-width="3" opacity=".45"/>'
        )
    return (
        f'{label}{bar}<circle cx="{px(e["value"]):.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
        f'<text class="strong" x="{width - 4}" y="{y + 4:.1f}" text-anchor="end">{e["value"]:.3f}</text>'
    )
