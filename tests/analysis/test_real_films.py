"""The protocol of real films: nobody on both sides, texts that say what is known, probes that see what is there."""

import csv
import json

import numpy as np

from cxr_jax.labels.taxonomy import CHEXPERT_14
from experiments.analysis import real_films


def _pack(folder, rng, count=120):
    rows = []
    for number in range(count):
        states = rng.choice(["1", "0", ""], 14, p=[0.2, 0.6, 0.2])
        basis = "nih_text+google_adjudicated" if number % 40 == 0 else "nih_text"
        rows.append(
            {
                "file": f"images/{number}.jpg",
                "source": "nih",
                "patient_id": f"nih:{number // 2}",
                "study": str(number),
                "view": "PA",
                "sex": "F",
                "age": "50",
                "population": "child" if number >= count - 4 else "adult",
                "origin": "github:a/b@1" if number % 3 else "github:c/d@2",
                "label_basis": basis,
                **dict(zip(CHEXPERT_14, states, strict=True)),
            }
        )
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return {row["file"]: row for row in rows}


def test_nobody_is_on_both_sides_and_evaluation_films_are_held_out(tmp_path):
    given = _pack(tmp_path, np.random.default_rng(0))
    real_films.prepare(tmp_path, tmp_path / "out", seed=0)
    sides = [
        [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held")
    ]
    train, held = ({row["patient_id"] for row in rows} for rows in sides)
    assert not train & held and len(train | held) == 58 and len(held) == round(0.4 * 58)
    assert {row["id"] for rows in sides for row in rows} == {
        name for name, row in given.items() if row["population"] == "adult"
    }
    assert all("google" not in given[row["id"]]["label_basis"] for row in sides[0])
    for row in [*sides[0], *sides[1]]:
        positive = [label for label in CHEXPERT_14 if given[row["id"]][label] == "1"]
        assert row["solution"] == ", ".join(positive)
        assert row["messages"][1]["content"].endswith(f"<answer>{', '.join(positive)}</answer>")
        cells = [str(row["labels"][label]).replace("None", "") for label in CHEXPERT_14]
        assert cells == [given[row["id"]][label] for label in CHEXPERT_14]


def test_a_probe_sees_what_is_in_the_features_and_nothing_else():
    rng = np.random.default_rng(1)
    features, patients = rng.normal(size=(900, 40)), np.repeat(np.arange(450), 2)
    states = np.stack([features[:, 0] + features[:, 1] > 1, rng.random(900) < 0.3], 1).astype(float)
    states[rng.random((900, 2)) < 0.1] = np.nan
    part = np.repeat(rng.integers(3, size=450), 2)
    parts = {name: part == number for number, name in enumerate(("train", "select", "test"))}
    found = real_films.probe(features, states, parts, patients)
    seen, unseen = (found["per_label"][label]["auroc"] for label in CHEXPERT_14[:2])
    assert seen["lo"] > 0.9
    assert unseen["lo"] < 0.5 < unseen["hi"]
    assert found["labels"] == list(CHEXPERT_14[:2])
    # What test patients have decides nothing: neither weights nor strengths.
    other = states.copy()
    other[parts["test"]] = np.nan
    other[parts["test"], 0] = states[parts["test"], 0]
    again = real_films.probe(features, other, parts, patients)
    assert again["per_label"][CHEXPERT_14[0]]["auroc"] == seen
