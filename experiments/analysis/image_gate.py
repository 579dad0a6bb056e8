"""Measures the image gate, and fits its card: `python -m experiments.analysis.image_gate [--fit] [--negatives=DIR]`.

Films are those of ../shared/data: half of the patients fit the card, the other half are held out and give the figures,
as they are and each changed four times (gate_pictures.change_film). What is no chest film is drawn (gate_pictures), and
read from DIR, a folder a kind; of each kind every second picture is held out. Without --fit the card of the package is
measured as it is; with it image_gate.toml is written anew.

A statistic's points are a piecewise linear curve; all curves together are one logistic regression (ridge; kinds weigh
as the root of their number). The limit: three in a thousand of the changed films that fit the card fall below it, and
no unchanged film or phantom of them comes near it. Prints one Markdown table, that of docs/inputs.md.

Result, 2026-11-29, 2 CPU cores, 3 minutes: the table of docs/inputs.md.
"""

import argparse
import csv
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PilImage

from cxr_jax.data import image_gate, images
from cxr_jax.data.sources.phantom import PhantomSource
from experiments.analysis import gate_pictures

# Tables of films, and the folders that their files are named from.
FILM_TABLES = {"films/manifest.csv": "films", "images/manifest.csv": "."}
CHANGES, DRAWN, PHANTOMS = 4, 200, 400  # copies of a film; pictures a kind; phantoms a hospital
PHANTOM_SIZES = (28, 32, 48, 56, 64, 112, 224)
KNOTS, RIDGE, STEPS = 7, 0.1, 30  # of a curve; of the regression; of its iteration
REFUSED_OF_CHANGED, ROOM = 0.003, 0.7  # share; points between the limit and the least film
MEASURED_ONLY = ("lateral_chest",)  # a chest film all the same: fitted neither as one nor against

# ---- Why a picture is no chest film: where a statistic is low, and where it is high -------------------
REASONS = {
    "tone_spread": ("hardly any light and dark", "nearly black and white"),
    "fine_detail": ("no detail at all", "neighbouring pixels do not agree"),
    "broad_shape": ("no large light and dark parts", "one broad shade with nothing in it"),
    "edge_evenness": ("hard edges on flat ground", "edges everywhere alike"),
    "edge_peaks": ("edges everywhere alike", "hard edges on flat ground"),
    "edge_imbalance": ("edges alike in both directions", "edges in one direction"),
    "edge_directions": ("edges in few directions", "edges in all directions alike"),
    "usual_shade": ("mostly flat", "detail everywhere"),
    "quiet_shade": ("large flat parts", "no quiet part"),
    "ground_level": ("gray ground around", "a body on an empty field"),
    "empty_side": ("no side with one level", "a body on an empty field"),
    "third_empty_side": ("no side with one level", "a body on an empty field"),
    "chest_likeness": (
        "no two darker lung fields beside a brighter midline",
        "two plain lung fields and nothing else",
    ),
    "lung_difference": ("two sides too much alike", "no two like lung fields beside a midline"),
    "symmetry": ("no two sides that are alike", "two sides too much alike"),
}
NAMES = tuple(REASONS)
# What it looks like most: a name for several kinds of pictures.
LOOKS = {
    "noise or a texture": ("white_noise", "coloured_noise"),
    "a page of text or a chart": ("text_page", "figure"),
    "a drawing or a pattern": ("gradient", "checkers", "shapes", "lung_mask"),
    "a photograph": ("photo", "photo_more"),
    "a hand or another limb": ("hand_drawn", "hand", "knees_drawn", "knee"),
    "a CT or MR slice": ("ct_slice_drawn", "ct_chest", "head_drawn", "mri_head"),
}

# ---- Pictures ----------------------------------------------------------------------------------------


def is_held_out(name: str) -> bool:
    """Tell whether a patient or a picture is held out: a function of its name alone."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def read_films(data: Path, held_out: bool) -> Iterator[np.ndarray]:
    """Read the films of one half of the patients."""
    for table, folder in FILM_TABLES.items():
        with open(data / table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if is_held_out(row["patient_id"] or row["file"]) == held_out:
                    yield images.read_image(data / folder / row["file"]).pixels


def change_films(films: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Change every film CHANGES times."""
    for number, film in enumerate(films):
        for change in range(CHANGES):
            random = np.random.default_rng([seed, number, change])
            yield gate_pictures.change_film(film, random)


