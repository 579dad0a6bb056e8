"""Readings and reports over HTTP: streams that resume, versions, signatures, what is refused, what leaves the house."""

import hashlib
import json
import threading

import pytest
from room_client import READING, events, read, room, take_token, upload, wait_for
from scripted_engine import ScriptedEngine

from cxr_jax.outputs import document
from cxr_jax.store import parse_head


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with room(tmp_path_factory.mktemp("room") / "store") as client:
        client.image = upload(client)
        client.reading, client.events = read(client, client.image)
        yield client
        assert client.store.verify(files=True) == []


def begin(client, **more):
    body = {"image": client.image, "reading": client.reading, **more}
    answer = client.post("/room/reports", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def change(client, method, report, path="", version=1, headers=None, shown=None, **body):
    shown = shown or {"image": client.image, "reading": client.reading}
    headers = {"If-Match": str(version), **(headers or {})}
    return client.request(
        method, f"/room/reports/{report}{path}", json={**body, "shown": shown}, headers=headers
    )


def refusals(client, reason):
    return [e for e in client.store.events("refused") if e.body["reason"] == reason]


# ---- Readings --------------------------------------------------------------------------------------


def test_a_reading_streams_and_is_kept(client):
    names = [name for _, name, _ in client.events]
    assert names == ["gate", *["sentence"] * 3, "answer", "contradictions", "probabilities", "done"]
    assert [number for number, _, _ in client.events] == list(range(1, 9))
    sentences = [json.loads(data) for _, name, data in client.events if name == "sentence"]
    assert [s["text"] for s in sentences][0] == "The heart is enlarged."
    assert sentences[0]["claims"] == [{"label": "Cardiomegaly", "state": "present", "side": None}]
    assert json.loads(client.events[4][2]) == {"labels": ["Cardiomegaly"]}
    found = client.get(f"/room/readings/{client.reading}").json()
    document.check(found)
    assert found["answer"] == ["Cardiomegaly"]
    # The chain holds the document's hash, computed here from its bytes.
    [done] = client.store.events("reading.done")
    assert done.body["document_sha256"] == hashlib.sha256(document.to_bytes(found)).hexdigest()


def test_a_stream_resumes_after_the_last_event(client):
    assert events(client, client.reading, after=5) == client.events[5:]
    assert events(client, client.reading, after=99) == []
    # The same from the store alone, as after a restart of the server.
    again = client.post("/room/readings", json={"image": client.image}).json()["id"]
    assert again == client.reading


def test_stop_stops_at_the_engine(tmp_path):
    gate = threading.Event()
    engine = ScriptedEngine(READING, gate=gate)
    with room(tmp_path / "store", engine) as client:
        image = upload(client)
        reading = client.post("/room/readings", json={"image": image}).json()["id"]
        assert client.get(f"/room/readings/{reading}").status_code == 409
        assert client.delete(f"/room/readings/{reading}").status_code == 204
        wait_for(lambda: engine.cancelled_total == 1)
        assert events(client, reading)[-1][1:] == ("error", '{"message": "cancelled"}')
        assert client.get(f"/room/readings/{reading}").status_code == 404
        assert [e.kind for e in client.store.events()][-2:] == [
            "reading.started",
            "reading.stopped",
        ]
        # It can be read again, and is then the same reading.
        gate.set()
        assert read(client, image)[0] == reading


def test_what_is_no_film_is_read_only_on_demand(client):
    import io

    import numpy as np
    from PIL import Image as PilImage

    noise = np.random.default_rng(3).integers(0, 255, (128, 128), np.uint8)
    buffer = io.BytesIO()
    PilImage.fromarray(noise).save(buffer, "PNG")
    image = client.post("/room/images", files={"file": ("x", buffer.getvalue())}).json()["sha256"]
    for path in ("/room/readings", "/room/reports"):
        answer = client.post(path, json={"image": image})
        assert answer.status_code == 400
        assert "no chest film by its pixels" in answer.json()["error"]["message"]
    assert len(refusals(client, "gate")) == 2
    reading, told = read(client, image, read_anyway=True)
    assert json.loads(told[0][2])["state"] == "refused"
    assert client.get(f"/room/readings/{reading}").json()["image"]["gate"]["state"] == "refused"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"image": "x"},
        {"image": "0" * 64, "url": "http://x"},
        {"image": "0" * 64, "seed": -1},
        {"image": "0" * 64, "seed": "1"},
        {"image": "0" * 64, "prompt": ""},
        {"image": ["0" * 64]},
    ],
)
def test_bad_readings_are_refused(client, body):
    answer = client.post("/room/readings", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"]
    assert client.post("/room/readings", json={"image": "0" * 64}).status_code == 404


# ---- Reports ---------------------------------------------------------------------------------------


def test_a_report_from_its_draft_to_its_addendum(client):
    report = begin(client)
    assert report["version"] == 1 and report["state"] == "draft"
    assert report["fields"] == client.get(f"/room/readings/{client.reading}").json()["report"]
    saved = change(client, "PUT", report["id"], fields={"heart": "Normal size."})
    assert saved.json()["version"] == 2 and saved.headers["ETag"] == '"2"'
    flagged = change(client, "POST", report["id"], "/flags", kind="wrong", sentence=1, note="no")
    assert flagged.status_code == 201
    assert change(client, "POST", report["id"], "/addendum", 2, text="x").status_code == 409
    signed = change(client, "POST", report["id"], "/sign", 2, meaning="reviewed", confidence=6)
    assert signed.json()["signed"]["meaning"] == "reviewed"
    assert signed.json()["version"] == 3
    # Signed: nothing changes it.
    assert change(client, "PUT", report["id"], "", 3, fields={"heart": "x"}).status_code == 409
    assert change(client, "POST", report["id"], "/sign", 3, meaning="x").status_code == 409
    added = change(client, "POST", report["id"], "/addendum", 3, text="Seen with the prior.")
    assert added.json()["addenda"][0]["text"] == "Seen with the prior."
    history = client.get(f"/room/reports/{report['id']}/history").json()
    assert [v["state"] for v in history["versions"]] == ["draft", "draft", "signed", "addendum"]
    # What was changed is there word by word, and gives the later text from the earlier.
    operations = history["versions"][1]["operations"]["heart"]
    assert operations and operations[-1][0] in ("replace", "insert")
    shown = client.get(f"/room/reports/{report['id']}").json()
    assert (
        shown["draft"]["heart"] == "The heart is enlarged."
        and shown["fields"]["heart"] == "Normal size."
    )
    assert [flag["kind"] for flag in shown["flags"]] == ["wrong"]
    assert report["id"] in [r["id"] for r in client.get("/room/reports").json()["reports"]]


def test_two_tabs_one_wins(client):
    """A second tab's save from an old version is refused, told, and an event; nothing is lost of the first."""
    report = begin(client)["id"]
    assert change(client, "PUT", report, fields={"heart": "one"}).status_code == 200
    before = len(refusals(client, "stale"))
    refused = change(client, "PUT", report, fields={"heart": "two"})
    assert refused.status_code == 409 and "version 2" in refused.json()["error"]["message"]
    assert change(client, "POST", report, "/sign", 1, meaning="x").status_code == 409
    assert len(refusals(client, "stale")) == before + 2
    assert client.get(f"/room/reports/{report}").json()["fields"]["heart"] == "one"
    # Without a version nothing is saved or signed blindly.
    body = {"fields": {}, "shown": {"image": client.image, "reading": client.reading}}
    body["fields"]["heart"] = "x"
    assert client.put(f"/room/reports/{report}", json=body).status_code == 428


def test_racing_tabs_make_one_version_each(client):
    report = begin(client)["id"]
    answers = []

    def save(text):
        answers.append(change(client, "PUT", report, fields={"heart": text}).status_code)

    threads = [threading.Thread(target=save, args=(f"text {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, *[409] * 7]
    assert client.get(f"/room/reports/{report}").json()["version"] == 2


def test_the_wrong_case_is_refused(client):
    """Text under another patient's film: each change says what the page shows, and another is a 409 and an event."""
    other = upload(client, seed=1)
    report = begin(client)["id"]
    before = len(refusals(client, "shown"))
    wrong = {"image": other, "reading": client.reading}
    for path, method, body in (
        ("", "PUT", {"fields": {"heart": "x"}}),
        ("/sign", "POST", {"meaning": "x"}),
        ("/flags", "POST", {"kind": "missing"}),
        ("/addendum", "POST", {"text": "x"}),
    ):
        assert change(client, method, report, path, shown=wrong, **body).status_code == 409
        missing = client.request(
            method, f"/room/reports/{report}{path}", json=body, headers={"If-Match": "1"}
        )
        assert missing.status_code == 400 and missing.json()["error"]["param"] == "shown"
    assert len(refusals(client, "shown")) == before + 4
    assert client.get(f"/room/reports/{report}").json()["version"] == 1
    # Nor can a report be begun of a film with the reading of another.
    body = {"image": other, "reading": client.reading}
    assert client.post("/room/reports", json=body).status_code == 409
    # The hash says the same as the two names.
    seen = hashlib.sha256(f"{client.image}:{client.reading}".encode()).hexdigest()
    body = {"fields": {"heart": "x"}, "shown_sha256": seen}
    saved = client.put(f"/room/reports/{report}", json=body, headers={"If-Match": "1"})
    assert saved.status_code == 200


def test_a_change_that_is_sent_twice_is_made_once(client):
    name = {"Idempotency-Key": "tab1-begin"}
    body = {"image": client.image, "reading": client.reading}
    first, second = (client.post("/room/reports", json=body, headers=name).json() for _ in "12")
    assert first["id"] == second["id"]
    for path, method, version, content in (
        ("", "PUT", 1, {"fields": {"heart": "x"}}),
        ("/flags", "POST", 2, {"kind": "side", "sentence": 2}),
        ("/sign", "POST", 2, {"meaning": "reviewed"}),
        ("/addendum", "POST", 3, {"text": "more"}),
    ):
        key = {"Idempotency-Key": f"k{path}"}
        answers = [
            change(client, method, first["id"], path, version, headers=key, **content)
            for _ in range(3)
        ]
        assert {a.status_code for a in answers} <= {200, 201}
        assert len({json.dumps(a.json(), sort_keys=True) for a in answers}) == 1
    report = client.get(f"/room/reports/{first['id']}").json()
    assert report["version"] == 4 and len(report["flags"]) == 1 and len(report["addenda"]) == 1
    # The same key for something else is a mistake, and told.
    other = change(
        client, "POST", first["id"], "/addendum", 4, headers={"Idempotency-Key": "k"}, text="z"
    )
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "", {"fields": {}}),
        ("PUT", "", {"fields": {"brain": "x"}}),
        ("PUT", "", {"fields": {"heart": "x" * 20_001}}),
        ("PUT", "", {"fields": {"heart": 3}}),
        ("PUT", "", {"fields": "heart"}),
        ("POST", "/flags", {"kind": "ugly", "sentence": 1}),
        ("POST", "/flags", {"kind": "wrong"}),
        ("POST", "/sign", {"meaning": ""}),
        ("POST", "/sign", {"meaning": "x", "confidence": 8}),
        ("POST", "/addendum", {"text": ""}),
        ("POST", "/addendum", {"text": "x", "more": 1}),
    ],
)
def test_bad_changes_are_refused(client, method, path, body):
    report = begin(client)["id"]
    answer = change(client, method, report, path, **body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert client.get(f"/room/reports/{report}").json()["version"] == 1


def test_any_text_is_kept(client):
    report = begin(client)["id"]
    text = "a\0b <img onerror=alert(1)> \u202e 心 \U0001f600"
    assert change(client, "PUT", report, fields={"heart": text}).status_code == 200
    assert client.get(f"/room/reports/{report}").json()["fields"]["heart"] == text
    assert client.get(f"/room/reports/{report}.txt").status_code == 200


# ---- Exports ---------------------------------------------------------------------------------------


def test_exports_are_events_and_name_the_head(client):
    report = begin(client)["id"]
    change(client, "PUT", report, fields={"heart": "Normal size.", "impression": "Normal."})
    draft = client.get(f"/room/reports/{report}.json")
    assert draft.status_code == 200, draft.text
    assert draft.json()["status"] == "draft" and draft.json()["report"]["heart"] == "Normal size."
    # Its findings are those of its text already; the model's stand beside them.
    heart = next(f for f in draft.json()["findings"] if f["label"] == "Cardiomegaly")
    assert heart["state"] == "absent" and heart["model_state"] == "present"
    assert client.get(f"/room/reports/{report}.fhir.json").status_code == 409
    change(client, "POST", report, "/sign", 2, meaning="reviewed")
    change(client, "POST", report, "/addendum", 3, text="Compared.")
    signed = client.get(f"/room/reports/{report}.json")
    document.check(signed.json())
    assert signed.json()["status"] == "addendum" and signed.json()["signed"]["by"] == "local"
    # Signed, the findings are those of the report: the heart is normal.
    states = {f["label"]: f["state"] for f in signed.json()["findings"]}
    assert states["Cardiomegaly"] == "absent"
    text = client.get(f"/room/reports/{report}.txt")
    assert "Research use only. Not for diagnosis." in text.text and "Compared." in text.text
    last = client.store.events("export")[-1]
    assert last.body["sha256"] == hashlib.sha256(text.content).hexdigest()
    head = parse_head(text.headers["X-Store-Head"])
    assert str(head) in text.text and client.store.verify([head]) == []
    assert client.get(f"/room/reports/{report}.exe").status_code == 404


# ---- Who may ---------------------------------------------------------------------------------------


def test_a_request_without_the_token_changes_nothing(client):
    report = begin(client)["id"]
    token = client.headers.pop("X-CSRF-Token")
    try:
        before = client.store.head().seq
        assert change(client, "PUT", report, fields={"heart": "x"}).status_code == 403
        assert client.post("/room/readings", json={"image": client.image}).status_code == 403
        assert client.get(f"/room/reports/{report}").status_code == 200
        # Two refusals, and nothing else.
        assert client.store.head().seq == before + 2
    finally:
        client.headers["X-CSRF-Token"] = token
    session = take_token(client).json()
    assert (session["user"], session["role"], session["csrf"]) == ("local", "reader", token)
    # Nobody logs in here, so nothing ends when nobody is there.
    assert session["idle_s"] is None
