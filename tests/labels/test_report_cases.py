"""Reports read as a careful reader would: hand-written texts with the states and sides that they mean.

A case of report_cases.jsonl gives every label that its text mentions; any other label is expected as not mentioned.
No Finding is given where it is 1.
"""

import json
import pathlib

import pytest

import cxr_jax.labels
from cxr_jax.labels import CHEXPERT_14

FILE = pathlib.Path(__file__).with_name("report_cases.jsonl")
CASES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
NOT_MENTIONED = -2
# Groups about what changes a mention (negations, hedges) and where that ends.
SCOPE = {
    "negation_before",
    "negation_after",
    "hedge_before",
    "hedge_after",
    "affirm_cues",
    "terminators",
    "pseudo_negation",
    "ignore",
}
SIDES = {"left": (True, False), "right": (False, True), "both": (True, True)}  # (left, right)


def case_id(k):
    """Group and number of case k, for the test's name."""
    return f"{CASES[k]['group']}-{k}"


WITH_SIDES = [k for k, case in enumerate(CASES) if "sides" in case and case["group"] != "limits"]


@pytest.fixture(scope="module")
def read():
    """All cases read in one call: state int8 [N, 14], right and left bool [N, 14]."""
    return cxr_jax.labels.read_reports([case["text"] for case in CASES])


# "limits" are plain to a reader and beyond the rules; they are here so that the day they pass is noticed.
LIMIT = pytest.mark.xfail(strict=True, reason="a known limit of the rules")
ALL = [
    pytest.param(k, marks=LIMIT if CASES[k]["group"] == "limits" else (), id=case_id(k))
    for k in range(len(CASES))
]


@pytest.mark.parametrize("k", ALL)
def test_states_of_a_report(read, k):
    want = dict.fromkeys(CHEXPERT_14, NOT_MENTIONED) | CASES[k]["want"]
    got = {name: int(state) for name, state in zip(CHEXPERT_14, read["state"][k], strict=True)}
    wrong = {
        name: {"want": want[name], "got": got[name]}
        for name in CHEXPERT_14
        if want[name] != got[name]
    }
    assert not wrong, CASES[k]["text"]


@pytest.mark.parametrize("k", WITH_SIDES, ids=case_id)
def test_sides_of_a_report(read, k):
    got, want = {}, {}
    for name, side in CASES[k]["sides"].items():
        at = CHEXPERT_14.index(name)
        want[name] = SIDES[side]
        got[name] = (bool(read["left"][k, at]), bool(read["right"][k, at]))
    assert got == want, CASES[k]["text"]


def test_cases_are_well_formed():
    for case in CASES:
        states, sides = case["want"], case.get("sides", {})
        assert set(states) <= set(CHEXPERT_14) and set(states.values()) <= {1, 0, -1}, case
        assert states.get("No Finding", 1) == 1, case
        assert set(sides) <= set(states) - {"No Finding"} and set(sides.values()) <= set(SIDES), (
            case
        )
    assert len({case["text"] for case in CASES}) == len(CASES)


def test_most_cases_are_about_scope():
    assert sum(case["group"] in SCOPE for case in CASES) >= 150
