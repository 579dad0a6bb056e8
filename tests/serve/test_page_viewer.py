"""The viewer in a real browser: the pixels on its canvas are those of the server, by every kind of window."""

import base64
import hashlib
import io
import warnings

import browser
import numpy as np
import pydicom
import pytest
import room_server
from dicom_files import build
from places import SHARED

from cxr_jax.data import dicom

pytestmark = pytest.mark.slow
GOOD = sorted((SHARED / "dicom").glob("[dr]e*/*.dcm")) + sorted((SHARED / "cases/dicom").glob("*"))
MADE = {
    "padding": dict(PixelPaddingValue=4095, PhotometricInterpretation="MONOCHROME1"),
    "slope": dict(RescaleSlope="0.37", RescaleIntercept="-12.5"),
    "inverse": dict(PresentationLUTShape="INVERSE"),
}
# Draws the film at one film pixel a screen pixel around a place, and gives the canvas's red bytes and where the film
# lies on it.
READ = """([x, y]) => {
  const canvas = document.getElementById("film");
  const { viewer } = canvas;
  Object.assign(viewer, { scale: 1, isFitted: false, centerX: x, centerY: y, seen: null });
  viewer.drawNow();
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const gray = new Uint8Array(canvas.width * canvas.height);
  let isGray = true;
  for (let at = 0; at < gray.length; at += 1) {
    gray[at] = data[4 * at];
    isGray &&= data[4 * at] === data[4 * at + 1] && data[4 * at] === data[4 * at + 2] && data[4 * at + 3] === 255;
  }
  let text = "";
  for (let at = 0; at < gray.length; at += 32768) text += String.fromCharCode(...gray.subarray(at, at + 32768));
  const { left, top } = viewer.extent();
  return { left, top, width: canvas.width, height: canvas.height, isGray, bytes: btoa(text) };
}"""
CHOOSE = """(window) => {
  const { viewer } = document.getElementById("film");
  viewer.chosen = window;
  viewer.retable();
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    state = room_server.make_state(tmp_path_factory.mktemp("room"))
    app = room_server.app_of(state, room_server.StubRoom().router(state))
    with room_server.served(app) as address, browser.launched() as chromium:
        with browser.page_of(chromium, address, 2200, 1300) as page:
            page.wait_for_selector("html[data-ready=yes]")
            yield page


def open_film(page, content, tmp_path):
    (tmp_path / "film.dcm").write_bytes(content)
    browser.upload(page, tmp_path / "film.dcm")
    name = f"film {hashlib.sha256(content).hexdigest()[:8]}"
    page.locator("#film-name", has_text=name).wait_for()


def assert_drawn(page, expected, place):
    """The canvas around a place of the film is the server's picture, within one of 255 levels."""
    answer = page.evaluate(READ, place)
    assert answer["isGray"]
    drawn = np.frombuffer(base64.b64decode(answer["bytes"]), np.uint8)
    drawn = drawn.reshape(answer["height"], answer["width"])
    left, top = answer["left"], answer["top"]
    rows, columns = expected.shape
    there = drawn[max(0, top) : top + rows, max(0, left) : left + columns]
    part = expected[max(0, -top) :, max(0, -left) :][: there.shape[0], : there.shape[1]]
    assert there.size >= 10_000
    worst = np.abs(there / 255.0 - part).max()
    assert worst <= 1 / 255, worst


def with_window(content, center, width, function):
    """The file with one window in place of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(io.BytesIO(content))
        for element in ("VOILUTSequence", "WindowCenterWidthExplanation"):
            if element in dataset:
                del dataset[element]
        dataset.WindowCenter, dataset.WindowWidth = str(center), str(width)
        dataset.VOILUTFunction = function
        buffer = io.BytesIO()
        dataset.save_as(buffer)
    return buffer.getvalue()


def read(content, tmp_path):
    (tmp_path / "expected.dcm").write_bytes(content)
    return dicom.read(tmp_path / "expected.dcm").pixels


def made(name):
    ramp = np.linspace(0, 4095, 300 * 280).astype(np.uint16).reshape(300, 280)
    return build(ramp, **MADE[name])


@pytest.mark.parametrize("film", [*MADE, *GOOD], ids=lambda film: getattr(film, "stem", film))
def test_the_canvas_shows_the_servers_picture_at_five_windows(page, film, tmp_path):
    content = made(film) if isinstance(film, str) else film.read_bytes()
    open_film(page, content, tmp_path)
    expected = read(content, tmp_path)
    rows, columns = expected.shape
    # The file's own window, a table included: the whole film, part by part.
    for x in range(500, columns + 500, 1000):
        for y in range(500, rows + 500, 1000):
            assert_drawn(page, expected, [min(x, columns), min(y, rows)])

    # The range of its values sets four others.
    info = page.evaluate("() => document.getElementById('film').viewer.film")
    low, high = (info["offset"] + info["slope"] * level for level in info["levels_range"])
    span = round(high - low)
    windows = [
        (round(low + span / 2), span, "LINEAR"),
        (round(low + span / 3), max(2, span // 7), "LINEAR"),
        (round(low + span / 2), max(2, span // 3), "SIGMOID"),
        (round(low + span * 0.6), max(2, span // 4), "LINEAR_EXACT"),
    ]
    for center, width, function in windows:
        page.evaluate(CHOOSE, {"name": "", "center": center, "width": width, "function": function})
        shown = read(with_window(content, center, width, function), tmp_path)
        assert_drawn(page, shown, [columns // 2, rows // 2])


def test_sixteen_bits_reach_the_canvas(page, tmp_path):
    """A step of one of 65,536 levels is black on one side and white on the other, by the narrowest window."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    content = build(ramp, bits=16, WindowCenter=30000.5, WindowWidth=1)
    open_film(page, content, tmp_path)
    assert_drawn(page, (ramp > 30000).astype(np.float32), [128, 128])


