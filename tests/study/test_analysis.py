"""What an analysis makes of studies that went as studies go: readers leave, arms stay empty, models have no optimum."""

import json

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.study.allocate import Place
from cxr_jax.study.analysis import auditing, contrasts, endpoints, rows
from cxr_jax.study.analysis.natural import NaturalErrors, find_errors
from cxr_jax.study.analysis.study import hypotheses
from cxr_jax.study.folder import SealedCase
from cxr_jax.study.page.report import make_page
from cxr_jax.study.plant import Plant
from cxr_jax.study.protocol import make_protocol
from cxr_jax.study.shown import ABSENT, PRESENT, Frozen
from cxr_jax.study.statistics import ordinal, paired

from .drawn import drawn_rows

PROTOCOL = make_protocol(name="t", readers=4, seed=5, resamples=200)


@pytest.fixture(scope="module")
def whole():
    return drawn_rows(PROTOCOL)


@pytest.fixture
def without_models(monkeypatch):
    """Fits of the ordinal model take seconds to compile; what stands around them does not need one."""

    def no_fit(*_):
        raise UserError("no fit")

    monkeypatch.setattr(ordinal, "fit_ordinal", no_fit)


@pytest.fixture(scope="module")
def some(whole):
    """The study that reader 4 left after a session: a film has one arm in a session, so he has no pair at all."""
    return [row for row in whole if row["reader"] != 4 or row["session"] == 1]


@pytest.fixture(scope="module")
def time_of_some(some):
    return endpoints.time_to_sign(PROTOCOL, some)


# ---- Readers who leave -----------------------------------------------------------------------------


def test_reader_who_left_takes_nobody_along(whole, some, time_of_some, without_models):
    contrast = time_of_some["contrasts"]["full/manual"]
    assert (contrast["readers"], contrast["pairs"]) == (3, 3 * 24)
    # The number of a reader is his, whoever is gone.
    seconds = endpoints._seconds(PROTOCOL, [row for row in whole if row["reader"] != 2])
    assert [mean is None for mean in seconds["readers"]["full"]] == [0, 1, 0, 0]
    json.dumps(contrasts.finite([time_of_some, seconds]), allow_nan=False)
    area = endpoints.areas(PROTOCOL, some)["any"]
    assert area["readers_left_out"] == 1 and area["cases_left_out"] == 0 and "auc" in area
    found = auditing.auditing(PROTOCOL, some)["contrasts"]["detected_label: full-labels"]
    assert [line["reader"] for line in found["readers"]][:3] == [1, 2, 3]


def test_study_that_was_closed_at_once_is_refused_in_words(whole, without_models):
    of_one_arm = [row for row in whole if row["arm"] == "full" and row["case"] < 9]
    for some in ([], whole[:1], of_one_arm):
        time = endpoints.time_to_sign(PROTOCOL, some)
        document = {
            "time": time,
            "confidence": endpoints.confidence(PROTOCOL, some),
            "auditing": auditing.auditing(PROTOCOL, some),
        }
        answered, refused = hypotheses(document, PROTOCOL)
        assert not answered and all(entry["refused"] for entry in refused)
        assert [entry["name"] for entry in refused] == ["H1", "H2", "H3"]
        json.dumps(contrasts.finite(document), allow_nan=False)


