"""Which bits of a cell are the pixel: every layout gives the picture of the plain one, or is refused in one line."""

import dataclasses
import io

import numpy as np
import pydicom
import pytest
from dicom_files import build
from places import SHARED
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from cxr_jax.data import images
from cxr_jax.errors import UserError

CASES = SHARED / "cases" / "dicom"
SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)


def film(bits=12, height=40, width=56, seed=0):
    """A smooth picture over the whole range of `bits` bits, with noise in its lowest ones. int64."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    shown = 0.5 + 0.5 * np.sin(3 * columns + 2 * rows + rng.uniform(0, 6))
    highest = 2**bits - 1
    values = np.clip(
        np.rint(shown * highest + rng.normal(0, highest / 200, shown.shape)), 0, highest
    )
    values.flat[:2] = 0, highest
    return values.astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How values are put into cells."""

    allocated: int = 16
    bits: int = 12
    shift: int = 0
    is_signed: bool = False
    repeats_sign: bool = True
    overlays: tuple[int, ...] = ()
    syntax: str = ExplicitVRLittleEndian
    seed: int = 0

    def file(self, values, **elements):
        """Bytes of a DICOM file that holds `values`, from -2^(bits-1) when signed, else from 0."""
        rng = np.random.default_rng(self.seed)
        cells = values & (2**self.bits - 1)
        if self.is_signed and self.repeats_sign:
            cells = values & (2 ** (self.allocated - self.shift) - 1)
        cells = cells << self.shift
        for number, position in enumerate(self.overlays):
            cells = (
                cells & ~(1 << position)
                | (rng.random(cells.shape) < 0.2).astype(np.int64) << position
            )
            elements[f"OverlayBitPosition_{number}"] = position
        kind = f"{'i' if self.is_signed else 'u'}{self.allocated // 8}"
        pixels = cells.astype(f"u{self.allocated // 8}").view(kind)
        low = -(2 ** (self.bits - 1)) if self.is_signed else 0
        window = {"WindowCenter": low + 2 ** (self.bits - 1), "WindowWidth": 2**self.bits}
        return build(
            pixels,
            bits=self.bits,
            syntax=self.syntax,
            HighBit=self.bits - 1 + self.shift,
            **window | elements,
        )


def read(file_bytes):
    return images.image_from_bytes("film.dcm", file_bytes)


def random_layout(seed):
    rng = np.random.default_rng(seed)
    allocated = int(rng.choice([8, 16, 16, 16, 32]))
    bits = int(rng.integers(6, min(allocated, 16) + 1))
    shift = int(rng.integers(0, allocated - bits + 1))
    is_signed = bool(rng.integers(2))
    beside = [position for position in range(allocated) if not shift <= position < shift + bits]
    # A sign that is repeated stands where overlays would.
    repeats_sign = bool(rng.integers(2))
    overlays = (
        () if is_signed and repeats_sign else tuple(rng.permutation(beside)[: rng.integers(3)])
    )
    return Layout(
        allocated=allocated,
        bits=bits,
        shift=shift,
        is_signed=is_signed,
        repeats_sign=repeats_sign,
        overlays=tuple(int(position) for position in overlays),
        syntax=SYNTAXES[rng.integers(4)],
        seed=seed,
    )


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_any_layout_of_bits_gives_the_picture_of_its_values(first):
    for seed in range(first, first + 50):
        layout = random_layout(seed)
        values = film(layout.bits, seed=seed)
        stored = values - 2 ** (layout.bits - 1) if layout.is_signed else values
        image = read(layout.file(stored))
        np.testing.assert_allclose(
            image.pixels, values / (2**layout.bits - 1), atol=1e-5, err_msg=str(layout)
        )


def test_pixels_that_lie_in_the_high_bits_are_shifted():
    values = film()
    for shift in range(5):
        image = read(Layout(shift=shift).file(values))
        np.testing.assert_allclose(image.pixels, values / 4095, atol=1e-6)
        assert image.meta["warnings"] == [] and image.meta["bits"] == 12


def test_compressed_values_have_no_cell_for_a_high_bit():
    for syntax, is_refused in ((JPEG2000Lossless, False), (RLELossless, True)):
        dataset = pydicom.dcmread(io.BytesIO(Layout().file(film())))
        dataset.compress(syntax)
        dataset.HighBit = 15
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        if is_refused:
            with pytest.raises(UserError, match="High Bit says"):
                read(buffer.getvalue())
        else:
            np.testing.assert_allclose(read(buffer.getvalue()).pixels, film() / 4095, atol=1e-6)


