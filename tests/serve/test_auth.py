"""Logging in over HTTP, roles, tokens, keys; and when a server may listen to others at all."""

import pytest
from quick_passwords import quick_passwords
from room_client import log_in, room, take_token, upload

from cxr_jax.errors import UserError
from cxr_jax.serve.auth import COOKIE, check_start
from cxr_jax.serve.state import ServerSettings
from cxr_jax.store import open_store

PASSWORD = "correct horse"


@pytest.fixture
def client(tmp_path):
    with quick_passwords(), room(tmp_path / "store") as client:
        for handle, role in (("anna", "reader"), ("bert", "reader"), ("carla", "coordinator")):
            client.store.users.add(handle, role, PASSWORD)
        yield client


def last_refusal(client):
    return client.store.events("refused")[-1]


def test_from_login_to_logout(client):
    assert client.get("/session").status_code == 401
    assert client.get("/room/reports").status_code == 401
    assert last_refusal(client).body["reason"] == "login"
    answer = log_in(client, "anna", PASSWORD)
    assert answer.json()["role"] == "reader"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secure" not in cookie
    assert client.get("/room/reports").status_code == 200
    assert client.post("/logout").status_code == 204
    assert client.get("/room/reports").status_code == 401
    # Behind a proxy that speaks TLS the cookie is for TLS alone.
    secure = client.post(
        "/login",
        json={"handle": "anna", "password": PASSWORD},
        headers={"X-Forwarded-Proto": "https"},
    )
    assert "Secure" in secure.headers["set-cookie"]


def test_wrong_passwords_are_events_without_what_was_typed(client):
    for handle in ("anna", "secret-typed-into-the-wrong-field"):
        answer = log_in(client, handle, "wrong password")
        assert answer.status_code == 401
        assert answer.json()["error"]["message"] == "handle or password is wrong"
    assert "secret-typed" not in repr(client.store.events())
    for _ in range(9):
        log_in(client, "anna", "wrong password")
    answer = log_in(client, "anna", PASSWORD)
    assert answer.status_code == 429 and 0 < int(answer.headers["Retry-After"]) <= 31
    # Others are not kept out by it.
    assert log_in(client, "bert", PASSWORD).status_code == 200


def test_readers_see_their_own_reports_and_others_none(client):
    log_in(client, "anna", PASSWORD)
    image = upload(client)
    body = {"image": image}
    report = client.post("/room/reports", json=body).json()["id"]
    shown = {"image": image, "reading": None}
    log_in(client, "bert", PASSWORD)
    for path in ("", "/history", ".txt"):
        assert client.get(f"/room/reports/{report}{path}").status_code == 404
    edit = {"fields": {"heart": "x"}, "shown": shown}
    answer = client.put(f"/room/reports/{report}", json=edit, headers={"If-Match": "1"})
    assert answer.status_code == 404 and last_refusal(client).body["reason"] == "owner"
    assert client.get("/room/reports").json() == {"reports": []}
    log_in(client, "carla", PASSWORD)
    assert client.get("/room/reports").status_code == 403
    assert last_refusal(client).body["reason"] == "role"
    assert last_refusal(client).role == "coordinator"


def test_signing_asks_for_the_password_again(client):
    log_in(client, "anna", PASSWORD)
    image = upload(client)
    report = client.post("/room/reports", json={"image": image}).json()["id"]
    body = {"meaning": "reviewed", "shown": {"image": image, "reading": None}}
    address, version = f"/room/reports/{report}/sign", {"If-Match": "1"}
    assert client.post(address, json=body, headers=version).status_code == 403
    wrong = {**body, "password": "wrong password"}
    assert client.post(address, json=wrong, headers=version).status_code == 403
    assert last_refusal(client).body["reason"] == "password"
    right = {**body, "password": PASSWORD}
    signed = client.post(address, json=right, headers=version)
    assert signed.status_code == 200 and signed.json()["signed"]["by"] == "anna"
    [event] = client.store.events("report.signed")
    assert event.role == "reader" and event.login_ref and PASSWORD not in repr(event)


def test_a_session_of_another_login_has_another_token(client):
    log_in(client, "anna", PASSWORD)
    first = client.headers["X-CSRF-Token"]
    log_in(client, "anna", PASSWORD)
    assert client.headers["X-CSRF-Token"] != first
    client.headers["X-CSRF-Token"] = first
    assert client.post("/logout").status_code == 403
    assert last_refusal(client).body["reason"] == "csrf"
    client.cookies.set(COOKIE, "x", domain="127.0.0.1")
    assert client.get("/room/reports").status_code == 401


def test_a_flood_of_refusals_does_not_flood_the_chain(client):
    before = client.store.head().seq
    for _ in range(100):
        assert client.get("/room/reports").status_code == 401
    assert client.store.head().seq == before + 60
    client.state.auth._recent.clear()  # a minute later
    client.get("/room/reports")
    assert last_refusal(client).body["unwritten_before"] == 40


def test_the_first_user_closes_an_open_server(tmp_path):
    with quick_passwords(), room(tmp_path / "store") as client:
        assert client.get("/room/reports").status_code == 200
        client.store.users.add("anna", "reader", PASSWORD)
        assert client.get("/room/reports").status_code == 401
        # Nobody can log in as the user of an open server.
        assert log_in(client, "local", "").status_code == 401
        assert take_token(client).status_code == 401


@pytest.mark.parametrize(
    ("settings", "has_user", "message"),
    [
        (dict(host="0.0.0.0"), False, "users or API keys are needed first"),
        (dict(host="0.0.0.0"), True, None),
        (dict(host="0.0.0.0", no_auth=True), True, "--no_auth: only on loopback"),
        (dict(public_hosts=("room.example.org",)), False, "users or API keys are needed first"),
        (dict(public_hosts=("room.example.org",), no_auth=True), True, "--no_auth: only on"),
        (dict(host="192.168.1.2"), False, "users or API keys are needed first"),
        (dict(), True, None),
    ],
)
def test_where_a_server_may_listen(tmp_path, settings, has_user, message):
    store = open_store(tmp_path / "store", announce=str)
    if has_user:
        store.users.add("anna", "reader")
    try:
        if message is None:
            assert check_start(ServerSettings(**settings), store) is None
        else:
            with pytest.raises(UserError, match=message):
                check_start(ServerSettings(**settings), store)
        if not has_user:
            assert "local" in check_start(ServerSettings(), store)
            store.api_keys.add("bench")
            assert check_start(ServerSettings(host="0.0.0.0"), store) is None
    finally:
        store.close()
