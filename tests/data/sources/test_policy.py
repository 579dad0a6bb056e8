"""Four states to two: every choice against a plain loop over random films."""

import numpy as np
import pytest

from cxr_jax.data.sources.policy import LabelPolicy, describe_protocol
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, PARENTS

CHEXPERT = {"Atelectasis": 1, "Edema": 1, "Cardiomegaly": 0, "Consolidation": 0}


def plain(states, blank, uncertain, parents, no_finding):
    """The same in words: a film at a time, a label at a time."""
    film = dict(states)
    for label, state in states.items():
        if state == -1 and uncertain(label) is not None:
            film[label] = uncertain(label)
        if state is None and blank == "negative":
            film[label] = 0
    if parents == "closed":
        for parent, children in PARENTS.items():
            below = [film[child] for child in children]
            if 1 in below:
                film[parent] = 1
            elif -1 in below and film[parent] != 1:
                film[parent] = -1
    if no_finding == "derived":
        findings = [film[x] for x in CHEXPERT_14 if x not in ("No Finding", "Support Devices")]
        if 1 in findings:
            film["No Finding"] = 0
        elif set(findings) == {0}:
            film["No Finding"] = 1
        else:
            film["No Finding"] = -1 if -1 in findings else None
    return film


def by_label(choice):
    """What an uncertain label counts as, None where it stays."""
    if choice == "chexpert":
        return CHEXPERT.get
    if "=" in choice:  # "Edema=ones, zeros"
        return lambda label: 1 if label == "Edema" else 0
    return lambda label: {"zeros": 0, "negative": 0, "ones": 1, "positive": 1}.get(choice)


@pytest.mark.parametrize("uncertain", ["ignore", "zeros", "ones", "chexpert", "Edema=ones, zeros"])
@pytest.mark.parametrize("blank", ["unknown", "negative"])
@pytest.mark.parametrize("parents", ["given", "closed"])
@pytest.mark.parametrize("no_finding", ["given", "derived"])
def test_every_choice(uncertain, blank, parents, no_finding):
    policy = LabelPolicy(blank=blank, uncertain=uncertain, parents=parents, no_finding=no_finding)
    generator = np.random.default_rng(0)
    # Mostly absent, or No Finding could never be derived.
    states = generator.choice([1, 0, -1, -2], (300, 14), p=[0.05, 0.85, 0.05, 0.05]).astype(np.int8)
    before = states.copy()
    applied = policy.apply_states(states)
    assert (states == before).all()
    for row, row_applied in zip(states.tolist(), applied.tolist(), strict=True):
        film = {label: None if x == -2 else x for label, x in zip(CHEXPERT_14, row, strict=True)}
        wanted = plain(film, blank, by_label(uncertain), parents, no_finding)
        assert [wanted[label] for label in CHEXPERT_14] == [
            None if x == -2 else x for x in row_applied
        ]
        # A row of a manifest goes the same way.
        assert policy.apply(film) == wanted


def test_names_beside_numbers():
    assert str(LabelPolicy(uncertain="zeros")) == "blank=unknown, uncertain=negative"
    assert str(LabelPolicy(parents="closed", no_finding="derived")).endswith(
        "parents=closed, No Finding=derived"
    )
    states = np.zeros((2, 14), np.int8)
    said = "uncertain none; blank none; parents as given; No Finding as given"
    assert describe_protocol(LabelPolicy(), states) == said
    states[0, INDEX["Edema"]], states[1, 0] = -1, -2
    assert "uncertain chexpert; blank negative; parents closed" in describe_protocol(
        LabelPolicy(blank="negative", uncertain="chexpert", parents="closed"), states
    )


@pytest.mark.parametrize(
    "choice",
    [
        {"uncertain": "maybe"},
        {"uncertain": "Edema=maybe"},
        {"uncertain": "Oedema=ones"},
        {"uncertain": 1},
        {"blank": "positive"},
        {"parents": "open"},
        {"no_finding": None},
    ],
)
def test_refused(choice):
    with pytest.raises(UserError, match=f"policy {next(iter(choice))} is not one of"):
        LabelPolicy(**choice)
