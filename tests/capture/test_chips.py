"""The 14 labels as the labeler reads them and as a reader sets them, and where the two differ."""

import pytest

from cxr_jax.capture.chips import Chip, check_answer, find_contradictions, parse_chips, read_text
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

TEXT = "No pneumothorax is seen. Small left pleural effusion. Possible edema."


def test_chips_are_what_the_text_says():
    read = read_text(TEXT)
    assert list(read.chips) == list(CHEXPERT_14)
    assert read.chips["Pneumothorax"] == Chip("absent")
    assert read.chips["Pleural Effusion"] == Chip("present", "left")
    assert read.chips["Edema"].state == "uncertain"
    assert read.chips["Fracture"] == Chip("not_mentioned")
    document = read.as_json()
    findings = {finding["label"]: finding for finding in document["findings"]}
    assert findings["Pleural Effusion"]["sentences"] == [2]
    assert document["sentences"][0] == "No pneumothorax is seen." and not document["is_foreign"]


def test_contradictions_are_listed():
    said = read_text(TEXT).chips
    assert find_contradictions(said, said) == []
    gold = said | {
        "Pneumothorax": Chip("present", "right"),
        "Pleural Effusion": Chip("present", "right"),
        "Edema": Chip("present"),
        # That nothing is said of what is absent is no contradiction.
        "Fracture": Chip("absent"),
    }
    differences = [
        (d["label"], d["kind"], d["gold"], d["text"]) for d in find_contradictions(gold, said)
    ]
    assert differences == [
        ("Edema", "state", "present", "uncertain"),
        ("Pneumothorax", "state", "present", "absent"),
        ("Pleural Effusion", "side", "right", "left"),
    ]


def test_chips_of_a_page():
    chips = parse_chips(
        {"Edema": {"state": "present", "side": "bilateral"}, "Fracture": {"state": "absent"}}
    )
    assert chips["Edema"] == Chip("present", "bilateral") and len(chips) == 14
    # What is absent has no side.
    assert parse_chips({"Edema": {"state": "absent", "side": "left"}})["Edema"] == Chip("absent")
    for given in (
        None,
        [],
        {"Hernia": {"state": "present"}},
        {"Edema": "present"},
        {"Edema": {"state": 1}},
        {"Edema": {"state": ["present"]}},
        {"Edema": {"state": "maybe"}},
        {"Edema": {"state": "present", "side": "up"}},
        {"Cardiomegaly": {"state": "present", "side": "left"}},
    ):
        with pytest.raises(UserError):
            parse_chips(given)


def test_no_finding_stands_alone():
    chips = parse_chips(
        {"No Finding": {"state": "present"}, "Support Devices": {"state": "present"}}
    )
    assert check_answer(chips) == []
    assert check_answer(chips | {"Edema": Chip("present")}) == ["No Finding is set beside Edema"]
