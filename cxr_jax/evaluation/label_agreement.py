"""Our labels of Open-i reports against gold labels: `cxr-jax agreement REPORTS_DIR`.

`python -m cxr_jax.evaluation.label_agreement` is the same command.

REPORTS_DIR holds openi_manifest.csv (--manifest: another name or path) and the XML files it lists. Columns that are
read: file (path below REPORTS_DIR), report_id, and gold_<name> (1: asserted positive, 0: not) for each source label in
the table [openi_gold] of labels/maps.toml. Where several source labels map to one of the 14, it is positive if any is.
Labels to which nothing maps are not scored.

An uncertain mention counts as not positive, or as positive with --uncertain positive; "not mentioned" is never
positive. Intervals are 95 % percentile bootstrap over reports. Macro-F1 is the mean over labels with a gold positive.

--errors FILE.csv has a row an error: report_id, label, kind (FP or FN), state (what was read: 1, 0, -1, or blank for
not mentioned). No output holds report text. Exit codes: 0 done, 2 bad usage or input. Research use only. Not for
diagnosis.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import report_files
from cxr_jax.errors import UserError, exit_code
from cxr_jax.labels.lexicon import read_toml
from cxr_jax.labels.taxonomy import CHEXPERT_14, NOT_MENTIONED, POSITIVE, UNCERTAIN
from cxr_jax.metrics import scores

MAPS = Path(__file__).parents[1] / "labels" / "maps.toml"
MAP = "openi_gold"
POLICIES = ("negative", "positive")  # what an uncertain mention counts as


class LabelMap(NamedTuple):
    """How another taxonomy's labels map to the 14: source label -> label."""

    name: str
    version: int
    labels: dict[str, str]


class Gold(NamedTuple):
    """A manifest: ids [N], paths of the reports [N], truth bool [N, 14], unscored: source labels without a target."""

    ids: list[str]
    paths: list[Path]
    truth: np.ndarray
    unscored: list[str]


def load_map(name: str = MAP, path: str | Path = MAPS) -> LabelMap:
    """The table [name] of a file of maps. Raises UserError if it cannot be read or a target is none of the 14."""
    entry = read_toml(Path(path)).get(name)
    labels = entry.get("map") if isinstance(entry, dict) else None
    if not isinstance(labels, dict) or not labels or not isinstance(entry.get("version"), int):
        raise UserError(f"{path}: has no table [{name}] with a version and a map")
    for source, target in labels.items():
        if target not in CHEXPERT_14:
            raise UserError(
                f"{path}: [{name}.map]: {source} maps to {target!r}, which is none of the 14 labels"
            )
    return LabelMap(name, entry["version"], labels)


def load_gold(folder: str | Path, manifest: str | Path, label_map: LabelMap) -> Gold:
    """The rows of a manifest. Raises UserError for a missing manifest, column or file, or a gold cell but 0 and 1."""
    path = Path(folder) / manifest
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = reader.fieldnames or [], list(reader)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or type(e).__name__}") from e
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a CSV file in UTF-8") from e
    for column in ("file", "report_id", *(f"gold_{source}" for source in label_map.labels)):
        if column not in columns:
            raise UserError(f"{path}: has no column {column!r}")
    if not rows:
        raise UserError(f"{path}: lists no reports")
    truth = np.zeros((len(rows), len(CHEXPERT_14)), bool)
    for number, (row, cells) in enumerate(zip(rows, truth, strict=True), 1):
        for source, target in label_map.labels.items():
            if row[f"gold_{source}"] not in ("0", "1"):
                raise UserError(f"{path}: row {number}: gold_{source} is neither 0 nor 1")
            cells[CHEXPERT_14.index(target)] |= row[f"gold_{source}"] == "1"
        if not (row["file"] or "").lower().endswith(".xml"):
            raise UserError(f"{path}: row {number}: file is not the name of an .xml file")
    paths = [Path(folder) / row["file"] for row in rows]
    if missing := next((p for p in paths if not p.is_file()), None):
        raise UserError(f"{missing}: there is no such file, but {path.name} lists it")
    unscored = [c.removeprefix("gold_") for c in columns if c.startswith("gold_")]
    return Gold(
        [r["report_id"] for r in rows],
        paths,
        truth,
        [s for s in unscored if s not in label_map.labels],
    )