def draw_phantoms(seed: int) -> Iterator[np.ndarray]:
    """Draw phantoms of both hospitals and of sites around them, of full and of small sizes."""
    for hospital in ("A", "B"):
        for sites in (0, PHANTOMS // 2):
            source = PhantomSource(hospital, "train", seed, sites=sites)
            for start in range(0, PHANTOMS // 2, 50):
                for number, film in enumerate(source.batch(np.arange(start, start + 50))["image"]):
                    film = np.asarray(film)
                    yield film
                    side = PHANTOM_SIZES[number % len(PHANTOM_SIZES)]
                    shrunk = PilImage.fromarray(film).resize((side, side))
                    yield np.clip(np.asarray(shrunk), 0, 1)


def negatives(folder: Path | None, held_out: bool) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Make or read what is no chest film: one half of each kind."""
    for kind in gate_pictures.MAKERS:
        yield kind, [gate_pictures.make(kind, 2 * i + held_out) for i in range(DRAWN // 2)]
    for place in sorted(folder.iterdir()) if folder else []:
        files = sorted(file for file in place.iterdir() if file.is_file())
        chosen = files if place.name in MEASURED_ONLY else files[held_out::2]
        yield place.name, [images.read_image(file).pixels for file in chosen]


def tabulate(pictures: Iterable[np.ndarray], mean_film: np.ndarray | None = None) -> np.ndarray:
    """Compute the statistics of pictures, [N, statistics], in the order of NAMES."""
    rows = []
    for picture in pictures:
        values = image_gate.statistics(picture, mean_film)
        rows.append([values[name] for name in NAMES])
    return np.array(rows, np.float64).reshape(-1, len(NAMES))


# ---- The card ----------------------------------------------------------------------------------------


def curve_knots(films: np.ndarray, others: np.ndarray) -> list[np.ndarray]:
    """Choose where each statistic's curve may bend: quantiles of films and of the rest, in equal parts."""
    shares = np.linspace(0.002, 0.998, 101)
    both = [np.quantile(values, shares, axis=0) for values in (films, others)]
    knots = np.quantile(np.concatenate(both), np.linspace(0, 1, KNOTS), axis=0)
    return [np.unique(np.round(column, 4)) for column in knots.T]


def hat_functions(values: np.ndarray, knots: list[np.ndarray]) -> np.ndarray:
    """Weigh the knots of every curve by a picture's statistics, [N, all knots]: linear between two of them."""
    columns = [
        np.interp(column, places, row)
        for column, places in zip(values.T, knots, strict=True)
        for row in np.eye(len(places))
    ]
    return np.stack(columns, axis=1)


def logistic_regression(inputs: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fit weights by Newton's method with a ridge; the last one is the intercept, without a ridge."""
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    ridge = np.diag(np.append(np.full(inputs.shape[1] - 1, RIDGE), 1e-9))
    fitted = np.zeros(inputs.shape[1])
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ fitted, -30, 30)))
        slope = inputs.T @ (weights * (truth - chance)) - ridge @ fitted
        curvature = (inputs * (weights * chance * (1 - chance))[:, None]).T @ inputs + ridge
        fitted = fitted + np.linalg.solve(curvature, slope)
    return fitted


def fit_card(
    films: dict[str, np.ndarray], others: dict[str, np.ndarray], mean_film: np.ndarray
) -> str:
    """Fit the card and write it as TOML.

    Args:
        films: statistics of "films", "changed" and "phantoms".
        others: statistics of each kind that is no chest film.
        mean_film: what `chest_likeness` compares with.
    """
    positive = np.concatenate(list(films.values()))
    negative = np.concatenate(list(others.values()))
    of_kind = np.concatenate(
        [np.full(len(rows), 1 / math.sqrt(len(rows))) for rows in others.values()]
    )
    # Films and the rest weigh the same in all.
    count = len(positive) + len(negative)
    weights = np.concatenate([np.full(len(positive), 1 / len(positive)), of_kind / of_kind.sum()])
    truth = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    knots = curve_knots(positive, negative)
    inputs = hat_functions(np.concatenate([positive, negative]), knots)
    fitted = logistic_regression(inputs, truth, weights * count / 2)

    # A typical film has 0 points everywhere, so that a statistic's points are what it costs or adds.
    typical = np.median(films["films"], axis=0)
    curves, start = {}, 0
    for name, places, middle in zip(NAMES, knots, typical, strict=True):
        points = fitted[start : start + len(places)]
        start += len(places)
        curves[name] = (places, np.round(points - np.interp(middle, places, points), 2), middle)

    def total(rows: np.ndarray) -> np.ndarray:
        return sum(np.interp(rows[:, i], *curves[name][:2]) for i, name in enumerate(NAMES))

    limit = min(
        float(np.quantile(total(films["changed"]), REFUSED_OF_CHANGED)),
        float(total(films["films"]).min()) - ROOM,
        float(total(films["phantoms"]).min()) - ROOM,
    )
    return card_text(limit, mean_film, curves, fit_looks(others))


