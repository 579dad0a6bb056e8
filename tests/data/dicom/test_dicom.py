"""DICOM reading: order of operations, flags, refusals in one clear line without any header value."""

import csv
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, build, ramp
from PIL import Image as PilImage
from places import SHARED
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEGBaseline8Bit,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from cxr_jax.data import dicom, images, radiograph
from cxr_jax.data.dicom import pixels as dicom_pixels
from cxr_jax.errors import UserError

DATA = SHARED / "dicom"


def read(data, renderer="voi"):
    return images.image_from_bytes("film.dcm", data, renderer)


def lut(table, first, bits):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(table), first, bits], table
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    return Sequence([item])


FULL = {"WindowCenter": 2048, "WindowWidth": 4096}


# --- order of operations


def test_reachable_from_the_top():
    import cxr_jax

    assert cxr_jax.data.dicom.read is dicom.read


def test_window_is_linear_over_the_stored_range():
    image = read(build(**FULL))
    np.testing.assert_allclose(image.pixels, ramp() / 4095, atol=1e-6)
    assert image.meta["window"] | {"center": 0, "width": 0} == {
        "kind": "window",
        "center": 0,
        "width": 0,
        "function": "LINEAR",
        "index": 0,
        "count": 1,
    }
    assert (image.meta["view"], image.meta["bits"], image.meta["photometric"]) == (
        "PA",
        12,
        "MONOCHROME2",
    )
    assert image.meta["warnings"] == [] and image.meta["unusable"] == []


@pytest.mark.parametrize("shape", [None, "INVERSE"])
def test_monochrome1_is_one_inversion_against_the_nominal_range(shape):
    extra = {} if shape is None else {"PresentationLUTShape": shape}
    dim = ramp() // 2  # nothing is at full scale: an inversion against the maximum would show
    image = read(build(dim, PhotometricInterpretation="MONOCHROME1", **FULL, **extra))
    np.testing.assert_allclose(image.pixels, 1 - dim / 4095, atol=1e-6)


def test_inverse_presentation_of_monochrome2_inverts():
    image = read(build(PresentationLUTShape="INVERSE", **FULL))
    np.testing.assert_allclose(image.pixels, 1 - ramp() / 4095, atol=1e-6)


def test_rescale_comes_before_the_window():
    image = read(
        build(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3095.5, WindowWidth=8191)
    )
    np.testing.assert_allclose(image.pixels, ramp() / 4095, atol=1e-3)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_functions_by_the_standard(function):
    x, c, w = np.arange(-50, 300, dtype=np.float32), 100.0, 80.0
    if function == "LINEAR":
        inside = (x - (c - 0.5)) / (w - 1) + 0.5
        want = np.where(
            x <= c - 0.5 - (w - 1) / 2, 0, np.where(x > c - 0.5 + (w - 1) / 2, 1, inside)
        )
    elif function == "LINEAR_EXACT":
        want = np.where(x <= c - w / 2, 0, np.where(x > c + w / 2, 1, (x - c) / w + 0.5))
    else:
        want = 1 / (1 + np.exp(-4 * (x - c) / w))
    np.testing.assert_allclose(dicom_pixels.window(x, c, w, function), want, atol=1e-5)


def test_window_width_one_is_binary():
    assert set(np.unique(read(build(WindowCenter=2000, WindowWidth=1)).pixels)) == {0.0, 1.0}


@pytest.mark.parametrize("bits, narrow", [(8, False), (12, False), (16, False)])
def test_voi_lut_is_scaled_by_its_own_depth(bits, narrow):
    table = np.linspace(0, 2**bits - 1, 4096).astype(int).tolist()
    image = read(
        build(VOILUTSequence=lut(table, 0, bits), WindowCenter=1, WindowWidth=2)
    )  # the LUT wins
    np.testing.assert_allclose(image.pixels, ramp() / 4095, atol=1 / 255)
    assert image.meta["window"]["kind"] == "VOI LUT"


