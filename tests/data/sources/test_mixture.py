"""Mixtures: shares, orders, and rows that are those of the sources."""

import collections

import numpy as np
import pytest

from cxr_jax.data.sources.base import ENDLESS
from cxr_jax.data.sources.several import mixture
from cxr_jax.data.sources.several.mixture import CYCLE, Mixture
from cxr_jax.errors import UserError


class Numbered:
    """A source whose examples say which they are: image = index, solution = bits of the index."""

    lexicon, native = None, None

    def __init__(self, name, length, size=4, bad=()):
        self.name, self.length, self.size, self.bad = name, length, size, set(bad)
        self.prompt = f"{name}?"

    def __len__(self):
        return self.length

    def prompts(self):
        return (self.prompt, "and then?")

    def readable(self, indices):
        return [int(index) for index in indices if int(index) not in self.bad]

    def solutions(self, indices):
        return (np.asarray(indices)[:, None] >> np.arange(14)) % 2 == 1

    def masks(self, indices):
        solution = self.solutions(indices)
        return ~solution, solution

    def about(self, indices):
        return {"prompts": [self.prompt] * len(indices), "ids": [f"{i}" for i in indices]}

    def batch(self, indices):
        known, hedged = self.masks(indices)
        images = np.broadcast_to(np.asarray(indices, float)[:, None, None], (len(indices), 4, 4))
        sides = np.zeros((len(indices), 14, 2), bool)
        truth = {"solution": self.solutions(indices), "known": known, "hedged": hedged}
        return {"image": images, "sides": sides, "own": [self.name] * len(indices), **truth}

    def conversations(self, batch, indices):
        return [f"{own} says {index}" for own, index in zip(batch["own"], indices, strict=True)]


def _open(seed=0, **kwargs):
    sources = {
        "a": (Numbered("a", 70), 3),
        "b": (Numbered("b", ENDLESS), 1.5),
        "c": (Numbered("c", 9), 0.5),
    }
    return Mixture({**sources, **kwargs}, seed)


def test_each_source_has_its_share_of_every_stretch():
    owners = np.concatenate([mixture.spread([3, 1.5, 0.5])] * 2)
    assert np.bincount(owners[:CYCLE]).tolist() == [600, 300, 100]
    # No long stretch is without any of them, wherever it begins.
    for start in range(CYCLE):
        counts = np.bincount(owners[start : start + 50], minlength=3)
        assert np.abs(counts - [30, 15, 5]).max() <= 2
    assert np.bincount(mixture.spread([1, 1, 1])).tolist() == [334, 333, 333]


@pytest.mark.parametrize(
    "shares", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1e-4]]
)
def test_weights_that_mean_nothing_are_refused(shares):
    with pytest.raises(UserError, match="weight"):
        mixture.spread(shares)


def test_films_are_all_shown_before_one_comes_again_and_phantoms_go_on():
    mixed = _open()
    taken = collections.defaultdict(list)
    for index in range(2 * CYCLE):
        source, own = mixed.owner(index)
        taken[source].append(own)
    assert taken[1] == list(range(600))  # the endless one in its order
    for source, length in ((0, 70), (2, 9)):
        laps = [taken[source][start : start + length] for start in range(0, 1200, length)]
        whole = [lap for lap in laps if len(lap) == length]
        assert all(sorted(lap) == list(range(length)) for lap in whole)
        assert whole[0] != whole[1] != sorted(whole[1])  # each lap in an order of its own
    assert [mixed.owner(index) for index in range(99)] == [
        _open().owner(index) for index in range(99)
    ]
    assert [mixed.owner(index) for index in range(99)] != [
        _open(1).owner(index) for index in range(99)
    ]


def test_rows_are_those_of_the_sources_whoever_asks_for_which():
    mixed, indices = _open(), np.array([5, 1999, 3, 700, 4, 8, 123_456_789])
    batch, about = mixed.batch(indices), mixed.about(indices)
    said = mixed.conversations(batch, indices)
    for row, index in enumerate(indices):
        source, own = mixed.owner(index)
        name = "abc"[source]
        assert batch["image"][row].tolist() == np.full((4, 4), own).tolist()
        assert said[row] == f"{name} says {own}"
        assert about["ids"][row] == batch["ids"][row] == f"{name}: {own}"
        assert about["prompts"][row] == batch["prompts"][row] == f"{name}?"
        alone = mixed.batch([index])
        for key in ("image", "solution", "known", "hedged", "sides"):
            assert np.array_equal(batch[key][row], alone[key][0])
    assert np.array_equal(mixed.solutions(indices), batch["solution"])
    known, hedged = mixed.masks(indices)
    assert np.array_equal(known, batch["known"]) and np.array_equal(hedged, batch["hedged"])
    assert mixed.prompts() == ("a?", "and then?", "b?", "c?")
    assert len(mixed) == ENDLESS


def test_what_a_source_cannot_read_is_not_readable_in_the_mixture():
    mixed = _open(c=(Numbered("c", 9, bad=[4]), 0.5))
    bad = [index for index in range(CYCLE) if mixed.owner(index) == (2, 4)]
    assert bad
    assert set(range(CYCLE)) - set(mixed.readable(range(CYCLE))) == set(bad)


def test_images_of_several_kinds_make_no_batch():
    with pytest.raises(UserError, match="one kind"):
        _open(d=(Numbered("d", 5, size=8), 1))
    other = Numbered("d", 5)
    other.native = object()
    with pytest.raises(UserError, match="one kind"):
        _open(d=(other, 1))
    with pytest.raises(UserError, match="no sources"):
        Mixture({})
