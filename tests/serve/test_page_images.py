"""Films over HTTP: what is kept of an upload, what is refused and why, and pixels with all their depth."""

import gzip
import hashlib
import io

import numpy as np
import pytest
import room_server
from dicom_files import SECRET, build, ramp
from fastapi.testclient import TestClient
from PIL import Image as PilImage
from places import SHARED

import cxr_jax
from cxr_jax.data import dicom, display, image_gate
from cxr_jax.data.dicom import pixels as dicom_pixels
from cxr_jax.inference import image_inputs
from cxr_jax.serve.room import films, pixels

NOISE = np.random.default_rng(5).integers(0, 4096, (300, 260)).astype(np.uint16)
GOOD = sorted((SHARED / "dicom").glob("[dr]e*/*.dcm"))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    state = room_server.make_state(tmp_path_factory.mktemp("room"), model=cxr_jax.load("phantom"))
    with TestClient(room_server.app_of(state), base_url="http://127.0.0.1") as client:
        client.folder = state.films.folder
        yield client


def upload(client, content, name="x"):
    return client.post("/room/images", files={"file": (name, content)})


def png(array):
    buffer = io.BytesIO()
    PilImage.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def shown(film, window):
    """A film by one of its windows, as the page computes it, float32 [H, W]."""
    values = np.float32(film.slope) * film.levels.astype(np.float32) + np.float32(film.offset)
    if table := window.get("lut"):
        entries = np.rint(values).astype(int) - table["first"]
        entries = np.clip(entries, 0, len(table["values"]) - 1)
        gray = np.clip(np.asarray(table["values"])[entries] / table["white"], 0, 1)
    else:
        gray = dicom_pixels.window(values, window["center"], window["width"], window["function"])
    gray = 1 - gray if film.is_inverted else gray
    return np.where(film.levels == film.padding, 0, gray) if film.padding else gray


# ---- Pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_levels_and_the_first_window_are_the_picture(path):
    film = display.open_film("x", path.read_bytes())
    expected = dicom.read(path).pixels
    assert film.levels.dtype == np.uint16
    np.testing.assert_allclose(shown(film, film.windows[0]), expected, atol=1e-4)


@pytest.mark.parametrize(
    "elements",
    [
        dict(WindowCenter=1500, WindowWidth=900, VOILUTFunction="SIGMOID"),
        dict(WindowCenter=1500, WindowWidth=900, VOILUTFunction="LINEAR_EXACT"),
        dict(WindowCenter=1500, WindowWidth=1, VOILUTFunction="LINEAR"),
        dict(PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=4095),
        dict(RescaleSlope="0.37", RescaleIntercept="-12.5", WindowCenter=700, WindowWidth=800),
    ],
    ids=lambda elements: "-".join(map(str, elements.values())),
)
def test_every_kind_of_window_and_padding(elements, tmp_path):
    content = build(ramp(12), **elements)
    (tmp_path / "x.dcm").write_bytes(content)
    film = display.open_film("x", content)
    expected = dicom.read(tmp_path / "x.dcm").pixels
    np.testing.assert_allclose(shown(film, film.windows[0]), expected, atol=1e-3)
    assert (film.padding is not None) == ("PixelPaddingValue" in elements)


def test_pixels_travel_as_little_endian_levels_compressed_once(client):
    described = upload(client, build(NOISE)).json()
    with client.stream("GET", f"/room/images/{described['sha256']}/pixels") as answer:
        raw = b"".join(answer.iter_raw())
    levels = np.frombuffer(gzip.decompress(raw), "<u2").reshape(300, 260)
    np.testing.assert_array_equal(levels * described["slope"] + described["offset"], NOISE)
    assert answer.headers["cache-control"] == "no-store"


def test_the_models_view_is_what_the_model_is_given(client):
    film = np.linspace(0, 1, 300 * 200).reshape(300, 200).astype(np.float32)
    described = upload(client, png((film * 255).astype(np.uint8))).json()
    answer = client.get(f"/room/images/{described['sha256']}/model_view.png")
    picture = np.asarray(PilImage.open(io.BytesIO(answer.content)))
    model = cxr_jax.load("phantom")
    pixels_read = films.Films(client.folder).picture(described["sha256"])
    side = int(model.pixel_limits[0] ** 0.5)
    expected = image_inputs.fit_to_model(pixels_read, model.pixel_limits)
    np.testing.assert_array_equal(picture, np.rint(expected * 255))
    # Two thirds of the square are the film, the rest is padding.
    left, top, right, bottom = map(float, answer.headers["x-film-box"].split(","))
    assert (top, bottom) == (0, 1) and right - left == pytest.approx(2 / 3, abs=2 / side)


