"""Rules of our bundles that models of FHIR in Python do not check: code sets, references, labels, hashes.

`fhir.resources` takes any string as a status. A server takes it, too, or not, and a wrong code in a record is worse
than a refused one. So what we write, and what we read back, is held to what this file lists; nothing else may be in it.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs import fhir_codes
from cxr_jax.outputs.codes import (
    CHOICES,
    Codes,
    Concept,
    label_of,
    load,
    side_of,
    state_of,
    system_of,
)

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_INSTANT = re.compile(_DAY.pattern + r"T\d{2}:\d{2}:\d{2}Z")
# Resource -> its elements: those that must be there, and those that may.
_ELEMENTS = {
    "Device": ("status manufacturer serialNumber deviceName version", "note"),
    "ImagingStudy": ("identifier status subject series", ""),
    "Observation": (
        "status category code subject issued valueCodeableConcept",
        "effectiveDateTime device performer derivedFrom bodySite component",
    ),
    "DiagnosticReport": (
        "status category code subject issued conclusion presentedForm",
        "effectiveDateTime result imagingStudy conclusionCode",
    ),
    "Provenance": ("target recorded agent entity", ""),
}
# Research software: no other status, whatever FHIR allows.
_STATUS = {
    "Device": "active",
    "ImagingStudy": "available",
    "Observation": "preliminary",
    "DiagnosticReport": "preliminary",
}
# How many of a kind a bundle has.
_COUNTS = {
    "Device": (1, 1),
    "ImagingStudy": (0, 1),
    "Observation": (0, 14),
    "DiagnosticReport": (1, 1),
    "Provenance": (1, 1),
}


def check(bundle: object) -> None:
    """Refuse a bundle that breaks a rule.

    Raises:
        UserError: that names the resource and the rule, and holds nothing of the text.
    """
    problem = next(problems(bundle), None)
    if problem is not None:
        raise UserError(f"FHIR bundle: {problem}")


def problems(bundle: object) -> Iterator[str]:
    """Yield what is wrong with a bundle."""
    try:
        yield from _problems(bundle)
    # Whatever is not where it should be: the shape itself is wrong.
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, binascii.Error) as error:
        yield f"an element is missing or of another kind ({type(error).__name__})"


def check_structure(bundle: Mapping[str, Any]) -> None:
    """Hold a bundle against FHIR R4B's own structure, by `fhir.resources`. Raises UserError."""
    # Loaded late: it takes seconds, and who only writes does not need it.
    from fhir.resources.R4B.bundle import Bundle

    try:
        Bundle.model_validate(bundle)
    except ValueError:
        # Its message holds what stands in the bundle.
        raise UserError("FHIR bundle: no bundle of FHIR R4B") from None


def _problems(bundle: Any) -> Iterator[str]:
    if not isinstance(bundle, dict) or bundle["resourceType"] != "Bundle":
        yield "no Bundle"
        return
    # A field that we do not write may hold anything, a patient's name among others.
    allowed = {"resourceType", "id", "meta", "identifier", "type", "timestamp", "entry"}
    if set(bundle) != allowed:
        yield "Bundle: elements missing, or others"
    if bundle["type"] != "collection" or not _INSTANT.fullmatch(bundle["timestamp"]):
        yield "Bundle: type or timestamp"
    # Entries name each other by their full URLs.
    resources = [entry["resource"] for entry in bundle["entry"]]
    names = [entry["fullUrl"] for entry in bundle["entry"]]
    if len(set(names)) < len(names):
        yield "Bundle: two entries of one name"
    for kind, (least, most) in _COUNTS.items():
        if not least <= sum(resource["resourceType"] == kind for resource in resources) <= most:
            yield f"Bundle: not {least} to {most} of {kind}"
    for resource, name in zip(resources, names, strict=True):
        if name != f"urn:uuid:{resource['id']}":
            yield f"{resource['resourceType']}: its name is not its id"
        yield from _of_resource(resource, bundle)
    # What points somewhere must point into the bundle: nothing is to be fetched.
    yield from _of_references(bundle, dict(zip(names, resources, strict=True)))
    yield from _of_report(bundle, dict(zip(names, resources, strict=True)))


# ---- Each resource ----


