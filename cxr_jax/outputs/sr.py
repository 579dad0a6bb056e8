"""A reading as DICOM SR: findings as TID 1500 (Comprehensive SR), and its sentences as a Basic Text SR beside it.

A group (TID 1501) for each finding that the reading mentions: what it is, where, whether it is there, the model's own
probability, by which algorithm, in which image. Nothing is final and nothing is verified: these are a device's
observations until a reader signs, and a research reader's afterwards. Same document, same source, same time: same bytes
and same UIDs, so an archive that gets it twice has it once.
"""

import copy
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr.coding import CodedConcept
from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from cxr_jax.errors import UserError
from cxr_jax.outputs import document as documents
from cxr_jax.outputs import sections
from cxr_jax.outputs.codes import Codes, Concept, label_of, scheme, side_of, state_of
from cxr_jax.outputs.dicom_source import (
    MANUFACTURER,
    Source,
    as_bytes,
    clean,
    derive_uid,
    parse_time,
    stamp,
)

# Series numbers that a modality does not use.
SERIES_NUMBER = 9001
SERIES_DESCRIPTION = "AI draft, research use only"
SIGNED_DESCRIPTION = "Reviewed reading, research use only"
_LONG = 64  # characters of an LO


def write(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    *,
    at: str,
    codes: str = "standard",
    verifying_organisation: str | None = None,
) -> bytes:
    """Write the findings as a Comprehensive SR.

    Args:
        reading: a `cxr_reading` document.
        sources: the film that is asked about, then those that were read with it.
        at: when the reading was made or signed, "2026-11-30T12:00:00Z".
        codes: of `codes.CHOICES`.
        verifying_organisation: who answers for the reader's signature; without it a signed reading stays unverified.

    Returns:
        The file's bytes.

    Raises:
        UserError: for a document that is none, sources of other films, or no time.
    """
    return as_bytes(findings_dataset(reading, sources, at, Codes(codes), verifying_organisation))


def write_text(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    *,
    at: str,
    codes: str = "standard",
    verifying_organisation: str | None = None,
) -> bytes:
    """Write the report and the reasoning, sentence by sentence, as a Basic Text SR. Arguments as for `write`."""
    return as_bytes(text_dataset(reading, sources, at, Codes(codes), verifying_organisation))


# ---- Findings: TID 1500 ----


def findings_dataset(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    at: str,
    codes: Codes,
    verifying_organisation: str | None = None,
) -> Dataset:
    """Make the Comprehensive SR; arguments as for `write`."""
    # Copies: the library puts more into what it is given.
    identity = _identify(reading, sources, at, codes)
    evidence = [copy.deepcopy(source.dataset) for source in sources]
    # What is not mentioned is no observation: it is left out, and not "absent".
    groups = [
        _group(reading, finding, evidence[0], identity, codes)
        for finding in reading["findings"]
        if finding["state"] != "not_mentioned"
    ]
    report = sr.MeasurementReport(
        observation_context=_observers(reading, identity),
        procedure_reported=_code(codes.said("procedure")),
        imaging_measurements=groups or None,
        title=Code("126000", "DCM", "Imaging Measurement Report"),
    )
    # The findings stay those that were signed: whoever reads them must see what was corrected since.
    report[0].ContentSequence.extend(
        _text(Code("121106", "DCM", "Comment"), text, "CONTAINS")
        for text in documents.addenda_of(reading)
    )
    dataset = sr.ComprehensiveSR(
        content=report,
        sop_instance_uid=derive_uid("findings", identity),
        instance_number=1,
        **_common(reading, evidence, identity, verifying_organisation),
    )
    return _finish(dataset, evidence[0], reading, at)


