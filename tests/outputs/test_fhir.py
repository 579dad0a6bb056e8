"""FHIR bundles: they say what the document says, every resource tells what made it, and broken ones are refused."""

import base64
import copy
import json
import shutil
import subprocess

import pytest
from places import NODE_MODULES
from said import AT, said

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs import document, fhir, fhir_check
from cxr_jax.outputs.codes import CHOICES


@pytest.fixture(scope="module")
def bundle(made):
    return fhir.bundle(made.signed, [made.source], at=AT, subject="S-1")


def resources(bundle, kind):
    return [
        entry["resource"] for entry in bundle["entry"] if entry["resource"]["resourceType"] == kind
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_bundle_says_what_its_document_says(made, choice):
    for reading in made.readings.values():
        for sources in ([made.source], []):
            written = fhir.bundle(reading, sources, at=AT, codes=choice)
            assert fhir.read_states(written) == said(reading)
            fhir_check.check_structure(written)
            assert fhir.to_bytes(written) == fhir.to_bytes(
                fhir.bundle(reading, sources, at=AT, codes=choice)
            )


def test_every_resource_is_labelled_and_nothing_is_final(made, bundle):
    draft = fhir.bundle(made.draft, [made.source], at=AT)
    for written, wanted in ((draft, ["AIAST"]), (bundle, ["AIAST", "CLINAST_AIRPT"])):
        for resource in (written, *(entry["resource"] for entry in written["entry"])):
            assert [label["code"] for label in resource["meta"]["security"]] == wanted
        [report] = resources(written, "DiagnosticReport")
        assert report["status"] == "preliminary"
        assert {row["status"] for row in resources(written, "Observation")} == {"preliminary"}
        assert b"Not for diagnosis" in base64.b64decode(report["presentedForm"][0]["data"])
    [provenance] = resources(bundle, "Provenance")
    assert [agent["type"]["coding"][0]["code"] for agent in provenance["agent"]] == [
        "author",
        "verifier",
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_reader_changed_shows_what_the_model_had_said(made, choice):
    written = fhir.bundle(made.signed, [made.source], at=AT, codes=choice)
    changed, without_device = {}, set()
    for row in resources(written, "Observation"):
        before = {
            component["code"]["coding"][0]["code"]: component["valueCodeableConcept"]["text"]
            for component in row.get("component", ())
            if component["code"]["coding"][0]["code"] in ("MODELSTATE", "MODELSIDE")
        }
        if before:
            changed[row["code"]["text"]] = before
        if "device" not in row:
            without_device.add(row["code"]["text"])
        assert row["performer"][0]["identifier"]["value"] == "r1"
    assert changed == {
        "Pleural Effusion": {"MODELSTATE": "Present", "MODELSIDE": "Left"},
        "Pneumonia": {"MODELSIDE": "Right"},
        "Cardiomegaly": {"MODELSTATE": "Not said"},
    }
    # No device is named for what none has found, and no reader for a draft.
    assert without_device == {"Cardiomegaly"}
    drafted = fhir.bundle(made.draft, [made.source], at=AT, codes=choice)
    for row in resources(drafted, "Observation"):
        assert "device" in row and "performer" not in row


def test_what_was_seen_was_so_when_the_film_was_taken(made, bundle):
    day = made.source.dataset.StudyDate
    for kind in ("Observation", "DiagnosticReport"):
        for row in resources(bundle, kind):
            assert row["effectiveDateTime"].replace("-", "") == day and row["issued"] == AT
        # Of a picture nobody knows when.
        for row in resources(fhir.bundle(made.draft, at=AT), kind):
            assert "effectiveDateTime" not in row and row["issued"] == AT
    [study] = resources(bundle, "ImagingStudy")
    assert study["series"][0]["modality"]["code"] == made.source.dataset.Modality == "DX"
    other = made.source._replace(dataset=copy.deepcopy(made.source.dataset))
    other.dataset.Modality = "CR"
    [study] = resources(fhir.bundle(made.draft, [other], at=AT), "ImagingStudy")
    assert study["series"][0]["modality"]["code"] == "CR"
    # With a study or without one, it is another bundle.
    assert fhir.bundle(made.draft, at=AT)["id"] != fhir.bundle(made.draft, [other], at=AT)["id"]


def test_a_conclusion_says_which_of_the_14_it_is(bundle):
    [report] = resources(bundle, "DiagnosticReport")
    for concept in report["conclusionCode"]:
        # "Enlarged" alone would conclude nothing.
        assert concept["coding"][-1]["system"].startswith("urn:oid:")
        assert concept["text"] in CHEXPERT_14


def test_strings_are_strings_of_fhir(made):
    facts = document.CompletionFacts(
        text="<think>Left effusion\x07 \x1b[31m.</think><answer>Edema</answer>",
        finish_reason="stop",
        prompt="\x07 Find\ud800.",
    )
    reading = document.build(document.ImageFacts(sha256="a" * 64), document.ModelFacts(
        name="stub\x00", weights_sha256="b" * 64), facts)  # fmt: skip
    text = fhir.to_bytes(fhir.bundle(reading, at=AT)).decode()
    assert not any(f"\\u{code:04x}" in text for code in (0, 7, 0x1B)) and "Find" in text


def test_nothing_of_a_patient_is_in_it_but_what_the_caller_gives(made, bundle):
    text = fhir.to_bytes(bundle).decode()
    assert "PHANTOM" not in text and '"S-1"' in text
    without = fhir.bundle(made.draft, [made.source], at=AT)
    assert "S-1" not in fhir.to_bytes(without).decode()
    for subject in ("", "x" * 65, "a\nb"):
        with pytest.raises(UserError, match="subject"):
            fhir.bundle(made.draft, [made.source], at=AT, subject=subject)


def test_model_text_in_the_page_is_escaped(made):
    facts = document.CompletionFacts(
        text="<think>Left effusion <script>alert(1)</script> & more.</think><answer>Edema</answer>",
        finish_reason="stop",
        prompt="Find.",
    )
    reading = document.build(document.ImageFacts(sha256="a" * 64), document.ModelFacts(
        name="stub", weights_sha256="b" * 64), facts)  # fmt: skip
    page = fhir.as_html(reading)
    assert "<script" not in page and "&lt;script&gt;" in page


def _change(bundle, kind, change, number=0):
    changed = copy.deepcopy(bundle)
    change(resources(changed, kind)[number])
    return changed


def mutated(bundle):
    """Bundles that are each broken at one place: name -> (bundle, whether the npm validator sees it, too)."""

    def set_in(kind, value, *path):
        def change(resource):
            for step in path[:-1]:
                resource = resource[step]
            resource[path[-1]] = value

        return _change(bundle, kind, change)

    def without(kind, name):
        return _change(bundle, kind, lambda resource: resource.pop(name))

    other_coding = {
        "system": "http://snomed.info/sct",
        "code": "36118008",
        "display": "Pneumothorax",
    }
    yield "report's status is none", set_in("DiagnosticReport", "nonsense", "status"), True
    yield "report is final", set_in("DiagnosticReport", "final", "status"), False
    yield "observation's status is none", set_in("Observation", "done", "status"), True
    yield "observation is final", set_in("Observation", "final", "status"), False
    yield "a field that FHIR has not", set_in("Observation", "x", "diagnosis"), True
    yield "a field that we do not write", set_in("Observation", [{"text": "x"}], "note"), False
    yield "no code", without("Observation", "code"), True
    yield (
        "a code of another finding",
        set_in("Observation", other_coding, "code", "coding", 0),
        False,
    )
    yield "a finding of none of the 14", set_in("Observation", "Scoliosis", "code", "text"), False
    yield (
        "a state that is none",
        set_in("Observation", "1234", "valueCodeableConcept", "coding", 0, "code"),
        False,
    )
    yield "a display of another code", set_in(
        "Observation", "Absent", "valueCodeableConcept", "coding", 0, "display"), False  # fmt: skip
    yield (
        "a site that is none",
        set_in("Observation", "80891009", "bodySite", "coding", 0, "code"),
        False,
    )
    yield "a category of laboratories", set_in(
        "Observation", "laboratory", "category", 0, "coding", 0, "code"), False  # fmt: skip
    yield "a label lost", set_in("Observation", {}, "meta"), False
    yield "a label of the report lost", set_in("DiagnosticReport", [], "meta", "security"), False
    yield (
        "a device that is not there",
        set_in("Observation", {"reference": "urn:uuid:x"}, "device"),
        False,
    )
    yield "a result that is not there", set_in(
        "DiagnosticReport", "urn:uuid:x", "result", 0, "reference"), False  # fmt: skip
    yield "a page that was changed", set_in(
        "DiagnosticReport", "PGh0bWw+", "presentedForm", 0, "data"), False  # fmt: skip
    yield (
        "a page of scripts",
        set_in("DiagnosticReport", "text/javascript", "presentedForm", 0, "contentType"),
        False,
    )
    yield "a conclusion too few", _change(
        bundle, "DiagnosticReport", lambda report: report["conclusionCode"].pop()), False  # fmt: skip
    yield (
        "a patient by name",
        set_in("DiagnosticReport", {"display": "Doe, Jane"}, "subject"),
        False,
    )
    yield "a reader who is not named", _change(
        bundle, "Provenance", lambda provenance: provenance["agent"].pop()), False  # fmt: skip
    yield "a time that is none", set_in("DiagnosticReport", "yesterday", "issued"), False
    yield "a time of nobody's zone", set_in(
        "Observation", "2026-11-30T12:00:00", "effectiveDateTime"), False  # fmt: skip
    yield "an observation of nobody", without("Observation", "performer"), False
    yield "a finding of no device's", without("Observation", "device"), False
    yield "a performer by name", set_in(
        "Observation", {"display": "Doe, Jane"}, "performer", 0), False  # fmt: skip
    yield "a bundle to be executed", bundle | {"type": "transaction"}, False
    yield "a resource twice", bundle | {"entry": [*bundle["entry"], bundle["entry"][0]]}, False
    yield "a resource less", bundle | {"entry": bundle["entry"][:-1]}, False
    yield "no bundle", {"resourceType": "Patient"}, False


def test_broken_bundles_are_refused_by_our_own_check(bundle):
    fhir_check.check(bundle)
    fhir_check.check(json.loads(fhir.to_bytes(bundle)))
    broken = list(mutated(bundle))
    assert len(broken) >= 20
    for name, changed, _ in broken:
        with pytest.raises(UserError) as refused:
            fhir_check.check(changed)
        assert "Doe" not in str(refused.value), name
    for value in (None, [], {}, "text", {"resourceType": "Bundle"}):
        with pytest.raises(UserError):
            fhir_check.check(value)


_VALIDATOR = """
const {Fhir} = require('fhir');
const checker = new Fhir();
for (const line of require('fs').readFileSync(0, 'utf8').split('\\n').filter(Boolean))
  console.log(checker.validate(JSON.parse(line), {errorOnUnexpected: true}).valid);
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE_MODULES / "fhir").is_dir(),
    reason="npm's fhir is absent (bash launch/test_tools.sh)",
)
def test_the_validator_of_npm_agrees(made, bundle):
    good = [
        fhir.bundle(reading, sources, at=AT, codes=choice)
        for reading in made.readings.values()
        for sources in ([made.source], [])
        for choice in CHOICES
    ]
    bad = [changed for _, changed, is_seen in mutated(bundle) if is_seen]
    checked = subprocess.run(
        ["node", "-e", _VALIDATOR],
        input="\n".join(map(json.dumps, [*good, *bad])),
        env={"NODE_PATH": str(NODE_MODULES), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert checked.stdout.split() == ["true"] * len(good) + ["false"] * len(bad)
