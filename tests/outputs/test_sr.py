"""DICOM outputs: SR, text SR and secondary capture say what the document says, the same way each time."""

import io
import itertools
import shutil
import subprocess
import uuid
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from said import AT, said

from cxr_jax.errors import UserError
from cxr_jax.outputs import document, fhir, secondary_capture, sr
from cxr_jax.outputs.codes import CHOICES
from cxr_jax.outputs.dicom_source import clean, parse_time, read_source, stamp
from cxr_jax.outputs.export import KINDS, ExportSettings, FilmFile, export
from cxr_jax.phantom.dicom_writer import write_dicom

SETTINGS = ExportSettings(at=AT)


def as_dataset(data):
    return pydicom.dcmread(io.BytesIO(data))


@pytest.mark.parametrize("choice", CHOICES)
def test_an_sr_says_what_its_document_says(made, choice):
    for reading in made.readings.values():
        written = as_dataset(sr.write(reading, [made.source], at=AT, codes=choice))
        assert sr.read_states(written) == said(reading)
        assert len(said(reading)) == 6
        schemes = {
            element.value
            for element in written.iterall()
            if element.keyword == "CodingSchemeDesignator"
        }
        # Templates are DICOM's own; what is said in them is ours.
        assert ("99CXRJAX" in schemes) and written.CodingSchemeIdentificationSequence


def test_nothing_is_final_and_a_signature_verifies_only_for_an_organisation(made):
    draft, signed = (
        as_dataset(sr.write(reading, [made.source], at=AT)) for reading in made.readings.values()
    )
    for written in (draft, signed):
        assert (written.PreliminaryFlag, written.VerificationFlag) == ("PRELIMINARY", "UNVERIFIED")
    values = [
        item.ConceptCodeSequence[0].CodeValue
        for item in sr._walk(draft)
        if item.ValueType == "CODE"
    ]
    assert "121007" in values and "121006" not in values  # a device alone
    people = [item.PersonName for item in sr._walk(signed) if item.ValueType == "PNAME"]
    assert [str(name) for name in people] == ["r1^"]
    verified = as_dataset(
        sr.write(made.signed, [made.source], at=AT, verifying_organisation="Clinic")
    )
    assert verified.VerificationFlag == "VERIFIED"
    assert verified.VerifyingObserverSequence[0].VerificationDateTime == "20261130120000+0000"
    assert (
        as_dataset(
            sr.write(made.draft, [made.source], at=AT, verifying_organisation="Clinic")
        ).VerificationFlag
        == "UNVERIFIED"
    )


def coded(dataset):
    """What the groups of an SR say in codes: label -> (name's code -> meanings of its values)."""
    groups = {}
    for group in sr._walk(dataset):
        if sr._name(group) != "125007":
            continue
        said_here = {}
        for item in sr._walk(group):
            if item.ValueType == "CODE":
                meaning = item.ConceptCodeSequence[0].CodeMeaning
                said_here.setdefault(sr._name(item), []).append(meaning)
            elif item.ValueType == "TEXT":
                said_here.setdefault(sr._name(item), []).append(item.TextValue)
        groups[said_here["112039"][0]] = said_here
    return groups


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_reader_changed_shows_what_the_model_had_said(made, choice):
    groups = coded(as_dataset(sr.write(made.signed, [made.source], at=AT, codes=choice)))
    changed = {
        label: [group.get(code, [""])[0] for code in ("MODELSTATE", "MODELSIDE")]
        for label, group in groups.items()
    }
    assert {label: both for label, both in changed.items() if any(both)} == {
        "Pleural Effusion": ["Present", "Left"],  # which the reader denied
        "Pneumonia": ["", "Right"],  # and is left of the reader's
        "Cardiomegaly": ["Not said", ""],  # the reader's own
    }
    # No algorithm is named for what none has found; the model's words stand under its name.
    assert {label for label, group in groups.items() if "111001" not in group} == {"Cardiomegaly"}
    drafted = coded(as_dataset(sr.write(made.draft, [made.source], at=AT, codes=choice)))
    assert all("111001" in group for group in drafted.values())
    assert not any("MODELSIDE" in group or "MODELSTATE" in group for group in drafted.values())


