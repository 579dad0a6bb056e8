"""What a room must outlast: numbers that are none, names that no database takes, a store that fails under a reading."""

import asyncio
import threading

import pytest
from fastapi.testclient import TestClient
from room_client import READING, events, read, room, upload
from room_servers import scripted_state
from scripted_engine import ScriptedEngine

from cxr_jax.errors import RunFailedError
from cxr_jax.serve import auth, study_routes
from cxr_jax.serve.app import create_app
from cxr_jax.serve.limits import BodyGuard, Limits
from cxr_jax.serve.refusals import RefusedError


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with room(tmp_path_factory.mktemp("room") / "store") as client:
        client.image = upload(client)
        client.reading, client.events = read(client, client.image)
        yield client


# ---- Numbers and names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["9" * 5000, "\u00b2", "-1", "1e3", ""])
def test_a_resumed_stream_takes_any_number(client, number):
    """What is no number of an event means from the beginning; Python itself refuses numbers of thousands of digits."""
    headers = {"Last-Event-ID": number.encode("latin-1")}
    answer = client.get(f"/room/readings/{client.reading}/events", headers=headers)
    assert answer.status_code == 200 and answer.text.startswith("id: 1\n")


@pytest.mark.parametrize("version", ["\u00b2", "9" * 5000, "W/x"])
def test_a_version_that_is_no_number_is_told(client, version):
    headers = {"If-Match": version.encode("latin-1")}
    for path in (f"/room/reports/{'0' * 16}", f"/capture/{'0' * 32}/text"):
        answer = client.put(path, json={"fields": {"heart": "x"}, "text": "x"}, headers=headers)
        assert 400 <= answer.status_code < 500, answer.text


def test_a_nul_in_an_address_reaches_no_database(client):
    for path in ("/room/readings/%00", "/room/reports/a%00b", "/capture/mine?image=%00"):
        answer = client.get(path)
        assert answer.status_code == 400 and "NUL" in answer.json()["error"]["message"]


def test_depth_in_a_beacon_is_refused():
    with pytest.raises(RefusedError, match="no JSON"):
        study_routes._parse(b"[" * 200_000)


# ---- A store that fails --------------------------------------------------------------------------------


def test_a_reading_ends_also_where_the_store_fails(client, monkeypatch):
    """Whoever follows is told, and the next who asks begins anew: a run without an end would hold both for ever."""
    image = upload(client, seed=5)

    def full(*args, **kinds):
        raise RunFailedError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(client.store.readings, "add", full)
        started = client.store.append

        def append(kind, *args, **kinds):
            return full() if kind == "reading.failed" else started(kind, *args, **kinds)

        patch.setattr(client.store, "append", append)
        # The thread of the reading ends with the store's error, which nobody is to be shown here.
        patch.setattr("threading.excepthook", lambda arguments: None)
        reading, told = read(client, image)
        assert told[-1][1] == "error"
    assert read(client, image)[1][-1][1] == "done"
    assert events(client, reading)[-1][1] == "done"


def test_a_film_that_was_cut_off_leaves_nothing(client):
    """A kill while a film is written leaves it under a name that no erasure knows; the next start takes it away."""
    folder = client.state.films.folder
    (folder / ".part-x").write_bytes(b"half a film")
    assert not list(type(client.state.films)(folder).folder.glob(".part-*"))
    assert client.get(f"/room/images/{client.image}/info").status_code == 200


# ---- Many at once --------------------------------------------------------------------------------------


def test_bodies_together_have_a_limit_that_their_answers_give_back():
    """One body within its limit is no fault; hundreds of them at a time would fill the memory."""
    guard = BodyGuard(None, Limits(waiting_bytes=100))
    inside, told = [], []

    async def send(message):
        told.append(message)

    async def ask(size, then=None):
        async def receive():
            return {"type": "http.request", "body": bytes(size), "more_body": False}

        async def answer(scope, receive, send):
            inside.append(len((await receive())["body"]))
            if then is not None:
                await then()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            assert guard._waiting_bytes == 0 or then is None

        guard.app = answer
        scope = {"type": "http", "path": "/x", "headers": []}
        await guard(scope, receive, send)

    async def while_it_waits():
        with pytest.raises(RefusedError, match="at once"):
            await ask(60)

    asyncio.run(ask(60, while_it_waits))
    asyncio.run(ask(60))
    assert inside == [60, 60] and guard._waiting_bytes == 0


def test_who_asks_at_once_shares_one_reading(tmp_path):
    """Of two who begin a reading at the same time one joins the other's, and a stop of both stops the engine."""
    gate = threading.Event()
    engine = ScriptedEngine(READING, gate=gate)
    with room(tmp_path / "store", engine) as client:
        body = {"image": upload(client)}
        threads = [
            threading.Thread(target=client.post, args=("/room/readings",), kwargs={"json": body})
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.submitted == 1
        gate.set()


def test_a_flood_of_passwords_does_not_take_all_threads(tmp_path):
    with room(tmp_path / "store") as client:
        for _ in range(auth._LOG_INS):
            client.state.auth._log_ins.acquire()
        answer = client.post("/login", json={"handle": "anna", "password": "wrong password"})
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"


def test_without_a_store_films_are_for_this_machine_alone():
    """A file of keys opens /v1 to others, and nothing else: nobody can log in where nothing is kept."""
    state = scripted_state(host="0.0.0.0", public_hosts=("room.example",))
    with TestClient(create_app(state), base_url="http://room.example") as client:
        assert client.post("/room/images", files={"file": ("x", b"x")}).status_code == 401
        assert client.get(f"/room/images/{'0' * 64}/pixels").status_code == 401