def _group(
    reading: Mapping[str, Any],
    finding: Mapping[str, Any],
    image: Dataset,
    identity: str,
    codes: Codes,
) -> sr.MeasurementsAndQualitativeEvaluations:
    """TID 1501: one finding."""
    label = finding["label"]
    # Its sentences say which kind of a group it is.
    coded = codes.finding(label, sentences_of(reading, finding))
    # Only what is there, or may be, has a side in a document.
    side_concept = None if finding["side"] is None else codes.side(finding["side"])
    evaluations = [
        sr.QualitativeEvaluation(
            _code(codes.said("presence")), _code(codes.state(finding["state"]))
        )
    ]
    # A side needs a site to be the side of; where there is none it is said by itself.
    if coded.site is None and side_concept is not None:
        evaluations.append(
            sr.QualitativeEvaluation(_code(codes.said("laterality")), _code(side_concept))
        )
    # What a reader has changed shows, as what it was (IHE AIRA: accept, modify, reject).
    if finding["model_state"] not in (finding["state"], "not_mentioned"):
        evaluations.append(
            sr.QualitativeEvaluation(
                _code(codes.said("model_state")), _code(codes.state(finding["model_state"]))
            )
        )
    # Its own code, so that nobody takes it for a probability of disease.
    measurements = []
    if finding["probability"] is not None:
        measurements.append(
            sr.Measurement(
                name=_code(codes.said("probability")),
                value=finding["probability"],
                unit=Code("1", "UCUM", "no units"),
            )
        )
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=derive_uid("finding", label, identity), identifier=label
        ),
        finding_type=_code(coded.finding),
        algorithm_id=_algorithm(reading),
        finding_sites=None
        if coded.site is None
        else [
            sr.FindingSite(
                _code(coded.site), laterality=None if side_concept is None else _code(side_concept)
            )
        ],
        measurements=measurements or None,
        qualitative_evaluations=evaluations,
        source_images=[sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)],
    )


def sentences_of(reading: Mapping[str, Any], finding: Mapping[str, Any]) -> list[str]:
    """Give the text that speaks of a finding: sentences of the trace, once signed the fields of the report."""
    is_changed = finding["state"] != finding["model_state"]
    if reading["status"] != "draft" or is_changed:
        return [text for text in reading["report"].values() if text]
    # What the model said, as long as nobody else has.
    by_number = {sentence["n"]: sentence["text"] for sentence in reading["trace"]}
    return [by_number[number] for number in finding["sentences"]]


def _algorithm(reading: Mapping[str, Any]) -> sr.AlgorithmIdentification:
    """TID 4019: which model, and all that its words follow from."""
    model = reading["model"]
    return sr.AlgorithmIdentification(
        name=clean(model["name"]) or "unnamed",
        version=clean(model["app_version"]),
        family=Code("123110", "DCM", "Artificial Intelligence"),
        manufacturer=MANUFACTURER,
        parameters=[
            f"weights sha256 {model['weights_sha256']}",
            f"renderer {clean(reading['image']['renderer'])}",
            f"seed {reading['seed']}",
            f"prompt {clean(reading['prompt'])}",
        ],
    )


# ---- Sentences: Basic Text SR ----


def text_dataset(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    at: str,
    codes: Codes,
    verifying_organisation: str | None = None,
) -> Dataset:
    """Make the Basic Text SR; arguments as for `write`."""
    identity = _identify(reading, sources, at, codes)
    evidence = [copy.deepcopy(source.dataset) for source in sources]
    # Notice first: a viewer that cuts long documents cuts the end.
    root_container = sr.ContainerContentItem(
        name=Code("18748-4", "LN", "Diagnostic Imaging Report")
    )
    root_container.ContentSequence = sr.ContentSequence(
        [
            *_observers(reading, identity),
            _text(Code("121106", "DCM", "Comment"), reading["notice"], "CONTAINS"),
            *_chapter(
                Code("121070", "DCM", "Findings"),
                Code("121071", "DCM", "Finding"),
                [
                    f"{name}: {reading['report'][key]}"
                    for key, name in sections.FIELDS.items()
                    if reading["report"][key].strip()
                ],
            ),
            *_chapter(
                Code("REASONING", scheme()["designator"], "Reasoning of the model"),
                Code("121071", "DCM", "Finding"),
                [f"{sentence['n']}. {sentence['text']}" for sentence in reading["trace"]],
            ),
            *_chapter(
                Code("121076", "DCM", "Conclusions"),
                Code("121077", "DCM", "Conclusion"),
                [documents.title_of(reading), *documents.addenda_of(reading)],
            ),
        ],
        is_sr=True,
    )
    dataset = sr.EnhancedSR(
        content=root_container,
        sop_instance_uid=derive_uid("sentences", identity),
        instance_number=2,
        **_common(reading, evidence, identity, verifying_organisation),
    )
    # The same tree, of text alone, which is what the simplest of the three classes holds.
    dataset.SOPClassUID = uids.BasicTextSRStorage
    dataset.file_meta.MediaStorageSOPClassUID = uids.BasicTextSRStorage
    return _finish(dataset, evidence[0], reading, at)


