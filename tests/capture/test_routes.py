"""The routes of thought capture over HTTP: from consent to a saved text, and every way in which they refuse."""

import time
from types import SimpleNamespace

import pytest
from films import draw_film
from store_films import png_of

pytest.importorskip("fastapi", reason="the reading room needs the extra `serve`")
from starlette.testclient import TestClient

from cxr_jax.capture import audio, consent
from cxr_jax.serve import capture_routes
from cxr_jax.serve.app import create_app
from cxr_jax.serve.auth import Auth
from cxr_jax.serve.metrics import Metrics
from cxr_jax.serve.state import Capabilities, ServerSettings, ServerState

SCRIPT = '[["Know", 0, 0.2, 0.9], ["left", 0.2, 0.5, 0.95], ["a", 0.5, 0.6, 0.4], ["fusion.", 0.6, 1, 0.3]]'


@pytest.fixture
def room(store, tmp_path):
    """A client of a server without engine and model, whose script hears four words."""
    (tmp_path / "script.json").write_text(SCRIPT)
    settings = ServerSettings(
        store=str(store.folder), dictate=f"scripted:{tmp_path / 'script.json'}"
    )
    state = ServerState(
        settings=settings,
        engine=None,
        model=None,
        model_name="phantom",
        weights_sha256="0" * 64,
        capabilities=Capabilities(),
        metrics=Metrics(),
        store=store,
        auth=Auth(settings, store),
    )
    with TestClient(create_app(state), base_url="http://127.0.0.1") as client:
        client.headers["X-CSRF-Token"] = client.get("/session").json()["csrf"]
        yield client


@pytest.fixture
def film(room):
    """The sha256 of a film that was uploaded to the room."""
    answer = room.post("/room/images", files={"file": ("x.png", png_of(draw_film(96, 96)))})
    assert answer.status_code == 201, answer.text
    return answer.json()["sha256"]


def begin(room, image=None):
    answer = room.post("/capture", json={"image": image, "consent_sha256": consent.SHA256})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def send(room, capture_id, number, piece, key=None):
    headers = {"Idempotency-Key": key or f"p{number}"}
    return room.put(f"/capture/{capture_id}/audio/{number}", content=piece, headers=headers)


def wait_heard(room, capture_id):
    while (found := room.get(f"/capture/{capture_id}").json())["hearing"]:
        time.sleep(0.02)
    return found


def save(room, capture_id, version=0, **body):
    return room.put(f"/capture/{capture_id}/text", json=body, headers={"If-Match": f'"{version}"'})


