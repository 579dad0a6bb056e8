"""A reading as a picture (DICOM secondary capture), for archives and viewers that show no SR.

The film in small beside what the reading says of it, and the notice burned in: it cannot be shown without.
Deterministic, as SR is; a font that comes with Pillow, so that it looks alike on every machine.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from highdicom import sc
from highdicom.sr.coding import CodedConcept
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from cxr_jax.outputs import document as documents
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
from cxr_jax.outputs.sr import CAPTURE_SERIES_NUMBER, check_sources, describe_series

WIDTH, HEIGHT = 1280, 800  # px
_FILM_SIDE, _MARGIN, _LINE = 560, 32, 27
_TEXT_LEFT = _FILM_SIDE + 2 * _MARGIN
# A state is told by a sign and a word, not by colour alone; signs that the font has.
_SHAPES = {
    "present": ("+", (255, 190, 90)),
    "uncertain": ("?", (190, 190, 255)),
    "absent": ("-", (150, 150, 150)),
    "not_mentioned": ("", (110, 110, 110)),
}
_WHITE, _GRAY, _BLACK = (235, 235, 235), (150, 150, 150), (0, 0, 0)


def write(
    reading: Mapping[str, Any], sources: Sequence[Source], film: np.ndarray, *, at: str
) -> bytes:
    """Write the secondary capture.

    Args:
        reading: a `cxr_reading` document.
        sources: the film that is asked about, then those that were read with it.
        film: float [H, W] in 0..1, bright is dense: the first source's pixels.
        at: when the reading was made or signed, "2026-11-30T12:00:00Z".

    Raises:
        UserError: for a document that is none, sources of other films, or no time.
    """
    return as_bytes(dataset(reading, sources, film, at))


@without_warnings()
def dataset(
    reading: Mapping[str, Any], sources: Sequence[Source], film: np.ndarray, at: str
) -> Dataset:
    """Make the instance; arguments as for `write`."""
    check_sources(reading, sources)
    time = parse_time(at)
    # The picture is the document's and the film's: both name it.
    identity = f"{documents.sha256(reading)}/{time.isoformat()}"
    source = copy.deepcopy(sources[0].dataset)
    # Patient and study are the film's; series and instance are new.
    capture: Dataset = sc.SCImage.from_ref_dataset(
        source,
        pixel_array=draw(reading, film),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=derive_uid("captures", identity),
        series_number=CAPTURE_SERIES_NUMBER,
        sop_instance_uid=derive_uid("capture", identity),
        instance_number=1,
        manufacturer=MANUFACTURER,
        patient_orientation=("L", "F"),  # the library asks for one; it goes below
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=describe_series(reading, "Picture"),
        manufacturer_model_name=clean(reading["model"]["name"], 64) or "unnamed",
        software_versions=clean(reading["model"]["app_version"], 64),
        specific_character_set="ISO_IR 192",
    )
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ConversionType = "WSD"
    # A chest has no side, so it needs none; rows and columns of a page have no direction in a patient.
    capture.BodyPartExamined, capture.PatientOrientation = "CHEST", ""
    capture.DateOfSecondaryCapture = time.strftime("%Y%m%d")
    capture.TimeOfSecondaryCapture = time.strftime("%H%M%S")
    # What is burned in is the reading, and nothing of a patient; so this is what the film's own header says of it.
    if source.BurnedInAnnotation:
        capture.BurnedInAnnotation = source.BurnedInAnnotation
    elif "BurnedInAnnotation" in capture:
        del capture.BurnedInAnnotation  # nobody knows, and "NO" would be a promise
    if "LossyImageCompression" in source:
        capture.LossyImageCompression = source.LossyImageCompression
    capture.SourceImageSequence = [_shown(each.dataset) for each in sources[:1]]
    capture.DerivationDescription = "Film in small beside the text of a reading. Research use only."
    capture.ImageComments = clean(reading["notice"], 1024)
    if (offset := source.get("TimezoneOffsetFromUTC")) is not None:
        capture.TimezoneOffsetFromUTC = offset
    stamp(capture, time)
    return capture


def _shown(film: Dataset) -> Dataset:
    """Reference the film that the picture shows."""
    reference = Dataset()
    reference.ReferencedSOPClassUID = film.SOPClassUID
    reference.ReferencedSOPInstanceUID = film.SOPInstanceUID
    purpose = CodedConcept("121322", "DCM", "Source image for image processing operation")
    reference.PurposeOfReferenceCodeSequence = [purpose]
    return reference


# ---- The picture ----


def draw(reading: Mapping[str, Any], film: np.ndarray) -> np.ndarray:
    """Draw the page, uint8 [800, 1280, 3]."""
    drawn_page = PilImage.new("RGB", (WIDTH, HEIGHT), _BLACK)
    _paste_film(drawn_page, film)
    drawing_pen = ImageDraw.Draw(drawn_page)
    _write_notice(drawing_pen, reading)
    line_top = _write_findings(drawing_pen, reading)
    _write_conclusion(drawing_pen, reading, line_top)
    return np.asarray(drawn_page)


def _paste_film(drawn_page: PilImage.Image, film: np.ndarray) -> None:
    levels = np.round(np.clip(np.nan_to_num(film), 0, 1) * 255).astype(np.uint8)
    small_film = PilImage.fromarray(levels).convert("L")
    # As large as it fits, and never drawn out of shape.
    film_scale = _FILM_SIDE / max(small_film.size)
    size = (
        max(1, round(small_film.width * film_scale)),
        max(1, round(small_film.height * film_scale)),
    )
    small_film = small_film.resize(size, PilImage.Resampling.LANCZOS)
    left = _MARGIN + (_FILM_SIDE - size[0]) // 2
    drawn_page.paste(small_film.convert("RGB"), (left, 3 * _MARGIN + (_FILM_SIDE - size[1]) // 2))


def _write_notice(drawing_pen: ImageDraw.ImageDraw, reading: Mapping[str, Any]) -> None:
    # Above and below, so that a cut picture still has one of them.
    notice = clean(reading["notice"], 200)
    for line_top in (_MARGIN - 8, HEIGHT - _MARGIN - 16):
        drawing_pen.text((_MARGIN, line_top), notice, font=_font(24), fill=(255, 120, 120))
    signed = reading["signed"]
    status = (
        "Draft of a model, not reviewed" if signed is None else f"Reviewed: {signed['meaning']}"
    )
    drawing_pen.text((_TEXT_LEFT, 2 * _MARGIN), clean(status, 60), font=_font(20), fill=_GRAY)


def _write_findings(drawing_pen: ImageDraw.ImageDraw, reading: Mapping[str, Any]) -> int:
    """The 14 findings, a line each; returns where the next line would be."""
    line_top = 3 * _MARGIN
    for finding in reading["findings"]:
        shape, colour = _SHAPES[finding["state"]]
        words = finding["state"].replace("_", " ")
        side = f", {finding['side']}" if finding["side"] else ""
        drawing_pen.text((_TEXT_LEFT, line_top), shape, font=_font(20), fill=colour)
        drawing_pen.text((_TEXT_LEFT + 28, line_top), finding["label"], font=_font(20), fill=_WHITE)
        drawing_pen.text(
            (_TEXT_LEFT + 320, line_top), f"{words}{side}", font=_font(20), fill=colour
        )
        if finding["probability"] is not None:
            text = f"p {finding['probability']:.2f}"
            drawing_pen.text((_TEXT_LEFT + 540, line_top), text, font=_font(18), fill=_GRAY)
        line_top += _LINE
    # Whose numbers these are, in the picture itself.
    model = clean(f"{reading['model']['name']} {reading['model']['app_version']}", 60)
    more = "p: the model's own probability, not calibrated"
    drawing_pen.text((_TEXT_LEFT, line_top + 6), f"{model}; {more}", font=_font(16), fill=_GRAY)
    return line_top + _LINE + 14


def _write_conclusion(
    drawing_pen: ImageDraw.ImageDraw, reading: Mapping[str, Any], line_top: int
) -> None:
    text = reading["report"]["impression"].strip() or documents.title_of(reading)
    # Addenda first: they may correct what is above them, and the end of a long text is cut.
    text_lines = [
        text_line
        for part in (*documents.addenda_of(reading)[::-1], text)
        for text_line in _wrap(drawing_pen, clean(part, 4000), WIDTH - _TEXT_LEFT - _MARGIN)
    ]
    # A picture has an end: what does not fit is said to be missing.
    lines_left = (HEIGHT - 2 * _MARGIN - 16 - line_top) // _LINE
    if len(text_lines) > lines_left:
        text_lines = [*text_lines[: lines_left - 1], "(cut: the whole text is in the report)"]
    for text_line in text_lines:
        drawing_pen.text((_TEXT_LEFT, line_top), text_line, font=_font(20), fill=_WHITE)
        line_top += _LINE


def _wrap(drawing_pen: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    # Greedily, word by word, by what the font makes of them.
    text_lines: list[str] = []
    text_line = ""
    for next_word in text.split():
        # A word that is wider than the page is cut, or it would run out of it.
        while drawing_pen.textlength(next_word, font=_font(20)) > width:
            next_word = next_word[: len(next_word) // 2]
        longer = f"{text_line} {next_word}".strip()
        if drawing_pen.textlength(longer, font=_font(20)) > width:
            text_lines.append(text_line)
            text_line = next_word
        else:
            text_line = longer
    return [*text_lines, text_line] if text_line else text_lines


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