def test_an_addendum_names_the_document_that_it_replaces_and_who_wrote_it(made):
    later = "2026-11-30T13:00:00Z"
    added = document.add_addendum(made.signed, by="r2", at=later, text="Compared.")
    clinic = {"verifying_organisation": "Clinic"}
    for write in (sr.write, sr.write_text):
        signed = as_dataset(write(made.signed, [made.source], at=AT, **clinic))
        extended = as_dataset(write(added, [made.source], at=later, **clinic))
        assert "PredecessorDocumentsSequence" not in signed
        [study] = extended.PredecessorDocumentsSequence
        [series] = study.ReferencedSeriesSequence
        [before] = series.ReferencedSOPSequence
        assert study.StudyInstanceUID == signed.StudyInstanceUID
        assert series.SeriesInstanceUID == signed.SeriesInstanceUID
        assert before.ReferencedSOPInstanceUID == signed.SOPInstanceUID
        # Who added answers for it, too; the last one first.
        assert [
            (str(observer.VerifyingObserverName), observer.VerificationDateTime)
            for observer in extended.VerifyingObserverSequence
        ] == [("r2^", "20261130130000+0000"), ("r1^", "20261130120000+0000")]


def test_a_finding_keeps_its_name_and_whoever_verifies_makes_another_instance(made):
    def names(data):
        written = as_dataset(data)
        tracked = {item.UID for item in sr._walk(written) if sr._name(item) == "112040"}
        return written.SOPInstanceUID, written.SeriesInstanceUID, tracked

    draft, signed, verified, text = (
        names(sr.write(made.draft, [made.source], at=AT)),
        names(sr.write(made.signed, [made.source], at=AT)),
        names(sr.write(made.signed, [made.source], at=AT, verifying_organisation="Clinic")),
        names(sr.write_text(made.signed, [made.source], at=AT)),
    )
    # A tracking UID is what the same finding is known by in the next document.
    assert len(draft[2] & signed[2]) == 5 and signed[2] == verified[2]
    assert len({draft[0], signed[0], verified[0], text[0]}) == 4
    # Viewers show one document a series.
    assert text[1] != signed[1]
    for uid in (draft[0], *draft[2]):
        assert uuid.UUID(int=int(uid.removeprefix("2.25."))).version == 5


def test_a_kind_is_named_only_by_sentences_that_say_it_and_still_stand(made):
    def read(trace, **edited):
        text = f"<think>{trace}</think><answer>Fracture</answer>"
        facts = document.CompletionFacts(text=text, finish_reason="stop", prompt="Find.")
        reading = document.build(
            document.ImageFacts(sha256=made.source.sha256),
            document.ModelFacts(name="stub", weights_sha256="b" * 64),
            facts,
        )
        if edited:
            reading = document.revise(reading, reading["report"] | edited)
        return coded(as_dataset(sr.write(reading, [made.source], at=AT)))

    trace = "Right clavicle fracture. No rib fracture. Endotracheal tube in place."
    groups = read(trace)
    # "Rib" is said of what is not there.
    assert "Rib" not in groups["Fracture"].get("363698007", [])
    assert groups["Support Devices"]["121071"] == ["Endotracheal tube"]
    assert read("Right rib fracture.")["Fracture"]["363698007"] == ["Rib"]
    # What a reader has written over a sentence is no kind of the model's.
    groups = read(trace, devices="Chest tube in place.")
    assert groups["Support Devices"]["121071"] == ["Support Devices"]


def test_an_addendum_stands_beside_the_findings_that_it_may_correct(made):
    """Findings stay those that were signed, so no output may show them without what was added since."""
    added, other = (
        document.add_addendum(made.signed, by="r1", at=AT, text=text)
        for text in ("Correction: the tube is too deep.", "Another text.")
    )
    written = as_dataset(sr.write(added, [made.source], at=AT))
    texts = [item.TextValue for item in sr._walk(written) if item.ValueType == "TEXT"]
    assert f"Addendum of {AT}: Correction: the tube is too deep." in texts
    assert sr.read_states(written) == said(added)
    conclusion = fhir.bundle(added, at=AT)["entry"][0]["resource"]["conclusion"]
    assert "Correction: the tube is too deep." in conclusion
    # Burned in: the pictures of two addenda differ, whatever else there is to be read.
    pages = [secondary_capture.draw(reading, made.pixels) for reading in (added, other)]
    assert (pages[0] != pages[1]).any()


