"""What tables of words and phrases are made smaller by, against plain loops."""

import numpy as np
import pytest

from cxr_jax.labels import phrase_tables


def plain_parts(following, outcomes):
    """Moore's refinement with tuples instead of sums: the part of each state, numbered by first states."""
    part = [tuple(row) for row in outcomes.tolist()]
    while True:
        after = [tuple(part[target] for target in row) for row in following]
        finer = list(zip(part, after, strict=True))
        number = {key: place for place, key in enumerate(dict.fromkeys(finer))}
        finer = [number[key] for key in finer]
        if len(number) == len(set(part)):
            return finer
        part = finer


@pytest.mark.parametrize("seed", range(20))
def test_equal_states_are_those_of_plain_refinement(seed):
    rng = np.random.default_rng(seed)
    states, columns = rng.integers(1, 30), rng.integers(1, 6)
    # Few targets and few outcomes, so that many states are equal; most rows go where the first does.
    following = rng.integers(0, min(states, 4), (states, columns)).astype(np.int16)
    following = np.where(rng.random(following.shape) < 0.6, following[0], following)
    outcomes = rng.integers(0, 2, (states, 2))
    part, first = phrase_tables.equal_states(following, outcomes)
    assert part.tolist() == plain_parts(following.tolist(), outcomes)
    assert first.tolist() == [part.tolist().index(number) for number in range(part.max() + 1)]


@pytest.mark.parametrize("largest", [2, 32_000])
def test_equal_columns_are_those_of_numpy(largest):
    table = np.random.default_rng(0).integers(0, largest, (3, 40)).astype(np.int16)
    distinct, which = phrase_tables._equal_columns(table)
    expected, inverse = np.unique(table, axis=1, return_inverse=True)
    np.testing.assert_array_equal(distinct, expected)
    np.testing.assert_array_equal(which, inverse.reshape(-1))
