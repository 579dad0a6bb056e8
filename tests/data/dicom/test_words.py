"""Words of the header in any writer's spelling: only what is understood as something else is a reason not to read."""

import io

import pytest
from dicom_files import SECRET, build
from places import SHARED
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cxr_jax.data import images
from cxr_jax.data.dicom import words
from cxr_jax.data.dicom.words import Meaning
from cxr_jax.errors import UserError

CASES = SHARED / "cases" / "dicom"
FULL = {"WindowCenter": 2048, "WindowWidth": 4096}


def read_meta(**elements):
    image = images.image_from_bytes("film.dcm", build(**FULL, **elements))
    assert SECRET not in repr(image.meta)
    return image.meta


PA = """PA|pa|P.A.|p.a|P-A|P/A|PA ERECT|PA_ERECT|ERECT PA|PA UPRIGHT|CHEST PA|THORAX PA|POSTEROANTERIOR|POSTERO-ANTERIOR
|POSTERO ANTERIOR|POSTERIOR-ANTERIOR|POSTERIOR ANTERIOR|posteroanterior|PÓSTERO-ANTERIOR|POSTERO-ANTERIEUR|PA INSP
|POSTERO-ANTERIORE|DORSO-VENTRAL|DORSOVENTRAL|PA EXPIRATION|PA 72IN|"""
AP = """AP|ap|A.P.|a.p|A-P|A/P|AP SUPINE|SUPINE AP|AP_SUPINE|PORTABLE AP|AP PORTABLE|AP SEMI-ERECT|AP SITTING|MOBILE AP
|ANTEROPOSTERIOR|ANTERO-POSTERIOR|ANTERO POSTERIOR|ANTERIOR-POSTERIOR|ANTERO-POSTERIEUR|AP BEDSIDE|VENTRODORSAL|"""
LATERAL = """L|LL|RL|LAT|LATERAL
|LLAT|L LAT|LEFT LATERAL|LATERAL LEFT|RT LAT|LATERALE|PERFIL|PROFIL|SEITLICH|LATERO-LATERAL
|LAT ERECT|"""
OTHER = """LLD|RLD
|LATERAL DECUBITUS|AP DECUBITUS|LAO|RAO|LPO|RPO|LLO|RLO|OBLIQUE|OBL|AP LORDOTIC|LORDOTIC|AP AXIAL|AXIAL
|MLO|CC|ML|CV|TANGENTIAL|SUNRISE|PA/LAT|AP LAT|PA AND LAT|PA LATERAL|FRONTAL AND LATERAL|COSTAL|CORONAL|"""
FRONTAL = "FRONTAL|FRONT|FRENTE|PA/AP|AP PA|PA OR AP|"
UNKNOWN = "NONE|UNKNOWN|UNK|"
NOT_UNDERSTOOD = (
    "SECRETNAME|PORTABLE|ERECT|SUPINE|BEDSIDE|TUBE|X|1|PALMAR|APEX|PAPA|LATEX|STEHEND|?|"
)


def split(table):
    return [text for text in table.replace("\n", "").split("|") if text]


@pytest.mark.parametrize(
    "table, view",
    [
        (PA, "PA"),
        (AP, "AP"),
        (LATERAL, "LATERAL"),
        (OTHER, "OTHER"),
        (FRONTAL, "FRONTAL"),
        (UNKNOWN, "unknown"),
        (NOT_UNDERSTOOD, ""),
    ],
)
def test_spellings_of_views(table, view):
    assert {text: words.view_of_position(text) for text in split(table)} == dict.fromkeys(
        split(table), view
    )


