"""The plot of ablations.py: RL - SFT by arm on both hospitals, and the curves of training, as one SVG file."""

import html

from cxr_jax.report.svg import PALETTE, Series, line_chart, nice_ticks, number

WIDTH, GAP, NAMES, EDGE = 1040, 20, 110, 20
ROW, HEAD, FOOT = 34, 46, 30
CURVES = 320
COLORS = (*PALETTE, "#c2185b", "#4b3f1e", "#5e8c31", "#3949ab")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.strong{font-weight:600}.grid{stroke:#ddd}"
    ".axis,.tick{stroke:#888}.zero{stroke:#444}"
)
MARKS = {"jaccard": ("Jaccard", PALETTE[0], -6), "macro_f1": ("macro-F1", PALETTE[1], 6)}


def draw(study, estimate) -> str:
    """The file's text. study: `ablations.Study`; estimate: `ablations.estimate`."""
    panel = (WIDTH - NAMES - GAP - EDGE) / 2
    forest = HEAD + ROW * len(study.arms) + FOOT
    out = [_legend()]
    for row, arm in enumerate(study.arms):
        out.append(
            f'<text class="strong" x="4" y="{HEAD + ROW * (row + 0.5) + 4}">{html.escape(arm)}</text>'
        )
    for i, set_name in enumerate((study.inside, study.outside)):
        out.append(_forest(study, estimate, set_name, NAMES + i * (panel + GAP), panel))
    curves, height = _curves(study, forest + 20)
    title = f"RL - SFT by arm on hospitals {study.inside} and {study.outside}, and training curves"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{html.escape(title)}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(out)}{curves}</svg>\n'
    )


def _mark(metric, x, y, r, opacity=1.0):
    _, color, _ = MARKS[metric]
    if metric == "jaccard":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{color}" opacity="{opacity}"/>'
    side = f'width="{2 * r}" height="{2 * r}"'
    return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" {side} fill="{color}" opacity="{opacity}"/>'


def _legend():
    out, x = [], NAMES
    for metric, (name, _, _) in MARKS.items():
        out.append(_mark(metric, x + 5, 14, 4.5) + f'<text x="{x + 15}" y="18">{name}</text>')
        x += 90
    note = (
        "large: mean over seeds; bar: 95 % t-interval over seeds, from three on; small: each seed"
    )
    return "".join(out) + f'<text x="{x}" y="18">{note}</text>'


def _forest(study, estimate, set_name, left, width):
    found = {}
    for arm in study.arms:
        for metric in MARKS:
            values = study.differences(arm, set_name, metric)
            if None not in values:
                found[arm, metric] = values, estimate(values)
    # An arm that began elsewhere can be far off: it would leave no room to tell the others apart.
    ends = lambda e: [] if e["lo"] is None else [e["lo"], e["hi"]]
    near = [
        v
        for (arm, _), (values, e) in found.items()
        if not study.elsewhere(arm)
        for v in [*values, *ends(e)]
    ]
    near = near or [v for values, _ in found.values() for v in values] or [0.0]
    near = [0.0, *near]
    pad = max(0.05 * (max(near) - min(near)), 0.005)
    lo, hi = min(near) - pad, max(near) + pad
    px = lambda v: left + (min(max(v, lo), hi) - lo) / (hi - lo) * width
    bottom = HEAD + ROW * len(study.arms)
    out = [
        f'<text class="strong" x="{left}" y="{HEAD - 8}">RL - SFT on hospital {html.escape(set_name)}</text>'
    ]
    for x in nice_ticks(lo, hi, 6):
        kind = "zero" if x == 0 else "grid"
        out.append(
            f'<line class="{kind}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{HEAD}" y2="{bottom}"/>'
        )
        out.append(
            f'<text x="{px(x):.1f}" y="{bottom + 16}" text-anchor="middle">{number(x)}</text>'
        )
    for row, arm in enumerate(study.arms):
        for metric, (_, color, shift) in MARKS.items():
            y = HEAD + ROW * (row + 0.5) + shift
            if (arm, metric) not in found:
                continue
            values, e = found[arm, metric]
            if not lo <= e["value"] <= hi:
                side = (
                    ("start", left + 4, "‹ ")
                    if e["value"] < lo
                    else ("end", left + width - 4, "› ")
                )
                anchor, x, arrow = side
                out.append(
                    f'<text x="{x:.1f}" y="{y + 4}" text-anchor="{anchor}" style="fill:{color}">'
                    f"{arrow}{number(round(e['value'], 3))}</text>"
                )
                continue
            if e["lo"] is not None:
                out.append(
                    f'<line x1="{px(e["lo"]):.1f}" x2="{px(e["hi"]):.1f}" y1="{y}" y2="{y}" stroke="{color}" '
                    'stroke-width="3" opacity=".35"/>'
                )
            out += [_mark(metric, px(v), y, 1.8, 0.7) for v in values]
            out.append(_mark(metric, px(e["value"]), y, 4.5))
    return "".join(out)


def _curves(study, top):
    """(SVG, height of the whole file) of the mean curve of each arm that began at the SFT model, with a legend."""
    title = f"Jaccard on selection images of hospital {study.outside}, mean over seeds"
    series = []
    for i, arm in enumerate(study.arms):
        if not study.elsewhere(arm) and (curve := study.curve(arm)):
            series.append(Series(arm, curve, COLORS[i % len(COLORS)], marks=True))
    if not series:
        return "", top
    chart = line_chart(title, series, width=WIDTH, height=CURVES)
    place = f'<svg x="0" y="{top + 22}" width="{WIDTH}" height="{CURVES}" '
    out = [f'<text class="strong" x="4" y="{top + 12}">{html.escape(title)}</text>']
    out.append(str(chart).replace("<svg ", place, 1))
    x, y = 56, top + CURVES + 42
    for s in series:
        if x > WIDTH - 120:
            x, y = 56, y + 20
        out.append(
            f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{s.color}" stroke-width="3"/>'
        )
        out.append(f'<text x="{x + 30}" y="{y}">{html.escape(s.name)}</text>')
        x += 125
    if left_out := [arm for arm in study.arms if study.elsewhere(arm)]:
        y += 20
        text = ", ".join(
            f"{arm} (ends at {c[-1][1]:.3f})" for arm in left_out if (c := study.curve(arm))
        )
        text = "Not drawn, as it began elsewhere: " + (text or ", ".join(left_out))
        out.append(f'<text x="56" y="{y}">{html.escape(text)}</text>')
    return "".join(out), y + 16