def test_voi_lut_with_an_offset_clamps_at_both_ends():
    image = read(build(VOILUTSequence=lut([0, 0, 255, 255], 1000, 8)))
    stored = ramp()
    np.testing.assert_array_equal(image.pixels, (stored >= 1002).astype(np.float32))


def test_modality_lut_comes_first():
    table = list(range(4095, -1, -1))
    image = read(build(ModalityLUTSequence=lut(table, 0, 12), **FULL))
    np.testing.assert_allclose(image.pixels, 1 - ramp() / 4095, atol=1e-6)


def test_padding_is_black_and_outside_every_statistic():
    padded = ramp(12)
    padded[:8] = 4095
    kw = {"PixelPaddingValue": 4095, "PhotometricInterpretation": "MONOCHROME1"}
    for renderer in radiograph.RENDERERS:
        image = read(build(padded, remove=(), **kw), renderer)
        assert (image.pixels[:8] == 0).all() and "pixel padding was masked" in image.meta[
            "warnings"
        ]
    flat = np.full((64, 64), 100, np.uint16)
    flat[:, 32:] = 200
    flat[:8] = 4000
    image = read(build(flat, PixelPaddingValue=3900, PixelPaddingRangeLimit=4095), "percentile")
    assert image.pixels[20, 10] == 0 and image.pixels[20, 50] == 1


def test_signed_pixels():
    signed = (ramp().astype(np.int32) - 2048).astype(np.int16)
    image = read(build(signed, bits=12, WindowCenter=0, WindowWidth=4096))
    np.testing.assert_allclose(image.pixels, ramp() / 4095, atol=1e-6)


@pytest.mark.parametrize("bits", [10, 12, 14, 15, 16])
def test_bits_stored_without_a_window_use_percentiles(bits):
    image = read(build(bits=bits))
    assert image.meta["window"]["kind"] == "percentile" and image.meta["bits"] == bits
    assert image.pixels.min() == 0 and image.pixels.max() == 1


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_encodings(syntax):
    np.testing.assert_allclose(read(build(syntax=syntax, **FULL)).pixels, ramp() / 4095, atol=1e-6)


def test_pixels_that_are_not_square_are_resampled():
    image = read(build(ImagerPixelSpacing=[0.2, 0.1], **FULL))
    assert (
        image.pixels.shape == (128, 80)
        and "pixels are not square: resampled" in image.meta["warnings"]
    )