@pytest.mark.parametrize(
    "text, view, is_usable, note",
    [
        ("AP SUPINE", "AP", True, None),
        ("PA ERECT", "PA", True, None),
        ("POSTEROANTERIOR", "PA", True, None),
        ("A.P.", "AP", True, None),
        ("LLAT", "LATERAL", False, "not frontal"),
        ("LLD", "OTHER", False, "not frontal"),
        ("FRONTAL", "unknown", True, None),
        ("PA/AP", "unknown", True, None),
        ("L", "LATERAL", False, "not frontal"),
        ("PA LATERAL", "OTHER", False, "not frontal"),
        (SECRET, "unknown", True, "the view is a word that is not understood"),
        ("STEHEND", "unknown", True, "the view is a word that is not understood"),
    ],
)
def test_view_words_that_are_not_understood_are_a_warning(text, view, is_usable, note):
    meta = read_meta(ViewPosition=text)
    assert (meta["view"], not meta["unusable"]) == (view, is_usable)
    assert any(note in line for line in meta["warnings"]) if note else meta["warnings"] == []


def test_a_view_word_that_is_not_understood_leaves_it_to_the_code_and_the_names():
    code = Dataset()
    code.CodeValue, code.CodeMeaning = "no known code", "Postero-anterior"
    assert read_meta(ViewPosition="STEHEND", ViewCodeSequence=Sequence([code]))["view"] == "PA"
    code.CodeMeaning = "left lateral"
    assert read_meta(ViewPosition="", ViewCodeSequence=Sequence([code]))["unusable"]
    assert read_meta(ViewPosition="STEHEND", ProtocolName="Thorax a.p.")["view"] == "AP"
    assert read_meta(ViewPosition="STEHEND", ProtocolName="Thorax a.p.")["warnings"] == []
    assert read_meta(ViewPosition="FRONTAL", ProtocolName="Thorax frontal PA")["view"] == "PA"
    # The name of a series of two films, and no word of which of them this is.
    both = read_meta(ViewPosition="", ProtocolName="Thorax frontal + lateral")
    assert both["view"] == "unknown" and not both["unusable"]


@pytest.mark.parametrize(
    "orientation, view",
    [(["A", "F"], "LATERAL"), (["P", "F"], "LATERAL"), (["L", "F"], "unknown"), ("", "unknown")],
)
def test_a_film_that_does_not_name_its_view_may_be_lateral_by_its_orientation(orientation, view):
    meta = read_meta(ViewPosition="", PatientOrientation=orientation)
    assert meta["view"] == view and (not meta["unusable"]) == (view == "unknown")


CHEST = """CHEST|chest|CHEST PA|CHEST_PA|PACHEST|CHEST, PORTABLE|THORAX|THORAX PA|THORAXPA|TORAX|TÓRAX|TORAX AP|TORACE
|POUMON|POUMONS
|PULMON|PULMÓN|PULMAO|LUNG|LUNGS|LUNGE|BRUST|BRUSTKORB|BORSTKAS|CAGE THORACIQUE|TORAKS|RIBS|LRIBS|HEART
|STERNUM|CHESTABDOMEN|ABDOMEN AND CHEST|CXR|PECHO|"""
NO_CHEST = """HAND|HANDS
|LHAND|R HAND|KNEE|LKNEE|FOOT|ABDOMEN|PELVIS|SKULL|HEAD|CSPINE|LSPINE|TSPINE|THORACIC SPINE|SPINE|HIP
|LEFT HIP|SHOULDER|WRIST|ANKLE|ELBOW|JAW|TEETH|BREAST|MANO|RODILLA|GENOU|KNIE|BECKEN|ARM|LEG|BRUSTWIRBELSAEULE
|COLUMNA TORACICA|THORACOLUMBAR|EXTREMITY|FINGER|KUB|"""
NO_WORD = "SECRETNAME|TORSO|TRUNK|BODY|WHOLEBODY|UNKNOWN|OTHER|1|?|Зуб|STANDARD|"


@pytest.mark.parametrize(
    "table, meaning",
    [(CHEST, Meaning.RIGHT), (NO_CHEST, Meaning.OTHER), (NO_WORD, Meaning.NOT_UNDERSTOOD)],
)
def test_spellings_of_body_parts(table, meaning):
    assert {text: words.meaning_of_body_part(text) for text in split(table)} == dict.fromkeys(
        split(table), meaning
    )


