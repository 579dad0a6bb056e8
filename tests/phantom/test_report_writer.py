"""The phantom's reports say what the scene holds, no more and no less, in few words."""

import re

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.phantom import report_writer, wording
from cxr_jax.phantom.constants import DEVICES, FINDINGS

N = 3000
OPACITIES = ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis")
MIDLINE = ("enlarged_cardiomediastinum", "cardiomegaly", "edema")


def scene(i: int, present: float = 0.18) -> dict:
    """A scene row as the contract has it, with the fields that a report reads."""
    rng = np.random.default_rng((7, i))
    severity = np.where(rng.random(12) < present, rng.uniform(0.15, 1, 12), 0).astype(np.float32)
    device = rng.random(5) < 0.15
    severity[11] = device.any()
    side = rng.integers(0, 2, 12).astype(np.int32)
    for k, name in enumerate(FINDINGS):
        if name in MIDLINE or (name in ("pleural_effusion", "atelectasis") and rng.random() < 0.3):
            side[k] = 2
    zone = rng.integers(0, 3, 12).astype(np.int32)
    quality = rng.integers(0, 2, 3).astype(np.int32)
    return {"severity": severity, "side": side, "zone": zone, "device": device, "quality": quality}


def expected_states(row: dict) -> dict[str, int]:
    """The contract's label rule, written apart from the code under test."""
    s = row["severity"]
    state = lambda v: 1 if v >= 0.35 else -1 if v > 0 else 0
    states = {name.replace("_", " ").title(): state(v) for name, v in zip(FINDINGS, s, strict=True)}
    lung = [states[name] for name in OPACITIES]
    states["Lung Opacity"] = 1 if 1 in lung else -1 if -1 in lung else 0
    sick = any(v == 1 for name, v in states.items() if name != "Support Devices")
    return {"No Finding": int(not sick), **states}


@pytest.fixture(scope="module")
def written():
    rows = [scene(i) for i in range(N)]
    return [
        (r, h, report_writer.write(r, h, np.random.default_rng(i)))
        for i, r in enumerate(rows)
        for h in "AB"
    ]


def test_facts_rebuild_the_labels(written):
    for row, _, rep in written:
        assert report_writer.label_states(rep.facts) == expected_states(row)


def test_answer_is_the_positive_labels_in_order(written):
    for row, _, rep in written:
        states = expected_states(row)
        names = rep.answer.split(", ")
        assert names == [n for n in CHEXPERT_14 if states[n] == 1]
        assert f"Summary: {rep.answer}" in rep.sentences[-1].text
        assert rep.sentences[-1].text[9 + len(rep.answer)] in ".;"


def test_organ_facts_match_the_scene(written):
    for row, _, rep in written:
        for fact in (f for s in rep.sentences[:-1] for f in s.facts):
            name = fact.finding.lower().replace(" ", "_")
            if name not in FINDINGS[:11] or fact.state == 0:
                continue
            k = FINDINGS.index(name)
            severity, side = row["severity"][k], row["side"][k]
            assert fact.side == side or (
                side == 2 and name in (*wording.LUNG_FINDINGS, "pleural_effusion")
            )
            assert fact.zone in (None, row["zone"][k])
            assert fact.state == (1 if severity >= 0.35 else -1)
            if fact.severity:
                grade = int(severity >= report_writer.MODERATE_AT) + int(
                    severity >= report_writer.LARGE_AT
                )
                assert fact.severity == ("small", "moderate", "large")[grade]


def test_words_say_the_facts(written):
    for _, _, rep in written:
        for sentence in rep.sentences[:-1]:
            text, facts = sentence.text.lower(), sentence.facts
            stated = [f for f in facts if f.state and f.finding in CHEXPERT_14]
            sides = {f.side for f in stated} - {None}
            if "lung:" not in text and "hila" not in text:
                assert ("right" in text) == (0 in sides) and ("left" in text) == (1 in sides)
            else:
                assert not ("right" in text and "left" in text)
                lung = {"right": 0, "left": 1}.get(text.split()[0])
                assert text.startswith("hila:") or {f.side for f in facts} == {lung}
            hedged = re.search("possible|cannot|questionable", text)
            assert bool(hedged) == any(f.state < 0 for f in stated)
            for fact in stated:
                name = fact.finding.lower().replace(" ", "_")
                if fact.severity:
                    words = wording.SEVERITY_WORDS[name]
                    assert words[wording.SEVERITIES.index(fact.severity)] in text
                if fact.zone is not None:
                    assert (
                        wording.ZONES[fact.zone] in text
                        or wording.PLEURAL_PLACES[fact.zone] in text
                    )


def test_no_absent_device_is_named(written):
    for row, _, rep in written:
        for name, on in zip(DEVICES, row["device"], strict=True):
            assert (name.replace("_", " ") in rep.trace) == on
            assert any(f.finding == f"device:{name}" and f.state == 1 for f in rep.facts) == on


