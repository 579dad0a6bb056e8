"""A small study without any model or phantom: six hand-made cases, three arms, two readers."""

import numpy as np
import pytest

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.store import open_store
from cxr_jax.study.cases import Case, CaseSet
from cxr_jax.study.commands import manage
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.plant import Plant
from cxr_jax.study.protocol import make_protocol
from cxr_jax.study.shown import ABSENT, PRESENT, Frozen

SECRET_SENTENCE = "Pleura: moderate zebrafish effusion on the left."


def frozen(*present, side=None, text=SECRET_SENTENCE):
    states = {label: PRESENT if label in present else ABSENT for label in CHEXPERT_14}
    sides = {label: side for label in present if side}
    return Frozen(sentences=("Quality: fine.", text), states=states, sides=sides)


def hand_made_case(number):
    truth = (
        frozen("Pleural Effusion", side="left")
        if number % 2
        else frozen("No Finding", text="Clear.")
    )
    plant = shown = None
    if number == 1:
        shown = frozen("Pleural Effusion", side="right")
        plant = Plant(
            kind="side",
            label="Pleural Effusion",
            state_true=PRESENT,
            state_shown=PRESENT,
            side_true="left",
            side_shown="right",
            sentences=(2,),
            text_before="left",
            text_after="right",
        )
    return Case(
        pixels=np.full((8, 8), number / 10, np.float32),
        truth=truth.states,
        truth_sides=truth.sides,
        natural=truth,
        shown=shown or truth,
        plant=plant,
    )


def make_study(place, make_case=hand_made_case, **values):
    """Create, seal and open a study in a folder or a database; 6 cases and one practice film an arm."""
    protocol = make_protocol(**({"name": "t", "readers": 2, "washout_days": 28} | values))
    cases = [make_case(number) for number in range(6)]
    practice = [make_case(number) for number in range(6, 9)]
    folder = StudyFolder.at(place)
    folder.create(protocol, CaseSet(tuple(cases), tuple(practice), True))
    with manage.open_study(place) as study:
        study.append("study.created", {"protocol_sha256": protocol.sha256})
    manage.seal(place)
    manage.start(place)
    return StudyFolder.at(place)


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "t")


@pytest.fixture
def store(study):
    opened = open_store(study.path, exclusive=False)
    yield opened
    opened.close()
