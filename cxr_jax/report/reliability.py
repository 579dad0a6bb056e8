"""Sections of the report: what probabilities are worth (AUROC, AP, Brier, ECE, reliability), and parts of a set."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cxr_jax.report import svg
from cxr_jax.report.markup import render, set_title

TITLES = {
    "mean_auroc": "AUROC",
    "mean_average_precision": "AP",
    "ece": "ECE, pooled",
    "ece_mean": "ECE, mean over labels",
    "brier": "Brier",
}
PART_TITLES = {
    "jaccard": "Jaccard",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "mean_auroc": "AUROC",
}
_SIDE, _LEFT, _BELOW, _ROOM = 440, 44, 40, 10  # of a reliability plot, in its own units


def _summaries(models: Mapping, part_name: str) -> list[tuple[str, str, dict]]:
    # In the order of the other tables of the page.
    return [
        (model, set_name, summary)
        for model, summaries in models.items()
        for set_name, summary in summaries.items()
        if summary.get(part_name)
    ]


def probabilities(evaluation: Mapping) -> Markup:
    """Draw what the probabilities of the findings are worth; nothing where there are none."""
    calibrated = _summaries(evaluation["models"], "calibration")
    # Evaluations of before have points alone, which the headline shows.
    calibrated = [entry for entry in calibrated if "estimates" in entry[2]["calibration"]]
    if not calibrated:
        return Markup()
    # Those of answers are sentences of the headline.
    compared = [
        comparison
        for comparison in evaluation.get("comparisons", ())
        if comparison["metric"] in TITLES
    ]
    return render(
        "probabilities.html",
        calibrated=calibrated,
        titles=TITLES,
        comparisons=compared,
        sampled=_summaries(evaluation["models"], "sampled"),
        plots=[
            (f"{model}, {set_title(set_name)}", _plots(summary))
            for model, set_name, summary in calibrated
            if summary["calibration"]["reliability"]
        ],
    )


def _plots(summary: Mapping) -> list[tuple[str, Markup]]:
    curves = {"as they are": summary["calibration"]["reliability"]}
    # Side by side, since what calibration has done is what the second one is for.
    if "recalibrated" in summary:
        curves["calibrated"] = summary["recalibrated"]["calibration"]["reliability"]
    return [(title, reliability_plot(title, bins)) for title, bins in curves.items()]


def reliability_plot(title: str, bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the share of positives of each bin, with its interval, over the mean probability; dot area: cells."""

    def across(value: float) -> float:
        return _LEFT + value * (_SIDE - _LEFT - _ROOM)

    def down(value: float) -> float:
        return _ROOM + (1 - value) * (_SIDE - _BELOW - _ROOM)

    # ---- The square, and where probability and share are equal ----
    elements = []
    for tick_value in (0, 0.25, 0.5, 0.75, 1):
        elements.append(
            svg.draw_line(across(tick_value), across(tick_value), down(0), down(1), 'class="grid"')
        )
        elements.append(
            svg.draw_line(across(0), across(1), down(tick_value), down(tick_value), 'class="grid"')
        )
        tick_label = svg.number(tick_value)
        elements.append(
            svg.draw_text(across(tick_value), down(0) + 14, tick_label, 'text-anchor="middle"')
        )
        elements.append(
            svg.draw_text(_LEFT - 5, down(tick_value) + 4, tick_label, 'text-anchor="end"')
        )
    diagonal = f'stroke="{svg.PALETTE[4]}" stroke-dasharray="5 4"'
    elements.append(svg.draw_line(across(0), across(1), down(0), down(1), diagonal))

    # ---- The bins ----
    largest_count = max(reliability_bin["n"] for reliability_bin in bins)
    for reliability_bin in bins:
        bin_center, positive_share = (
            across(reliability_bin["probability"]),
            reliability_bin["share"],
        )
        # Of very few patients there may be no interval.
        if positive_share["lo"] is not None:
            interval = f'stroke="{svg.BLUE}" stroke-width="2" stroke-opacity="0.4"'
            elements.append(
                svg.draw_line(
                    bin_center,
                    bin_center,
                    down(positive_share["lo"]),
                    down(positive_share["hi"]),
                    interval,
                )
            )
        # Area, not radius, is what the eye compares.
        dot_radius = 2 + 5 * (reliability_bin["n"] / largest_count) ** 0.5
        dot = f'cx="{bin_center:.1f}" cy="{down(positive_share["value"]):.1f}" r="{dot_radius:.1f}"'
        elements.append(f'<circle {dot} fill="{svg.BLUE}"/>')
    # One axis is named; the other is the heading of the figure.
    axis = "mean probability in the bin"
    elements.append(svg.draw_text(across(0.5), _SIDE - 6, axis, 'text-anchor="middle"'))
    return svg.draw_picture(f"Reliability, {title}", (_SIDE, _SIDE), elements)


def subgroups(models: Mapping) -> Markup:
    """Draw the scores of parts of each set, of the last model; nothing where no set has parts."""
    # The last one is what a run has made; the others stand in evaluation.json.
    last_model = list(models)[-1] if models else ""
    divided = [entry for entry in _summaries(models, "subgroups") if entry[0] == last_model]
    if not divided:
        return Markup()
    return render("subgroups.html", divided=divided, titles=PART_TITLES)