def _chapter(
    chapter_name: Code, item_name: Code, texts: Sequence[str]
) -> list[sr.ContainerContentItem]:
    """A container of texts; none without texts."""
    # An empty TEXT item is no item of a tree.
    items = [_text(item_name, text, "CONTAINS") for text in texts if clean(text)]
    if not items:
        return []
    container = sr.ContainerContentItem(name=chapter_name, relationship_type="CONTAINS")
    container.ContentSequence = sr.ContentSequence(items)
    return [container]


def _text(name: Code, text: str, relationship: str) -> sr.TextContentItem:
    return sr.TextContentItem(name=name, value=clean(text), relationship_type=relationship)


# ---- What both have in common ----


def _identify(reading: Mapping[str, Any], sources: Sequence[Source], at: str, codes: Codes) -> str:
    """What all UIDs follow from. Raises UserError where document and sources do not belong together."""
    check_sources(reading, sources)
    time = parse_time(at)
    # Times differ in files that differ in nothing else: they are other instances.
    return f"{documents.sha256(reading)}/{time.isoformat()}/{codes.choice}"


def check_sources(reading: Mapping[str, Any], sources: Sequence[Source]) -> None:
    """Refuse a document that is none, and sources that are not its films. Raises UserError."""
    documents.check(reading)
    films = [reading["image"], *reading["other_images"]]
    if [film["sha256"] for film in films] != [source.sha256 for source in sources]:
        raise UserError(
            "DICOM outputs: the sources are not the films of this reading, in its order"
        )
    # The wrong patient is the worst that an output can name.
    if len({source.dataset.PatientID for source in sources}) > 1:
        raise UserError("DICOM outputs: the films are of different patients")


def describe_series(reading: Mapping[str, Any]) -> str:
    """Say what a series of outputs holds."""
    return SERIES_DESCRIPTION if reading["signed"] is None else SIGNED_DESCRIPTION


def _observers(reading: Mapping[str, Any], identity: str) -> Any:
    """TID 1001: the device, and once signed the person, too."""
    # Named by its weights: another set of them is another observer.
    model = reading["model"]
    device = sr.ObserverContext(
        observer_type=CodedConcept("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=derive_uid("model", model["weights_sha256"], model["app_version"]),
            name=clean(model["name"]) or "unnamed",
            manufacturer_name=MANUFACTURER,
            model_name=clean(model["name"]) or "unnamed",
            serial_number=model["weights_sha256"],
        ),
    )
    if reading["signed"] is None:
        return sr.ObservationContext(observer_device_context=device)
    # A pseudonym: who it is, the room's store knows.
    person = sr.ObserverContext(
        observer_type=CodedConcept("121006", "DCM", "Person"),
        observer_identifying_attributes=sr.PersonObserverIdentifyingAttributes(
            name=_person(reading["signed"]["by"])
        ),
    )
    return sr.ObservationContext(observer_person_context=person, observer_device_context=device)


