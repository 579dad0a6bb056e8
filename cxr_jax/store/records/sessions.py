"""Keep logins: a random token in the cookie, its sha256 here; at most 12 hours, and 30 minutes without a request."""

import functools
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from cxr_jax.store import tables
from cxr_jax.store.core import Core
from cxr_jax.store.records.users import User

# A working day, and a coffee break.
LONGEST = timedelta(hours=12)
IDLE = timedelta(minutes=30)
# How late `last_seen` may be: written at every request, it would cost each a commit.
_LATE = timedelta(seconds=60)


@dataclass(frozen=True)
class Session:
    """One login: its user (with the login's reference) and the token that its other requests carry."""

    user: User
    csrf: str


def csrf_of(token: str) -> str:
    """Return the token that goes with a session's requests; whoever has no cookie cannot compute it."""
    return hashlib.sha256(f"csrf:{token}".encode()).hexdigest()


def _reference(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


class Sessions:
    """The logins of a store."""

    def __init__(self, store: Core, clock: Callable[[], datetime] | None = None) -> None:
        self._store = store
        self.clock = clock or functools.partial(datetime.now, UTC)

    def begin(self, user: User) -> tuple[str, Session]:
        """Log a user in and return the token, which is kept nowhere, and the session."""
        # 256 random bits: nobody guesses one, so a plain sha256 is enough.
        token = secrets.token_urlsafe(32)
        current_time, reference = self.clock(), _reference(token)
        session = Session(_with_login(user, reference), csrf_of(token))
        stored_row = {
            "id_sha256": reference,
            "user": user.id,
            "csrf_sha256": _reference(session.csrf),
            "created": current_time.isoformat(),
            "last_seen": current_time.isoformat(),
            "expires": (current_time + LONGEST).isoformat(),
        }
        with self._store.write() as transaction:
            transaction.connection.execute(tables.login.insert(), stored_row)
            transaction.append("login", {"user": user.id}, **session.user.actor.as_arguments())
        return token, session

    def find(self, token: str) -> Session | None:
        """Return the session of a token, None once it has ended; the request counts as one of it."""
        from_table, reference, current_time = tables.login, _reference(token), self.clock()
        selection = (
            sa.select(
                from_table, tables.user.c.handle, tables.user.c.role, tables.user.c.disabled_at
            )
            .join(tables.user, tables.user.c.id == from_table.c.user)
            .where(from_table.c.id_sha256 == reference)
        )
        with self._store.read() as connection:
            stored_row = connection.execute(selection).first()
        # Disabling a user ends the sessions; asked again, since one could begin in between.
        if (
            stored_row is None
            or stored_row.revoked_at is not None
            or stored_row.disabled_at is not None
        ):
            return None
        # The cookie has no end of its own: what has ended is decided here.
        last_seen = datetime.fromisoformat(stored_row.last_seen)
        if (
            current_time >= datetime.fromisoformat(stored_row.expires)
            or current_time - last_seen >= IDLE
        ):
            return None
        if current_time - last_seen >= _LATE:
            with self._store.write() as transaction:
                condition = from_table.c.id_sha256 == reference
                seen = (
                    from_table.update().where(condition).values(last_seen=current_time.isoformat())
                )
                transaction.connection.execute(seen)
        user = _with_login(User(stored_row.user, stored_row.handle, stored_row.role), reference)
        return Session(user, csrf_of(token))

    def end(self, token: str) -> None:
        """Log out; a token that is none is let by."""
        # Only a session that goes on can end, and its user is named in the event.
        session = self.find(token)
        if session is None:
            return
        condition = tables.login.c.id_sha256 == _reference(token)
        with self._store.write() as transaction:
            ended = (
                tables.login.update().where(condition).values(revoked_at=self.clock().isoformat())
            )
            transaction.connection.execute(ended)
            transaction.append(
                "logout", {"user": session.user.id}, **session.user.actor.as_arguments()
            )


def _with_login(user: User, reference: str) -> User:
    # Half of the hash names the login in the chain and is of no use to anybody who reads it.
    return User(user.id, user.handle, user.role, reference[:16])


def is_csrf(session: Session, given: str | None) -> bool:
    """Return whether a request's token is the session's, in a time that does not depend on it."""
    return given is not None and hmac.compare_digest(session.csrf.encode(), given.encode())