def test_every_finding_is_stated_and_the_tour_keeps_its_order(written):
    for _, _, rep in written:
        assert [s.text.split(":")[0] for s in rep.sentences] == list(report_writer.ORDER)
        organ = {f.finding for s in rep.sentences[:-1] for f in s.facts}
        assert organ >= set(CHEXPERT_14) - {"No Finding"}


def test_size_and_vocabulary(written):
    targets = [report_writer.target(rep) for _, _, rep in written]
    lengths = np.array([len(re.sub("<.*?>", " ", t).split()) for t in targets])
    words = {w for t in targets for w in re.findall("[A-Za-z]+", t)}
    print(lengths.mean(), lengths.max(), len(words))
    assert all(t.isascii() for t in targets)
    assert 60 <= lengths.mean() <= 95 and lengths.max() <= 135 and np.quantile(lengths, 0.99) <= 130
    assert len(words) <= 300


def test_same_rng_same_text_and_two_hospitals_differ():
    row = scene(3)
    one, two = (
        report_writer.target(report_writer.write(row, "A", np.random.default_rng(5)))
        for _ in range(2)
    )
    assert one == two
    assert one != report_writer.target(report_writer.write(row, "B", np.random.default_rng(5)))
    assert (
        len(
            {
                report_writer.target(report_writer.write(row, "A", np.random.default_rng(k)))
                for k in range(20)
            }
        )
        > 10
    )
    for key, options in wording.PHRASES["A"].items():
        assert not set(options) & set(wording.PHRASES["B"][key]), key


def test_border_severity_is_positive():
    row = scene(0, present=0)
    row["severity"][4] = np.float32(0.35)
    assert "Consolidation" in report_writer.write(row, "A", np.random.default_rng(0)).answer


def only(**present) -> dict:
    """A clean scene with the given findings: name=(severity, side, zone), or True for a device."""
    row = scene(0, present=0)
    row["device"] = np.array([present.get(name, False) for name in DEVICES])
    row["severity"][:] = 0
    row["quality"][:] = (1, 0, 0)
    for k, name in enumerate(FINDINGS):
        if name in present:
            row["severity"][k], row["side"][k], row["zone"][k] = present[name]
    row["severity"][11] = row["device"].any()
    return row


def test_causes_follow_the_rest_of_the_picture():
    def first_cause(name, **scene_parts):
        rep = report_writer.write(only(**scene_parts), "A", np.random.default_rng(0))
        summary = rep.sentences[-1].text.lower()
        return re.search(rf"{name} (?:likely )?from ([a-z ]+?)(?: or |[;.])", summary).group(1)

    air, broken = (0.9, 1, 0), (0.9, 1, 1)
    assert first_cause("pneumothorax", pneumothorax=air) == "ruptured bleb"
    assert first_cause("pneumothorax", pneumothorax=air, fracture=broken) == "trauma"
    assert first_cause("pneumothorax", pneumothorax=air, fracture=(0.9, 0, 1)) == "ruptured bleb"
    assert first_cause("pneumothorax", pneumothorax=air, central_line=True) == "line placement"
    assert (
        first_cause("effusion", pleural_effusion=(0.5, 2, 2), pneumonia=(0.5, 0, 1)) == "infection"
    )


def test_sentences_that_lean_on_each_other():
    row = only(pleural_effusion=(0.9, 0, 2), cardiomegaly=(0.2, 2, 1))
    rep = report_writer.write(row, "A", np.random.default_rng(0))
    texts = dict(s.text.split(": ", 1) for s in rep.sentences)
    assert "above the effusion" in texts["Right lung"] and "effusion" not in texts["Left lung"]
    assert "AP view" in texts["Heart"]


@pytest.mark.parametrize("hospital", "AB")
def test_real_scenes(hospital):
    jax = pytest.importorskip("jax")
    from cxr_jax.phantom import scene as world

    sample = jax.jit(lambda keys: world.sample_scenes(keys, hospital))
    batch = jax.device_get(sample(jax.random.split(jax.random.key(0), 2000)))
    labels = np.asarray(world.labels(batch))
    lengths = []
    for i in range(len(labels)):
        rep = report_writer.write(
            {k: v[i] for k, v in batch.items()}, hospital, np.random.default_rng(i)
        )
        states = report_writer.label_states(rep.facts)
        assert [states[name] for name in CHEXPERT_14] == labels[i].tolist()
        lengths.append(len(re.sub("<.*?>", " ", report_writer.target(rep)).split()))
    assert 65 <= np.mean(lengths) <= 90 and max(lengths) <= 135


def test_unknown_hospital():
    with pytest.raises(UserError, match="hospital"):
        report_writer.write(scene(0), "C", np.random.default_rng(0))
