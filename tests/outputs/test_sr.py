"""DICOM outputs: SR, text SR and secondary capture say what the document says, the same way each time."""

import io
import itertools
import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from said import AT, said

from cxr_jax.errors import UserError
from cxr_jax.outputs import document, fhir, secondary_capture, sr
from cxr_jax.outputs.codes import CHOICES
from cxr_jax.outputs.dicom_source import parse_time, read_source, stamp
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


def test_what_a_reader_changed_shows_what_the_model_had_said(made):
    written = as_dataset(sr.write(made.signed, [made.source], at=AT))
    before = [
        item.ConceptCodeSequence[0].CodeMeaning
        for item in sr._walk(written)
        if item.get("ConceptNameCodeSequence")
        and item.ConceptNameCodeSequence[0].CodeValue == "MODELSTATE"
    ]
    assert before == ["Present"]  # the effusion, which the reader denied


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
    written = Dataset()
    written.TimezoneOffsetFromUTC, written.ContentDate = "-0530", "20000101"
    stamp(written, parse_time("2026-11-30T02:00:00Z"))
    assert (written.ContentDate, written.ContentTime) == ("20261129", "203000")


@pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is absent"
)
def test_dciodvfy_finds_no_error(made, tmp_path):
    files = {}
    for (name, reading), kind, choice in itertools.product(
        made.readings.items(), ("sr.dcm", "text.dcm", "sc.dcm"), CHOICES
    ):
        settings = ExportSettings(at=AT, codes=choice)
        files[f"{name}.{choice}.{kind}"] = export(kind, reading, [made.file], settings)
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