def test_colour_jpeg_in_a_worker():
    gray = (np.add.outer(np.arange(64), np.arange(80)) * 255 // 142).astype(np.uint8)
    jpeg = io.BytesIO()
    PilImage.fromarray(gray).convert("RGB").save(jpeg, "JPEG", quality=95, subsampling=2)
    data = build(
        np.zeros((64, 80, 3), np.uint8),
        bits=8,
        syntax=JPEGBaseline8Bit,
        SamplesPerPixel=3,
        Modality="OT",
        PhotometricInterpretation="YBR_FULL_422",
        PlanarConfiguration=0,
        BurnedInAnnotation="YES",
        PixelData=pydicom.encaps.encapsulate([jpeg.getvalue()]),
    )
    image = read(data)
    assert np.abs(image.pixels * 255 - gray).max() < 8
    assert any("burned-in" in note for note in image.meta["warnings"])


def test_renderers():
    out = {name: read(build(ramp() // 4, **FULL), name) for name in radiograph.RENDERERS}
    assert all(image.meta["renderer"] == name for name, image in out.items())
    assert out["voi"].pixels.max() < 0.26 and out["percentile"].pixels.max() == 1
    levels = np.unique(np.round(out["mimic_jpg"].pixels * 255))
    assert levels[0] == 0 and levels[-1] == 255


def test_phantom_films_come_back(tmp_path):
    from cxr_jax.phantom import dicom_writer as phantom_dicom

    picture = np.random.default_rng(0).random((64, 80), np.float32)
    for photometric, ap in [("MONOCHROME1", False), ("MONOCHROME2", True)]:
        path = tmp_path / "film.dcm"
        phantom_dicom.write_dicom(
            path, picture, hospital="A", photometric=photometric, ap=ap, seed=0
        )
        image = dicom.read(path)
        assert np.abs(image.pixels - picture).max() < 1 / 1000
        assert image.meta["view"] == ("AP" if ap else "PA") and image.meta["warnings"] == []


# --- what is read with a warning


@pytest.mark.parametrize(
    "elements, reason",
    [
        ({"WindowCenter": 2048, "WindowWidth": 0}, "window is not usable"),
        ({"WindowCenter": 2048, "WindowWidth": -5}, "window is not usable"),
        ({"WindowCenter": 2048}, "window is not usable"),
        ({"WindowWidth": 4096, "WindowCenter": None}, "window is not usable"),
        ({"RescaleSlope": None, "RescaleIntercept": 0, **FULL}, "slope is empty or zero"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0, **FULL}, "slope is empty or zero"),
        ({"WindowCenter": [2048, 1000], "WindowWidth": [4096, 500]}, "2 windows"),
        ({"VOILUTSequence": lut([1, 2, 3], 0, 99), **FULL}, "VOI LUT is not usable"),
        ({"PresentationIntentType": "FOR PROCESSING", **FULL}, "raw detector data"),
        ({"FieldOfViewHorizontalFlip": "YES", **FULL}, "mirrored"),
        ({"PatientOrientation": ["R", "F"], **FULL}, "orientation"),
        ({"ViewPosition": "LL", **FULL}, "not frontal"),
        ({"BodyPartExamined": "HAND", **FULL}, "body part is not the chest"),
        ({"Modality": "OT", **FULL}, "Modality does not say"),
    ],
)
def test_flagged(elements, reason):
    image = read(build(**elements))
    assert np.isfinite(image.pixels).all() and image.pixels.std() > 0.1
    assert any(reason in note for note in image.meta["warnings"]), image.meta["warnings"]


@pytest.mark.parametrize(
    "elements, view, usable",
    [
        ({"ViewPosition": "AP"}, "AP", True),
        ({"ViewPosition": "LL"}, "LATERAL", False),
        ({"ViewPosition": "LLO"}, "OTHER", False),
        ({"ViewPosition": ""}, "unknown", True),
        ({"ViewPosition": "", "SeriesDescription": "Chest PA erect"}, "PA", True),
        ({"ViewPosition": "", "SeriesDescription": "Chest PA/LAT"}, "unknown", True),
    ],
)
def test_view(elements, view, usable):
    meta = read(build(**FULL, **elements)).meta
    assert meta["view"] == view and (not meta["unusable"]) == usable


def test_view_from_its_code():
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "R-10214", "SNM3"
    assert (
        read(build(ViewPosition="", ViewCodeSequence=Sequence([code]), **FULL)).meta["view"] == "PA"
    )


def test_blank_is_flagged():
    image = read(build(np.full((64, 64), 777, np.uint16)))
    assert "blank: the image is constant" in image.meta["unusable"]
    assert np.isfinite(image.pixels).all()


def test_meta_holds_no_identifying_value():
    meta = read(
        build(StudyDescription=SECRET, SeriesDescription=SECRET, ProtocolName=SECRET, **FULL)
    ).meta
    assert SECRET not in repr(meta)


# --- what is refused

REFUSED = {
    "several frames": lambda: build(np.zeros((2, 64, 80), np.uint8), bits=8, NumberOfFrames=2),
    "holds no image": lambda: build(remove=("PixelData",)),
    "Photometric Interpretation is missing": lambda: build(remove=("PhotometricInterpretation",)),
    "do not describe a gray image": lambda: build(PhotometricInterpretation="RGB"),
    "Rows or Columns": lambda: build(remove=("Rows",)),
    "cut short": lambda: build(Rows=100),
    "megapixels": lambda: build(Rows=65_535, Columns=65_535),
    "too small": lambda: build(np.zeros((1, 1), np.uint16)),
    "strip": lambda: build(np.zeros((40, 2000), np.uint16)),
    "not projection radiography": lambda: build(Modality="CT"),
    "not projection radiography ": lambda: build(Modality="MR\\CR"),
    "contradict each other": lambda: build(BitsStored=20),
    "DICOMDIR": lambda: build(SOPClassUID=MediaStorageDirectoryStorage),
    "floating-point": lambda: build(FloatPixelData=bytes(64 * 80 * 4), remove=("PixelData",)),
    "not say its transfer syntax": lambda: bytes(128) + b"DICM",
    "compressed pixel data is damaged": lambda: build(
        syntax=RLELossless, PixelData=pydicom.encaps.encapsulate([b"junk" * 50])
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason, capfd, caplog):
    with pytest.raises(UserError, match=reason.strip()) as caught:
        read(REFUSED[reason]())
    line = str(caught.value)
    assert line.startswith("film.dcm: ") and "\n" not in line
    out, err = capfd.readouterr()
    assert SECRET not in line + out + err + caplog.text


def test_deflate_bomb_is_refused_before_it_is_inflated(monkeypatch):
    monkeypatch.setattr(radiograph, "MAX_FILE_BYTES", 10 * 2**20)
    data = build(syntax=DeflatedExplicitVRLittleEndian)
    head = 128 + 4 + 12 + struct.unpack("<I", data[140:144])[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(bytes(100 * 2**20)) + packer.flush()
    with pytest.raises(UserError, match="inflates to more"):
        read(data[:head] + bomb)


def test_streams_that_ask_for_too_much():
    """A JPEG stream of 81 megapixels behind a header of 64 x 80."""
    jpeg = io.BytesIO()
    PilImage.fromarray(np.zeros((9000, 9000), np.uint8)).save(jpeg, "JPEG")
    stream = pydicom.encaps.encapsulate([jpeg.getvalue()])
    with pytest.raises(UserError):
        read(build(np.zeros((64, 80), np.uint8), bits=8, syntax=JPEGBaseline8Bit, PixelData=stream))


def test_random_damage_ends_in_an_image_or_one_line(capfd, caplog):
    base = build(**FULL)
    header = base.index(b"\xe0\x7f\x10\x00")
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(base)
        for at in rng.integers(132, header + 12, rng.integers(1, 5)):
            data[at] = rng.integers(256)
        try:
            image = read(bytes(data))
        except UserError as error:
            assert SECRET not in str(error) and "\n" not in str(error)
        else:
            assert np.isfinite(image.pixels).all()
            assert image.pixels.min() >= 0 and image.pixels.max() <= 1
    out, err = capfd.readouterr()
    assert "SECRET" not in out + err + caplog.text


ODD_VALUES = {
    "US": [0, 1, 2, 3, 7, 8, 10, 12, 15, 16, 17, 64, 80, 4095, 65535, [12, 13], None],
    "DS": ["", "0", "1", "-1", "1e9", "1e-9", "1\\\\2", "0.5", "4096", None],
    "CS": [
        "",
        SECRET,
        "PA",
        "NONE",
        "MONOCHROME1",
        "MONOCHROME",
        "RGB",
        "INVERSE",
        "SIGMOID",
        ["A", "B"],
        "\0",
        None,
    ],
}
ODD_NAMES = {
    "US": "Rows Columns SamplesPerPixel BitsAllocated BitsStored HighBit PixelRepresentation PlanarConfiguration "
    "PixelPaddingValue PixelPaddingRangeLimit NumberOfFrames OverlayBitPosition_0",
    "DS": "RescaleSlope RescaleIntercept WindowCenter WindowWidth ImagerPixelSpacing PixelAspectRatio",
    "CS": "PhotometricInterpretation PresentationLUTShape VOILUTFunction ViewPosition BodyPartExamined Modality "
    "PresentationIntentType PatientOrientation SpecificCharacterSet ImageType",
}


def test_random_odd_headers_end_in_an_image_or_one_line(capfd, caplog):
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        elements = dict(FULL)
        for _ in range(rng.integers(1, 4)):
            kind = str(rng.choice(list(ODD_NAMES)))
            name = str(rng.choice(ODD_NAMES[kind].split()))
            elements[name] = ODD_VALUES[kind][rng.integers(len(ODD_VALUES[kind]))]
        try:
            file_bytes = build(**elements)
        except Exception:  # pydicom cannot write it
            continue
        try:
            image = read(file_bytes)
        except UserError as error:
            assert SECRET not in str(error) and "\n" not in str(error)
            outcomes[False] += 1
        else:
            assert SECRET not in repr(image.meta)
            assert image.pixels.min() >= 0 and image.pixels.max() <= 1
            outcomes[True] += 1
    assert min(outcomes.values()) > 30
    out, err = capfd.readouterr()
    assert "SECRET" not in out + err + caplog.text


# --- real, derived and malformed files


def shared(folder):
    if not DATA.is_dir():
        return []
    with open(DATA / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["file"].startswith(f"dicom/{folder}/")]
    return [pytest.param(DATA.parent / row["file"], row, id=Path(row["file"]).name) for row in rows]


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent")


@needs_data
@pytest.mark.parametrize("path, row", shared("derived"))
def test_every_encoding_of_one_film_gives_the_same_picture(path, row):
    device = path.name.split("_")[0]
    reference = np.asarray(PilImage.open(path.parent / f"{device}_reference.png"), np.float32)
    image = dicom.read(path)
    allowed = 12 if "JPEG Baseline" in row["transfer_syntax"] else 2
    assert np.abs(image.pixels * 255 - reference).max() <= allowed
    assert image.meta["view"] == "PA" and image.meta["unusable"] == []


@needs_data
@pytest.mark.parametrize("path, row", shared("real"))
def test_real_files_decode(path, row):
    image = dicom.read(path)
    assert image.pixels.shape == (int(row["rows"]), int(row["cols"]))
    assert image.pixels.std() > 0.1 and image.meta["photometric"] == row["photometric"]
    if row["body_part"] == "CHEST":
        h, w = image.pixels.shape
        air = image.pixels[h // 3 : h // 2, w // 5 : w // 3]
        middle = image.pixels[h // 2 : -h // 4, w * 9 // 20 : w * 11 // 20]
        assert np.median(air) < np.median(
            middle
        )  # lung darker than mediastinum: the polarity is right
        assert image.meta["unusable"] == []
    else:
        assert any("chest" in note for note in image.meta["warnings"])


ACCEPTED = {  # file name without its device prefix -> a warning, or None for a plain reading
    "window_width_zero.dcm": "the window is not usable",
    "constant.dcm": "blank",
    "lateral_tag.dcm": "not frontal",
    "png_renamed.dcm": None,
    "rgb_secondary_capture.dcm": "colour",
    "gray16.png": "16-bit",
    "rgba.png": None,
    "palette.png": None,
}


@needs_data
@pytest.mark.parametrize("path, row", shared("bad"))
def test_bad_files_get_one_line_or_their_warning(path, row):
    kind = path.name.split("_", 1)[1]
    if kind in ACCEPTED:
        image = images.read_image(path)
        assert np.isfinite(image.pixels).all()
        if ACCEPTED[kind] is not None:
            assert any(ACCEPTED[kind] in note for note in image.meta["warnings"])
        else:
            assert image.meta["warnings"] == []
    else:
        with pytest.raises(UserError) as caught:
            images.read_image(path)
        line = str(caught.value)
        assert path.name in line and "\n" not in line and len(line) < 250
