"""A reading as a FHIR R4B bundle: a diagnostic report, an observation a finding, and who or what said so.

Nothing in it is final: research software reports preliminarily, also after a reader has signed. Every resource says
that an artificial intelligence has asserted it (AIAST), and once a reader has signed, that a clinician has, too; the
device stands at what it has said, and not at what a reader has added. The patient is an opaque identifier that the
caller gives, or nobody. `fhir_check.check` holds a bundle to its code sets.
"""

import base64
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

from cxr_jax.errors import UserError
from cxr_jax.outputs import document as documents
from cxr_jax.outputs import fhir_check, sections, told
from cxr_jax.outputs.codes import Coded, Codes, Concept, side_of, state_of, system_of
from cxr_jax.outputs.dicom_source import MANUFACTURER, Source, clean, parse_time
from cxr_jax.outputs.fhir_codes import (
    AI_ASSERTED,
    CLINICIAN_ASSERTED,
    DOCUMENT_SYSTEM,
    IMAGING,
    LONGEST_SUBJECT,
    PARTICIPANTS,
    RADIOLOGY,
    READER_SYSTEM,
    REPORT_CODES,
    SUBJECT_SYSTEM,
)
from cxr_jax.outputs.sr import check_sources


def bundle(
    reading: Mapping[str, Any],
    sources: Sequence[Source] = (),
    *,
    at: str,
    codes: str = "standard",
    subject: str | None = None,
) -> dict[str, Any]:
    """Make the bundle.

    Args:
        reading: a `cxr_reading` document.
        sources: the DICOM films of the reading, in its order; () for pictures, which belong to no imaging study.
        at: when the reading was made or signed, "2026-11-30T12:00:00Z".
        codes: of `codes.CHOICES`.
        subject: an opaque identifier of the patient; no name, and nothing of a header is used in its place.

    Raises:
        UserError: for a document that is none, sources of other films, no time, or a subject that is no identifier.
    """
    documents.check(reading)
    if sources:
        check_sources(reading, sources)
    if subject is not None and not (0 < len(subject) <= LONGEST_SUBJECT and subject.isprintable()):
        raise UserError(f"subject: no identifier of 1 to {LONGEST_SUBJECT} printable characters")
    made_bundle = _as_text(_Bundle(reading, at, Codes(codes), subject, sources).make())
    fhir_check.check(made_bundle)
    return made_bundle


