"""The 1,160 labelled films of four collections as a fixed protocol: who trains, who chooses, who tests; linear probes.

    python -m experiments.analysis.real_films prepare FILMS OUT [--seed=0]
    python -m experiments.analysis.real_films probe FILMS OUT [--model=phantom] [--only=nih]

`prepare` reads FILMS/manifest.csv and writes OUT/train.jsonl and OUT/held.jsonl: of adults three patients in five
train, and two are held out, among them all of whom NIH or Google have published evaluation labels. The text that SFT
imitates says the labels that are known, and nothing else.

`probe` fits one ridge regression a label on the mean token of the model's frozen tower; its strength is chosen by the
held-out patients who choose checkpoints, and the others are scored, by patient. It answers as well how far a film tells
its collection ("repository"): classes that come from different collections can be told apart by that alone. --only
keeps the films of one source.

With the tower of the embedded model, which has seen phantoms alone (2026-11-30, commit a0306cc; 20 s on one core; 622
films train, 157 choose, 275 test; mean AUROC with 95 % intervals by patient): the 11 labels 0.673 [0.633, 0.712] (No
Finding 0.744, Edema 0.829, Pleural Effusion 0.710, Pneumonia 0.676; Atelectasis 0.559 and Pneumothorax 0.407 with
intervals that hold one half), the collection 0.828 [0.782, 0.870]. So a tower of phantoms tells something of real
films, and also where they come from: of NIH alone (--only=nih) 0.671 [0.630, 0.712] over 10 labels, its two
collections 0.762 [0.696, 0.827]. The embedded model's own answers to all films are worth nothing (AUROC 0.535 [0.510,
0.560] of 11 labels, Jaccard below the best constant; `cxr-jax manifest FILMS/manifest.csv M.jsonl --empty=keep`, then
experiments/eval.py:files with eval.include_train=True, eval.n_final=0).

**SFT on them** (2026-11-30, commit b929c77; 200 steps of 16 from the embedded model, 224 pixels, 622 films of 492
patients; 297 test films of 226 patients, the last step; 12 labels have an AUROC; 2 minutes of
training on two cores):

                           seed 0                   seed 1                   seed 2
    mean AUROC             0.603 [0.555, 0.644]     0.615 [0.560, 0.658]     0.626 [0.562, 0.664]
    Jaccard                0.367 [0.300, 0.427]     0.387 [0.323, 0.451]     0.372 [0.304, 0.437]
    macro-F1               0.198 [0.145, 0.252]     0.171 [0.135, 0.211]     0.145 [0.116, 0.178]
    macro-F1, swapped      0.213                    0.195                    0.200
    start: AUROC 0.508 [0.476, 0.574]; best constants: Jaccard 0.286 [0.217, 0.354], macro-F1 0.211 [0.195, 0.244]

    bash launch/local.sh --config=experiments/sft.py:files --workdir=runs/films_$s --config.seed=$s \\
        --config.data.seed=$((s + 1)) --config.steps=200 --config.eval.every=100 --config.eval.n=130 \\
        --config.eval.n_final=0 --config.eval.probabilities=True \\
        --config.data.train="films: files OUT/train.jsonl image_root=FILMS" \\
        --config.data.eval="films: files OUT/held.jsonl image_root=FILMS"

So probabilities rank findings better than chance, below the probe on the tower they started from, and the answers are
those of the set: another patient's film does as well.

**RL from there** (2026-11-30, commit b929c77; 16 prompts x 8; the same test films). At RL's usual rate of 2e-4 it fell
apart (seed 0): entropy doubled by step 8, Jaccard on the films that choose 0.358 -> 0.046 by step 10; the alarms named
it. At 3e-5, 30 steps (3 minutes), change from SFT, by patient:

                           seed 0                     seed 1    seed 2
    Jaccard                -0.003 [-0.037, +0.031]    none      -0.011 [-0.041, +0.018]
    macro-F1               +0.011 [-0.027, +0.050]    none      +0.032 [+0.002, +0.060]
    mean AUROC             -0.001 [-0.038, +0.040]    none      -0.010 [-0.045, +0.033]
    ECE, pooled            +0.028 [+0.015, +0.043]    none      +0.029 [+0.018, +0.039]

Seed 1: no step was as good on the films that choose as the start (Jaccard 0.408; 0.346, 0.347, 0.364), so the start was
kept. Where a step was kept, traces agree more with their answers (0.87 -> 0.96) and no more with the truth; the
model is surer and by most numbers no better.

    bash launch/local.sh --config=experiments/rl.py:files --workdir=runs/films_rl_$s --config.model=runs/films_$s/hf \\
        --config.seed=$s --config.data.seed=$((s + 1)) --config.optim.lr=3e-5 --config.steps=30 \\
        --config.rl.prompts_per_step=16 --config.eval.every=10 --config.eval.n=130 --config.eval.n_final=0 \\
        --config.eval.probabilities=True --config.data.ood=films (and the two sources above)

**From random weights** (2026-11-30 and 12-01, commit b929c77; the same films; SFT: 200 steps at 1e-3; RL: 20 at
3e-5):

                           seed 0                     seed 1                     seed 2
    SFT: mean AUROC        0.569 [0.528, 0.627]       0.549 [0.512, 0.625]       0.547 [0.486, 0.588]
    SFT: Jaccard           0.318 [0.259, 0.379]       0.349 [0.290, 0.405]       0.354 [0.288, 0.418]
    SFT: macro-F1          0.151 [0.118, 0.193]       0.143 [0.117, 0.174]       0.121 [0.095, 0.150]
    SFT: macro-F1, swapped 0.135                      0.139                      0.124
    RL: change in Jaccard  -0.012 [-0.046, +0.023]    none                       none
    RL: in macro-F1        -0.041 [-0.075, -0.003]    none                       none
    RL: in mean AUROC      -0.013 [-0.077, +0.037]    none                       none
    RL: in ECE, pooled     +0.023 [+0.010, +0.038]    none                       none

    bash launch/local.sh --config=experiments/sft.py:files --workdir=runs/random_$s --config.model=random:phantom \\
        --config.seed=$s --config.data.seed=$((s + 1)) --config.steps=200 --config.optim.lr=1e-3 (and as above)
    bash launch/local.sh --config=experiments/rl.py:files --workdir=runs/random_rl_$s \\
        --config.model=runs/random_$s/hf --config.steps=20 --config.optim.lr=3e-5 (and as above)

**In their own aspect ratio** (the same days and commit; SFT of 60 steps from the embedded model, which has seen squares
of 50,176 pixels alone, on films of at most 112,896):

                           seed 0                     seed 1                     seed 2
    mean AUROC             0.559 [0.517, 0.625]       0.565 [0.525, 0.622]       0.603 [0.545, 0.655]
    Jaccard                0.304 [0.250, 0.361]       0.325 [0.264, 0.385]       0.313 [0.252, 0.377]
    macro-F1               0.137 [0.105, 0.179]       0.137 [0.108, 0.174]       0.112 [0.085, 0.148]
    macro-F1, swapped      0.136                      0.123                      0.107
    start: AUROC 0.546 [0.474, 0.578], Jaccard 0.076 [0.056, 0.099], macro-F1 0.114 [0.089, 0.146]

    the command of SFT with --config.steps=60 --config.eval.every=1000 --config.data.max_pixels=112896

("none": no step of RL was as good on the films that choose, so the start was kept.) A start from the phantom model is
worth a few hundredths of AUROC over random weights (0.603 to 0.626 beside 0.547 to 0.569; most intervals overlap), and
RL from random weights gains nothing in any of three seeds. Sixty steps in the films' own aspect ratio, from a tower
that has to learn other grids first, reach 0.559 to 0.603; longer runs were not made. In all of them another patient's
film does as well for the answers.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import cxr_jax
from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data import images, resize
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.sources.patients import place_of, same_patient_key
from cxr_jax.errors import UserError, exit_code
from cxr_jax.inference.model import Model, encode_images
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics.label_counts import Reference
from cxr_jax.metrics.probability_scores import auroc, calibration
from cxr_jax.runtime import whole_files

HELD_SHARE = 0.4  # of the patients
STRENGTHS = 10.0 ** np.arange(-2, 6)  # of the ridge, of which selection chooses one a label


class Film(NamedTuple):
    """A film of the pack: its row of manifest.csv, and whether its patient is held out."""

    row: dict[str, str]
    patient: str
    is_held: bool

    @property
    def states(self) -> list[int | None]:
        """The 14 states: 1, 0, or None where nobody knows."""
        return [int(self.row[label]) if self.row[label] else None for label in CHEXPERT_14]


def read_films(folder: Path, seed: int) -> list[Film]:
    """Read the films of adults, and say who is held out.

    Raises:
        UserError: for a folder without a manifest.
    """
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        raise UserError(f"{manifest}: there is no such file")
    # Children are for refusals and shift, as the pack says.
    with open(manifest, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["population"] == "adult"]
    patients = [same_patient_key(row["patient_id"]) for row in rows]
    # Films with boxes or with radiologists' labels are evaluation films of NIH.
    is_registered = ["google" in row["label_basis"] or "box" in row["label_basis"] for row in rows]
    # All of their films, or one patient would be on both sides.
    registered = {
        patient for patient, registered in zip(patients, is_registered, strict=True) if registered
    }
    # The rest by a hash, so that more films later change no side.
    order = sorted(set(patients) - registered, key=lambda patient: place_of(patient, seed))
    wanted = max(0, round(HELD_SHARE * len(set(patients))) - len(registered))
    held = registered | set(order[:wanted])
    return [
        Film(row, patient, patient in held) for row, patient in zip(rows, patients, strict=True)
    ]


# ---- Rows to train on ------------------------------------------------------------------------------


def manifest_row(film: Film) -> dict[str, Any]:
    """Write a film as a row of a manifest, with a text that says the labels that are known to be there."""
    row, states = film.row, dict(zip(CHEXPERT_14, film.states, strict=True))
    named = [label for label, state in states.items() if state == 1]
    # What is not known is not spoken of, nor what is known to be absent.
    said = ", ".join(named) or "none of the labels asked for"
    text = f"<think>Summary: {said}.</think><answer>{', '.join(named)}</answer>"
    return {
        "id": row["file"],
        "image": row["file"],
        "patient_id": row["patient_id"],
        "study_id": row["study"],
        "view": row["view"],
        "sex": row["sex"],
        "age": row["age"],
        "source": row["origin"].partition("@")[0].removeprefix("github:"),
        "solution": ", ".join(named),
        "labels": states,
        "messages": [
            {"role": "user", "content": f"<image>{FIND_PROMPT}"},
            {"role": "assistant", "content": text},
        ],
    }


def prepare(folder: Path, out: Path, seed: int) -> list[str]:
    """Write train.jsonl and held.jsonl; gives lines about them."""
    films = read_films(folder, seed)
    lines = []
    out.mkdir(parents=True, exist_ok=True)
    # The same rows serve SFT, RL and evaluation.
    for name, is_held in (("train", False), ("held", True)):
        chosen = [film for film in films if film.is_held == is_held]
        text = "".join(json.dumps(manifest_row(film)) + "\n" for film in chosen)
        whole_files.write_text(out / f"{name}.jsonl", text)
        sources = Counter(film.row["source"] for film in chosen)
        counts = ", ".join(f"{source} {count}" for source, count in sources.most_common())
        patients = len({film.patient for film in chosen})
        lines.append(f"{name}: {len(chosen)} films of {patients} patients ({counts})")
    return lines


# ---- Probes ----------------------------------------------------------------------------------------


def mean_tokens(model: Model, files: Sequence[Path]) -> np.ndarray:
    """Encode films by the frozen tower, float32 [N, D]: the mean and the largest of their tokens, side by side."""
    side = 224
    features = []
    # One by one, as the model reads them: films of one size are one program.
    for file in files:
        pixels = resize.fit(images.read_image(file).pixels, side)
        patches, grid = model.prepare(pixels)
        tokens = encode_images(model.params, model.config, patches[None], grid, model.dtype).tokens
        features.append(jnp.concatenate([tokens[0].mean(0), tokens[0].max(0)]))
    return np.asarray(jnp.stack(features), np.float32)


def fit_ridge(features: np.ndarray, truth: np.ndarray, strength: float) -> np.ndarray:
    """Fit one label by ridge regression on -1 and 1; features [N, D] have a column of ones, which is not shrunk."""
    # The constant is free: a rare label is not a weak one.
    weights = np.full(features.shape[1], strength)
    weights[-1] = 0.0
    gram = features.T @ features + np.diag(weights)
    return np.linalg.solve(gram, features.T @ (2.0 * truth - 1.0))


def probe(
    features: np.ndarray, states: np.ndarray, parts: dict[str, np.ndarray], patients: np.ndarray
) -> dict[str, Any]:
    """Score linear probes of N films: fitted on "train", their strength chosen on "select", scored on "test".

    Args:
        features: float [N, D].
        states: float [N, L], 1, 0, or NaN; L at most 14.
        parts: name -> bool [N].
        patients: [N].

    Returns:
        `calibration` of the test films, of ranks alone.
    """
    # By those who train alone, as everything that is fitted.
    center, spread = features[parts["train"]].mean(0), features[parts["train"]].std(0) + 1e-6
    columns = np.concatenate([(features - center) / spread, np.ones((len(features), 1))], axis=1)
    # In the places of the 14, which is what the metrics take; a collection has no place of its own.
    scores = np.zeros((len(features), len(CHEXPERT_14)))
    known = np.zeros_like(scores, bool)
    truth = np.zeros_like(known)
    for label in range(states.shape[1]):
        is_known = np.isfinite(states[:, label])
        of_part = {name: part & is_known for name, part in parts.items()}
        known[:, label], truth[:, label] = is_known, states[:, label] == 1
        # A label that nobody has, or everybody, cannot be fitted.
        if any(len(set(states[of_part[name], label])) < 2 for name in ("train", "select")):
            known[:, label] = False
            continue
        fitted = [
            columns @ fit_ridge(columns[of_part["train"]], truth[of_part["train"], label], strength)
            for strength in STRENGTHS
        ]
        areas = [
            area_of(scored[of_part["select"]], truth[of_part["select"], label]) for scored in fitted
        ]
        # Chosen by patients who are not scored: a strength is fitted, too.
        scores[:, label] = fitted[int(np.argmax(areas))]
    test = parts["test"]
    # Scores are no probabilities: outside 0..1 they are ranked, and nothing else.
    return calibration(scores[test] * 10 + 5, Reference(truth[test], known[test], patients[test]))


def chooses(patient: str, seed: int) -> bool:
    """Tell whether a held-out patient is one of the third that chooses checkpoints."""
    return int(place_of(f"select {patient}", seed), 16) % 3 == 0


def area_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """The area under the ROC curve; 0.5 without both classes."""
    area = auroc(scores, truth)
    return 0.5 if area is None else area


def _describe(name: str, found: dict[str, Any], labels: Sequence[str]) -> list[str]:
    # Labels with one class among the test films have no area, and no line.
    mean = found["estimates"]["mean_auroc"]
    lines = [f"{name}: mean AUROC {_shown(mean)} over {len(found['labels'])} labels"]
    for slot, label in zip(CHEXPERT_14, labels, strict=False):
        row = found["per_label"][slot]
        if row["auroc"]["value"] is not None:
            lines.append(f"  {label}: {_shown(row['auroc'])}, {row['n_pos']} of {row['n_known']}")
    return lines


def _shown(estimate: dict[str, float | None]) -> str:
    return "{value:.3f} [{lo:.3f}, {hi:.3f}]".format(**estimate)


def run_probes(folder: Path, model_name: str, seed: int, only: str) -> list[str]:
    """Probe the labels, and the collection, and give the lines of the table."""
    films = [film for film in read_films(folder, seed) if only in ("", film.row["source"])]
    if not films:
        raise UserError(f"--only={only}: no film is of that source")
    # Frozen: only its tower is used, and nothing of it is fitted.
    model = cxr_jax.load(model_name)
    features = mean_tokens(model, [folder / film.row["file"] for film in films])
    patients = np.array([film.patient for film in films])
    held = np.array([film.is_held for film in films])
    selects = np.array([film.is_held and chooses(film.patient, seed) for film in films])
    parts = {"train": ~held, "select": selects, "test": held & ~selects}
    states = np.array([film.states for film in films], float)
    # First who is where: a probe of few films says little.
    lines = [f"{name}: {part.sum()} films" for name, part in parts.items()]
    lines += _describe("labels", probe(features, states, parts, patients), CHEXPERT_14)
    # A collection of a handful has too few patients to be told apart, or to matter.
    origins = [film.row["origin"] for film in films]
    names = [name for name, count in Counter(origins).most_common() if count >= len(films) // 50]
    if len(names) > 1:
        of_origin = np.array([[origin == name for name in names] for origin in origins], float)
        found = probe(features, of_origin, parts, patients)
        lines += _describe("collection", found, [name.partition("@")[0] for name in names])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = ArgumentParser("experiments.analysis.real_films", description=__doc__)
    parser.add_argument("what", choices=("prepare", "probe"))
    parser.add_argument("films", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")

    def run() -> None:
        args = parser.parse_args(argv)
        # Two steps of one protocol: both draw the sides from the same seed.
        if args.what == "prepare":
            if args.out is None:
                raise UserError("prepare needs OUT")
            lines = prepare(args.films, args.out, args.seed)
        else:
            lines = run_probes(args.films, args.model, args.seed, args.only)
        print("\n".join(lines))

    return exit_code(run, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
