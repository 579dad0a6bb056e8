"""Our labels of Open-i reports against gold labels: `cxr-jax agreement REPORTS_DIR`.

`python -m cxr_jax.evaluation.label_agreement` is the same command.

REPORTS_DIR holds openi_manifest.csv (--manifest: another name or path) and the XML files it lists. Columns that are
read: file (path below REPORTS_DIR), report_id, and gold_<name> (1: asserted positive, 0: not) for each source label in
the map openi_gold (data/sources/maps). Where several source labels map to one of the 14, it is positive if
any is. Labels to which nothing maps are not scored.

An uncertain mention counts as not positive, or as positive with --uncertain positive; "not mentioned" is never
positive. Intervals are 95 % percentile bootstrap over reports. Macro-F1 is the mean over labels with a gold positive.

--errors FILE.csv has a row an error: report_id, label, kind (FP or FN), state (what was read: 1, 0, -1, or blank for
not mentioned). No output holds report text. Exit codes: 0 done, 2 bad usage or input. Research use only. Not for
diagnosis.
"""

import csv
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import report_files
from cxr_jax.data.sources.maps import LabelMap, load_map
from cxr_jax.errors import UserError, exit_code
from cxr_jax.labels.taxonomy import CHEXPERT_14, NOT_MENTIONED, POSITIVE, UNCERTAIN
from cxr_jax.metrics import scores

# The map of data/sources/maps that says which gold label is which of the 14.
MAP = "openi_gold"
POLICIES = ("negative", "positive")  # what an uncertain mention counts as
_GOLD = "gold_"  # what the names of gold columns begin with

# ---- Gold labels -----------------------------------------------------------------------------------------------------


class Gold(NamedTuple):
    """A manifest of N reports.

    Attributes:
        ids: of the reports.
        paths: of their files.
        truth: bool [N, 14].
        unscored: source labels without a target.
    """

    ids: list[str]
    paths: list[Path]
    truth: np.ndarray
    unscored: list[str]


def load_gold(folder: str | Path, manifest: str | Path, label_map: LabelMap) -> Gold:
    """Read the rows of a manifest.

    Args:
        folder: where the reports are.
        manifest: a name below it, or a path.
        label_map: which gold columns are read.

    Raises:
        UserError: for a missing manifest, column or file, or a gold cell but 0 and 1.
    """
    manifest_path = Path(folder) / manifest
    columns, manifest_rows = _read_manifest(manifest_path)
    # All columns that are read are asked for first, so that a wrong file is told by its header.
    for column in (
        "file",
        "report_id",
        *(_GOLD + source_label for source_label in label_map.labels),
    ):
        if column not in columns:
            raise UserError(f"{manifest_path}: has no column {column!r}")
    if not manifest_rows:
        raise UserError(f"{manifest_path}: lists no reports")
    truth = np.zeros((len(manifest_rows), len(CHEXPERT_14)), bool)
    # Rows are counted from 1, as people count them; the header is no row.
    for row_number, (manifest_row, row_truth) in enumerate(
        zip(manifest_rows, truth, strict=True), 1
    ):
        # Where csv.DictReader puts cells beyond the header: a comma too many has shifted the others.
        if None in manifest_row:
            raise UserError(f"{manifest_path}: row {row_number}: more cells than columns")
        for source_label, target_label in label_map.labels.items():
            gold_cell = manifest_row[_GOLD + source_label]
            if gold_cell not in ("0", "1"):
                raise UserError(
                    f"{manifest_path}: row {row_number}: gold_{source_label} is neither 0 nor 1"
                )
            # Of several source labels any one makes the target positive.
            row_truth[CHEXPERT_14.index(target_label)] |= gold_cell == "1"
        if not (manifest_row["file"] or "").lower().endswith(".xml"):
            raise UserError(
                f"{manifest_path}: row {row_number}: file is not the name of an .xml file"
            )
    # Every file is looked for before one is read.
    report_paths = [Path(folder) / manifest_row["file"] for manifest_row in manifest_rows]
    if missing := next(
        (report_path for report_path in report_paths if not report_path.is_file()), None
    ):
        raise UserError(f"{missing}: there is no such file, but {manifest_path.name} lists it")
    # Gold that nothing maps to is told, not dropped in silence.
    source_labels = [column.removeprefix(_GOLD) for column in columns if column.startswith(_GOLD)]
    unscored = [
        source_label for source_label in source_labels if source_label not in label_map.labels
    ]
    return Gold(
        [manifest_row["report_id"] for manifest_row in manifest_rows], report_paths, truth, unscored
    )


