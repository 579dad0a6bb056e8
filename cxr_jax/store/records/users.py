"""Keep users: pseudonyms with a role and, where they log in, a password's argon2id hash."""

import functools
import hashlib
import math
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from cxr_jax.errors import UserError, shown
from cxr_jax.store import tables
from cxr_jax.store.chain import Event, utc_now
from cxr_jax.store.core import Core, Transaction
from cxr_jax.store.folds import compares, folds
from cxr_jax.store.records.actors import OPERATOR, SERVER, Actor

# What each may do is decided by the routers: here they are words.
ROLES = ("reader", "coordinator", "admin", "analyst")
LOCAL = "local"
"""The user of a server on loopback whose store has no users: no password, and nobody else can log in as it."""

# Ten tries in a row, then 30 s, 60 s, .. up to 15 minutes: a thousand tries take ten days.
FREE_TRIES = 10
FIRST_DELAY_SECONDS = 30
LONGEST_DELAY_SECONDS = 900
LEAST_PASSWORD = 10
_HANDLE = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
# A row is 120 bytes: about a megabyte at most.
_MOST_TRY_ROWS = 10_000


@dataclass(frozen=True)
class User:
    """Who a request is from. `login` is the reference of the session, None without one."""

    id: str
    handle: str
    role: str
    login: str | None = None

    @property
    def actor(self) -> Actor:
        """Who events of this user's requests are put down to."""
        return Actor(self.id, self.role, self.login)