def test_the_same_document_is_the_same_file_and_another_is_another_instance(made):
    def uid(data):
        return as_dataset(data).SOPInstanceUID

    for kind in ("sr.dcm", "text.dcm", "sc.dcm"):
        first, second = (export(kind, made.draft, [made.file], SETTINGS) for _ in range(2))
        assert first == second
        other = export(kind, made.draft, [made.file], ExportSettings(at="2026-11-30T12:00:01Z"))
        assert (
            len({uid(first), uid(other), uid(export(kind, made.signed, [made.file], SETTINGS))})
            == 3
        )
        written = as_dataset(first)
        # In the study of the film, as a series of its own.
        assert written.StudyInstanceUID == made.source.dataset.StudyInstanceUID
        assert written.SeriesInstanceUID != made.source.dataset.SeriesInstanceUID
        assert (written.ContentDate if "ContentDate" in written else "20261130") == "20261130"


def nothing_said(made):
    """A reading that mentions none of the 14."""
    return document.build(
        document.ImageFacts(sha256=made.source.sha256),
        document.ModelFacts(name="stub", weights_sha256="b" * 64),
        document.CompletionFacts(text="<think>", finish_reason="length", prompt="Find."),
    )


def with_lateral(made):
    """The source of a second film of the study, and a reading of both."""
    film = as_dataset(made.file.data)
    film.SOPInstanceUID += ".1"
    film.SeriesInstanceUID += ".1"
    buffer = io.BytesIO()
    film.save_as(buffer)
    lateral = read_source("lateral.dcm", buffer.getvalue())
    other = made.draft["image"] | {"sha256": lateral.sha256, "role": "lateral"}
    return lateral, made.draft | {"other_images": [other]}


def test_a_reading_that_mentions_nothing_is_exported_all_the_same(made):
    reading = nothing_said(made)
    for kind in KINDS:
        assert export(kind, reading, [made.file], SETTINGS)
    assert sr.read_states(as_dataset(sr.write(reading, [made.source], at=AT))) == {}


def test_all_films_that_were_read_together_are_named(made):
    lateral, together = with_lateral(made)
    written = as_dataset(sr.write(together, [made.source, lateral], at=AT))
    films = [made.source.dataset.SOPInstanceUID, lateral.dataset.SOPInstanceUID]
    for group in (item for item in sr._walk(written) if sr._name(item) == "125007"):
        assert [
            item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
            for item in group.ContentSequence
            if item.ValueType == "IMAGE"
        ] == films
    [study] = written.CurrentRequestedProcedureEvidenceSequence
    assert len(study.ReferencedSeriesSequence) == 2


def test_the_text_sr_holds_every_sentence_and_the_notice(made):
    written = as_dataset(sr.write_text(made.draft, [made.source], at=AT))
    texts = [item.TextValue for item in sr._walk(written) if item.ValueType == "TEXT"]
    assert any("Not for diagnosis" in text for text in texts)
    for sentence in made.draft["trace"]:
        assert f"{sentence['n']}. {sentence['text']}" in texts


def test_the_capture_shows_the_film_and_burns_in_the_notice(made):
    written = as_dataset(secondary_capture.write(made.draft, [made.source], made.pixels, at=AT))
    page = written.pixel_array
    assert page.shape == (secondary_capture.HEIGHT, secondary_capture.WIDTH, 3)
    assert "Not for diagnosis" in written.ImageComments
    # Red words above and below, gray film between them.
    for rows in (page[:80], page[-60:]):
        assert ((rows[..., 0] > 200) & (rows[..., 1] < 160)).sum() > 500
    film = page[100:650, 40:580]
    assert np.ptp(film) > 200 and (film[..., 0] == film[..., 1]).all()
    # Other text is another picture.
    other = secondary_capture.draw(made.signed, made.pixels)
    assert not np.array_equal(page, other)