def read_states(paths, lexicon: str | None = None) -> np.ndarray:
    """int8 [N, 14]: what the parser reads in findings and impression of Open-i files. UserError for a bad file."""
    from cxr_jax import labels

    rows = list(report_files.read(report_files.open_inputs(paths)))
    if bad := next((row for row in rows if row.text is None), None):
        raise UserError(f"{bad.source}: {bad.reason}")
    return labels.read_reports([row.text for row in rows], lexicon=lexicon)["state"]


def positive(states: np.ndarray, policy: str) -> np.ndarray:
    """bool: which states count as positive under a policy of POLICIES."""
    return (states == POSITIVE) | ((states == UNCERTAIN) & (policy == "positive"))


def summarise(states, truth, label_map: LabelMap, policy: str, n_boot: int = 1000) -> dict:
    """`scoring.summary` over the labels that the map has; the rest are unknown."""
    scored = np.isin(CHEXPERT_14, list(label_map.labels.values()))
    return scores.summary(
        positive(states, policy), truth, known=np.tile(scored, (len(truth), 1)), n_boot=n_boot
    )


def errors(gold: Gold, states, label_map: LabelMap, policy: str) -> list[tuple[str, str, str, int]]:
    """(report_id, label, "FP" or "FN", state) of every scored cell where prediction and gold differ, in order."""
    wrong = (positive(states, policy) != gold.truth) & np.isin(
        CHEXPERT_14, list(label_map.labels.values())
    )
    return [
        (gold.ids[i], CHEXPERT_14[j], "FN" if gold.truth[i, j] else "FP", int(states[i, j]))
        for i, j in np.argwhere(wrong)
    ]


def lines(gold: Gold, states, label_map: LabelMap, policy: str) -> list[str]:
    """The report, one string a line."""
    out = summarise(states, gold.truth, label_map, policy)
    other = POLICIES[1 - POLICIES.index(policy)]
    rest = summarise(states, gold.truth, label_map, other, n_boot=1)
    wrong = errors(gold, states, label_map, policy)
    targets = set(label_map.labels.values())
    micro, sound, macro = (
        out["micro_f1"]["all"],
        out["micro_f1"]["without_no_finding"],
        out["macro_f1"]["all"],
    )
    rows = [
        f"{len(gold.ids)} reports; map {label_map.name} version {label_map.version}; uncertain = {policy}",
        f"micro-F1 {_estimate(micro)}",
        f"micro-F1 without No Finding {_estimate(sound)}",
        f"macro-F1 {_estimate(macro)} over the {len(macro['labels'])} labels with a gold positive",
        f"micro-F1 with uncertain = {other}: {_value(rest['micro_f1']['all']['value'])}",
        f"{'label':<28}{'gold':>6}{'tp':>6}{'fp':>6}{'fn':>6}{'errors':>8}{'precision':>11}{'recall':>8}{'F1':>7}",
    ]
    for label in CHEXPERT_14:
        if label in targets:
            x = out["per_label"][label]
            rows.append(
                f"{label:<28}{x['n_pos']:>6}{x['tp']:>6}{x['fp']:>6}{x['fn']:>6}{x['fp'] + x['fn']:>8}"
                f"{_value(x['precision']):>11}{_value(x['recall']):>8}{_value(x['f1']['value']):>7}"
            )
    rows.append(f"{len(wrong)} errors in {len({e[0] for e in wrong})} reports")
    if gold.unscored:
        rows.append(f"not scored: {', '.join(gold.unscored)}")
    return rows


def _value(x) -> str:
    return "-" if x is None else f"{x:.3f}"


def _estimate(e) -> str:
    return f"{_value(e['value'])} [{_value(e['lo'])}, {_value(e['hi'])}]"


def write_errors(path: str, rows) -> None:
    """Raises UserError if it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("report_id", "label", "kind", "state"))
            writer.writerows((*row[:3], "" if row[3] == NOT_MENTIONED else row[3]) for row in rows)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e


def parse_args(argv):
    parser = ArgumentParser("cxr_jax.evaluation.label_agreement", description=__doc__)
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


def run(args) -> None:
    label_map = load_map()
    gold = load_gold(args.folder, args.manifest, label_map)
    if args.errors:
        out, inputs = Path(args.errors), [Path(args.folder) / args.manifest, *gold.paths]
        if out.suffix.lower() != ".csv" or (out.exists() and any(out.samefile(p) for p in inputs)):
            raise UserError(f"{out}: must be named .csv, and must not be the manifest")
    states = read_states(gold.paths, args.lexicon)
    print("\n".join(lines(gold, states, label_map, args.uncertain)))
    if args.errors:
        write_errors(args.errors, errors(gold, states, label_map, args.uncertain))


def main(argv=None) -> int:
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