# ---- What is kept and told -------------------------------------------------------------------------


def test_an_upload_is_named_by_its_bytes_and_keeps_no_text_of_a_header(client):
    content = build(
        NOISE,
        WindowCenter=[2048, 1000],
        WindowWidth=[4096, 500],
        WindowCenterWidthExplanation=["NORMAL", SECRET],
        PatientOrientation=["L", "F"],
    )
    answer = upload(client, content, f"{SECRET}.dcm")
    assert answer.status_code == 201
    described = answer.json()
    assert described["sha256"] == hashlib.sha256(content).hexdigest()
    assert SECRET not in answer.text
    assert [window["name"] for window in described["windows"][:2]] == ["Normal", "Window 2 of 2"]
    assert described["marker"] == {
        "left": "R", "right": "L", "source": "Patient Orientation (0020,0020)"
    }  # fmt: skip
    assert client.get(f"/room/images/{described['sha256']}/info").json() == described
    # The bytes of the film itself are what an export is made of; all else is free of its header.
    for file in client.folder.glob(f"{described['sha256']}*"):
        assert SECRET not in file.name and file.stat().st_mode & 0o777 == 0o600
        assert file.suffix == ".film" or SECRET.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("content", "state", "word"),
    [
        (build(NOISE), "refused", "noise"),
        (build(np.full((100, 90), 700, np.uint16)), "refused", "blank"),
        (png(np.random.default_rng(1).integers(0, 255, (90, 90, 3)).astype(np.uint8)),
         "refused", "colour"),
    ],
    ids=["noise", "blank", "colour"],
)  # fmt: skip
def test_the_gate_says_why(client, content, state, word):
    gate = upload(client, content).json()["gate"]
    assert gate["state"] == state and any(word in reason for reason in gate["reasons"])


@pytest.mark.skipif(not GOOD, reason="the shared data is not there")
def test_a_film_passes_the_gate_and_a_lateral_does_not(client):
    scene = display.open_film("x", GOOD[0].read_bytes())
    assert image_gate.gate_of(scene.image).state == "ok"
    lateral = SHARED / "dicom/bad/devA_lateral_tag.dcm"
    assert upload(client, lateral.read_bytes()).json()["gate"]["reasons"] == ["not a frontal view"]


# ---- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"", 415), (b"GIF89a", 415), (b"<svg onload=alert(1)>", 415), (b"\x89PNG\r\n\x1a\n", 400)]
    + [(b"\0" * 128 + b"DICM", 400), (png(np.zeros((8, 8), np.uint8)), 400)],
)  # fmt: skip
def test_what_is_no_film_is_refused_in_one_line(client, content, status):
    before = sorted(client.folder.iterdir())
    answer = upload(client, content)
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert message and "\n" not in message and "Traceback" not in message
    assert sorted(client.folder.iterdir()) == before


def test_forms_that_are_none(client):
    refused = [
        client.post("/room/images", content=b"x"),
        client.post("/room/images", files={"other": b"x"}),
        client.post("/room/images", data={"file": "x"}, files={"a": b"x"}),
        client.post("/room/images", files=[("file", b"x"), ("file", b"y")]),
        client.post("/room/images", content=b"x", headers={"content-type": "multipart/form-data"}),
    ]
    assert [answer.status_code for answer in refused] == [400] * 5


@pytest.mark.parametrize("digest", ["x", "0" * 64, "..%2f..%2fetc", "A" * 64])
def test_hashes_that_are_none(client, digest):
    for path in ("info", "pixels", "model_view.png"):
        assert client.get(f"/room/images/{digest}/{path}").status_code == 404


def test_an_upload_may_not_be_too_large(tmp_path):
    limits = room_server.Limits(upload_bytes=1000)
    state = room_server.make_state(tmp_path, limits=limits)
    with TestClient(room_server.app_of(state), base_url="http://127.0.0.1") as client:
        assert upload(client, build(NOISE)).status_code == 413
    assert pixels.router(state).routes  # pixels need no model until they are asked for