def test_hostile_text_is_written_as_text(made, tmp_path):
    text = (
        "<think>Left effusion \x00\x1b[31m\\ \u4e2d\ud800 "
        + "w" * 5000
        + ".</think><answer>Edema</answer>"
    )
    facts = document.CompletionFacts(text=text, finish_reason="stop", prompt="\x07 \\ ^=")
    reading = document.build(
        document.ImageFacts(sha256=made.source.sha256),
        document.ModelFacts(name="\\^=" * 40, weights_sha256="b" * 64),
        facts,
    )
    for kind in KINDS:
        data = export(kind, reading, [made.file], SETTINGS)
        assert kind.endswith("json") or as_dataset(data).SOPInstanceUID


def test_films_that_are_not_the_reading_s_are_refused(made, tmp_path):
    other_path = tmp_path / "other.dcm"
    write_dicom(other_path, made.pixels, hospital="B", ap=True, seed=4)
    other = read_source(other_path)
    for sources in ([other], [], [made.source, other]):
        with pytest.raises(UserError, match="not the films"):
            sr.write(made.draft, sources, at=AT)
    # Read together, and of two patients.
    both = made.draft | {
        "other_images": [made.draft["image"] | {"sha256": other.sha256, "role": "lateral"}]
    }
    with pytest.raises(UserError, match="different patients"):
        sr.write(both, [made.source, other], at=AT)
    with pytest.raises(UserError, match="no time"):
        sr.write(made.draft, [made.source], at="yesterday")


def test_a_picture_has_no_patient_and_study(made):
    png = b"\x89PNG\r\n\x1a\n" + bytes(200)
    for kind in ("sr.dcm", "text.dcm", "sc.dcm"):
        with pytest.raises(UserError, match="only a DICOM names"):
            export(kind, made.draft, [FilmFile("film.png", png)], SETTINGS)
    assert export("fhir.json", made.draft, [FilmFile("film.png", png)], SETTINGS)


def test_a_header_gives_its_identity_and_nothing_else(made, tmp_path):
    film = as_dataset(made.file.data)
    film.PatientName, film.PatientID = "Doe^Jane\x00\x1b", "A" * 90
    film.PatientComments, film.OtherPatientIDs = "secret remark", "secret id"
    film.add_new(0x00091001, "LO", "secret private")
    film.StudyDate, film.PatientSex = "yesterday", "secret"
    path = tmp_path / "film.dcm"
    film.save_as(path)
    source = read_source(path)
    reading = made.draft | {"image": made.draft["image"] | {"sha256": source.sha256}}
    data = sr.write(reading, [source], at=AT)
    assert b"secret" not in data and b"yesterday" not in data and b"Doe^Jane" in data
    film.StudyInstanceUID = "secret"
    film.save_as(path)
    with pytest.raises(UserError, match="StudyInstanceUID is missing") as refused:
        read_source(path)
    assert "secret" not in str(refused.value)
    for broken in (
        b"",
        b"DICM",
        made.file.data[:400],
        bytes(128) + b"DICM" + bytes(range(256)) * 9,
    ):
        with pytest.raises(UserError) as refused:
            read_source("film.dcm", broken)
        assert "\n" not in str(refused.value)


def test_times_are_in_the_film_s_own_zone():
    for offset, wanted in (("-0530", "20261129203000-0530"), (None, "20261130020000+0000")):
        written = Dataset()
        written.ContentDate, written.ContributingEquipmentSequence = "20000101", [Dataset()]
        if offset:
            written.TimezoneOffsetFromUTC = offset
        stamp(written, parse_time("2026-11-30T02:00:00Z"))
        assert f"{written.ContentDate}{written.ContentTime}" == wanted[:14]
        assert written.ContributingEquipmentSequence[0].ContributionDateTime == wanted