def test_a_film_is_fitted_windowed_zoomed_at_the_pointer_inverted_and_reset(page, tmp_path):
    open_film(page, made("slope"), tmp_path)
    state = """() => {
      const { viewer } = document.getElementById("film");
      const { scale, isInverted, quarters, chosen, split } = viewer;
      const place = viewer.filmPlace(700, 400);
      return { scale, isInverted, quarters, split, width: chosen.width, center: chosen.center, place };
    }"""
    box = page.locator("#viewport").bounding_box()
    x, y = box["x"] + 700, box["y"] + 400
    begun = page.evaluate(state)
    # ---- Drag: width by x, centre by y ----
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 40, steps=4)
    page.mouse.up()
    dragged = page.evaluate(state)
    assert dragged["width"] > begun["width"] and dragged["center"] != begun["center"]
    # ---- The wheel keeps what is under the pointer ----
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(100)
    zoomed = page.evaluate(state)
    assert zoomed["scale"] > begun["scale"] * 1.3
    assert zoomed["place"]["x"] == pytest.approx(begun["place"]["x"], abs=1)
    assert zoomed["place"]["y"] == pytest.approx(begun["place"]["y"], abs=1)
    # ---- Keys ----
    page.keyboard.press("i")
    page.keyboard.press("0")
    by_key = page.evaluate(state)
    assert by_key["isInverted"] and by_key["scale"] == 1
    page.keyboard.press("Space")
    assert page.evaluate(state) == begun
    page.keyboard.press("w")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(state)["width"] > begun["width"]
    page.keyboard.press("1")
    assert page.evaluate(state)["width"] == begun["width"]


def test_a_turned_film_has_a_red_frame_and_its_sides_go_along(page, tmp_path):
    # Other in every corner: no turn and no mirror image of it is itself.
    slope = np.add.outer(np.arange(300) * 8, np.arange(280) * 5).astype(np.uint16)
    content = build(slope, PatientOrientation=["L", "F"])
    open_film(page, content, tmp_path)
    assert page.locator("#edge-left").text_content() == "R"
    page.locator("#turn").select_option("2")
    assert page.locator("#edge-left").text_content() == "L"
    assert page.locator("#edge-right").text_content() == "R"
    assert "not as stored" in page.locator("#turned-words").text_content()
    assert "turned" in page.locator("#viewport").get_attribute("class")
    # No key turns or flips: a mirrored chest is the worst of errors.
    page.locator("#viewport").focus()
    for key in ("r", "l", "h", "v"):
        page.keyboard.press(key)
    assert page.evaluate("() => document.getElementById('film').viewer.quarters") == 2
    expected = np.rot90(read(content, tmp_path), 2)
    assert_drawn(page, expected, [140, 150])
    page.keyboard.press("Space")
    assert page.locator("#turned-words").is_hidden()


def test_a_redraw_maps_only_what_is_seen(page, tmp_path):
    """A film of 7.5 megapixels; the milliseconds that a window and a pan take are printed."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 4000, (300, 250)).astype(np.uint16)
    open_film(page, build(np.kron(small, np.ones((10, 10), np.uint16))), tmp_path)
    milliseconds = page.evaluate(
        """() => {
          const { viewer } = document.getElementById("film");
          const times = { window: [], pan: [] };
          for (let count = 0; count < 100; count += 1) {
            viewer.setWindow(2000 + count, 3000);
            viewer.drawNow();
            times.window.push(viewer.lastMilliseconds);
          }
          for (let count = 0; count < 100; count += 1) {
            viewer.pan(1, 1);
            viewer.drawNow();
            times.pan.push(viewer.lastMilliseconds);
          }
          const median = (list) => list.sort((a, b) => a - b)[50];
          const { width, height } = viewer.base;
          return { window: median(times.window), pan: median(times.pan), width, height };
        }"""
    )
    print(milliseconds)
    assert 0 < milliseconds["width"] * milliseconds["height"] < small.size * 100 / 4
