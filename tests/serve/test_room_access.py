"""Who may see what: of films, readings and reports a reader has the reader's own; others do not exist."""

import hashlib
import shutil
from collections import namedtuple

import pytest
import sqlalchemy as sa
from quick_passwords import quick_passwords
from room_client import film_file, log_in, read, room, take_token, upload

from cxr_jax.capture import consent
from cxr_jax.serve.limits import Limits
from cxr_jax.store import open_store

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A room in which anna has brought a film, had it read, and begun a report; bert has done nothing."""
    place = tmp_path_factory.mktemp("room") / "store"
    with quick_passwords(), room(place, limits=Limits(films_bytes=200_000)) as client:
        for handle, role in (("anna", "reader"), ("bert", "reader"), ("carla", "admin")):
            client.store.users.add(handle, role, PASSWORD)
        log_in(client, "anna", PASSWORD)
        client.image = upload(client)
        client.reading, _ = read(client, client.image)
        body = {"image": client.image, "reading": client.reading}
        client.report = client.post("/room/reports", json=body).json()["id"]
        yield client
        assert client.store.verify(files=True) == []


def ask_for_all(client, image, reading, report):
    """Ask every route that names a film, a reading or a report; statuses and bodies by what was asked."""
    shown = {"image": image, "reading": reading}
    thought = {"image": image, "consent_sha256": consent.SHA256}
    asked = [
        *(("GET", f"/room/images/{image}/{name}", None) for name in ("info", "pixels")),
        ("GET", f"/room/images/{image}/model_view.png", None),
        ("POST", "/room/readings", {"image": image}),
        ("POST", "/room/readings", {"image": image, "read_anyway": True, "seed": 9}),
        *(("GET", f"/room/readings/{reading}{path}", None) for path in ("", "/events")),
        ("DELETE", f"/room/readings/{reading}", None),
        ("POST", f"/room/readings/{reading}/ask", {"text": "Where?"}),
        ("POST", "/room/reports", {"image": image}),
        ("POST", "/room/reports", shown),
        *(
            ("GET", f"/room/reports/{report}{path}", None)
            for path in ("", "/history", ".txt", ".json", ".fhir.json", ".sr.dcm")
        ),
        ("POST", f"/room/reports/{report}/flags", {"kind": "missing", "shown": shown}),
        ("POST", f"/room/reports/{report}/sign", {"meaning": "x", "shown": shown}),
        ("POST", f"/room/reports/{report}/addendum", {"text": "x", "shown": shown}),
        ("POST", "/capture", thought),
    ]
    answers = []
    for method, path, body in asked:
        answer = client.request(method, path, json=body, headers={"If-Match": "1"})
        answers.append((f"{method} {path}", answer.status_code, answer.text))
    return answers


def test_knowing_a_name_opens_nothing(client):
    log_in(client, "bert", PASSWORD)
    before = len(client.store.events("refused"))
    theirs = ask_for_all(client, client.image, client.reading, client.report)
    assert {status for _, status, _ in theirs} == {404}, theirs
    # What is another's is answered as what nobody has.
    nobodys = ask_for_all(client, "0" * 64, "1" * 64, "2" * 16)
    assert [text for _, _, text in theirs] == [text for _, _, text in nobodys]
    # And that somebody tried stands in the chain, by hashes alone.
    refused = client.store.events("refused")[before:]
    assert {event.body["reason"] for event in refused} == {"owner"}
    facts = {event.body.get(kind) for event in refused for kind in ("image", "reading", "report")}
    assert {client.image, client.reading, client.report} <= facts
    assert client.store.reports.of_user(refused[-1].actor) == []
    # No role sees it either.
    log_in(client, "carla", PASSWORD)
    others = ask_for_all(client, client.image, client.reading, client.report)
    assert {status for _, status, _ in others} == {403}


def test_whoever_brings_the_same_film_has_it_and_asks_for_the_same_reading(client):
    log_in(client, "bert", PASSWORD)
    assert upload(client) == client.image
    assert client.get(f"/room/images/{client.image}/info").status_code == 200
    # The film is bert's; what anna asked about it is not.
    assert client.get(f"/room/readings/{client.reading}").status_code == 404
    body = {"image": client.image, "reading": client.reading}
    assert client.post("/room/reports", json=body).status_code == 404
    assert read(client, client.image)[0] == client.reading
    assert client.get(f"/room/readings/{client.reading}").status_code == 200
    report = client.post("/room/reports", json=body)
    assert report.status_code == 201 and report.json()["id"] != client.report
    assert client.get(f"/room/reports/{client.report}").status_code == 404
    # Brought and asked for once more, nothing is written down again.
    before = client.store.head()
    upload(client), client.post("/room/readings", json={"image": client.image})
    assert client.store.head() == before


def test_an_erased_film_is_nobodys(client):
    log_in(client, "anna", PASSWORD)
    image = upload(client, seed=3)
    assert client.get(f"/room/images/{image}/info").status_code == 200
    client.store.images.erase(image, "asked for")
    assert client.get(f"/room/images/{image}/info").status_code == 404
    assert upload(client, seed=3) == image
    assert client.get(f"/room/images/{image}/info").status_code == 200


def test_a_reader_cannot_fill_the_disk(client, monkeypatch):
    log_in(client, "anna", PASSWORD)
    answers = [
        client.post("/room/images", files={"file": ("x", film_file(seed))})
        for seed in range(40, 60)
    ]
    assert {answer.status_code for answer in answers} == {201, 413}
    assert "your films take" in answers[-1].json()["error"]["message"]
    anna = client.store.users.find("anna").id
    assert client.store.access.film_bytes(anna) < 250_000
    # Erasing makes room again, and nobody else is kept out.
    client.store.images.erase(answers[0].json()["sha256"], "asked for")
    log_in(client, "bert", PASSWORD)
    assert upload(client, seed=40)
    # A disk that is nearly full takes no film of anybody, and goes on keeping reports.
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**40, 2**40 - 2**20, 2**20))
    full = client.post("/room/images", files={"file": ("x", film_file(41))})
    assert full.status_code == 503 and "nearly full" in full.json()["error"]["message"]
    log_in(client, "anna", PASSWORD)
    shown = {"image": client.image, "reading": client.reading}
    edit = {"fields": {"heart": "x"}, "shown": shown}
    address = f"/room/reports/{client.report}"
    assert client.put(address, json=edit, headers={"If-Match": "1"}).status_code == 200


def test_a_store_of_before_gives_everybody_what_was_theirs(tmp_path):
    """Rights came with a migration: who had brought a film, or asked for a reading, has it still, and nobody else."""
    content = film_file(1)
    image, reading = hashlib.sha256(content).hexdigest(), "b" * 64
    store = open_store(tmp_path / "store", announce=str)
    anna, bert = (store.users.add(name, "reader", None) for name in ("anna", "bert"))
    store.write_file(store.image_file(image, "film"), content)
    gone = "c" * 64
    with store.write() as transaction:
        connection = transaction.connection
        for name in (image, gone):
            row = {
                "sha256": name,
                "kind": "PNG",
                "rows": 120,
                "cols": 100,
                "bits": 8,
                "created": "x",
            }
            connection.execute(sa.insert(sa.table("image", *map(sa.column, row))), row)
        body = {"image": image, "kind": "PNG", "gate": None}
        transaction.append("image.added", body, **anna.actor.as_arguments())
        transaction.append("image.added", {**body, "image": gone}, **anna.actor.as_arguments())
        started = {"reading": reading, "image": image}
        transaction.append("reading.started", started, **anna.actor.as_arguments())
        erased = {"image": gone, "files": 1, "reason": "x"}
        transaction.append("image.erased", erased, actor="operator", role="operator")
        # As a store of the first tables was.
        connection.execute(sa.text("DROP TABLE access"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    store.close()
    store = open_store(tmp_path / "store", announce=str)
    try:
        assert store.verify() == []
        rights = {
            (user.handle, kind, name): store.access.has(user.id, kind, name)
            for user in (anna, bert)
            for kind, name in (("image", image), ("reading", reading), ("image", gone))
        }
        theirs = {("anna", "image", image), ("anna", "reading", reading)}
        assert {right for right, is_given in rights.items() if is_given} == theirs
    finally:
        store.close()


def test_the_one_reader_of_a_machine_has_all_that_was_brought_there(tmp_path):
    with room(tmp_path / "store", limits=Limits(films_bytes=1)) as client:
        image = upload(client)
        reading, _ = read(client, image)
        assert client.get(f"/room/images/{image}/pixels").status_code == 200
        # Another page of the same machine.
        client.cookies.clear()
        take_token(client)
        assert client.get(f"/room/readings/{reading}").status_code == 200
        # Rights of one user are none of another's, nor those of somebody who was let in later.
        with quick_passwords():
            client.store.users.add("anna", "reader", PASSWORD)
            log_in(client, "anna", PASSWORD)
        assert client.get(f"/room/images/{image}/info").status_code == 404


# ---- Proxies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
def test_a_proxy_that_nobody_has_told_of_opens_nothing(tmp_path, name):
    """Behind one everybody seems to come from this machine: the open room, the API and the figures are not for them."""
    with room(tmp_path / "store") as client:
        through = {name: "10.0.0.1"}
        paths = ("/room/reports", "/session", "/metrics", "/v1/models")
        assert {client.get(path).status_code for path in paths} == {200}
        assert {client.get(path, headers=through).status_code for path in paths} == {401}


def test_figures_are_not_for_whoever_comes_through_a_proxy(tmp_path):
    """A proxy that was told of may say nothing of whom it brings: then a key to read is asked for, also from here."""
    with room(tmp_path / "store", public_hosts=("127.0.0.1",)) as client:
        key = client.store.api_keys.add("watch", ("read",))
        assert client.get("/metrics").status_code == 401
        with_key = {"Authorization": f"Bearer {key}"}
        assert client.get("/metrics", headers=with_key).status_code == 200


# ---- Keys of a file and of the store -------------------------------------------------------------------------


def test_keys_of_a_file_stand_beside_those_of_the_store(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-of-the-file-0000000\n")
    file.chmod(0o600)
    with room(tmp_path / "store", api_key_file=file) as client:
        keys = ("sk-of-the-file-0000000", client.store.api_keys.add("bench"), "sk-of-nobody-at-all")
        answers = [
            client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in keys
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 401]
        assert client.get("/v1/models").status_code == 401
        assert client.store.events("refused")[-1].body["reason"] == "key"
