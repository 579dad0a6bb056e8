"""Which phantoms become cases, and where a study is."""

from pathlib import Path

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.study import cases
from cxr_jax.study.folder import StudyFolder, place_of
from cxr_jax.study.plant import Plant, plant_of
from cxr_jax.study.protocol import make_protocol
from cxr_jax.study.shown import PRESENT, UNSURE, freeze_text, read_texts

from .conftest import frozen


def test_each_label_of_the_protocol_gets_its_share_of_the_cases():
    protocol = make_protocol(name="t")
    generator = np.random.default_rng(1)
    # As phantoms come: half have none of the labels, and the rarest is there once in twenty scenes.
    readings = []
    for _ in range(240):
        shares = (0.05, 0.08, 0.1, 0.2, 0.3) if generator.random() < 0.5 else (0,) * 5
        drawn = generator.random(5) < shares
        present = [
            name
            for name, is_there in zip(protocol.suspicion_labels, drawn, strict=True)
            if is_there
        ]
        readings.append(frozen(*present))
    chosen = cases._mixed(protocol, range(240), readings, 60)
    assert len(set(chosen)) == 60 and chosen == sorted(chosen)
    present = [
        {name for name in protocol.suspicion_labels if readings[number].states[name] == "present"}
        for number in chosen
    ]
    rarest = protocol.suspicion_labels[0]
    there = sum(reading.states[rarest] == "present" for reading in readings)
    assert sum(rarest in names for names in present) == min(there, 12)
    assert sum(protocol.suspicion_labels[4] in names for names in present) >= 10
    # An area under a curve asks for films of the other kind, too.
    assert sum(not names for names in present) >= 20


def test_study_is_in_its_folder_or_in_a_database_whose_url_names_one(tmp_path):
    url = "postgresql+pg8000://reader@127.0.0.1:1/room"
    assert place_of("demo", None) == "demo" and place_of("demo", "elsewhere") == "elsewhere"
    named = place_of("demo", f"{url}?folder={tmp_path}")
    assert StudyFolder.at(named).path == tmp_path
    # Without one the files lie where those of a study without a database do.
    unnamed = StudyFolder.at(place_of(str(tmp_path / "a b"), url))
    assert unnamed.path == tmp_path / "a b" and unnamed.store_place.startswith(url)
    assert StudyFolder.at("demo").store_place == "demo"


# ---- Planted errors --------------------------------------------------------------------------------

SWAPPED = dict.fromkeys(("sentences", "text_before", "text_after"), ()) | {
    "label": "Pleural Effusion",
    "state_true": PRESENT,
    "state_shown": PRESENT,
    "side_true": "left",
    "side_shown": "right",
}
CLEAR = "The heart is normal in size. There is no pleural effusion. There is no pneumothorax."
SICK = "There is a left pleural effusion. The heart is normal in size. There is no pneumothorax."


@pytest.mark.parametrize(
    ("stated", "is_carried", "is_corrected", "lacks_side"),
    [
        (("present", "right"), True, False, False),
        (("present", "left"), False, True, False),
        # It says neither what is so nor what was planted.
        (("absent", None), False, False, False),
        (("present", None), False, False, True),
        (("uncertain", "left"), False, False, False),
    ],
)
def test_swapped_side_is_carried_corrected_or_left_open(
    stated, is_carried, is_corrected, lacks_side
):
    swapped = Plant(kind="side", **SWAPPED)
    assert swapped.is_carried(*stated) == is_carried
    assert swapped.is_corrected(*stated) == is_corrected
    assert swapped.lacks_side(*stated) == lacks_side


def test_plant_is_of_the_kind_that_it_is_called():
    left, right, bare = (frozen("Pleural Effusion", side=side) for side in ("left", "right", None))
    hedged = frozen("Pleural Effusion", side="left")
    hedged.states["Pleural Effusion"] = UNSURE
    pairs = {"side": (left, right), "hedge": (left, hedged)}
    for kind, pair in pairs.items():
        assert plant_of(kind, "Pleural Effusion", *pair).kind == kind
        for other in {"add", "drop", "side", "hedge"} - {kind}:
            assert plant_of(other, "Pleural Effusion", *pair) is None
    # A side that is left out is not another side.
    assert plant_of("side", "Pleural Effusion", left, bare) is None


def listed(natural_text, plant):
    [reading] = read_texts([natural_text], is_phantom=False)
    natural = freeze_text(natural_text, reading, plant.pop("natural_answer", ()))
    case = cases.Case(
        pixels=np.zeros((2, 2)), truth={}, truth_sides={}, natural=natural, shown=natural
    )
    return cases._with_listed_plant(Path("m.jsonl"), 3, case, plant).plant


def test_listed_plants_are_checked_like_made_ones():
    added = {"kind": "add", "label": "Pneumothorax"}
    # Two things that are none of the labels: one is there, the other is not.
    others = "There is a hiatal hernia. No free air under the diaphragm."
    moved = {"kind": "side", "label": "Pleural Effusion"}
    shown = SICK.replace("left", "right")
    assert listed(SICK, moved | {"reasoning": f"{shown} {others}"}).side_shown == "right"
    sound = SICK.replace("no pneumothorax", "a right pneumothorax")
    assert listed(SICK, added | {"reasoning": sound}).side_shown == "right"
    # The same finding, and the sentence that denies it left where it was.
    with pytest.raises(UserError, match=r"m\.jsonl:3: plant: Pneumothorax .*contradict"):
        listed(SICK, added | {"reasoning": f"{sound} No pneumothorax is seen."})
    # In the chips alone, which the reasoning beside them contradicts.
    with pytest.raises(UserError, match="Pneumothorax: the reasoning is read as absent"):
        listed(SICK, added | {"reasoning": SICK, "answer": ["Pneumothorax"]})
    with pytest.raises(UserError, match="of that kind"):
        listed(SICK, added | {"kind": "side", "reasoning": sound})