def fit_looks(others: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Fit what tells the LOOKS apart: a linear discriminant, (weights of the statistics, offset) of each."""
    groups = {
        look: np.concatenate([others[kind] for kind in kinds if kind in others])
        for look, kinds in LOOKS.items()
    }
    means = np.stack([rows.mean(axis=0) for rows in groups.values()])
    spread = np.mean([np.cov(rows.T) for rows in groups.values()], axis=0)
    # A little of the diagonal, so that statistics that go together do not cancel.
    spread = spread + 1e-3 * np.diag(np.diag(spread))
    weights = np.linalg.solve(spread, means.T).T
    offsets = -(weights * means).sum(axis=1) / 2
    return {look: (weights[i], float(offsets[i])) for i, look in enumerate(groups)}


def card_text(
    limit: float,
    mean_film: np.ndarray,
    curves: dict[str, tuple[np.ndarray, np.ndarray, float]],
    looks: dict[str, tuple[np.ndarray, float]],
) -> str:
    """Write a card as TOML."""
    lines = [
        "# The score card of image_gate.py, written by `python -m experiments.analysis.image_gate --fit`. The points",
        "# of a statistic are linear between the places `at`; a picture with fewer points in all than `limit` is no",
        "# chest film. `low` and `high` say what it looks like where the statistic is below or above a typical film's;",
        "# `looks`, linear in the statistics in the order above, which other kind of picture it is most like.",
        f"limit = {limit:.2f}",
        "",
        "# The mean of many phantom films, in hundredths of white.",
        "mean_film = [",
        *(f"    [{', '.join(f'{100 * level:.0f}' for level in row)}]," for row in mean_film),
        "]",
    ]
    for name, (places, points, typical) in curves.items():
        low, high = REASONS[name]
        lines += [
            "",
            f"[statistics.{name}]",
            f"typical = {typical:.4f}",
            f"at = [{', '.join(f'{place:.4f}' for place in places)}]",
            f"points = [{', '.join(f'{point:.2f}' for point in points)}]",
            f"low = {json.dumps(low)}",
            f"high = {json.dumps(high)}",
        ]
    for look, (weights, offset) in looks.items():
        lines += [
            "",
            f"[looks.{json.dumps(look)}]",
            f"offset = {offset:.3f}",
            f"weights = [{', '.join(f'{weight:.3f}' for weight in weights)}]",
        ]
    return "\n".join(lines) + "\n"


def mean_phantom() -> np.ndarray:
    """The mean of the fitting phantoms as the gate sees them, made symmetric and rounded, [16, 16]."""
    copies = [image_gate.coarse_copy(film) for film in draw_phantoms(seed=1)]
    mean = np.mean(copies, axis=0)
    return np.round((mean + mean[:, ::-1]) / 2, 2)


# ---- Figures -----------------------------------------------------------------------------------------


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share."""
    z = 1.959964
    middle = (hits + z * z / 2) / (count + z * z)
    reach = z * math.sqrt(hits * (count - hits) / count + z * z / 4) / (count + z * z)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def table_row(name: str, rows: np.ndarray) -> str:
    """Write a row of the table: how many were refused."""
    refused = sum(
        image_gate.judge_statistics(dict(zip(NAMES, row, strict=True))).reason is not None
        for row in rows
    )
    low, high = wilson(refused, len(rows))
    return f"| {name} | {len(rows):,} | {refused:,} | {refused / len(rows):.1%} | {low:.1%} to {high:.1%} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fit", action="store_true", help="write the card anew first")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--negatives", type=Path, help="a folder a kind of what is no chest film")
    arguments = parser.parse_args(argv)

    if arguments.fit:
        mean_film = mean_phantom()
        films = list(read_films(arguments.data, held_out=False))
        tables = {
            "films": tabulate(films, mean_film),
            "changed": tabulate(change_films(films, seed=1), mean_film),
            "phantoms": tabulate(draw_phantoms(seed=1), mean_film),
        }
        others = {
            kind: tabulate(pictures, mean_film)
            for kind, pictures in negatives(arguments.negatives, held_out=False)
            if pictures and kind not in MEASURED_ONLY
        }
        image_gate.CARD_PATH.write_text(fit_card(tables, others, mean_film), encoding="utf-8")
        image_gate.load_card.cache_clear()

    films = list(read_films(arguments.data, held_out=True))
    print("| held out | pictures | refused | share | 95 % interval |")
    print("|---|---|---|---|---|")
    print(table_row("films", tabulate(films)), flush=True)
    print(table_row("films, changed", tabulate(change_films(films, seed=2))), flush=True)
    print(table_row("phantoms", tabulate(draw_phantoms(seed=2))), flush=True)
    for kind, pictures in negatives(arguments.negatives, held_out=True):
        if pictures:
            print(table_row(kind, tabulate(pictures)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
