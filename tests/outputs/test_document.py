"""The reading document: what a completion becomes, what contradicts, what a signature changes, what is refused."""

import copy
import json

import jax
import numpy as np
import pytest

from cxr_jax import phantom
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs import document, schema, sections
from cxr_jax.outputs.trace_sentences import SentenceStream, find_words, read_trace, read_traces
from cxr_jax.phantom import report_writer
from cxr_jax.weights.locate import find_folder

_sample = jax.jit(phantom.sample_scenes, static_argnums=1)
IMAGE = document.ImageFacts(sha256="a" * 64, view="PA")
MODEL = document.ModelFacts(name="phantom", weights_sha256="b" * 64, words="phantom")
FILMS = document.ModelFacts(name="films", weights_sha256="b" * 64)


def build(trace, answer, model=FILMS, **more):
    text = f"<think>{trace}</think><answer>{answer}</answer>"
    facts = document.CompletionFacts(text=text, finish_reason="stop", prompt="Find.", **more)
    return document.build(IMAGE, model, facts)


def finding(reading, label):
    return document.finding_of(reading, label)


@pytest.fixture(scope="module")
def phantom_reports():
    """200 reports of each hospital, as the grammar writes them."""
    reports = []
    for hospital in "AB":
        # Scenes alone: nobody looks at these films.
        keys = phantom.example_keys(3, "test", hospital, range(200))
        scenes = jax.tree.map(np.asarray, _sample(keys, hospital))
        reports += [
            report_writer.write(
                phantom.scene_row(scenes, row), hospital, np.random.default_rng(row)
            )
            for row in range(200)
        ]
    return reports


@pytest.fixture(scope="module")
def phantom_readings(phantom_reports):
    """What the parser reads in the traces of all these reports: read once."""
    return read_traces([report.trace for report in phantom_reports], "phantom")


def test_a_completion_becomes_14_findings_with_states_sides_and_sentences():
    reading = build(
        "There is a small left pleural effusion. No pneumothorax. Possible right lower lobe pneumonia.",
        "Pleural Effusion",
        probabilities=dict.fromkeys(CHEXPERT_14, 0.25),
    )
    assert [row["label"] for row in reading["findings"]] == list(CHEXPERT_14)
    effusion = finding(reading, "Pleural Effusion")
    assert (effusion["state"], effusion["side"], effusion["sentences"]) == ("present", "left", [1])
    assert effusion["named_in_answer"] and effusion["probability"] == 0.25
    assert finding(reading, "Pneumothorax")["state"] == "absent"
    pneumonia = finding(reading, "Pneumonia")
    assert (pneumonia["state"], pneumonia["side"]) == ("uncertain", "right")
    assert finding(reading, "Fracture")["state"] == "not_mentioned"
    # What a page marks: the words of the third sentence that hedge, and that name a side.
    third = reading["trace"][2]
    assert [third["text"][start:end] for start, end in third["hedged"]] == ["Possible"]
    assert [third["text"][start:end] for start, end, _ in third["sides"]] == ["right"]
    assert reading["status"] == "draft" and "Not for diagnosis" in reading["notice"]
    assert reading["contradictions"] == []


@pytest.mark.parametrize(
    ("trace", "answer", "kinds"),
    [
        ("Right pneumothorax.", "Edema", {("affirmed_not_named", "Pneumothorax"), ("named_not_mentioned", "Edema")}),
        ("No pneumothorax.", "Pneumothorax", {("named_but_denied", "Pneumothorax")}),
        ("Possible pneumothorax.", "Pneumothorax", set()),
        ("Possible pneumothorax.", "Edema", {("named_not_mentioned", "Edema")}),
        ("Small left effusion.", "No Finding", {
            ("no_finding_beside_a_finding", "No Finding"), ("affirmed_not_named", "Pleural Effusion")}),
        ("No effusion on the right. Left effusion.", "Pleural Effusion", set()),
        ("No effusion. Small left effusion.", "Pleural Effusion", {("trace_against_itself", "Pleural Effusion")}),
        ("Left basilar atelectasis.", "Lung Opacity, Atelectasis", set()),
    ],
)  # fmt: skip
def test_contradictions_are_found_and_hedges_are_none(trace, answer, kinds):
    found = build(trace, answer)["contradictions"]
    assert {(entry["kind"], entry["label"]) for entry in found} == kinds


def test_the_report_of_a_phantom_trace_says_what_the_trace_says(phantom_readings):
    # In the fields, not in a heap: every heading of the tour has its field.
    readings = phantom_readings[:6] + phantom_readings[200:206]
    fields = [sections.from_trace(reading, "phantom") for reading in readings]
    back = read_traces([sections.compose(of_one) for of_one in fields], "phantom")
    for reading, of_one, again in zip(readings, fields, back, strict=True):
        assert (again.states, again.sides) == (reading.states, reading.sides)
        assert all(of_one.values())


def test_the_states_of_a_phantom_trace_are_the_facts_of_its_grammar(
    phantom_reports, phantom_readings
):
    wanted = {1: "present", -1: "uncertain", 0: "absent"}
    for report, reading in zip(phantom_reports, phantom_readings, strict=True):
        states = report_writer.label_states(report.facts)
        said = dict(zip(CHEXPERT_14, reading.states, strict=True))
        for label, state in states.items():
            if label not in ("No Finding", "Lung Opacity"):  # both follow from others there
                # "Clear" denies what it does not name, and the parser reads words.
                assert said[label] in (
                    wanted[state],
                    "not_mentioned" if state == 0 else wanted[state],
                )