def test_from_voice_to_a_saved_text(room, film, store, monkeypatch):
    monkeypatch.setattr(audio, "decode", lambda file_bytes: SOUND)
    about = room.get("/capture/about").json()
    assert about["engine"] == "scripted" and about["consent"]["sha256"] == consent.SHA256
    capture_id = begin(room, film)
    # Out of order, and one of them twice.
    assert [send(room, capture_id, n, b"x%d" % n).status_code for n in (1, 0, 1)] == [201, 201, 200]
    missing = room.post(f"/capture/{capture_id}/finish", json={"pieces": 3, "mime": "audio/webm"})
    assert missing.status_code == 409 and missing.json()["missing"] == [2]
    done = room.post(f"/capture/{capture_id}/finish", json={"pieces": 2, "mime": "audio/webm"})
    assert done.status_code == 202
    heard = wait_heard(room, capture_id)
    assert (heard["failure"], heard["text"], heard["seconds"]) == (None, "Know left a fusion.", 1.0)

    checked = room.post(f"/capture/{capture_id}/check", json={"text": heard["text"]}).json()
    assert [mark["text"] for mark in checked["marks"]] == ["Know", "left", "a", "fusion."]
    assert {p["text"] for p in checked["proposals"]} >= {"no", "effusion"}
    # The text is another one once it is corrected; what it says is read anew.
    text = "No left effusion."
    checked = room.post(f"/capture/{capture_id}/check", json={"text": text}).json()
    findings = {finding["label"]: finding for finding in checked["read"]["findings"]}
    assert findings["Pleural Effusion"]["state"] == "absent"

    # Not before every side and negation was looked at, whatever a client shows.
    refused = save(room, capture_id, text=text, labels=None, looked=[0])
    assert refused.status_code == 409
    assert [mark["text"] for mark in refused.json()["unseen"]] == ["left"]
    labels = {"Pleural Effusion": {"state": "present", "side": "left"}}
    saved = save(room, capture_id, text=text, labels=labels, looked=[0, 1])
    assert saved.status_code == 200 and saved.headers["ETag"] == '"1"'
    assert [d["label"] for d in saved.json()["contradictions"]] == ["Pleural Effusion"]
    assert save(room, capture_id, text="Stale.", labels=None, looked=[]).status_code == 409
    assert (
        save(room, capture_id, 1, text="Left effusion.", labels=None, looked=[0]).json()["version"]
        == 2
    )
    assert send(room, capture_id, 2, b"x").status_code == 409
    document = room.get(f"/capture/{capture_id}").json()
    assert (document["version"], document["state"], document["pieces"]) == (2, "saved", 2)
    mine = room.get(f"/capture/mine?image={film}").json()["captures"]
    assert [(entry["id"], entry["version"]) for entry in mine] == [(capture_id, 2)]

    assert room.delete(f"/capture/{capture_id}").json() == {"erased": capture_id}
    assert room.get(f"/capture/{capture_id}").status_code == 404
    assert room.get("/capture/mine").json() == {"captures": []}
    assert not (store.folder / "captures" / capture_id).exists() and store.verify() == []


SOUND = capture_routes.audio.np.full(16_000, 0.1, "float32")


def test_what_cannot_be_heard_is_said(room, film):
    capture_id = begin(room, film)
    send(room, capture_id, 0, b"no recording at all")
    room.post(f"/capture/{capture_id}/finish", json={"pieces": 1, "mime": "audio/webm"})
    assert "no recording" in wait_heard(room, capture_id)["failure"]
    # Its text may be typed all the same.
    assert save(room, capture_id, text="Clear lungs.", labels=None, looked=[0]).status_code == 200


def test_typing_needs_no_recording(room):
    capture_id = begin(room)
    checked = room.post(f"/capture/{capture_id}/check", json={"text": "Right effuson."}).json()
    assert [mark["text"] for mark in checked["marks"]] == ["Right"]
    assert [p["text"] for p in checked["proposals"]][:1] == ["effusion"]
    assert (
        save(room, capture_id, text="Right effusion.", labels=None, looked=[0]).status_code == 200
    )


@pytest.mark.parametrize(
    "body, status",
    [
        ({}, 403),
        ({"image": None, "consent_sha256": "0" * 64}, 403),
        ({"consent_sha256": consent.SHA256, "image": "../x"}, 400),
        ({"consent_sha256": consent.SHA256, "image": 7}, 400),
        ({"consent_sha256": consent.SHA256, "image": "0" * 64}, 404),
        ([], 400),
    ],
)
def test_beginnings_that_are_refused_keep_nothing(room, store, body, status):
    assert room.post("/capture", json=body).status_code == status
    assert store.events("capture.begun") == []


