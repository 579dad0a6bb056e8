"""A reading as DICOM SR: findings as TID 1500 (Comprehensive SR), and its sentences as a Basic Text SR beside it.

A group (TID 1501) for each finding that the reading mentions: what it is, where, whether it is there, the model's own
probability, by which algorithm, in which image. Nothing is final and nothing is verified: these are a device's
observations until a reader signs, and a research reader's afterwards. Same document, same source, same time: same bytes
and same UIDs, so an archive that gets it twice has it once. The two are of two series: viewers show one document a
series, and OHIF shows texts, but no findings without coordinates.
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
from cxr_jax.outputs import sections, told
from cxr_jax.outputs.codes import Codes, Concept, label_of, scheme, side_of, state_of
from cxr_jax.outputs.dicom_source import (
    MANUFACTURER,
    Source,
    as_bytes,
    clean,
    derive_uid,
    parse_time,
    stamp,
    without_warnings,
)

# Series numbers that a modality does not use: of findings, of pictures (`secondary_capture`), of texts.
SERIES_NUMBER, CAPTURE_SERIES_NUMBER, TEXT_SERIES_NUMBER = 9001, 9002, 9003
_LONG = 64  # characters of an LO
# What UIDs of an instance and of its series are derived from, beside the document.
_KINDS = {
    uids.ComprehensiveSRStorage: ("findings", "series"),
    uids.BasicTextSRStorage: ("sentences", "texts"),
}


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


@without_warnings()
def findings_dataset(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    at: str,
    codes: Codes,
    verifying_organisation: str | None = None,
) -> Dataset:
    """Make the Comprehensive SR; arguments as for `write`."""
    # Copies: the library puts more into what it is given.
    identity = _identify(reading, sources, at, codes, verifying_organisation)
    evidence = [copy.deepcopy(source.dataset) for source in sources]
    # What is not mentioned is no observation: it is left out, and not "absent".
    groups = [
        _group(reading, finding, evidence, codes)
        for finding in reading["findings"]
        if finding["state"] != "not_mentioned"
    ]
    nothing = sr.TrackingIdentifier(uid=derive_uid("nothing"), identifier="nothing")
    report = sr.MeasurementReport(
        observation_context=_observers(reading),
        procedure_reported=_code(codes.said("procedure")),
        imaging_measurements=groups or [sr.MeasurementsAndQualitativeEvaluations(nothing)],
        title=Code("126000", "DCM", "Imaging Measurement Report"),
    )
    # A report may mention nothing: the library does not know that, and the template (row 12) does.
    if not groups:
        comment = _text(Code("121106", "DCM", "Comment"), "No finding is mentioned.", "CONTAINS")
        del report[0].ContentSequence[-1]
        report[0].ContentSequence.append(
            _container(Code("C0034375", "UMLS", "Qualitative Evaluations"), [comment])
        )
    # The findings stay those that were signed: whoever reads them must see what was corrected since.
    report[0].ContentSequence.extend(
        _text(Code("121106", "DCM", "Comment"), text, "CONTAINS")
        for text in documents.addenda_of(reading)
    )
    dataset = sr.ComprehensiveSR(
        content=report,
        series_number=SERIES_NUMBER,
        series_description=describe_series(reading, "Findings in codes"),
        **_uids(uids.ComprehensiveSRStorage, identity),
        **_common(reading, evidence, verifying_organisation),
    )
    before = _before(reading, sources, codes, verifying_organisation)
    return _finish(dataset, evidence[0], reading, at, before)


def _group(
    reading: Mapping[str, Any], finding: Mapping[str, Any], images: Sequence[Dataset], codes: Codes
) -> sr.MeasurementsAndQualitativeEvaluations:
    """TID 1501: one finding."""
    label = finding["label"]
    # Its sentences say which kind of a group it is.
    coded = codes.finding(label, told.sentences_of(reading, finding), reading["report"].values())
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
    evaluations += [
        sr.QualitativeEvaluation(_code(codes.said(name)), _code(getattr(codes, name)(value)))
        for name, value in told.before_review(finding).items()
    ]
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
            # The same from the draft to the last addendum: that is what it is for.
            uid=derive_uid("finding", label, told.reading_id(reading)),
            identifier=label,
        ),
        finding_type=_code(coded.finding),
        # What a reader has added, no algorithm has found.
        algorithm_id=_algorithm(reading) if told.is_of_model(finding) else None,
        finding_sites=None
        if coded.site is None
        else [
            sr.FindingSite(
                _code(coded.site), laterality=None if side_concept is None else _code(side_concept)
            )
        ],
        measurements=measurements or None,
        qualitative_evaluations=evaluations,
        # All of them: who reads two films together has no finding of one alone.
        source_images=[
            sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)
            for image in images
        ],
    )


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


@without_warnings()
def text_dataset(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    at: str,
    codes: Codes,
    verifying_organisation: str | None = None,
) -> Dataset:
    """Make the Basic Text SR; arguments as for `write`."""
    identity = _identify(reading, sources, at, codes, verifying_organisation)
    evidence = [copy.deepcopy(source.dataset) for source in sources]
    # Notice first: a viewer that cuts long documents cuts the end.
    root_container = sr.ContainerContentItem(
        name=Code("18748-4", "LN", "Diagnostic Imaging Report"),
        # Items, each with its name: as running text a viewer would put all of them on one line.
        is_content_continuous=False,
    )
    root_container.ContentSequence = sr.ContentSequence(
        [
            *_observers(reading),
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
                # No "Finding": a reader may have signed something else.
                Code("SENTENCE", scheme()["designator"], "Sentence of the model"),
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
        **_uids(uids.BasicTextSRStorage, identity),
        series_number=TEXT_SERIES_NUMBER,
        series_description=describe_series(reading, "Text"),
        **_common(reading, evidence, verifying_organisation),
    )
    # The same tree, of text alone, which is what the simplest of the three classes holds.
    dataset.SOPClassUID = uids.BasicTextSRStorage
    dataset.file_meta.MediaStorageSOPClassUID = uids.BasicTextSRStorage
    before = _before(reading, sources, codes, verifying_organisation)
    return _finish(dataset, evidence[0], reading, at, before)


def _chapter(
    chapter_name: Code, item_name: Code, texts: Sequence[str]
) -> list[sr.ContainerContentItem]:
    """A container of texts; none without texts."""
    # An empty TEXT item is no item of a tree.
    items = [_text(item_name, text, "CONTAINS") for text in texts if clean(text)]
    return [_container(chapter_name, items)] if items else []


def _container(name: Code, items: Sequence[sr.TextContentItem]) -> sr.ContainerContentItem:
    container = sr.ContainerContentItem(
        name=name, is_content_continuous=False, relationship_type="CONTAINS"
    )
    container.ContentSequence = sr.ContentSequence(items)
    return container


def _text(name: Code, text: str, relationship: str) -> sr.TextContentItem:
    return sr.TextContentItem(name=name, value=clean(text), relationship_type=relationship)


# ---- What both have in common ----


def _identify(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    at: str,
    codes: Codes,
    verifying_organisation: str | None,
) -> str:
    """What all UIDs follow from. Raises UserError where document and sources do not belong together."""
    check_sources(reading, sources)
    time = parse_time(at)
    # Times differ in files that differ in nothing else, and so does who verifies: they are other instances.
    verified = f"/{verifying_organisation}" if reading["signed"] and verifying_organisation else ""
    return f"{documents.sha256(reading)}/{time.isoformat()}/{codes.choice}{verified}"


def _uids(sop_class: uids.UID, identity: str) -> dict[str, Any]:
    instance_kind, series_kind = _KINDS[sop_class]
    return {
        "sop_instance_uid": derive_uid(instance_kind, identity),
        "series_instance_uid": derive_uid(series_kind, identity),
    }


def _before(
    reading: Mapping[str, Any],
    sources: Sequence[Source],
    codes: Codes,
    verifying_organisation: str | None,
) -> str | None:
    """The identity of the document that an addendum was made to; None without one."""
    earlier = told.before_addendum(reading)
    if earlier is None:
        return None
    # As it was exported then: it was signed, so its time is its own.
    return _identify(earlier, sources, told.time_of(earlier, ""), codes, verifying_organisation)


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


def describe_series(reading: Mapping[str, Any], form: str) -> str:
    """Say what a series of outputs holds: "Text (AI draft, research use only)"."""
    who = "AI draft" if reading["signed"] is None else "reviewed reading"
    # The form first: lists cut the end.
    return f"{form} ({who}, research use only)"


def _observers(reading: Mapping[str, Any]) -> Any:
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
    reading: Mapping[str, Any], evidence: list[Dataset], verifying_organisation: str | None
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
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "is_complete": True,
        # Research software says nothing final.
        "is_final": False,
        "manufacturer_model_name": clean(reading["model"]["name"], _LONG) or "unnamed",
        "software_versions": clean(reading["model"]["app_version"], _LONG),
        "device_serial_number": reading["model"]["weights_sha256"][:_LONG],
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


def _finish(
    dataset: Dataset, evidence: Dataset, reading: Mapping[str, Any], at: str, before: str | None
) -> Dataset:
    """Date it, name who answers for it, and the document that it replaces: `before` is that one's identity."""
    # The library does not carry it over, and all times of an instance are in it.
    if (offset := evidence.get("TimezoneOffsetFromUTC")) is not None:
        dataset.TimezoneOffsetFromUTC = offset
    stamp(dataset, parse_time(at))
    # The library knows one who verifies, at the clock's time; all who wrote do, when they wrote, the last one first.
    if verifying := dataset.get("VerifyingObserverSequence"):
        dataset.VerifyingObserverSequence = [
            _verifying(verifying[0], reader, written_at)
            for reader, written_at in reversed(told.readers_of(reading).items())
        ]
    if before is not None:
        dataset.PredecessorDocumentsSequence = [_predecessor(dataset, before)]
    return dataset


def _verifying(observer: Dataset, reader: str, written_at: str) -> Dataset:
    own = copy.deepcopy(observer)
    own.VerifyingObserverName = _person(reader)
    own.VerificationDateTime = _dicom_time(parse_time(written_at))
    return own


def _predecessor(dataset: Dataset, before: str) -> Dataset:
    """Reference the document that this one replaces, in its study and series."""
    instance_kind, series_kind = _KINDS[dataset.SOPClassUID]
    instance, series, study = Dataset(), Dataset(), Dataset()
    instance.ReferencedSOPClassUID = dataset.SOPClassUID
    instance.ReferencedSOPInstanceUID = derive_uid(instance_kind, before)
    series.SeriesInstanceUID = derive_uid(series_kind, before)
    series.ReferencedSOPSequence = [instance]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = dataset.StudyInstanceUID, [series]
    return study


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