def _of_resource(resource: dict[str, Any], bundle: dict[str, Any]) -> Iterator[str]:
    kind = resource["resourceType"]
    if kind not in _ELEMENTS:
        yield "Bundle: a resource of a kind that we do not write"
        return
    # Optional ones are optional for us: FHIR has many more.
    required, optional = (set(names.split()) for names in _ELEMENTS[kind])
    given = set(resource) - {"resourceType", "id", "meta"}
    if required - given or given - required - optional:
        yield f"{kind}: elements missing, or others"
    if kind in _STATUS and resource["status"] != _STATUS[kind]:
        yield f"{kind}: status"
    # All of one bundle carry the same labels, and every one of them that of the machine.
    if (
        resource["meta"] != bundle["meta"]
        or resource["meta"]["security"][0] != fhir_codes.AI_ASSERTED
    ):
        yield f"{kind}: meta.security without AIAST"
    if resource["meta"]["security"][1:] not in ([], [fhir_codes.CLINICIAN_ASSERTED]):
        yield f"{kind}: meta.security"
    for name, pattern in (
        ("effectiveDateTime", _DAY),
        ("issued", _INSTANT),
        ("recorded", _INSTANT),
    ):
        if name in resource and not pattern.fullmatch(resource[name]):
            yield f"{kind}: {name}"
    if "subject" in resource:
        yield from _of_subject(kind, resource["subject"])
    if kind == "Observation":
        yield from _of_observation(resource, is_signed=len(resource["meta"]["security"]) == 2)
    if kind == "Provenance":
        yield from _of_provenance(resource, is_signed=len(resource["meta"]["security"]) == 2)


def _of_subject(kind: str, subject: dict[str, Any]) -> Iterator[str]:
    if subject == {"display": "not stated"}:
        return
    identifier = subject.get("identifier", {})
    # No name, no reference: nothing that says who it is beyond an opaque identifier.
    if set(subject) != {"identifier"} or identifier.get("system") != fhir_codes.SUBJECT_SYSTEM:
        yield f"{kind}: subject"


def _of_observation(resource: dict[str, Any], is_signed: bool) -> Iterator[str]:
    label = resource["code"]["text"]
    if label not in CHEXPERT_14:
        yield "Observation: code is none of the 14 labels"
        return
    if resource["category"] != [{"coding": [fhir_codes.IMAGING]}]:
        yield "Observation: category"
    for coding in resource["code"]["coding"]:
        if _label_of(coding) != label:
            yield "Observation: a code of another finding"
    if not _is_coded(resource["valueCodeableConcept"], "states"):
        yield "Observation: value"
    if "bodySite" in resource and _coding(resource["bodySite"]) not in _sites():
        yield "Observation: bodySite"
    for component in resource.get("component", ()):
        yield from _of_component(component)
    # A reader stands for what is signed, and for nothing else.
    if ("performer" in resource) != is_signed or not all(
        map(_is_reader, resource.get("performer", ()))
    ):
        yield "Observation: performer"
    # The device for what it said, and not for what is new.
    not_said = {Codes(choice).said("not_said") for choice in CHOICES}
    codes_of_states = [
        _code(component["valueCodeableConcept"])
        for component in resource.get("component", ())
        if component["code"]["coding"][0]["code"] == "MODELSTATE"
    ]
    if ("device" in resource) == any(concept.code in codes_of_states for concept in not_said):
        yield "Observation: device"


def _is_reader(reference: dict[str, Any]) -> bool:
    identifier = reference.get("identifier", {})
    return set(reference) == {"identifier"} and identifier["system"] == fhir_codes.READER_SYSTEM


def _of_component(component: dict[str, Any]) -> Iterator[str]:
    # In either choice of codes.
    kinds = {
        (concept.code, system_of(concept)): name
        for choice in CHOICES
        for name in ("laterality", "probability", "model_state", "model_side")
        for concept in [Codes(choice).said(name)]
    }
    kind = kinds.get(_coding(component["code"])[:2])
    if kind == "probability":
        quantity = component["valueQuantity"]
        is_share = isinstance(quantity["value"], (int, float)) and 0 <= quantity["value"] <= 1
        if not is_share or (quantity["system"], quantity["code"]) != (
            "http://unitsofmeasure.org",
            "1",
        ):
            yield "Observation: probability"
    elif kind == "laterality":
        value = component["valueCodeableConcept"]
        if not _is_coded(value, "sides") or not side_of(_code(value)):
            yield "Observation: laterality"
    elif kind in ("model_state", "model_side"):
        value, table = component["valueCodeableConcept"], f"{kind.removeprefix('model_')}s"
        if not _is_coded(value, table) and _code(value) != Codes().said("not_said").code:
            yield "Observation: what was said before review"
    else:
        yield "Observation: a component that we do not write"


