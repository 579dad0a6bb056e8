"""The evaluation section of a model card, from a run's evaluation.json alone; docs/evaluation.md defines the numbers.

Every score stands with its 95 % interval; one that has none is a dash. So there is no `model-index` in a card's front
matter: what hubs read there has no place for an interval, for patients, or for what uncertain labels counted as.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.report.records import FORMAT, KINDS, read_json
from cxr_jax.report.text_table import CAVEAT
from cxr_jax.runtime import whole_files
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS

FILE = "card.md"  # in a run's folder: the section by itself
_README = "README.md"
_BEGIN, _END = "<!-- evaluation by cxr_jax -->", "<!-- end of the evaluation -->"
_EXPORTS = ("hf", "adapter")  # folders of a run whose cards get the section
# What Markdown, or the HTML in it, would take for more than text.
_MARKED = re.compile(r"([\\`*_{}\[\]<>|#~])")
_OVERALL = {
    "mean_auroc": "AUROC, mean over labels",
    "mean_average_precision": "AP, mean over labels",
    "brier": "Brier, pooled",
    "brier_mean": "Brier, mean over labels",
    "ece": "ECE, pooled",
    "ece_mean": "ECE, mean over labels",
}
_SUBSETS = {"all": "all labels", "findings_only": "without No Finding and Support Devices"}
_OF_LABELS = {"auroc": "AUROC", "average_precision": "AP", "brier": "Brier", "ece": "ECE"}


def write(workdir: Path, name_of: Callable[[str], str] = str) -> Path:
    """Write the section of a run's evaluation as card.md, and into the cards of what the run has exported.

    Args:
        workdir: the run's folder.
        name_of: what a card may call a model, of which an evaluation knows the folder.

    Returns:
        The path of card.md.

    Raises:
        UserError: if the run has not been evaluated.
    """
    section_text = section(read_evaluation(workdir), name_of)
    for export in _EXPORTS:
        # A run that only evaluates has none.
        if (workdir / export / _README).is_file():
            put_into(workdir / export / _README, section_text)
    path = workdir / FILE
    whole_files.write_text(path, section_text)
    return path


def read_evaluation(workdir: Path) -> dict[str, Any]:
    """Read a run's evaluation.json.

    Raises:
        UserError: if it is not there or not of the format.
    """
    path = workdir / "evaluation.json"
    evaluation = read_json(path)
    is_known = isinstance(evaluation, dict) and evaluation.get("format") == FORMAT
    if not is_known or evaluation.get("kind") not in KINDS or not evaluation.get("models"):
        raise UserError(f"{path}: not an evaluation of format {FORMAT}")
    return evaluation


def put_into(readme: Path, section_text: str) -> None:
    """Put the section at the end of a card, in place of one that stands there."""
    card = readme.read_text(encoding="utf-8")
    begin_place, end_place = card.find(_BEGIN), card.find(_END)
    # Only what is between both marks is ours: a person may have written behind it.
    if 0 <= begin_place < end_place:
        card = card[:begin_place] + section_text.rstrip("\n") + card[end_place + len(_END) :]
    else:
        card = f"{card.rstrip()}\n\n{section_text}"
    whole_files.write_text(readme, card)


# ---- The section -------------------------------------------------------------------------------------------------


def section(evaluation: Mapping[str, Any], name_of: Callable[[str], str] = str) -> str:
    """Write the section of the last model of an evaluation, which is the one that a run has made, in Markdown.

    Args:
        evaluation: the object of evaluation.json.
        name_of: see `write`.
    """
    model, summaries = list(evaluation["models"].items())[-1]
    section_lines = [
        _BEGIN,
        "## Evaluation",
        "",
        f"{NOT_FOR_DIAGNOSIS} {CAVEAT[evaluation['kind']]}",
        "",
    ]
    # First of all: no number below may be read without it.
    if contaminated := evaluation.get("contaminated"):
        section_lines += [f"**{_text(contaminated)}**", ""]
    section_lines += [
        f"Model: {_text(name_of(model))}. Values stand with 95 % intervals by bootstrap, which cover who was tested "
        "and not the seed of training; one without width says that no resample differs, "
        "and is no certainty. Each number is defined in docs/evaluation.md of cxr_jax.",
        "",
    ]
    protocols = list(evaluation.get("protocol", ()))
    for place, (set_name, summary) in enumerate(summaries.items()):
        # Evaluations of before have the line beside the numbers or not at all.
        protocol = summary.get("protocol") or (
            protocols[place] if place < len(protocols) else evaluation.get("label_policy", "")
        )
        section_lines += [*_of_set(set_name, protocol, summary), ""]
    section_lines += _comparisons(evaluation, model, name_of)
    return "\n".join([*section_lines, _END, ""])


def _of_set(set_name: str, protocol: str, summary: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {_text(set_name)}", "")
    if protocol:
        yield from (f"Scored: {_text(protocol)}.", "")
    resampled_units = (
        "patients" if summary["unit"] == "patient" else "images, each taken for a patient"
    )
    yield (
        f"{summary['n']:,} {'studies' if summary.get('scored') == 'study' else 'images'}; intervals draw "
        f"{summary['n_units']:,} {resampled_units}, {summary['n_boot']:,} times (seed {summary['seed']})."
    )
    # From the whole to the single label, and then what it rests on.
    yield from ("", *_overall_table(summary), "")
    yield from (*_label_table(summary), "")
    yield from _image_use(summary)


def _overall_table(summary: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| | value [95 % interval] |", "|---|---|")
    yield f"| Jaccard | {_number(summary['jaccard'])} |"
    for metric, title in (("macro_f1", "macro-F1"), ("micro_f1", "micro-F1")):
        for subset, which in _SUBSETS.items():
            subset_score = summary[metric][subset]
            yield f"| {title}, {which} ({len(subset_score['labels'])}) | {_number(subset_score)} |"
    # ---- The bar, chosen on these very images ----
    best_constant = summary["constants"]["best_macro_f1"]
    bar = _number(best_constant["macro_f1"])
    yield f"| best constant answer ({_text(best_constant['policy'])}): macro-F1 | {bar} |"
    constant_gain = summary["over_constant"]["macro_f1"]
    yield f"| macro-F1 over it, paired | {_number(constant_gain, '+')} |"
    # ---- Probabilities, where an evaluation has them ----
    calibration = summary.get("calibration") or {}
    estimates = calibration.get("estimates") or {}
    mapped_estimates = (summary.get("recalibrated") or {}).get("calibration", {}).get(
        "estimates"
    ) or {}
    for name, title in _OVERALL.items():
        if estimates.get(name):
            yield f"| {title} | {_number(estimates[name])} |"
        if mapped_estimates.get(name) and name not in ("mean_auroc", "mean_average_precision"):
            yield f"| {title}, calibrated on the selection split | {_number(mapped_estimates[name])} |"
    # A rate without its interval, of evaluations of before, is left out.
    if "parse_failures" in summary:
        yield f"| answers that could not be parsed | {_number(summary['parse_failures'])} |"


def _label_table(summary: Mapping[str, Any]) -> Iterator[str]:
    # F1 of every model; the rest of those that give probabilities.
    by_label = (summary.get("calibration") or {}).get("per_label") or {}
    metrics = {
        name: title
        for name, title in _OF_LABELS.items()
        if any(name in of_label for of_label in by_label.values())
    }
    yield f"| label | known | positive | F1 | {' | '.join([*metrics.values(), ''])}".rstrip()
    yield "|---" * (4 + len(metrics)) + "|"
    for label, counts in summary["per_label"].items():
        # What is known of no image has no number, and stands there all the same.
        label_estimates = [counts["f1"], *(by_label.get(label, {}).get(name) for name in metrics)]
        row_cells = [
            label,
            f"{counts['n_known']:,}",
            f"{counts['n_pos']:,}",
            *map(_number, label_estimates),
        ]
        yield f"| {' | '.join(row_cells)} |"
    few_labels = (summary.get("calibration") or {}).get("few")
    if few_labels:
        yield from ("", f"Fewer than 10 positives or negatives: {', '.join(few_labels)}.")


def _image_use(summary: Mapping[str, Any]) -> Iterator[str]:
    other_images = {name: row for name, row in summary.get("audit", {}).items() if name != "real"}
    # Covers are read of some images alone, so their number stands with them.
    covered_images = {
        f"{name}{kind} (of {summary[part]['n']})": row
        for part, kind in (("covered", ""), ("boxed", ", boxes"))
        for name, row in summary.get(part, {}).get("images", {}).items()
        if name != "real"
    }
    if not other_images and not covered_images:
        yield "It was not asked whether the answers depend on the image."
        return
    drops = [row["drop_jaccard"] for row in other_images.values()]
    uses_image = bool(drops) and all(drop["lo"] is not None and drop["lo"] > 0 for drop in drops)
    yield (
        "Other images in place of the real ones, against the truth of the real ones: what is lost, paired. "
        + (
            "The answers use the image."
            if uses_image
            else "It is not shown that the answers use the image."
        )
    )
    yield from ("", "| image | Jaccard lost | macro-F1 lost |", "|---|---|---|")
    for name, row in (other_images | covered_images).items():
        drops_of_row = (row.get("drop_jaccard"), row.get("drop_macro_f1"))
        yield f"| {_text(name)} | {' | '.join(_number(drop, '+') for drop in drops_of_row)} |"


def _comparisons(
    evaluation: Mapping[str, Any], model: str, name_of: Callable[[str], str]
) -> list[str]:
    # Other pairs of the run say nothing of this model.
    comparison_rows: Sequence[Mapping] = [
        row for row in evaluation.get("comparisons", ()) if model in (row["a"], row["b"])
    ]
    if not comparison_rows:
        return []
    section_lines = [
        "Differences on the same images, paired:",
        "",
        "| set | difference | |",
        "|---|---|---|",
    ]
    for row in comparison_rows:
        model_pair = (
            f"{_text(name_of(row['b']))} - {_text(name_of(row['a']))}: {_text(row['metric'])}"
        )
        section_lines.append(
            f"| {_text(row['set'])} | {model_pair} | {_number({**row, 'value': row['diff']}, '+')} |"
        )
    return [*section_lines, ""]


def _number(estimate: Mapping[str, Any] | None, sign: str = "") -> str:
    """A value with its interval; a dash where either is missing."""
    if estimate is None or any(estimate.get(key) is None for key in ("value", "lo", "hi")):
        return "–"
    value, low, high = (f"{estimate[key]:{sign}.3f}" for key in ("value", "lo", "hi"))
    return f"{value} [{low}, {high}]"


def _text(value: object) -> str:
    """Text that others have written, in one line and without effect."""
    return _MARKED.sub(r"\\\1", " ".join(str(value).split()))