def test_bad_requests_are_refused_in_one_line(room, film):
    capture_id = begin(room, film)
    url = f"/capture/{capture_id}"
    good = {"text": "Clear lungs.", "labels": None, "looked": [0]}
    answers = [
        (400, room.post(f"{url}/check", content=b"{")),
        (400, room.post(f"{url}/check", content=b"[" * 100_000)),
        (400, room.post(f"{url}/check", json={"text": 7})),
        (400, room.post(f"{url}/check", json={"text": "a\0b"})),
        (400, room.post(f"{url}/check", content=b'{"text": "\\ud800"}')),
        (
            400,
            room.post(
                f"{url}/check", json={"text": "x", "labels": {"Hernia": {"state": "present"}}}
            ),
        ),
        (413, room.post(f"{url}/check", content=b"x" * (capture_routes.MOST_JSON + 1))),
        (428, room.put(f"{url}/text", json=good)),
        (400, save(room, capture_id, **good | {"looked": "all"})),
        (400, save(room, capture_id, **good | {"looked": [True]})),
        (400, save(room, capture_id, **good | {"text": "  "})),
        (409, save(room, capture_id, 3, **good)),
        # The page shows another film, or none: the text is not about the thought's.
        (409, save(room, capture_id, **good | {"image": "0" * 64})),
        (409, save(room, capture_id, **good | {"image": None})),
        (428, room.put(f"{url}/text", json=good, headers={"If-Match": "²".encode("latin-1")})),
        (
            400,
            save(
                room,
                capture_id,
                **good
                | {"labels": {"No Finding": {"state": "present"}, "Edema": {"state": "present"}}},
            ),
        ),
        (400, send(room, capture_id, 0, b"x", "a/b")),
        (400, send(room, capture_id, 0, b"")),
        (413, send(room, capture_id, 0, bytes(audio.MAX_PIECE + 1))),
        (413, send(room, capture_id, 99_999, b"x")),
        (400, room.put(f"{url}/audio/one", content=b"x")),
        (400, room.post(f"{url}/finish", json={"pieces": 0, "mime": "audio/webm"})),
        (400, room.post(f"{url}/finish", json={"pieces": 1, "mime": "text/html"})),
        (409, room.post(f"{url}/finish", json={"pieces": 10**9, "mime": "audio/webm"})),
        (404, room.get("/capture/" + "0" * 32)),
        (404, room.delete("/capture/none")),
        (404, room.get("/capture/" + "A" * 32)),
    ]
    for number, (status, answer) in enumerate(answers):
        assert answer.status_code == status, (number, answer.status_code, answer.text)
        message = answer.json()["error"]["message"]
        assert "\n" not in message and "Traceback" not in message
    assert room.get(url).json()["version"] == 0


def test_a_thought_is_its_readers(room, store):
    capture_id = begin(room)
    store.users.add("reader-2", "reader", "another password")
    # Now everybody is asked who they are; the thought was the local user's.
    assert room.get(f"/capture/{capture_id}").status_code == 401
    csrf = room.post("/login", json={"handle": "reader-2", "password": "another password"}).json()[
        "csrf"
    ]
    room.headers["X-CSRF-Token"] = csrf
    for answer in (room.get(f"/capture/{capture_id}"), room.delete(f"/capture/{capture_id}")):
        assert answer.status_code == 404
    room.headers["X-CSRF-Token"] = "forged"
    assert room.post("/capture", json={"consent_sha256": consent.SHA256}).status_code == 403


def test_recordings_cannot_fill_the_disk(room, monkeypatch):
    monkeypatch.setattr(capture_routes, "MOST_OPEN", 2)
    begin(room), begin(room)
    answer = room.post("/capture", json={"consent_sha256": consent.SHA256})
    assert answer.status_code == 429
    monkeypatch.setattr(audio, "MAX_BYTES", 3)
    capture_id = room.get("/capture/mine").json()["captures"][0]["id"]
    assert send(room, capture_id, 0, b"123").status_code == 201
    assert send(room, capture_id, 1, b"4").status_code == 413


def test_a_server_that_hears_nothing_takes_no_recording(store, tmp_path):
    desk = capture_routes.CaptureDesk(SimpleNamespace(store=store, engine=None), None)
    assert desk.hearing is None
    assert capture_routes.make_hearing(SimpleNamespace(settings=ServerSettings())) is None


def test_the_page_has_no_inline_script_or_style(room):
    page = room.get("/capture")
    assert page.status_code == 200 and "Not for diagnosis" in page.text
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    assert "<style" not in page.text and "style=" not in page.text and "onclick" not in page.text
    assert page.text.count("<script") == page.text.count('<script type="module" src=') == 1
