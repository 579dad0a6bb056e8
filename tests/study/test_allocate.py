"""The allocation: every reader, case and arm once, and everything that can carry over in balance."""

from collections import Counter

import pytest

from cxr_jax.errors import UserError
from cxr_jax.study import allocate
from cxr_jax.study.protocol import make_protocol

ARMS = {
    2: ("manual", "full"),
    3: ("manual", "labels", "full"),
    4: ("manual", "labels", "report", "full"),
}


def study(arm_count, readers, case_count=24, **more):
    protocol = make_protocol(name="t", arms=ARMS[arm_count], readers=readers, **more)
    strata = [(case_no % 2, case_no % 3 == 0) for case_no in range(case_count)]
    return protocol, strata, allocate.allocate(protocol, strata)


@pytest.mark.parametrize("arm_count", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_reader_has_each_case_once_in_each_arm(arm_count, seed):
    protocol, strata, places = study(arm_count, 5, case_count=23, seed=seed)
    counted = Counter(
        (place.reader_no, place.case_no, place.arm) for place in places if not place.practice
    )
    assert set(counted.values()) == {1}
    assert len(counted) == 5 * 23 * arm_count
    # No reader has a case twice in one session, practice cases included.
    by_session = Counter((place.reader_no, place.session_no, place.case_no) for place in places)
    assert max(by_session.values()) == 1


@pytest.mark.parametrize("arm_count, readers", [(2, 2), (2, 4), (3, 6), (3, 12), (4, 4), (4, 8)])
def test_all_that_can_carry_over_is_balanced(arm_count, readers):
    protocol, _, places = study(arm_count, readers)
    found = allocate.balance(protocol, places)
    assert found.is_balanced, found.counts


def test_another_number_of_readers_is_allowed_and_called_unbalanced():
    protocol, _, places = study(3, 5)
    assert not allocate.balance(protocol, places).is_balanced


def test_three_arms_have_the_six_orders():
    _, _, places = study(3, 6)
    orders = {
        "".join(
            next(
                place.arm[0]
                for place in places
                if place.reader_no == reader and place.session_no == session and place.block == 0
            )
            for session in range(3)
        )
        for reader in range(6)
    }
    assert orders == {"mlf", "lfm", "fml", "flm", "mfl", "lmf"}


@pytest.mark.parametrize("size", range(2, 8))
def test_williams_rows_put_each_after_each_equally_often(size):
    rows = allocate.williams_rows(size)
    pairs = Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))
    assert len(pairs) == size * (size - 1) and len(set(pairs.values())) == 1
    assert all(sorted(row) == list(range(size)) for row in rows)


def test_blocks_share_every_stratum():
    protocol, strata, _ = study(3, 6, case_count=60)
    blocks = allocate.make_blocks(protocol, strata)
    assert sorted(Counter(blocks.tolist()).values()) == [20, 20, 20]
    for stratum in set(strata):
        sizes = Counter(int(blocks[case]) for case in range(60) if strata[case] == stratum)
        assert max(sizes.values()) - min(sizes.values()) <= 1


def test_split_reads_each_case_once():
    protocol, _, places = study(3, 6, design="split")
    counted = Counter((place.reader_no, place.case_no) for place in places if not place.practice)
    assert set(counted.values()) == {1} and protocol.sessions == 1
    # Over the readers every case is read in every arm, equally often.
    arms = Counter((place.case_no, place.arm) for place in places if not place.practice)
    assert set(arms.values()) == {2}


def test_orders_differ_between_readers_and_repeat_with_the_seed():
    first, again, other = (study(3, 6, seed=seed)[2] for seed in (3, 3, 4))
    assert first == again != other
    orders = [
        tuple(
            p.case_no for p in first if p.reader_no == reader and p.session_no == 0 and p.block == 0
        )
        for reader in range(6)
    ]
    assert len(set(orders)) == 6


def test_blocks_are_contiguous_and_open_with_practice():
    _, _, places = study(3, 6, practice_per_block=2)
    session = [place for place in places if (place.reader_no, place.session_no) == (1, 2)]
    assert [place.position for place in session] == list(range(len(session)))
    arms = [place.arm for place in session]
    assert sum(a != b for a, b in zip(arms, arms[1:], strict=False)) == 2
    starts = [0] + [i for i in range(1, len(arms)) if arms[i] != arms[i - 1]]
    assert all(session[start].practice and session[start + 1].practice for start in starts)
    assert sum(place.practice for place in session) == 6


@pytest.mark.parametrize(
    "values, field",
    [
        ({"arms": ("manual",)}, "arms"),
        ({"arms": ("manual", "voice")}, "arms"),
        ({"suspicion_labels": ("Edema", "Gout")}, "suspicion_labels"),
        ({"clock_speed": 10.0}, "clock_speed"),
        ({"washout_days": -1}, "washout_days"),
        ({"name": "../x"}, "name"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_protocols_that_cannot_be_run_are_refused_by_field(values, field):
    with pytest.raises(UserError, match=field):
        make_protocol(**{"name": "t", **values})


def test_too_few_cases():
    with pytest.raises(UserError, match="too few"):
        study(3, 6, case_count=2)
