"""The results as a plain table for the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from cxr_jax.report.records import NO_REMARKS, Remarks

CAVEAT = {
    "phantom": "Phantom results: they say nothing about patients.",
    "files": "Real films: the embedded model has seen phantoms alone, and no number here is a claim about patients.",
}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The cells of one row; a constant answer has only scores."""

    model: str
    test_set: str
    images: str
    jaccard: str
    macro_f1: str
    micro_f1: str = ""
    swapped_macro_f1: str = ""
    parse_failures: str = ""
    trace_answer: str = ""
    trace_truth: str = ""


_HEADINGS = _Row(
    # Written like any other row, so that the columns fit it, too.
    model="model",
    test_set="set",
    images="n",
    jaccard="Jaccard [95 % CI]",
    macro_f1="macro-F1 [95 % CI]",
    micro_f1="micro-F1",
    swapped_macro_f1="swapped macro-F1",
    parse_failures="parse failures",
    trace_answer="trace = answer",
    trace_truth="trace = truth",
)


def with_interval(estimate: Mapping) -> str:
    """Write an estimate and its interval, a missing one as a dash."""
    # Very few images may define no score.
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.3f} [{estimate['lo']:.3f}, {estimate['hi']:.3f}]"


def _model_row(model: str, test_set: str, summary: Mapping) -> _Row:
    micro_f1 = summary["micro_f1"]["all"]["value"] or 0.0
    swapped = summary["audit"]["swapped"]["macro_f1"] or 0.0
    return _Row(
        model=model,
        test_set=test_set,
        images=str(summary["n"]),
        jaccard=with_interval(summary["jaccard"]),
        macro_f1=with_interval(summary["macro_f1"]["all"]),
        micro_f1=f"{micro_f1:.3f}",
        swapped_macro_f1=f"{swapped:.3f}",
        parse_failures=f"{summary['parse_failure_rate']:.3f}",
        trace_answer=f"{summary['trace']['trace_answer']['value']:.3f}",
        trace_truth=f"{summary['trace']['trace_findings']['value']:.3f}",
    )


def _constant_row(best: Mapping, test_set: str, summary: Mapping) -> _Row:
    """best: the best constant answer by some metric, from the summary of the test set."""
    return _Row(
        model=f"constant: {best['policy']}",
        test_set=test_set,
        images=str(summary["n"]),
        jaccard=with_interval(best["jaccard"]),
        macro_f1=with_interval(best["macro_f1"]),
    )


def _aligned(rows: Sequence[_Row]) -> list[str]:
    """One line a row, columns as wide as their widest cell."""
    # Spaces at the end of a line would only be copied along.
    cells = [astuple(row_cells) for row_cells in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row_cells, widths, strict=True)).rstrip()
        for row_cells in cells
    ]


def _probability_lines(tables: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    """What the probabilities are worth, a line a model and set; none where there are none."""
    lines = []
    for model, summaries in tables.items():
        for test_set, summary in summaries.items():
            # Not every evaluation computes them.
            calibration = summary.get("calibration")
            if not calibration:
                continue
            estimates = calibration["estimates"]
            few_labels = ", ".join(
                f"{label} n+ {calibration['per_label'][label]['n_pos']}"
                for label in calibration["few"]
            )
            of_labels = f"{len(calibration['labels'])} labels" + (
                f"; few: {few_labels}" if few_labels else ""
            )
            # Ranks first: a map of the probabilities leaves them as they are.
            numbers = [
                f"AUROC {with_interval(estimates['mean_auroc'])} ({of_labels})",
                f"AP {with_interval(estimates['mean_average_precision'])}",
            ]
            recalibrated_estimates = (
                summary.get("recalibrated", {}).get("calibration", {}).get("estimates", {})
            )
            for name, title in (
                ("ece", "ECE pooled"),
                ("ece_mean", "by label"),
                ("brier", "Brier"),
            ):
                if estimates[name]:
                    numbers.append(f"{title} {with_interval(estimates[name])}")
                if recalibrated_estimates.get(name):
                    numbers[-1] += f" -> {with_interval(recalibrated_estimates[name])} calibrated"
            lines.append(f"{model} on {test_set}: {'; '.join(numbers)}")
            if sampled := summary.get("sampled"):
                lines.append(
                    f"{model} on {test_set}, {sampled['traces']} sampled: Jaccard mean "
                    f"{with_interval(sampled['mean_at_k'])}, best {with_interval(sampled['best_at_k'])}, majority "
                    f"{with_interval(sampled['majority_at_k'])}; all right {with_interval(sampled['exact_at_1'])}, "
                    f"pass@k {with_interval(sampled['pass_at_k'])}"
                )
            if calibration["refused"]:
                lines.append(f"{model} on {test_set}: {calibration['refused']}")
    return lines


def difference_line(comparison: Mapping) -> str:
    """Write a paired difference of evaluation.json's "comparisons" in one line."""
    model_pair = f"{comparison['b']} - {comparison['a']} on {comparison['set']}"
    interval = f"[{comparison['lo']:+.3f}, {comparison['hi']:+.3f}]"
    # What is undefined for one of the two has no difference.
    if not math.isfinite(comparison["diff"]):
        interval = "not defined"
    return f"{model_pair}: {comparison['metric']} {comparison['diff']:+.3f} {interval} (paired)"


def text_table(
    tables: Mapping[str, Mapping[str, Mapping]],
    comparisons: Sequence[Mapping],
    kind: str,
    remarks: Remarks = NO_REMARKS,
) -> str:
    """Write the results as a plain table for the terminal.

    Args:
        tables: {model: {test set: metrics.scores.summary}}, with traces and the image-use audit.
        comparisons: as in evaluation.json.
        kind: "phantom" or "files": what the numbers may be taken for.
        remarks: what stands beside every number.
    """
    rows = [_HEADINGS]
    for model, summaries in tables.items():
        for test_set, summary in summaries.items():
            rows.append(_model_row(model, test_set, summary))
    # Constant answers do not look, so those of the first model are those of all.
    # Below the models: the bar that they have to pass.
    for test_set, summary in next(iter(tables.values())).items():
        for metric in ("jaccard", "macro_f1"):
            best_policy = summary["constants"][f"best_{metric}"]
            rows.append(_constant_row(best_policy, test_set, summary))
    table_lines = _aligned(rows)
    table_lines += map(difference_line, comparisons)
    table_lines += _probability_lines(tables)
    table_lines += [f"scored: {line}" for line in remarks.protocol]
    if remarks.label_policy:
        table_lines.append(f"labels: {remarks.label_policy}")
    if remarks.contaminated:
        table_lines.append(remarks.contaminated)
    # The last line is the one that stays on the screen.
    table_lines.append(CAVEAT[kind])
    return "\n".join(table_lines)