def to_bytes(made_bundle: Mapping[str, Any]) -> bytes:
    """Write a bundle as JSON, indented; the same bundle is the same bytes."""
    return (json.dumps(made_bundle, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _as_text(part: Any) -> Any:
    """Let all strings hold what FHIR's strings may: no control characters, no half characters."""
    if isinstance(part, dict):
        return {name: _as_text(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_as_text(value) for value in part]
    # An empty string is no string of FHIR's, either.
    return (clean(part) or "(empty)") if isinstance(part, str) else part


class _Bundle:
    """One bundle being made: its resources name each other by identifiers that follow from the document."""

    def __init__(
        self,
        reading: Mapping[str, Any],
        at: str,
        codes: Codes,
        subject: str | None,
        sources: Sequence[Source],
    ) -> None:
        self.reading = reading
        self.codes = codes
        self.sources = sources
        time = parse_time(at)
        # Everything that differs in a bundle makes it another one: the films are known, their study may be left out.
        has_study = "study" if sources else "no study"
        settings = f"{time.isoformat()}/{codes.choice}/{subject}/{has_study}"
        self.identity = f"{documents.sha256(reading)}/{settings}"
        self.time = time.strftime("%Y-%m-%dT%H:%M:%SZ")
        # What was seen was so when the film was taken, which may be long ago; the hour has no time zone there.
        day = sources[0].dataset.StudyDate if sources else ""
        self.seen = {"effectiveDateTime": f"{day[:4]}-{day[4:6]}-{day[6:]}"} if day else {}
        labels = [AI_ASSERTED]
        if reading["signed"] is not None:
            labels.append(CLINICIAN_ASSERTED)
        self.meta = {"security": [dict(label) for label in labels]}
        # A reference needs something in it; that nothing is known is said in words.
        self.subject: dict[str, Any] = {"display": "not stated"}
        if subject is not None:
            self.subject = {"identifier": {"system": SUBJECT_SYSTEM, "value": subject}}
        self.entries: list[dict[str, Any]] = []

    def make(self) -> dict[str, Any]:
        # In the order in which they need each other's names.
        device = self._add("device", self._device())
        study = self._add("study", self._study()) if self.sources else None
        # As in SR: what is not mentioned is no observation.
        observations = [
            self._add(f"finding {finding['label']}", self._observation(finding, device, study))
            for finding in self.reading["findings"]
            if finding["state"] != "not_mentioned"
        ]
        report = self._add("report", self._report(observations, study))
        self._add("provenance", self._provenance([report, *observations], device))
        # The report first: who opens the bundle looks for it.
        first = next(
            index for index, entry in enumerate(self.entries) if entry["fullUrl"] == report
        )
        ordered = [self.entries[first], *self.entries[:first], *self.entries[first + 1 :]]
        return {
            "resourceType": "Bundle",
            "id": self._uuid("bundle"),
            "meta": self.meta,
            "identifier": {"system": DOCUMENT_SYSTEM, "value": documents.sha256(self.reading)},
            "type": "collection",
            "timestamp": self.time,
            "entry": ordered,
        }

    def _uuid(self, kind: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"cxr_jax/{kind}/{self.identity}"))

    def _add(self, kind: str, resource: dict[str, Any]) -> str:
        """Put a resource into the bundle, and give the name that others refer to it by."""
        name = self._uuid(kind)
        # Its kind and labels come first, as readers of JSON expect.
        first_elements = {
            "resourceType": resource.pop("resourceType"),
            "id": name,
            "meta": self.meta,
        }
        self.entries.append({"fullUrl": f"urn:uuid:{name}", "resource": first_elements | resource})
        return f"urn:uuid:{name}"

    # ---- Who read what ----

    def _device(self) -> dict[str, Any]:
        # A device is a version of software with one set of weights.
        model = self.reading["model"]
        return {
            "resourceType": "Device",
            "status": "active",
            "manufacturer": MANUFACTURER,
            # The weights are the model: its name may be anybody's.
            "serialNumber": model["weights_sha256"],
            "deviceName": [{"name": model["name"] or "unnamed", "type": "model-name"}],
            "version": [{"value": model["app_version"] or "unknown"}],
            "note": [
                {"text": f"prompt: {self.reading['prompt'] or '(none)'}"},
                {"text": f"seed: {self.reading['seed']}"},
                {"text": f"renderer: {self.reading['image']['renderer']}"},
            ],
        }

    def _study(self) -> dict[str, Any]:
        first = self.sources[0].dataset
        series: dict[str, dict[str, Any]] = {}
        for film in [source.dataset for source in self.sources]:
            # A prior film is of an earlier study: it was read, and is not of this one.
            if film.StudyInstanceUID != first.StudyInstanceUID:
                continue
            modality = {"system": system_of(Concept("", "DCM", "")), "code": film.Modality}
            own = {"uid": film.SeriesInstanceUID, "modality": modality, "instance": []}
            sop_class = {"system": "urn:ietf:rfc:3986", "code": f"urn:oid:{film.SOPClassUID}"}
            series.setdefault(film.SeriesInstanceUID, own)["instance"].append(
                {"uid": film.SOPInstanceUID, "sopClass": sop_class}
            )
        return {
            "resourceType": "ImagingStudy",
            "identifier": [
                {"system": "urn:dicom:uid", "value": f"urn:oid:{first.StudyInstanceUID}"}
            ],
            "status": "available",
            "subject": self.subject,
            "series": list(series.values()),
        }

    # ---- Findings ----

    def _observation(
        self, finding: Mapping[str, Any], device: str, study: str | None
    ) -> dict[str, Any]:
        coded = self._coded(finding)
        observation: dict[str, Any] = {
            "resourceType": "Observation",
            "status": "preliminary",
            "category": [{"coding": [IMAGING]}],
            "code": _both_codes(coded, finding["label"]),
            "subject": self.subject,
            **self.seen,
            "issued": self.time,
            "valueCodeableConcept": _concept(self.codes.state(finding["state"])),
        }
        # The device's word, or a reader's, or both.
        if told.is_of_model(finding):
            observation["device"] = {"reference": device}
        if self.reading["signed"] is not None:
            observation["performer"] = [_reader(self.reading["signed"]["by"])]
        # A picture without a DICOM is of no study that could be named.
        if study is not None:
            observation["derivedFrom"] = [{"reference": study}]
        if coded.site is not None:
            side_word = f"{finding['side']} " if finding["side"] else ""
            observation["bodySite"] = {
                "coding": [_coding(coded.site)],
                "text": f"{side_word}{coded.site.meaning.lower()}",
            }
        components = self._components(finding)
        if components:
            observation["component"] = components
        return observation

    def _components(self, finding: Mapping[str, Any]) -> list[dict[str, Any]]:
        components: list[dict[str, Any]] = []
        if finding["side"] is not None:
            side_word = _concept(self.codes.side(finding["side"]))
            components.append(self._component("laterality", valueCodeableConcept=side_word))
        if finding["probability"] is not None:
            quantity = {
                "value": finding["probability"],
                "unit": "no units",
                "system": "http://unitsofmeasure.org",
                "code": "1",
            }
            components.append(self._component("probability", valueQuantity=quantity))
        # What the model had said, where a reader has changed it.
        for name, value in told.before_review(finding).items():
            before = _concept(getattr(self.codes, name)(value))
            components.append(self._component(name, valueCodeableConcept=before))
        return components

    def _coded(self, finding: Mapping[str, Any]) -> Coded:
        said = told.sentences_of(self.reading, finding)
        return self.codes.finding(finding["label"], said, self.reading["report"].values())

    def _component(self, name: str, **value: Any) -> dict[str, Any]:
        return {"code": _concept(self.codes.said(name)), **value}

    # ---- The report ----

    def _report(self, observations: Sequence[str], study: str | None) -> dict[str, Any]:
        # The text as a person reads it, in the bundle itself: nothing has to be fetched.
        page_bytes = as_html(self.reading).encode()
        impression = self.reading["report"]["impression"].strip()
        report: dict[str, Any] = {
            "resourceType": "DiagnosticReport",
            "status": "preliminary",
            "category": [{"coding": [RADIOLOGY]}],
            "code": {"coding": [REPORT_CODES[1 if not self._has_lateral() else 2]]},
            "subject": self.subject,
            **self.seen,
            "issued": self.time,
            # With what was added since: a client may show the conclusion alone.
            "conclusion": " ".join(
                [
                    self.reading["notice"],
                    impression or documents.title_of(self.reading),
                    *documents.addenda_of(self.reading),
                ]
            ),
            "presentedForm": [
                {
                    "contentType": "text/html",
                    "language": "en",
                    "data": base64.b64encode(page_bytes).decode(),
                    "size": len(page_bytes),
                    # SHA-1, because FHIR says so; it guards against accidents alone.
                    "hash": base64.b64encode(hashlib.sha1(page_bytes).digest()).decode(),
                    "title": "Reading of a chest radiograph",
                }
            ],
        }
        # Empty lists are no FHIR.
        if observations:
            report["result"] = [{"reference": name} for name in observations]
        if study is not None:
            report["imagingStudy"] = [{"reference": study}]
        # Hedges and denials are observations, and no conclusions.
        present = [
            _both_codes(self._coded(finding), finding["label"])
            for finding in self.reading["findings"]
            if finding["state"] == "present"
        ]
        if present:
            report["conclusionCode"] = present
        return report

    def _has_lateral(self) -> bool:
        return any(film["role"] == "lateral" for film in self.reading["other_images"])

    def _provenance(self, targets: Sequence[str], device: str) -> dict[str, Any]:
        # The reader verifies, and is not the author: the draft was the device's.
        agent_list = [self._agent("author", "Author", {"reference": device})]
        agent_list += [
            self._agent("verifier", "Verifier", _reader(reader))
            for reader in told.readers_of(self.reading)
        ]
        source = {
            "identifier": {"system": DOCUMENT_SYSTEM, "value": documents.sha256(self.reading)}
        }
        return {
            "resourceType": "Provenance",
            "target": [{"reference": target} for target in targets],
            "recorded": self.time,
            "agent": agent_list,
            "entity": [{"role": "source", "what": source}],
        }

    def _agent(self, code: str, display: str, agent_reference: dict[str, Any]) -> dict[str, Any]:
        coding = {"system": PARTICIPANTS, "code": code, "display": display}
        return {"type": {"coding": [coding]}, "who": agent_reference}


def _coding(concept: Concept) -> dict[str, str]:
    return {"system": system_of(concept), "code": concept.code, "display": concept.meaning}


def _both_codes(coded: Coded, label: str) -> dict[str, Any]:
    """A finding with our own code beside the standard one: that says which of the 14 this is, whatever that covers."""
    both_codes = dict.fromkeys([coded.finding, coded.local])
    return {"coding": [_coding(concept) for concept in both_codes], "text": label}


def _reader(handle: str) -> dict[str, Any]:
    return {"identifier": {"system": READER_SYSTEM, "value": handle}}


def _concept(concept: Concept) -> dict[str, Any]:
    return {"coding": [_coding(concept)], "text": concept.meaning}


def as_html(reading: Mapping[str, Any]) -> str:
    """Write the report as a page without scripts, styles or links; all text in it is escaped."""
    # Escaped by markupsafe, whatever a model or a reader has written.
    page_rows = [
        f"<dt>{name}</dt><dd>{escape(reading['report'][key])}</dd>"
        for key, name in sections.FIELDS.items()
        if reading["report"][key].strip()
    ]
    page_rows += [
        f"<dt>Addendum</dt><dd>{escape(entry['text'])}</dd>" for entry in reading["addenda"]
    ]
    return clean(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Reading</title></head><body>'
        f"<p><strong>{escape(reading['notice'])}</strong></p><dl>{''.join(page_rows)}</dl></body></html>"
    )


# ---- Reading one back ----


def read_states(made_bundle: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Read what a bundle of ours says: label -> (state, side), of the labels that it mentions."""
    found = {}
    for entry in made_bundle["entry"]:
        resource = entry["resource"]
        if resource["resourceType"] != "Observation":
            continue
        side_word = None
        for component in resource.get("component", ()):
            if component["code"]["coding"][0]["code"] in ("272741003", "LATERALITY"):
                side_word = side_of(component["valueCodeableConcept"]["coding"][0]["code"])
        state = state_of(resource["valueCodeableConcept"]["coding"][0]["code"])
        found[resource["code"]["text"]] = (state or "", side_word)
    return found