class TooManyTriesError(Exception):
    """A handle has had too many wrong passwords; `retry_after` seconds must pass before the next try."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many tries; again in {retry_after} s")
        self.retry_after = retry_after


# ---- Events and their folds ------------------------------------------------------------------------------------------

compares(tables.user, "argon2")


@folds("user.added")
def _added(connection: sa.Connection, event: Event) -> None:
    event_body = event.body
    stored_row = {
        "id": event_body["user"],
        "handle": event_body["handle"],
        "role": event_body["role"],
    }
    connection.execute(tables.user.insert(), {**stored_row, "created": event.at_utc})


@folds("user.disabled")
def _disabled(connection: sa.Connection, event: Event) -> None:
    condition = tables.user.c.id == event.body["user"]
    connection.execute(tables.user.update().where(condition).values(disabled_at=event.at_utc))


# ---- Passwords -------------------------------------------------------------------------------------------------------

# argon2id with the package's parameters (64 MiB, 3 passes), which are those of RFC 9106's second choice.
_HASHER = PasswordHasher()
# Each check takes 64 MiB: a flood of logins must not take the machine's memory.
_HASHING = threading.BoundedSemaphore(2)


def hash_password(password: str) -> str:
    """Return the argon2id hash of a password.

    Raises:
        UserError: if it is too short to be one, or longer than 1,000 characters.
    """
    # The upper limit: hashing a megabyte is work that anybody could ask for.
    if not LEAST_PASSWORD <= len(password) <= 1000:
        raise UserError(f"a password has {LEAST_PASSWORD} to 1,000 characters")
    with _HASHING:
        return _HASHER.hash(password.encode(errors="surrogatepass"))


@functools.cache
def _nobodys_hash() -> str:
    return _HASHER.hash(secrets.token_hex(16))


def is_password(stored: str | None, password: str) -> bool:
    """Return whether a password is the one of a hash; of no hash it takes as long and is False."""
    # So that the time of an answer does not tell which handles exist.
    expected = _nobodys_hash() if stored is None else stored
    with _HASHING:
        try:
            matches = _HASHER.verify(expected, password[:1001].encode(errors="surrogatepass"))
        except (VerificationError, InvalidHashError):
            return False
    return matches and stored is not None


# ---- The records -----------------------------------------------------------------------------------------------------


class Users:
    """The users of a store."""

    def __init__(self, store: Core, clock: Callable[[], datetime] | None = None) -> None:
        self._store = store
        self.clock = clock or functools.partial(datetime.now, UTC)

    def add(
        self, handle: str, role: str, password: str | None = None, *, actor: Actor = OPERATOR
    ) -> User:
        """Add a user; without a password nobody can log in as this one.

        Raises:
            UserError: for a handle that is taken or no handle, a role that is none, a password that is too short.
        """
        # No capitals: Anna and anna would be two people in the chain and one on the screen.
        self.check_new(handle, role)
        # Before the transaction, since it takes a tenth of a second on purpose.
        hashed = None if password is None else hash_password(password)
        # Looked for inside the transaction, so that two calls cannot both find it free.
        with self._store.write() as transaction:
            taken_already = sa.select(tables.user.c.id).where(tables.user.c.handle == handle)
            if transaction.connection.execute(taken_already).first() is not None:
                raise UserError(f"{handle}: there is a user of that handle")
            return _add(transaction, handle, role, hashed, actor)

    def check_new(self, handle: str, role: str) -> None:
        """Refuse what cannot be added, whoever has the handle. Raises UserError."""
        if not _HANDLE.fullmatch(handle):
            raise UserError(
                f"{shown(handle)}: a handle is a pseudonym of a-z, 0-9, '.', '_', '-', at most 40 characters"
            )
        if role not in ROLES:
            raise UserError(f"{shown(role)}: no role; there are {', '.join(ROLES)}")

    def local(self) -> User:
        """Return the user of a store without users, made at the first call."""
        # Every request of an open server asks: only the first may wait for the writing lock and the disk.
        known = self.by_id(LOCAL)
        if known is not None:
            return known
        with self._store.write() as transaction:
            stored_row = transaction.connection.execute(
                sa.select(tables.user).where(tables.user.c.id == LOCAL)
            ).first()
            if stored_row is None:
                return _add(transaction, LOCAL, "reader", None, SERVER, user_id=LOCAL)
        return User(stored_row.id, stored_row.handle, stored_row.role)

    def has_people(self) -> bool:
        """Return whether anybody could log in: a user other than `local`, disabled or not."""
        selection = sa.select(tables.user.c.id).where(tables.user.c.id != LOCAL).limit(1)
        with self._store.read() as connection:
            return connection.execute(selection).first() is not None

    def rows(self) -> list[dict]:
        """Return all users as rows without their hashes, in the order of their handles."""
        columns = [column for column in tables.user.c if column.name != "argon2"]
        with self._store.read() as connection:
            rows = connection.execute(sa.select(*columns).order_by(tables.user.c.handle))
            return [dict(stored_row) for stored_row in rows.mappings()]

    def find(self, handle: str) -> User | None:
        """Return the user of a handle who is not disabled."""
        stored_row = self._row(handle)
        return (
            None if stored_row is None else User(stored_row.id, stored_row.handle, stored_row.role)
        )

    def by_id(self, user_id: str) -> User | None:
        """Return the user of an id who is not disabled."""
        selection = sa.select(tables.user).where(
            tables.user.c.id == user_id, tables.user.c.disabled_at.is_(None)
        )
        with self._store.read() as connection:
            stored_row = connection.execute(selection).first()
        return (
            None if stored_row is None else User(stored_row.id, stored_row.handle, stored_row.role)
        )

    def disable(self, handle: str, *, actor: Actor = OPERATOR) -> None:
        """Let nobody be this user any more, from the next request on; the user's records stay.

        Raises:
            UserError: if there is no such user.
        """
        user = self._existing(handle)
        with self._store.write() as transaction:
            # Sessions end with it, in the same transaction.
            transaction.append("user.disabled", {"user": user.id}, **actor.as_arguments())
            _end_sessions(transaction, user.id)

    def set_password(self, handle: str, password: str, *, actor: Actor = OPERATOR) -> None:
        """Give a user another password, and end the user's sessions.

        Raises:
            UserError: if there is no such user, or the password is too short.
        """
        user, hashed = self._existing(handle), hash_password(password)
        with self._store.write() as transaction:
            condition = tables.user.c.id == user.id
            transaction.connection.execute(
                tables.user.update().where(condition).values(argon2=hashed)
            )
            transaction.append("user.password", {"user": user.id}, **actor.as_arguments())
            _end_sessions(transaction, user.id)

    def check(self, handle: str, password: str) -> User | None:
        """Return the user of a handle and a password; None for a wrong one, which counts.

        Raises:
            TooManyTriesError: after 10 wrong passwords, for a time that doubles with each one more.
        """
        # Not the handle itself: people type their password there.
        tried = hashlib.sha256(handle.encode(errors="surrogatepass")).hexdigest()
        self._check_delay(tried)
        stored_row = self._row(handle)
        matches = is_password(None if stored_row is None else stored_row.argon2, password)
        with self._store.write() as transaction:
            _count_try(transaction.connection, tried, self.clock(), failed=not matches)
        return (
            User(stored_row.id, stored_row.handle, stored_row.role)
            if stored_row is not None and matches
            else None
        )

    def _check_delay(self, tried: str) -> None:
        from_table = tables.login_try
        with self._store.read() as connection:
            stored_row = connection.execute(
                sa.select(from_table).where(from_table.c.handle_sha256 == tried)
            ).first()
        if stored_row is None or stored_row.failures < FREE_TRIES:
            return
        doublings = min(stored_row.failures - FREE_TRIES, 10)
        delay = min(FIRST_DELAY_SECONDS * 2**doublings, LONGEST_DELAY_SECONDS)
        until = datetime.fromisoformat(stored_row.last_failure) + timedelta(seconds=delay)
        if (left := (until - self.clock()).total_seconds()) > 0:
            raise TooManyTriesError(math.ceil(left))

    def _row(self, handle: str) -> sa.Row | None:
        # PostgreSQL refuses texts with NUL; no handle has a question mark.
        selection = sa.select(tables.user).where(
            tables.user.c.handle == handle.replace("\0", "?"), tables.user.c.disabled_at.is_(None)
        )
        with self._store.read() as connection:
            return connection.execute(selection).first()

    def _existing(self, handle: str) -> User:
        user = self.find(handle)
        if user is None:
            raise UserError(f"{shown(handle)}: no user of that handle, or disabled")
        return user


def _add(
    transaction: Transaction,
    handle: str,
    role: str,
    hashed: str | None,
    actor: Actor,
    user_id: str | None = None,
) -> User:
    user_id = user_id or secrets.token_hex(8)
    event_body = {"user": user_id, "handle": handle, "role": role}
    transaction.append("user.added", event_body, **actor.as_arguments())
    # The hash is no part of an event: a chain may be shown to others.
    if hashed is not None:
        condition = tables.user.c.id == user_id
        transaction.connection.execute(tables.user.update().where(condition).values(argon2=hashed))
    return User(user_id, handle, role)


def _end_sessions(transaction: Transaction, user_id: str) -> None:
    from_table = tables.login
    open_ones = sa.and_(from_table.c.user == user_id, from_table.c.revoked_at.is_(None))
    transaction.connection.execute(
        from_table.update().where(open_ones).values(revoked_at=utc_now())
    )


def _count_try(
    connection: sa.Connection, tried: str, current_time: datetime, *, failed: bool
) -> None:
    """Count a wrong password of a handle; a right one makes it forget the wrong ones."""
    from_table = tables.login_try
    condition = from_table.c.handle_sha256 == tried
    stored_row = connection.execute(sa.select(from_table).where(condition)).first()
    connection.execute(from_table.delete().where(condition))
    if not failed:
        return
    failures = 1 if stored_row is None else stored_row.failures + 1
    connection.execute(
        from_table.insert(),
        {"handle_sha256": tried, "failures": failures, "last_failure": current_time.isoformat()},
    )
    # Whoever tries a million handles must not fill the disk; what goes first has waited longest.
    count = connection.execute(sa.select(sa.func.count()).select_from(from_table)).scalar_one()
    if count > _MOST_TRY_ROWS:
        oldest = (
            sa.select(from_table.c.handle_sha256).order_by(from_table.c.last_failure).limit(1000)
        )
        connection.execute(from_table.delete().where(from_table.c.handle_sha256.in_(oldest)))
