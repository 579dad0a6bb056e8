"""Fitting and measuring the image gate's card: its parts on made statistics."""

import tomllib

import numpy as np
import pytest

from experiments.analysis import gate_pictures, image_gate


def test_a_card_fitted_to_made_statistics_tells_them_apart():
    random = np.random.default_rng(0)
    count = len(image_gate.NAMES)
    films = {name: random.normal(0, 1, (300, count)) for name in ("films", "changed", "phantoms")}
    kinds = [kind for kinds in image_gate.LOOKS.values() for kind in kinds]
    others = {
        kind: random.normal(4 * np.eye(count)[i % count], 1, (40, count))
        for i, kind in enumerate(kinds)
    }
    card = tomllib.loads(image_gate.fit_card(films, others, np.eye(16)))
    assert list(card["statistics"]) == list(image_gate.NAMES)
    assert set(card["looks"]) == set(image_gate.LOOKS) and np.shape(card["mean_film"]) == (16, 16)

    def points(rows):
        curves = card["statistics"].values()
        pairs = zip(rows.T, curves, strict=True)
        return sum(np.interp(column, line["at"], line["points"]) for column, line in pairs)

    assert (points(films["films"]) > card["limit"]).all()
    assert (points(films["phantoms"]) > card["limit"]).all()
    others_points = points(np.concatenate(list(others.values())))
    assert others_points.mean() < points(films["films"]).mean() - 2


def test_intervals_and_halves():
    # Wilson's interval in the textbook's example: 81 of 263.
    assert image_gate.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert image_gate.wilson(0, 10)[0] == 0 and image_gate.wilson(10, 10)[1] == 1
    held_out = [image_gate.is_held_out(f"patient{i}") for i in range(400)]
    assert 150 < sum(held_out) < 250 and held_out[0] == image_gate.is_held_out("patient0")


def test_pictures_are_a_function_of_kind_and_number():
    for kind in gate_pictures.MAKERS:
        first, again, other = (gate_pictures.make(kind, number) for number in (3, 3, 4))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
        assert first.dtype == np.float32 and first.min() >= 0 and first.max() <= 1
    film = gate_pictures.make("gradient", 0)
    changed = gate_pictures.change_film(film, np.random.default_rng(1))
    assert changed.ndim == 2 and changed.min() >= 0 and changed.max() <= 1