@pytest.mark.parametrize(
    ("character_set", "name", "wanted"),
    [
        ("ISO_IR 100", "M\u00fcller^J\u00f6rg", "M\u00fcller^J\u00f6rg"),
        ("ISO_IR 192", "Wang^XiaoDong=\u738b^\u5c0f\u6771", "Wang^XiaoDong=\u738b^\u5c0f\u6771"),
        (
            ["", "ISO 2022 IR 87"],
            "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce",
            "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce",
        ),
        # Each spelling may have 64 characters: one that is too long must not cost the next.
        ("ISO_IR 192", "A" * 90 + "=\u738b", "A" * 64 + "=\u738b"),
    ],
)
def test_names_are_kept_in_whatever_letters_they_are(made, character_set, name, wanted):
    film = as_dataset(made.file.data)
    film.SpecificCharacterSet, film.PatientName = character_set, name
    film.StudyDate, film.PatientBirthDate, film.StudyTime = "20261399", "20260101", "250000"
    buffer = io.BytesIO()
    film.save_as(buffer)
    source = read_source("film.dcm", buffer.getvalue())
    reading = made.draft | {"image": made.draft["image"] | {"sha256": source.sha256}}
    with warnings.catch_warnings():
        # A library's warning of an odd name has the name in it.
        warnings.simplefilter("error")
        written = as_dataset(sr.write(reading, [source], at=AT))
    assert written.SpecificCharacterSet == "ISO_IR 192" and str(written.PatientName) == wanted
    # Digits that are no day, and no hour, are none.
    assert (written.StudyDate, written.PatientBirthDate, written.StudyTime) == ("", "20260101", "")


def test_a_picture_says_what_its_film_says_of_itself(made):
    for burned_in, lossy in (("YES", "01"), ("NO", None), (None, None)):
        film = as_dataset(made.file.data)
        film.BurnedInAnnotation, film.LossyImageCompression = burned_in, lossy
        if burned_in is None:
            del film.BurnedInAnnotation
        buffer = io.BytesIO()
        film.save_as(buffer)
        source = read_source("film.dcm", buffer.getvalue())
        reading = made.draft | {"image": made.draft["image"] | {"sha256": source.sha256}}
        written = as_dataset(secondary_capture.write(reading, [source], made.pixels, at=AT))
        # Not said is not "NO": a name may be in the film's pixels.
        assert written.get("BurnedInAnnotation") == burned_in
        assert written.get("LossyImageCompression") == lossy
        [shown] = written.SourceImageSequence
        assert shown.ReferencedSOPInstanceUID == film.SOPInstanceUID


def test_blanks_of_any_kind_part_words():
    assert clean("No\teffusion,\xa05\u2028mm.\x00\u202e") == "No effusion, 5 mm."


@pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is absent"
)
def test_dciodvfy_finds_no_error(made, tmp_path):
    files = {}
    for (name, reading), kind, choice in itertools.product(
        made.readings.items(), ("sr.dcm", "text.dcm"), CHOICES
    ):
        settings = ExportSettings(at=AT, codes=choice)
        files[f"{name}.{choice}.{kind}"] = export(kind, reading, [made.file], settings)
    files["sc.dcm"] = export("sc.dcm", made.signed, [made.file], SETTINGS)
    added = document.add_addendum(made.signed, by="r2", at=AT, text="Correction.")
    clinic = ExportSettings(at=AT, verifying_organisation="Clinic")
    for kind in ("sr.dcm", "text.dcm"):
        files[f"added.{kind}"] = export(kind, added, [made.file], clinic)
        files[f"nothing.{kind}"] = export(kind, nothing_said(made), [made.file], SETTINGS)
    lateral, together = with_lateral(made)
    files["two.sr.dcm"] = sr.write(together, [made.source, lateral], at=AT)
    for photometric, ap, bits in (("MONOCHROME1", True, 12), ("MONOCHROME2", False, 16)):
        path = tmp_path / f"{photometric}.dcm"
        write_dicom(
            path, made.pixels, hospital="B", photometric=photometric, bits=bits, ap=ap, seed=1
        )
        files[path.name] = path.read_bytes()
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        said_by_it = checked.stdout + checked.stderr
        assert "Error" not in said_by_it and checked.returncode == 0, (name, said_by_it)
        # One remark, and no other: nobody but us knows our scheme.
        remarks = {line for line in said_by_it.splitlines() if line.startswith("Warning")}
        assert all("<99CXRJAX>" in line for line in remarks), (name, remarks)
