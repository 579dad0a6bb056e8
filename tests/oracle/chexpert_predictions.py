"""Our scores of ten public models on the CheXpert test set against those of scikit-learn 1.9.1.

    python tests/oracle/chexpert_predictions.py FOLDER [ORACLE.json]

FOLDER holds groundtruth.csv and the ten `*_predictions.csv` of github.com/rajpurkarlab/cheXpert-test-set-labels, which
are not kept here. ORACLE.json is chexpert_test_oracle.json of the shared tables. Prints a line a model with the largest
difference of AUROC, average precision, Brier score, both ECE and F1 at 0.5; exits 1 above 1e-6. Two of the ten models
have values above 1: they have no ECE and no Brier score.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Bootstrap, Reference

SHARED_ORACLE = Path(__file__).parents[3] / "shared/data/tables/chexpert_test_oracle.json"
TOLERANCE = 1e-6


def read_table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as table:
        return {row["Study"]: row for row in csv.DictReader(table)}


def difference(folder: Path, model: str, wanted: dict) -> float:
    """The largest difference from the oracle of all numbers of a model."""
    truth_rows, rows = read_table(folder / "groundtruth.csv"), read_table(folder / model)
    truth = np.array(
        [[row[label] in ("1", "1.0") for label in CHEXPERT_14] for row in truth_rows.values()]
    )
    probabilities, known = np.zeros(truth.shape), np.zeros(truth.shape, bool)
    for label in wanted["labels"]:
        place = CHEXPERT_14.index(label)
        probabilities[:, place] = [float(rows[study][label]) for study in truth_rows]
        known[:, place] = True
    reference = Reference(truth, known, list(truth_rows))
    found = scores.calibration(probabilities, reference, bootstrap=Bootstrap(1))
    at_half = scores.threshold_scores(probabilities, 0.5, reference, bootstrap=Bootstrap(1))
    pairs = [(found["mean_auroc"], wanted["mean_auroc"])]
    for label in wanted["labels"]:
        pairs += [
            (found[metric][label], wanted[metric][label])
            for metric in ("auroc", "average_precision")
        ]
        pairs.append((at_half["per_label"][label]["value"], wanted["f1_at_0.5"][label]))
    if wanted["in_0_1"]:
        pairs += [
            (found["ece"], wanted["ece15_pooled"]),
            (found["ece_mean"], wanted["ece15_classwise_mean"]),
            *(
                (found["per_label"][label]["brier"]["value"], wanted["brier"][label])
                for label in wanted["labels"]
            ),
        ]
    # A model whose values are no probabilities must be told from one whose values are.
    assert (found["refused"] is None) == (found["ece"] is not None) == wanted["in_0_1"], model
    return max(abs(ours - theirs) for ours, theirs in pairs)


def main(folder: str, oracle: str | Path = SHARED_ORACLE) -> float:
    differences = {
        model: difference(Path(folder), model, wanted)
        for model, wanted in json.loads(Path(oracle).read_text()).items()
        if model.endswith(".csv")
    }
    for model, largest in differences.items():
        print(f"{model:30} {largest:.1e}")
    return max(differences.values())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > TOLERANCE)