def test_overlays_among_the_bits_are_masked_declared_or_not():
    values = film()
    rng = np.random.default_rng(1)
    drawing = (rng.random(values.shape) < 0.1).astype(np.int64)
    pixels = (values | drawing << 15 | (1 - drawing) << 13).astype(np.uint16)
    image = read(build(pixels, WindowCenter=2048, WindowWidth=4096))
    np.testing.assert_allclose(image.pixels, values / 4095, atol=1e-6)
    assert image.meta["warnings"] == ["bits beside the pixels' values were masked"]


def test_padding_outside_the_range_of_the_values_is_padding():
    values = film()
    for shift, padding in [(0, 65535), (0, 4095), (0, 5000), (4, 4095)]:
        cells = values << shift
        cells[:4] = padding << shift if shift else padding
        image = read(
            build(
                cells.astype(np.uint16),
                HighBit=11 + shift,
                PixelPaddingValue=padding,
                WindowCenter=2048,
                WindowWidth=4096,
            )
        )
        assert (image.pixels[:4] == 0).all()
        is_other = values[4:] != padding
        np.testing.assert_allclose(
            image.pixels[4:][is_other], values[4:][is_other] / 4095, atol=1e-6
        )
        assert image.meta["warnings"] == ["pixel padding was masked"]


def test_a_few_values_above_the_range_are_clipped():
    values = film()
    brightest = np.argsort(values.flat)[-2:]
    pixels = np.maximum(values, 3500).astype(np.uint16)
    pixels.flat[brightest] = 4096, 4100
    image = read(build(pixels, WindowCenter=2048, WindowWidth=4096))
    assert (image.pixels.flat[brightest] == 1).all()
    assert image.meta["warnings"] == ["a few pixels are out of the range of Bits Stored: clipped"]


@pytest.mark.parametrize(
    "pixels, elements, reason",
    [
        (film(14).astype(np.uint16), {}, "Bits Stored or Pixel Representation contradict"),
        (film().astype(np.int16), {}, "Bits Stored or Pixel Representation contradict"),
        (film().astype(np.uint16), {"HighBit": 15}, "High Bit says"),
        (film().astype(np.uint16), {"HighBit": 13}, "High Bit says"),
        (film(8).astype(np.uint16) << 4, {"HighBit": 15}, "High Bit says"),
        (film(12).astype(np.uint16) << 1, {"BitsStored": 14, "HighBit": 14}, "High Bit says"),
        (film().astype(np.uint16), {"HighBit": 10}, "High Bit contradicts"),
        (film().astype(np.uint16), {"HighBit": 16}, "High Bit contradicts"),
        (film().astype(np.uint16), {"BitsStored": 17, "HighBit": 16}, "contradict each other"),
        (film().astype(np.uint16), {"BitsAllocated": 12}, "contradict each other"),
        (film().astype(np.uint16), {"PixelRepresentation": 2}, "Pixel Representation"),
    ],
)
def test_bits_and_pixels_that_contradict_each_other_are_refused(pixels, elements, reason):
    with pytest.raises(UserError, match=reason) as caught:
        read(build(pixels, **elements))
    assert str(caught.value).startswith("film.dcm: ") and "\n" not in str(caught.value)


def test_a_missing_high_bit_is_the_usual_one():
    values = film()
    file_bytes = build(
        values.astype(np.uint16), remove=("HighBit",), WindowCenter=2048, WindowWidth=4096
    )
    np.testing.assert_allclose(read(file_bytes).pixels, values / 4095, atol=1e-6)


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "US"},
        {"RescaleSlope": "1.000", "RescaleIntercept": "0.0"},
        {"RescaleIntercept": 0},
        {"RescaleSlope": 1},
        {"RescaleSlope": 0, "RescaleIntercept": 0},
        {"RescaleSlope": None, "RescaleIntercept": None},
    ],
)
@pytest.mark.parametrize("bits, is_signed", [(8, False), (8, True), (7, False), (12, False)])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_an_identity_rescale_changes_nothing(elements, bits, is_signed, photometric):
    values = film(bits) // 2 - (2 ** (bits - 1) if is_signed else 0)
    pixels = values.astype(f"{'i' if is_signed else 'u'}{1 if bits <= 8 else 2}")
    plain = read(build(pixels, bits=bits, PhotometricInterpretation=photometric))
    image = read(build(pixels, bits=bits, PhotometricInterpretation=photometric, **elements))
    assert (image.pixels == plain.pixels).all() and image.meta["window"] == plain.meta["window"]


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared data folder is absent")
def test_identity_rescale_of_a_film_changes_nothing():
    plain, image = (
        images.read_image(CASES / name)
        for name in ("plain_8bit.dcm", "plain_8bit_identity_rescale.dcm")
    )
    assert (image.pixels == plain.pixels).all() and image.meta == plain.meta
