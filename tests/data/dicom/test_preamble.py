"""Files that begin with their first element, as those from before DICOM had a file format do."""

import io
import struct

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, build, ramp
from places import SHARED
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from cxr_jax.data import dicom, images
from cxr_jax.errors import UserError

CASES = SHARED / "cases" / "dicom"
FULL = {"WindowCenter": 2048, "WindowWidth": 4096}
SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


def read(file_bytes):
    return images.image_from_bytes("film.dcm", file_bytes)


def data_start(file_bytes):
    """Where the data set begins, after preamble, mark and group 2."""
    return 132 + 12 + struct.unpack("<I", file_bytes[140:144])[0]


def strip(file_bytes, what):
    """Take from a file its preamble, its mark, its group 2."""
    start = data_start(file_bytes)
    return {
        "preamble": file_bytes[128:],
        "preamble and mark": file_bytes[132:],
        "preamble, mark and group 2": file_bytes[start:],
        "group 2": file_bytes[:132] + file_bytes[start:],
        "preamble and group 2": b"DICM" + file_bytes[start:],
    }[what]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
@pytest.mark.parametrize(
    "what",
    [
        "preamble",
        "preamble and mark",
        "preamble, mark and group 2",
        "group 2",
        "preamble and group 2",
    ],
)
def test_a_file_without_its_preamble_gives_the_same_picture(what, syntax, tmp_path):
    elements = {"PhotometricInterpretation": "MONOCHROME1", **FULL}
    whole = build(syntax=syntax, **elements)
    (tmp_path / "film").write_bytes(strip(whole, what))
    image, expected = images.read_image(tmp_path / "film"), read(whole)
    assert (image.pixels == expected.pixels).all() and image.meta == expected.meta
    assert (dicom.read(tmp_path / "film").pixels == expected.pixels).all()
    np.testing.assert_allclose(image.pixels, 1 - ramp() / 4095, atol=1e-6)


def test_compressed_pixels_without_a_preamble_are_read_if_the_syntax_is_named():
    dataset = pydicom.dcmread(io.BytesIO(build(**FULL)))
    dataset.compress(RLELossless)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    whole = buffer.getvalue()
    assert (read(strip(whole, "preamble and mark")).pixels == read(whole).pixels).all()
    with pytest.raises(UserError, match="compressed, and the transfer syntax does not say how"):
        read(strip(whole, "preamble, mark and group 2"))


def test_group_2_in_implicit_form_is_read():
    body = strip(build(syntax=ImplicitVRLittleEndian, **FULL), "preamble, mark and group 2")
    value = ImplicitVRLittleEndian.encode() + b"\0" * (len(ImplicitVRLittleEndian) % 2)
    group = struct.pack("<HHI", 2, 0x10, len(value)) + value
    for start in (b"", b"DICM", bytes(128) + b"DICM"):
        np.testing.assert_allclose(read(start + group + body).pixels, ramp() / 4095, atol=1e-6)


@pytest.mark.parametrize(
    "elements, syntax",
    [
        ({"remove": ("SOPClassUID", "SOPInstanceUID")}, ImplicitVRLittleEndian),
        ({"SpecificCharacterSet": "ISO_IR 100"}, ImplicitVRLittleEndian),
        ({"RecognitionCode": "ACR-NEMA 2.0"}, ImplicitVRLittleEndian),
        ({"ImageType": ["DERIVED", "PRIMARY"]}, ExplicitVRLittleEndian),
    ],
)
def test_other_first_elements_without_a_preamble(elements, syntax):
    file_bytes = build(syntax=syntax, **elements, **FULL)
    image = read(strip(file_bytes, "preamble, mark and group 2"))
    # The oracle guesses as well, in its own way.
    body = io.BytesIO(strip(file_bytes, "preamble, mark and group 2"))
    oracle = pydicom.dcmread(body, force=True)
    assert oracle.original_encoding == (syntax.is_implicit_VR, True)
    np.testing.assert_allclose(image.pixels, ramp() / 4095, atol=1e-6)


NO_DICOM = {
    "text": b"This is no film.\n" * 40,
    "text of one letter": b"\x08",
    "zeros": bytes(4000),
    "first tag only": b"\x08\x00\x05\x00",
    "lengths past the end": b"\x08\x00\x05\x00\xff\xff\xff\x7f" + bytes(500),
    "tags that fall": (b"\x08\x00\x16\x00\x02\x00\x00\x00AB\x08\x00\x05\x00\x02\x00\x00\x00AB") * 9,
    "TIFF": b"II*\x00\x08\x00\x00\x00" + bytes(500),
    "icon": b"\x00\x00\x01\x00\x01\x00\x10\x10" + bytes(500),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(500),
    "random": np.random.default_rng(0).bytes(4000),
}


@pytest.mark.parametrize("kind", NO_DICOM)
def test_what_is_no_dicom_is_told_as_such(kind):
    with pytest.raises(UserError, match="not a PNG, JPEG or DICOM file"):
        read(NO_DICOM[kind])


@pytest.mark.parametrize("syntax", [*SYNTAXES, DeflatedExplicitVRLittleEndian])
def test_damage_without_a_preamble_ends_in_an_image_or_one_line(syntax, capfd):
    whole = build(syntax=syntax, **FULL)
    base = strip(whole, "preamble and mark" if syntax.is_deflated else "preamble, mark and group 2")
    rng = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(base[: rng.integers(1, len(base))] if rng.integers(4) == 0 else base)
        for position in rng.integers(0, min(len(data), 400), rng.integers(1, 5)):
            data[position] = rng.integers(256)
        try:
            image = read(bytes(data))
        except UserError as error:
            assert SECRET not in str(error) and "\n" not in str(error)
        else:
            assert image.pixels.min() >= 0 and image.pixels.max() <= 1
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared data folder is absent")
def test_a_film_without_its_preamble_gives_the_same_picture():
    whole = (CASES / "ref_12bit.dcm").read_bytes()
    assert (read(whole[data_start(whole) :]).pixels == read(whole).pixels).all()