def _read_manifest(manifest_path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """The names of the columns, and the rows."""
    try:
        # Spreadsheets put a mark before the first name (utf-8-sig); strict makes no guesses.
        with open(manifest_path, encoding="utf-8-sig", newline="") as manifest_file:
            csv_reader = csv.DictReader(manifest_file, strict=True)
            return csv_reader.fieldnames or [], list(csv_reader)
    except OSError as error:
        raise UserError(f"{manifest_path}: {error.strerror or type(error).__name__}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{manifest_path}: not a CSV file in UTF-8") from error


# ---- Ours against gold -----------------------------------------------------------------------------------------------


def read_states(paths: Sequence[str | Path], lexicon: str | None = None) -> np.ndarray:
    """Read findings and impression of Open-i files with the parser.

    Args:
        paths: N files.
        lexicon: other phrases than the built-in ones.

    Returns:
        int8 [N, 14].

    Raises:
        UserError: for a bad file or lexicon.
    """
    # Here, so that `--help` and bad usage do not wait for the parser.
    from cxr_jax import labels

    # One bad file refuses them all, before any is parsed.
    reports = list(report_files.read(report_files.open_inputs(paths)))
    if unreadable_report := next((report for report in reports if report.text is None), None):
        raise UserError(f"{unreadable_report.source}: {unreadable_report.reason}")
    texts = [cast(str, report.text) for report in reports]
    return labels.read_reports(texts, lexicon=lexicon)["state"]


def is_positive(states: np.ndarray, policy: str) -> np.ndarray:
    """Tell which states count as positive under a policy of POLICIES: bool, as the states."""
    # What is not mentioned is never positive, under no policy.
    return (states == POSITIVE) | ((states == UNCERTAIN) & (policy == "positive"))


def summarise(
    states: np.ndarray, truth: np.ndarray, label_map: LabelMap, policy: str, n_boot: int = 1000
) -> dict[str, Any]:
    """Compute `scores.summary` over the labels that the map has; the rest are unknown.

    Args:
        states: int8 [N, 14].
        truth: bool [N, 14].
        label_map: which labels are scored.
        policy: of POLICIES.
        n_boot: bootstrap samples of the intervals.
    """
    # Labels that nothing maps to are unknown: neither right nor wrong.
    known = np.tile(label_map.scored(), (len(truth), 1))
    answers = scores.Answers(is_positive(states, policy))
    reference = scores.Reference(truth, known)
    return scores.summary(answers, reference, bootstrap=scores.Bootstrap(n_boot))


class LabelError(NamedTuple):
    """A scored cell where prediction and gold differ."""

    report_id: str
    label: str
    kind: str  # "FP" or "FN"
    state: int  # what was read


def find_errors(
    gold: Gold, states: np.ndarray, label_map: LabelMap, policy: str
) -> list[LabelError]:
    """List every scored cell where prediction and gold differ, in order."""
    # A row of the mask for all reports: labels without gold are no errors.
    is_wrong = (is_positive(states, policy) != gold.truth) & label_map.scored()
    return [
        LabelError(
            gold.ids[report_index],
            CHEXPERT_14[label_index],
            "FN" if gold.truth[report_index, label_index] else "FP",
            int(states[report_index, label_index]),
        )
        for report_index, label_index in np.argwhere(is_wrong)
    ]


# ---- Output ----------------------------------------------------------------------------------------------------------


def report_lines(gold: Gold, states: np.ndarray, label_map: LabelMap, policy: str) -> list[str]:
    """Write the report, one string a line."""
    summary = summarise(states, gold.truth, label_map, policy)
    other_policy = POLICIES[1 - POLICIES.index(policy)]
    # The choice of a policy is shown by what the other one would give; its interval is not needed.
    other_summary = summarise(states, gold.truth, label_map, other_policy, n_boot=1)
    errors = find_errors(gold, states, label_map, policy)
    micro_f1, macro_f1 = summary["micro_f1"], summary["macro_f1"]["all"]
    # The head of the report: what was compared, by which rules, and the sums.
    written_lines = [
        f"{len(gold.ids)} reports; map {label_map.name} version {label_map.version}; uncertain = {policy}, "
        "not mentioned = negative",
        f"micro-F1 {_format_estimate(micro_f1['all'])}",
        f"micro-F1 without No Finding {_format_estimate(micro_f1['without_no_finding'])}",
        f"macro-F1 {_format_estimate(macro_f1)} over the {len(macro_f1['labels'])} labels with a gold positive",
        f"micro-F1 with uncertain = {other_policy}: {_format_value(other_summary['micro_f1']['all']['value'])}",
        f"{'label':<28}{'gold':>6}{'tp':>6}{'fp':>6}{'fn':>6}{'errors':>8}{'precision':>11}{'recall':>8}{'F1':>7}",
    ]
    # Then one line a label; those without gold have no numbers to show.
    for label, is_scored in zip(CHEXPERT_14, label_map.scored(), strict=True):
        if is_scored:
            written_lines.append(_label_line(label, summary["per_label"][label]))
    written_lines.append(
        f"{len(errors)} errors in {len({error.report_id for error in errors})} reports"
    )
    # What was left out is said, or the sums would seem to be over all 14.
    if gold.unscored:
        written_lines.append(f"not scored: {', '.join(gold.unscored)}")
    return written_lines


def _label_line(label: str, scored: dict[str, Any]) -> str:
    true_positives, false_positives, false_negatives = scored["tp"], scored["fp"], scored["fn"]
    label_errors = false_positives + false_negatives
    return (
        f"{label:<28}{scored['n_pos']:>6}{true_positives:>6}{false_positives:>6}{false_negatives:>6}{label_errors:>8}"
        f"{_format_value(scored['precision']):>11}{_format_value(scored['recall']):>8}"
        f"{_format_value(scored['f1']['value']):>7}"
    )


# A precision without a positive is undefined, and no zero.
def _format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _format_estimate(estimate: dict[str, Any]) -> str:
    value, lower_bound, upper_bound = (
        _format_value(estimate[bound_name]) for bound_name in ("value", "lo", "hi")
    )
    return f"{value} [{lower_bound}, {upper_bound}]"


def write_errors(path: str | Path, errors: Iterable[LabelError]) -> None:
    """Write a table with a row an error.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with open(
            path, "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as errors_file:
            # A fixed line end, so that the file is the same on every system.
            csv_writer = csv.writer(errors_file, lineterminator="\n")
            csv_writer.writerow(LabelError._fields)
            for error in errors:
                # Blank, as in the tables of CheXpert, for what a report does not mention.
                state_cell = "" if error.state == NOT_MENTIONED else error.state
                csv_writer.writerow((error.report_id, error.label, error.kind, state_cell))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


# ---- The command -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """Read the flags.

    Raises:
        UserError: for bad usage.
    """
    parser = ArgumentParser("cxr_jax.evaluation.label_agreement", description=__doc__)
    # Flags and their help; rules that need files are checked in `run`.
    parser.add_argument("folder", metavar="REPORTS_DIR")
    parser.add_argument(
        "--manifest",
        default="openi_manifest.csv",
        metavar="FILE.csv",
        help="default: openi_manifest.csv",
    )
    parser.add_argument(
        "--errors", metavar="FILE.csv", help="write a row an error; replaced if it exists"
    )
    parser.add_argument(
        "--uncertain",
        choices=POLICIES,
        default=POLICIES[0],
        help="what it counts as (default: negative)",
    )
    parser.add_argument(
        "--lexicon", metavar="FILE", help="other phrases than the built-in ones (TOML)"
    )
    return parser.parse_args(argv)


def run(arguments: Namespace) -> None:
    """Compare, print, and write the errors if asked to.

    Raises:
        UserError: for bad input.
    """
    label_map = load_map(MAP)
    gold = load_gold(arguments.folder, arguments.manifest, label_map)
    if arguments.errors:
        # Before the reports are read, so that a bad name costs no time.
        _check_errors_path(
            Path(arguments.errors), [Path(arguments.folder) / arguments.manifest, *gold.paths]
        )
    states = read_states(gold.paths, arguments.lexicon)
    print("\n".join(report_lines(gold, states, label_map, arguments.uncertain)))
    if arguments.errors:
        write_errors(arguments.errors, find_errors(gold, states, label_map, arguments.uncertain))


def _check_errors_path(errors_path: Path, input_paths: Sequence[Path]) -> None:
    # The suffix keeps a slip from replacing a report; samefile sees through links.
    is_table = errors_path.suffix.lower() == ".csv"
    if not is_table or (
        errors_path.exists() and any(errors_path.samefile(input_path) for input_path in input_paths)
    ):
        raise UserError(f"{errors_path}: must be named .csv, and must not be the manifest")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