@pytest.mark.parametrize(
    "text, is_usable, note",
    [
        ("TORAX", True, None),
        ("POUMON", True, None),
        ("PULMON", True, None),
        ("Brust", True, None),
        ("CHEST PA", True, None),
        ("TORSO", True, "the body part is a word that is not understood"),
        (SECRET, True, "the body part is a word that is not understood"),
        ("KNEE", False, "the body part is not the chest"),
        ("THORACIC SPINE", False, "the body part is not the chest"),
    ],
)
def test_body_part_words_that_are_not_understood_are_a_warning(text, is_usable, note):
    meta = read_meta(BodyPartExamined=text)
    assert (not meta["unusable"]) == is_usable
    assert any(note in line for line in meta["warnings"]) if note else meta["warnings"] == []


def test_a_body_part_that_is_not_understood_is_asked_of_code_and_descriptions():
    region = Dataset()
    region.CodeValue, region.CodeMeaning = "43799004", "Chest"
    regions = {"BodyPartExamined": "", "AnatomicRegionSequence": Sequence([region])}
    assert read_meta(**regions)["warnings"] == []
    region.CodeMeaning = "Knee"
    assert read_meta(**regions)["unusable"]
    assert read_meta(BodyPartExamined="TORSO", StudyDescription="RX TÓRAX")["warnings"] == []
    assert read_meta(BodyPartExamined="", StudyDescription="Thorax stehend")["warnings"] == []


@pytest.mark.parametrize("text", ["CR", "DX", "DR", "RG", "dx", "DX ", "CR\\DX"])
def test_modalities_that_are_radiography(text):
    assert read_meta(Modality=text)["warnings"] == []


@pytest.mark.parametrize(
    "text", ["XR", "XRAY", "X-RAY", "RX", "PX", "OT", "SC", "RF", "", SECRET, "?"]
)
def test_modality_words_that_are_not_understood_are_a_warning(text):
    meta = read_meta(Modality=text)
    assert meta["unusable"] == [] and len(meta["warnings"]) == 1
    assert "Modality does not say" in meta["warnings"][0]


@pytest.mark.parametrize("text", ["CT", "MR", "US", "MG", "NM", "PT", "XA", "SR", "CT\\CR", "ct"])
def test_modalities_that_are_something_else_are_refused(text):
    with pytest.raises(UserError, match="not projection radiography"):
        read_meta(Modality=text)


def test_a_modality_that_is_not_understood_is_asked_of_the_class():
    with pytest.raises(UserError, match="not projection radiography"):
        read_meta(Modality="", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")  # CT Image Storage


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
@pytest.mark.parametrize("change", [{}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1"}])
def test_a_slice_whose_modality_says_radiograph_is_not_read(name, change):
    slice_ = dcmread(get_testdata_file(name))
    with pytest.raises(UserError, match="not projection radiography"):
        images.image_from_bytes(name, written(slice_))
    # The pixels alone pass the image gate: a slice cut close has no empty field around a body.
    elements = {"Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "PA", **change}
    for keyword, value in elements.items():
        setattr(slice_, keyword, value)
    meta = images.image_from_bytes(name, written(slice_)).meta
    assert meta["unusable"] == ["by its header another kind of image, whatever the Modality"]


def written(dataset):
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


@pytest.mark.parametrize(
    "elements",
    [
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"},
        {"EchoTime": "90"},
        {"GantryDetectorTilt": "0"},
    ],
)
def test_a_modality_that_the_rest_of_the_header_contradicts_is_not_believed(elements):
    assert read_meta(**elements)["unusable"] and not read_meta()["unusable"]
    # Elements that are there and empty say nothing.
    assert not read_meta(EchoTime=None, GantryDetectorTilt="")["unusable"]


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared data folder is absent")
@pytest.mark.parametrize("name", ["body_TORAX", "view_POSTEROANTERIOR"])
def test_real_world_words_give_the_picture_of_the_reference(name):
    image, reference = (
        images.read_image(CASES / f"{file_name}.dcm") for file_name in (name, "ref_12bit")
    )
    assert (image.pixels == reference.pixels).all() and image.meta == reference.meta