def _person(handle: str) -> str:
    """A reader's pseudonym as a name: the marks that part names have another meaning there."""
    return (clean(handle, _LONG).translate(dict.fromkeys(map(ord, "^="), "-")) or "reader") + "^"


def _common(
    reading: Mapping[str, Any],
    evidence: list[Dataset],
    identity: str,
    verifying_organisation: str | None,
) -> dict[str, Any]:
    # A verified document needs somebody who answers for it, and this software cannot.
    own, signed = scheme(), reading["signed"]
    verified_by: dict[str, Any] = {}
    if signed is not None and verifying_organisation:
        verified_by = {
            "is_verified": True,
            "verifying_observer_name": _person(signed["by"]),
            "verifying_organization": clean(verifying_organisation, _LONG),
        }
    return verified_by | {
        "evidence": evidence,
        "series_instance_uid": derive_uid("series", identity),
        "series_number": SERIES_NUMBER,
        "manufacturer": MANUFACTURER,
        "is_complete": True,
        # Research software says nothing final.
        "is_final": False,
        "manufacturer_model_name": clean(reading["model"]["name"], _LONG) or "unnamed",
        "software_versions": clean(reading["model"]["app_version"], _LONG),
        "device_serial_number": reading["model"]["weights_sha256"][:_LONG],
        "series_description": describe_series(reading),
        "specific_character_set": "ISO_IR 192",
        "coding_schemes": [
            CodingSchemeIdentificationItem(
                designator=own["designator"],
                name=own["name"],
                uid=own["uid"],
                responsible_organization=MANUFACTURER,
            )
        ],
    }


def _finish(dataset: Dataset, evidence: Dataset, reading: Mapping[str, Any], at: str) -> Dataset:
    time = parse_time(at)
    # The library does not carry it over, and all times of an instance are in it.
    if (offset := evidence.get("TimezoneOffsetFromUTC")) is not None:
        dataset.TimezoneOffsetFromUTC = offset
    stamp(dataset, time)
    # The library verifies at the clock's time; the reader did when the reading was signed.
    for observer in dataset.get("VerifyingObserverSequence", ()):
        observer.VerificationDateTime = _dicom_time(parse_time(reading["signed"]["at"]))
    return dataset


def _dicom_time(time: datetime.datetime) -> str:
    return time.strftime("%Y%m%d%H%M%S+0000")


def _code(concept: Concept) -> Code:
    return Code(concept.code, concept.scheme, concept.meaning)


# ---- Reading one back ----


def read_states(dataset: Dataset) -> dict[str, tuple[str, str | None]]:
    """Read what a Comprehensive SR of ours says: label -> (state, side), of the labels that it mentions.

    Codes of either choice are known. A group without a finding or a state that is known here is passed over.
    """
    found = {}
    # Wherever a group hangs: archives may have wrapped the tree.
    for container in _walk(dataset):
        if _name(container) != "125007":  # Measurement Group
            continue
        # What a group says stands in its items, in any order.
        label = state = side_concept = None
        for content_item in _walk(container):
            if content_item.get("ValueType") != "CODE":
                continue
            value = content_item.ConceptCodeSequence[0]
            code, name = value.CodeValue, _name(content_item)
            # By the name of the item: the same code may be a state and the state before.
            if name == "121071":
                label = label_of(code, value.CodingSchemeDesignator)
            elif name in ("705057003", "PRESENCE"):
                state = state_of(code)
            elif name in ("272741003", "LATERALITY"):
                side_concept = side_of(code)
        if label and state:
            found[label] = (state, side_concept)
    return found


def _walk(dataset: Dataset) -> list[Dataset]:
    items = []
    # Depth first, as the tree reads.
    for content_item in dataset.get("ContentSequence", ()):
        items += [content_item, *_walk(content_item)]
    return items


def _name(content_item: Dataset) -> str:
    concept = content_item.get("ConceptNameCodeSequence")
    return concept[0].CodeValue if concept else ""
