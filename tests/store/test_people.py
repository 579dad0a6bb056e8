"""Users, their sessions and the keys of programs: what lets nobody in, and for how long."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from quick_passwords import quick_passwords

from cxr_jax.errors import UserError
from cxr_jax.store import tables
from cxr_jax.store.records.sessions import is_csrf
from cxr_jax.store.records.users import TooManyTriesError

PASSWORD = "correct horse"


class Clock:
    def __init__(self):
        self.now = datetime(2026, 11, 30, 12, tzinfo=UTC)

    def __call__(self):
        return self.now

    def passes(self, **time):
        self.now += timedelta(**time)


@pytest.fixture
def clock(store):
    clock = Clock()
    store.users.clock = store.sessions.clock = clock
    return clock


@pytest.fixture
def quick_hashes():
    with quick_passwords():
        yield


def everything(store):
    """All that the database holds, as text."""
    with store.read() as connection:
        rows = [connection.execute(sa.select(t)).all() for t in tables.metadata.tables.values()]
    return repr(rows)


def test_passwords_are_argon2id_and_kept_nowhere(store):
    anna = store.users.add("anna", "reader", PASSWORD)
    with store.read() as connection:
        stored = connection.execute(sa.select(tables.user.c.argon2)).scalar()
    # RFC 9106's second choice: 64 MiB, three passes.
    assert stored.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert store.users.check("anna", PASSWORD) == anna
    assert store.users.check("anna", PASSWORD + "x") is None
    assert store.users.check("bert", PASSWORD) is None
    assert PASSWORD not in everything(store)


def test_ten_tries_then_a_delay_that_doubles(store, clock, quick_hashes):
    store.users.add("anna", "reader", PASSWORD)
    for handle in ("anna", "nobody"):
        for _ in range(10):
            assert store.users.check(handle, "wrong") is None
        with pytest.raises(TooManyTriesError) as error:
            store.users.check(handle, PASSWORD)
        # Of a handle that is none just the same: nobody learns which there are.
        assert error.value.retry_after == 30
    clock.passes(seconds=29)
    with pytest.raises(TooManyTriesError):
        store.users.check("anna", PASSWORD)
    clock.passes(seconds=2)
    assert store.users.check("anna", "wrong") is None
    with pytest.raises(TooManyTriesError) as error:
        store.users.check("anna", PASSWORD)
    assert error.value.retry_after == 60
    clock.passes(seconds=61)
    assert store.users.check("anna", PASSWORD) is not None
    # A right one makes it forget the wrong ones.
    assert store.users.check("anna", "wrong") is None
    assert store.users.check("anna", PASSWORD) is not None


def test_sessions_end_after_twelve_hours_or_thirty_idle_minutes(store, clock):
    anna = store.users.add("anna", "reader")
    token, session = store.sessions.begin(anna)
    assert (
        is_csrf(session, session.csrf) and not is_csrf(session, "x") and not is_csrf(session, None)
    )
    for _ in range(25):
        clock.passes(minutes=28)
        assert store.sessions.find(token).user.handle == "anna"
    clock.passes(minutes=21)  # 12 h 1 min after the login
    assert store.sessions.find(token) is None
    token, _ = store.sessions.begin(anna)
    clock.passes(minutes=31)
    assert store.sessions.find(token) is None
    assert token not in everything(store)
    assert hashlib.sha256(token.encode()).hexdigest() in everything(store)


@pytest.mark.parametrize("how", ["logout", "disable", "password"])
def test_sessions_that_are_ended(store, clock, how, quick_hashes):
    anna = store.users.add("anna", "reader")
    token, _ = store.sessions.begin(anna)
    if how == "logout":
        store.sessions.end(token)
    elif how == "disable":
        store.users.disable("anna")
        assert store.users.find("anna") is None
    else:
        store.users.set_password("anna", PASSWORD)
    assert store.sessions.find(token) is None
    assert store.sessions.find("x\0\ud800") is None
    assert store.verify() == []


def test_keys_are_shown_once_and_have_scopes(store):
    key = store.api_keys.add("bench", ["chat"])
    assert store.api_keys.find(key).scopes == ("chat",)
    assert store.api_keys.find(key + "x") is None and store.api_keys.find("") is None
    assert key not in everything(store)
    store.api_keys.disable("bench")
    assert store.api_keys.find(key) is None
    assert store.api_keys.has_any() and not store.api_keys.has_active()
    # Its name is not used again, so an event that names it means this key.
    with pytest.raises(UserError, match="not used again"):
        store.api_keys.add("bench")
    assert store.verify() == []


@pytest.mark.parametrize(
    ("handle", "role", "password", "message"),
    [
        ("Anna", "reader", None, "a handle is a pseudonym"),
        ("", "reader", None, "a handle is a pseudonym"),
        ("a" * 41, "reader", None, "a handle is a pseudonym"),
        ("anna\0", "reader", None, "a handle is a pseudonym"),
        ("anna", "king", None, "no role"),
        ("anna", "reader", "short", "10 to 1,000 characters"),
        ("anna", "reader", "x" * 1001, "10 to 1,000 characters"),
        ("taken", "reader", None, "there is a user of that handle"),
    ],
)
def test_users_that_cannot_be(store, handle, role, password, message):
    store.users.add("taken", "admin")
    with pytest.raises(UserError, match=message):
        store.users.add(handle, role, password)
    assert len(store.users.rows()) == 1
