"""One gate at all doors: what room, API and command say of a film is the same, whatever has let it be read."""

import base64
import json

import numpy as np
import pytest
from api_bodies import BLANK, COLOUR, NOISE, body, data_url, png_bytes
from dicom_files import build
from films import draw_film
from room_client import hash_of, read, room

from cxr_jax.data import images
from cxr_jax.errors import UserError
from cxr_jax.inference.reading import check_usable
from cxr_jax.outputs import document
from experiments.analysis import gate_pictures

HAND = data_url(
    png_bytes((np.clip(gate_pictures.draw_hand(np.random.default_rng(1)), 0, 1) * 255).astype("u1"))
)
LEVELS = draw_film(300, 280).astype(np.uint16) * 16
KINDS = {
    "noise": (NOISE, "noise"),
    "hand": (HAND, "hand"),
    "lateral": (data_url(build(LEVELS, ViewPosition="LL"), "application/dicom"), "frontal"),
    "colour": (COLOUR, "colour"),
    "blank": (BLANK, "blank"),
}
DOCUMENT = {"type": "json_schema", "json_schema": {"name": "cxr_reading"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with room(tmp_path_factory.mktemp("room") / "store") as client:
        yield client


def content_of(url):
    return base64.b64decode(url.partition(",")[2])


def at_the_room(client, url):
    """Upload a film; its gate, and that of its reading."""
    described = client.post("/room/images", files={"file": ("x", content_of(url))}).json()
    reading, _ = read(client, described["sha256"], read_anyway=True)
    return described["gate"], client.get(f"/room/readings/{reading}").json()["image"]["gate"]


def at_the_api(client, url):
    """Ask for a document; the film's gate in it."""
    asked = body(url, response_format=DOCUMENT, read_anyway=True)
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["choices"][0]["message"]["content"])["image"]["gate"]


def at_the_command(path, url, **how):
    """Read a file as `cxr-jax predict` does; its gate in the document of --sr and --fhir."""
    content = content_of(url)
    path.write_bytes(content)
    film = images.read_image(path)
    check_usable(path, film, **how)
    return document.image_facts(hash_of(content), film).as_json()["gate"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_door_refuses_and_says_so_of_what_is_read_anyway(client, tmp_path, kind):
    url, word = KINDS[kind]
    gate, of_reading = at_the_room(client, url)
    assert gate["state"] == "refused" and word in " ".join(gate["reasons"])
    # ---- No report by itself ----
    for path in ("/room/readings", "/room/reports"):
        answer = client.post(path, json={"image": hash_of(content_of(url))})
        assert answer.status_code == 400 and word in answer.json()["error"]["message"]
    asked = client.post("/v1/chat/completions", json=body(url))
    assert asked.status_code == 400 and word in asked.json()["error"]["message"]
    with pytest.raises(UserError, match=word):
        at_the_command(tmp_path / "x", url)
    # ---- And the same state and reasons, read all the same ----
    assert of_reading == gate
    assert at_the_api(client, url) == gate
    assert at_the_command(tmp_path / "x", url, read_anyway=True) == gate


@pytest.mark.parametrize("policy", ["warn", "off"])
def test_no_flag_makes_a_film_of_what_is_none(tmp_path, policy):
    """What is said of a film is what it is, and not which flag has let it by."""
    gate = at_the_command(tmp_path / "x", NOISE, gate_policy=policy)
    assert gate["state"] == "refused" and "noise" in gate["reasons"][0]


def test_a_film_and_a_film_with_a_doubt(client, tmp_path):
    film = data_url(png_bytes(draw_film(260, 240)))
    doubted = data_url(build(LEVELS, PixelSpacing=None, PhotometricInterpretation="MONOCHROME1"),
                       "application/dicom")  # fmt: skip
    for url in (film, doubted):
        gate, of_reading = at_the_room(client, url)
        assert gate == of_reading == at_the_api(client, url)
        assert gate == at_the_command(tmp_path / "x", url)
        assert gate["state"] in ("ok", "warned")
    assert at_the_command(tmp_path / "x", film) == {"state": "ok", "reasons": []}