def test_sentences_come_while_a_completion_streams(phantom_reports):
    trace = phantom_reports[5].trace
    stream, text = SentenceStream("phantom"), f"<think>{trace}</think><answer>Edema</answer>"
    given = [
        sentence
        for start in range(0, len(text), 37)
        for sentence in stream.feed(text[start : start + 37])
    ]
    assert len(given) > 6
    assert (*given, *stream.finish()) == read_trace(trace, "phantom").sentences
    assert stream.finish() == []


def test_the_embedded_model_writes_in_the_words_of_phantoms(tmp_path):
    assert find_words(find_folder("phantom")) == "phantom"
    assert find_words(tmp_path) == "films"
    (tmp_path / "hf").mkdir()
    (tmp_path / "config.json").write_text('{"config": {"data": {"source": "phantom"}}}')
    assert find_words(tmp_path / "hf") == "phantom"


def test_a_signature_makes_the_report_that_is_signed_the_truth():
    draft = build("There is a small left pleural effusion. The heart is enlarged.", "Cardiomegaly")
    before = copy.deepcopy(draft)
    report = draft["report"] | {"pleura": "No pleural effusion.", "lungs_right": "Atelectasis."}
    signed = document.sign(
        draft, by="r1", at="2026-11-30T12:00:00Z", meaning="author", report=report
    )
    assert draft == before
    effusion = finding(signed, "Pleural Effusion")
    assert (effusion["state"], effusion["model_state"]) == ("absent", "present")
    assert (effusion["side"], effusion["model_side"]) == (None, "left")
    # The field gives its side to what is written there.
    assert finding(signed, "Atelectasis")["side"] == "right"
    assert finding(signed, "Cardiomegaly")["state"] == "present"
    with pytest.raises(UserError, match="signed already"):
        document.sign(signed, by="r1", at="2026-11-30T12:00:00Z", meaning="author")
    extended = document.add_addendum(signed, by="r1", at="2026-11-30T13:00:00Z", text="Compared.")
    assert extended["status"] == "addendum" and extended["findings"] == signed["findings"]
    with pytest.raises(UserError, match="not signed yet"):
        document.add_addendum(draft, by="r1", at="2026-11-30T13:00:00Z", text="Compared.")


def test_the_same_reading_is_the_same_bytes():
    first, second = (build("Left effusion.", "Pleural Effusion", seed=3) for _ in range(2))
    assert document.to_bytes(first) == document.to_bytes(second)
    assert document.sha256(first) == document.sha256(json.loads(json.dumps(second)))
    assert document.sha256(build("Left effusion.", "Pleural Effusion", seed=4)) != document.sha256(
        first
    )


def test_what_a_model_may_write_is_taken_as_text():
    hostile = (
        '<img src=x onerror="alert(1)"> \x00\x1b[31m ' + "word " * 2000 + "\ud800 \u202e effusion."
    )
    reading = build(hostile, "<script>, Edema")
    document.check(json.loads(document.to_bytes(reading)))
    assert reading["answer"] == ["Edema"]
    empty = document.CompletionFacts(text="", finish_reason="length", prompt="Find.")
    nothing = document.build(IMAGE, FILMS, empty)
    assert nothing["trace"] == [] and nothing["answer"] == []
    assert "the answer was cut at the length limit" in nothing["warnings"]


def test_a_bad_document_is_refused_without_its_values():
    good = build("Left effusion.", "Pleural Effusion")
    document.check(good)
    secret = "Doe^Jane"
    for change in (
        {"schema": secret}, {"status": secret}, {"seed": secret}, {"seed": True}, {"seed": -1}, {secret: 1},
        {"findings": good["findings"][:13]}, {"findings": good["findings"][::-1]}, {"answer": [secret]},
        {"answer": ["Edema", "Edema"]}, {"answer": ["Edema"]}, {"signed": {"by": secret}}, {"status": "signed"},
        {"image": good["image"] | {"sha256": secret}}, {"report": {secret: ""}}, {"prompt": None}, {"notice": ""},
        {"report": good["report"] | {"heart": secret * 20_000}}, {"trace": good["trace"] * 2},
        {"findings": [good["findings"][0] | {"probability": float("nan")}, *good["findings"][1:]]},
        {"addenda": [{"by": "r", "at": secret, "text": "t"}]},
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            document.check(good | change)
        assert secret not in str(refused.value) and len(str(refused.value)) < 200
    for value in (None, [], "text", 3):
        with pytest.raises(UserError):
            document.check(value)


def test_the_schema_is_that_of_json_schema_2020_12():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    checker = jsonschema.Draft202012Validator
    checker.check_schema(schema.load())
    # The same verdicts, over documents that are broken at every place in turn.
    good = build("Left effusion. Possible edema.", "Pleural Effusion", probabilities={"Edema": 0.5})
    oracle = checker(schema.load())
    for broken in _broken(good):
        assert bool(schema.problems(broken)) == (not oracle.is_valid(broken)), broken


def _broken(value):
    """Copies of a document with one thing changed each, at every place."""
    yield value
    if isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            for item in _broken(value[key]):
                yield value | {key: item}
        yield value | {"more": 1}
    elif isinstance(value, list):
        yield value * 2
        for item in _broken(value[0]) if value else ():
            yield [item, *value[1:]]
    else:
        yield from (None, True, -1, 0.5, 1e9, "x", "x" * 200_000, [], {})


def test_a_schema_with_a_rule_that_is_not_checked_is_refused():
    with pytest.raises(ValueError, match="not checked"):
        schema.problems({}, {"oneOf": []})