def _of_provenance(resource: dict[str, Any], is_signed: bool) -> Iterator[str]:
    # The device is always the author.
    agents = [agent["type"]["coding"][0] for agent in resource["agent"]]
    if any(agent["system"] != fhir_codes.PARTICIPANTS for agent in agents):
        yield "Provenance: agent"
    # Who signed is named exactly where the labels say that somebody did; further readers may have added.
    readers = [agent["code"] for agent in agents][1:]
    if agents[0]["code"] != "author" or bool(readers) != is_signed or set(readers) - {"verifier"}:
        yield "Provenance: agents and labels do not agree"
    if resource["entity"][0]["role"] != "source":
        yield "Provenance: entity"


# ---- What holds them together ----


def _of_references(bundle: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> Iterator[str]:
    # Element -> what it may name.
    kinds = {
        "device": "Device",
        "derivedFrom": "ImagingStudy",
        "imagingStudy": "ImagingStudy",
        "result": "Observation",
    }
    for entry in bundle["entry"]:
        resource = entry["resource"]
        for element, kind in kinds.items():
            named = resource.get(element, [])
            for reference in named if isinstance(named, list) else [named]:
                target = by_name.get(reference["reference"])
                if target is None or target["resourceType"] != kind:
                    yield f"{resource['resourceType']}: {element} leads nowhere"
        for target_reference in resource.get("target", ()):
            if target_reference["reference"] not in by_name:
                yield "Provenance: target leads nowhere"


def _of_report(bundle: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> Iterator[str]:
    report = next(
        resource_item
        for resource_item in by_name.values()
        if resource_item["resourceType"] == "DiagnosticReport"
    )
    observations = [
        resource_item
        for resource_item in by_name.values()
        if resource_item["resourceType"] == "Observation"
    ]
    # Each finding once, and none that is not in the report.
    labels = [observation["code"]["text"] for observation in observations]
    listed = [reference["reference"] for reference in report.get("result", ())]
    all_names = {
        name
        for name, resource_item in by_name.items()
        if resource_item["resourceType"] == "Observation"
    }
    if len(set(labels)) < len(labels) or len(set(listed)) < len(listed) or set(listed) != all_names:
        yield "DiagnosticReport: its results are not the observations"
    if report["category"] != [{"coding": [fhir_codes.RADIOLOGY]}]:
        yield "DiagnosticReport: category"
    if report["code"]["coding"][0] not in fhir_codes.REPORT_CODES.values():
        yield "DiagnosticReport: code"
    # What is concluded is what is present, and nothing else.
    present = {
        observation["code"]["text"]
        for observation in observations
        if state_of(_code(observation["valueCodeableConcept"])) == "present"
    }
    concluded = [_label_of(concept["coding"][0]) for concept in report.get("conclusionCode", ())]
    if set(concluded) != present or len(concluded) != len(present):
        yield "DiagnosticReport: conclusionCode"
    yield from _of_form(report["presentedForm"][0])


def _of_form(presented_form: dict[str, Any]) -> Iterator[str]:
    page_bytes = base64.b64decode(presented_form["data"], validate=True)
    if presented_form["contentType"] != "text/html" or presented_form["size"] != len(page_bytes):
        yield "DiagnosticReport: presentedForm"
    if presented_form["hash"] != base64.b64encode(hashlib.sha1(page_bytes).digest()).decode():
        yield "DiagnosticReport: hash of presentedForm"
    if b"Not for diagnosis" not in page_bytes:
        yield "DiagnosticReport: presentedForm without the notice"


# ---- Codes ----


def _coding(concept: dict[str, Any]) -> tuple[str, str, str]:
    coding = concept["coding"][0]
    return coding["code"], coding["system"], coding["display"]


def _code(concept: dict[str, Any]) -> str:
    return concept["coding"][0]["code"]


def _label_of(coding: dict[str, str]) -> str | None:
    """The label of a coding, if its system is one that we write."""
    # By its system first: the same digits mean other things elsewhere.
    for designator in ("SCT", "DCM", load()["scheme"]["designator"]):
        if coding["system"] == system_of(Concept("", designator, "")):
            return label_of(coding["code"], designator)
    return None


def _is_coded(concept: dict[str, Any], table: str) -> bool:
    """Whether a concept is one of a table, in either choice, with its own display."""
    known = {
        (found.code, system_of(found), found.meaning)
        for choice in CHOICES
        for name in load()[table]
        for found in [Codes(choice).state(name) if table == "states" else Codes(choice).side(name)]
    }
    return _coding(concept) in known


def _sites() -> set[tuple[str, str, str]]:
    own_scheme = load()["scheme"]["designator"]
    found = set()
    for name, entry in load()["sites"].items():
        for concept in (
            Concept(entry["code"], entry["scheme"], entry["meaning"]),
            Concept(name.upper(), own_scheme, entry["meaning"]),
        ):
            found.add((concept.code, system_of(concept), concept.meaning))
    return found
