"""Other systems, by names of the operator's file alone: what is asked of them, fetched from them, sent to them."""

from types import SimpleNamespace

import pytest
from room_client import film_file, hash_of, room, upload

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.serve.room import exports, pacs


class Peer:
    """A client of a server that has one film; what is stored there is kept in `sent`."""

    def __init__(self, may_store=True):
        self.server = SimpleNamespace(name="archive", may_store=may_store)
        self.sent, self.asked = [], []
        self.is_failing = False

    def search_studies(self, filters):
        self.asked.append(filters)
        if not filters:
            raise UserError("a search needs one of: PatientID")
        return [{"StudyInstanceUID": "1.2"}]

    def search_instances(self, study):
        return [{"SOPInstanceUID": "1.2.3"}]

    def retrieve(self, study, series, instance):
        if instance == "9":
            raise RunFailedError("server archive: status 500")
        return b"no film" if instance == "8" else film_file(seed=7)

    def store(self, instances):
        if self.is_failing:
            raise RunFailedError("server archive: no answer within 30 s")
        self.sent += instances
        return SimpleNamespace(stored=["1.2.4"], refused={})


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    peer = Peer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pacs._Peers, "__init__", lambda self, state: None)
        patch.setattr(pacs._Peers, "_clients", {"archive": peer}, raising=False)
        with room(tmp_path_factory.mktemp("room") / "store") as client:
            client.peer = peer
            yield client


def test_servers_are_named_and_their_addresses_not(client):
    assert client.get("/room/pacs").json() == {"servers": [{"name": "archive", "may_store": True}]}
    found = client.get("/room/pacs/archive/studies", params={"PatientID": "x"})
    assert found.json() == {"studies": [{"StudyInstanceUID": "1.2"}]}
    assert client.get("/room/pacs/archive/studies/1.2").json()["instances"]
    assert client.get("/room/pacs/archive/studies").status_code == 400
    assert client.get("/room/pacs/archive/studies?PatientID=a&PatientID=b").status_code == 400
    for name in ("other", "http:%2F%2Fx", "127.0.0.1"):
        assert client.get(f"/room/pacs/{name}/studies?PatientID=x").status_code == 404


def test_a_film_is_pulled_onto_the_shelf(client):
    wanted = {"study": "1.2", "series": "1.2.1", "instance": "1.2.3"}
    film = client.post("/room/pacs/archive/pull", json=wanted)
    assert film.status_code == 201
    assert film.json()["sha256"] == hash_of(film_file(seed=7))
    assert client.get(f"/room/images/{film.json()['sha256']}/info").status_code == 200
    assert client.store.events("pacs.pulled")[-1].body["image"] == film.json()["sha256"]
    for bad in (
        {**wanted, "instance": "8"},  # what it sends is no film
        {**wanted, "study": "../x"},
        {**wanted, "url": "http://x"},
    ):
        assert client.post("/room/pacs/archive/pull", json=bad).status_code == 400
    failing = client.post("/room/pacs/archive/pull", json={**wanted, "instance": "9"})
    assert failing.status_code == 503
    assert failing.json()["error"]["message"] == "server archive: status 500"


def test_only_what_is_signed_is_sent(client, monkeypatch):
    monkeypatch.setattr(exports, "make_export", lambda state, report, kind, head: kind.encode())
    image = upload(client)
    body = {"image": image, "reading": None}
    report = client.post("/room/reports", json=body).json()["id"]
    sending = {"report": report, "kinds": ["sr.dcm", "sc.dcm"]}
    refused = client.post("/room/pacs/archive/push", json=sending)
    assert refused.status_code == 409 and not client.peer.sent
    assert client.store.events("refused")[-1].body["reason"] == "unsigned"
    signature = {"meaning": "reviewed", "shown": body}
    client.post(f"/room/reports/{report}/sign", json=signature, headers={"If-Match": "1"})
    sent = client.post("/room/pacs/archive/push", json=sending)
    assert sent.json() == {"stored": ["1.2.4"], "refused": []}
    assert client.peer.sent == [b"sr.dcm", b"sc.dcm"]
    assert [e.body["params"]["server"] for e in client.store.events("export")] == ["archive"] * 2
    assert client.store.events("pacs.pushed")[-1].body["stored"] == 1
    # A server that takes it and never says so has it all the same: that it went out is put down before.
    monkeypatch.setattr(client.peer, "is_failing", True)
    assert client.post("/room/pacs/archive/push", json=sending).status_code == 503
    assert len(client.store.events("export")) == 4 and len(client.store.events("pacs.pushed")) == 1
    # Where nothing may be sent nothing is put down as sent.
    monkeypatch.setattr(client.peer.server, "may_store", False)
    assert client.post("/room/pacs/archive/push", json=sending).status_code == 400
    assert len(client.store.events("export")) == 4
    assert (
        client.post("/room/pacs/archive/push", json={**sending, "kinds": ["txt"]}).status_code
        == 400
    )
    other = {**sending, "report": "0" * 16}
    assert client.post("/room/pacs/archive/push", json=other).status_code == 404