def test_refused_hypothesis_keeps_its_place_in_holms_order():
    ratio = {"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.9, "p_value": 0.03}
    document = {
        "time": {"contrasts": {"full/manual": ratio}, "refused": {}},
        "confidence": {"refused": "no finite effect"},
        "auditing": {"contrasts": {"detected_label: full-labels": {"refused": "none planted"}}},
    }
    [time], refused = hypotheses(document, PROTOCOL)
    # Three questions were asked: two that have no answer do not make the third one easier.
    assert time["p_holm"] == pytest.approx(0.09) and not time["supported"]
    assert [entry["name"] for entry in refused] == ["H2", "H3"]
    # A study without the arms never asked.
    of_two = make_protocol(name="t", arms=("manual", "full"))
    answered, refused = hypotheses(document, of_two)
    assert answered[0]["p_holm"] == pytest.approx(0.03) and not refused


def test_page_says_what_has_no_answer(some, time_of_some, without_models):
    found = {
        "time": time_of_some,
        "confidence": endpoints.confidence(PROTOCOL, some),
        "auditing": auditing.auditing(PROTOCOL, some),
    }
    answered, refused = hypotheses(found, PROTOCOL)
    assert [entry["name"] for entry in answered] == ["H1", "H3"]
    document = found | {
        "study": "t",
        "simulated": False,
        "notice": "",
        "first_line": "crossed",
        "flow": rows.flow(some, PROTOCOL.arms),
        "balance": {"is_balanced": True, "is_balanced_as_read": False, "counts": {}},
        "auc": endpoints.areas(PROTOCOL, some),
        "label_f1": endpoints.label_f1(PROTOCOL, some),
        "opinions": {},
        "workload": {"tlx": {}, "sus": []},
        "hypotheses": answered,
        "hypotheses_refused": refused,
        "seal_sha256": "0" * 64,
        "protocol_sha256": PROTOCOL.sha256,
        "app_version": "0",
        "store_head": "0:0",
    }
    page = make_page(PROTOCOL, contrasts.finite(document))
    assert "no answer: no fit" in page and "UNBALANCED as it was read" in page
    # A study that has no time at all has a page, too.
    bare = {"time": endpoints.time_to_sign(PROTOCOL, []), "hypotheses": []}
    assert "time: no reading was timed" in make_page(PROTOCOL, document | bare)


def test_one_known_finding_is_enough_and_planted_films_stand_apart(whole):
    assert rows.any_truth([1, None]) == 1 and rows.any_truth([0, 0]) == 0
    assert rows.any_truth([0, None]) is None
    found = endpoints.areas(PROTOCOL, whole)
    assert (found["any"]["positives"], found["any"]["negatives"]) == (12, 12)
    # A third of the films is planted: fewer than ten of a kind are left, and refused.
    assert found["any, no plants"]["positives"] == 8 and "refused" in found["any, no plants"]


# ---- Split studies ---------------------------------------------------------------------------------


def test_split_study_has_a_gap_without_pairs(whole, without_models):
    split = make_protocol(name="t", readers=4, design="split", resamples=200)
    # Planted films are every third one: each reader has some of them in each arm.
    some = [
        dict(row)
        for row in whole
        if split.arms.index(row["arm"]) == (row["case"] // 3 + row["reader"]) % 3
    ]
    for row in some:
        if row["planted"] and row["arm"] != "manual":
            row["detected_label"] = int(row["arm"] == "full" or row["case"] // 3 % 2)
    found = auditing.auditing(split, some)
    gap = found["contrasts"]["detected_label: full-labels"]["gap"]
    of_labels = [row["detected_label"] for row in some if row["planted"] and row["arm"] == "labels"]
    assert gap["estimate"] == pytest.approx(1 - np.mean(of_labels))
    assert gap["low"] < gap["estimate"] < gap["high"]
    assert "readers" not in found["contrasts"]["detected_label: full-labels"]


# ---- What decides ----------------------------------------------------------------------------------


def test_readers_who_differ_are_not_outvoted_by_many_readings():
    model = contrasts.wald(0.69, 0.136)
    assert model["p_value"] < 0.001
    # One reader of three is moved by the arm, on forty films.
    table = np.zeros((3, 40))
    table[0] = 1 + np.arange(40) % 2
    decided = contrasts.with_readers_at_random(model, paired.contrast(table))
    assert decided["p_value"] == decided["p_of_readers"] > 0.2
    with pytest.raises(UserError, match="no finite effect"):
        contrasts.wald(9.0, float("nan"))


def test_all_caught_in_one_arm_is_decided_without_the_model(whole, monkeypatch):
    runaway = ordinal.OrdinalFit(
        cuts=np.zeros(1),
        cut_errors=np.zeros(1),
        effects=np.array([17.0]),
        effect_errors=np.array([np.nan]),
        covariance=np.full((1, 1), np.nan),
        spreads=np.zeros(3),
        log_likelihood=-1.0,
        converged=False,
    )
    monkeypatch.setattr(ordinal, "fit_ordinal", lambda *_: runaway)
    some = [
        row | {"detected_label": 1}
        if row["detected_flag"] is not None and row["arm"] == "full"
        else row
        for row in whole
    ]
    found = auditing.auditing(PROTOCOL, some)["contrasts"]["detected_label: full-labels"]
    assert found["model"]["estimate"] is None and 0 < found["model"]["p_value"] < 0.05
    json.dumps(found, allow_nan=False)
    # Confidence has a place for a refusal, and no numbers.
    assert "contrasts" not in endpoints.confidence(PROTOCOL, whole)


def test_arm_without_readings_is_not_the_reference(whole, monkeypatch):
    effects = np.array([0.9])
    fit = ordinal.OrdinalFit(
        cuts=np.arange(6.0),
        cut_errors=np.ones(6),
        effects=effects,
        effect_errors=np.ones(1),
        covariance=np.eye(1),
        spreads=np.ones(3),
        log_likelihood=-1.0,
        converged=True,
    )
    monkeypatch.setattr(ordinal, "fit_ordinal", lambda *_: fit)
    some = [row for row in whole if row["arm"] != "labels"]
    found = endpoints.confidence(PROTOCOL, some)
    assert set(found["contrasts"]) == {"full-manual"} and found["reference"] == "manual"


def test_no_error_in_a_few_reports_is_no_proof(whole, without_models):
    none_carried = [row | {"carried": 0} if row["planted"] else row for row in whole]
    found = auditing.auditing(PROTOCOL, none_carried)["over_reliance"]
    # Eight planted films without one: a margin of a tenth would pass them by in 43 of 100 studies.
    assert found["p_one_sided"] == pytest.approx(0.9**8)
    some = auditing.auditing(PROTOCOL, whole)["over_reliance"]
    is_below = some["contrast"]["high"] < PROTOCOL.over_reliance_margin
    # The p value and the interval that is printed beside it say the same.
    assert (some["p_value"] < 0.05) == is_below


# ---- The AI's own errors ---------------------------------------------------------------------------


def reading(*present, sides=None):
    states = {label: PRESENT if label in present else ABSENT for label in CHEXPERT_14}
    return Frozen(sentences=("One.", "Two.", "Three."), states=states, sides=sides or {})


def test_own_errors_of_the_ai_are_told_from_planted_ones():
    truth = reading("Edema", "Pleural Effusion")
    natural = reading("Edema", "Fracture", "Pleural Effusion", sides={"Pleural Effusion": "left"})
    shown = reading("Fracture", "Pleural Effusion", sides={"Pleural Effusion": "left"})
    plant = Plant(
        kind="drop",
        label="Edema",
        state_true=PRESENT,
        state_shown=ABSENT,
        side_true=None,
        side_shown=None,
        sentences=(1,),
        text_before="",
        text_after="",
    )
    sealed = SealedCase(
        case_no=0,
        abnormal=True,
        truth=truth.states | {"Pneumonia": "uncertain"},
        truth_sides={"Pleural Effusion": "right"},
        natural=natural,
        plant=plant,
    )
    errors = find_errors(sealed, shown)
    assert [(error.kind, error.label) for error in errors] == [
        ("side", "Pleural Effusion"),
        ("add", "Fracture"),
    ]
    own = NaturalErrors(tuple(errors), frozenset({2}))
    labels = {label: {"state": ABSENT, "side": None} for label in CHEXPERT_14}
    labels["Fracture"] = {"state": PRESENT, "side": None}
    answer = {
        "labels": labels,
        # On the plant, on the AI's own error, and on what is true.
        "flags": [{"sentence": number, "kind": "wrong"} for number in (1, 2, 3)],
        "rejected": ["Fracture", "Pneumonia", "Lung Lesion"],
    }
    place = Place(0, 0, 0, 0, 0, "full", False)
    found = rows._audit(place, sealed, own, answer)
    assert found["detected_flag"] == 1 and found["carried"] == 1
    # Nobody knows of the pneumonia, so its rejection is neither.
    assert found["false_flags"] == 2
    assert rows._natural(own, answer) == {"natural_errors": 2, "natural_carried": 1}
    labels["Pleural Effusion"] = {"state": PRESENT, "side": None}
    assert rows._natural(own, answer) == {"natural_errors": 1, "natural_carried": 1}


@pytest.mark.parametrize(
    ("side", "counts"),
    [("right", (1, 0, 0, 0)), ("left", (0, 1, 0, 1)), (None, (None, None, 1, None))],
)
def test_reader_who_gives_no_side_has_found_no_swapped_one(side, counts):
    natural = reading("Pleural Effusion", sides={"Pleural Effusion": "left"})
    plant = Plant(
        kind="side",
        label="Pleural Effusion",
        state_true=PRESENT,
        state_shown=PRESENT,
        side_true="left",
        side_shown="right",
        sentences=(1,),
        text_before="",
        text_after="",
    )
    sealed = SealedCase(
        case_no=0,
        abnormal=True,
        truth=natural.states,
        truth_sides=natural.sides,
        natural=natural,
        plant=plant,
    )
    answer = {
        "labels": {"Pleural Effusion": {"state": PRESENT, "side": side}},
        "flags": [],
        "rejected": [],
    }
    place = Place(0, 0, 0, 0, 0, "full", False)
    found = rows._audit(place, sealed, NaturalErrors(), answer)
    names = ("carried", "corrected", "no_side", "detected_label")
    assert tuple(found[name] for name in names) == counts


def test_readings_without_a_side_are_in_the_flow(whole):
    bare = [row | {"no_side": 1} if row["planted"] and row["reader"] == 1 else row for row in whole]
    flow = rows.flow(bare, PROTOCOL.arms)
    assert [line["of them without a side"] for line in flow] == [8, 8, 8]
