"""What a room must outlast: numbers that are none, names that no database takes, a store that fails under a reading."""

import pytest
from room_client import events, read, room, upload

from cxr_jax.errors import RunFailedError
from cxr_jax.serve import study_routes
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
