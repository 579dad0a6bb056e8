"""Keep API keys: shown once, stored as their sha256, each with what it may do."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from cxr_jax.errors import UserError, shown
from cxr_jax.store import tables
from cxr_jax.store.chain import Event
from cxr_jax.store.core import Core
from cxr_jax.store.folds import compares, folds
from cxr_jax.store.records.actors import OPERATOR, Actor

SCOPES = ("chat", "read")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


@dataclass(frozen=True)
class ApiKey:
    """A key that may be used: its name and what it may do; never the key itself."""

    name: str
    scopes: tuple[str, ...]

    @property
    def actor(self) -> Actor:
        """Who events of this key's requests are put down to."""
        return Actor(f"key:{self.name}", "key")


compares(tables.api_key)


@folds("key.added")
def _added(connection: sa.Connection, event: Event) -> None:
    names = ("sha256", "name", "scopes")
    stored_row = {name: event.body[name] for name in names}
    connection.execute(tables.api_key.insert(), {**stored_row, "created": event.at_utc})


@folds("key.disabled")
def _disabled(connection: sa.Connection, event: Event) -> None:
    condition = tables.api_key.c.name == event.body["name"]
    connection.execute(tables.api_key.update().where(condition).values(disabled_at=event.at_utc))


class ApiKeys:
    """The API keys of a store."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def add(self, name: str, scopes: Sequence[str] = SCOPES, *, actor: Actor = OPERATOR) -> str:
        """Make a key and return it: the only time that it is seen.

        Raises:
            UserError: for a name that is taken or none, or a scope that is none.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{shown(name)}: a key's name has a-z, 0-9, '.', '_', '-', at most 40")
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise UserError(f"--scopes: {shown(','.join(unknown))}: there are {', '.join(SCOPES)}")
        # The beginning lets scanners of published code know one when they see it.
        key = f"cxr_{secrets.token_urlsafe(32)}"
        # 256 random bits need no slow hash: nobody tries them all.
        event_body = {"sha256": _hash(key), "name": name, "scopes": sorted(set(scopes))}
        with self._store.write() as transaction:
            taken_already = sa.select(tables.api_key.c.name).where(tables.api_key.c.name == name)
            if transaction.connection.execute(taken_already).first() is not None:
                raise UserError(f"{name}: there is a key of that name; keys are not used again")
            transaction.append("key.added", event_body, **actor.as_arguments())
        return key

    def find(self, key: str) -> ApiKey | None:
        """Return what a key may do, None for one that is none or disabled."""
        given, found = _hash(key).encode(), None
        # All of them, whichever is right, so that the time tells nothing.
        for stored_row in self._rows():
            is_this = hmac.compare_digest(given, stored_row["sha256"].encode())
            if is_this and stored_row["disabled_at"] is None:
                found = ApiKey(stored_row["name"], tuple(stored_row["scopes"]))
        return found

    def has_any(self) -> bool:
        """Return whether a key was ever made, disabled or not."""
        # Whoever disables the last key means to close the door, not to open it for all.
        return bool(self._rows())

    def has_active(self) -> bool:
        """Return whether there is a key that is not disabled."""
        return any(stored_row["disabled_at"] is None for stored_row in self._rows())

    def rows(self) -> list[dict]:
        """Return all keys as rows without their hashes."""
        return [
            {name: value for name, value in stored_row.items() if name != "sha256"}
            for stored_row in self._rows()
        ]

    def disable(self, name: str, *, actor: Actor = OPERATOR) -> None:
        """Let a key be used no more.

        Raises:
            UserError: if there is no such key.
        """
        # Twice the same would be an event that changes nothing.
        if not any(
            stored_row["name"] == name and stored_row["disabled_at"] is None
            for stored_row in self._rows()
        ):
            raise UserError(f"{shown(name)}: no key of that name, or disabled")
        self._store.append("key.disabled", {"name": name}, **actor.as_arguments())

    def _rows(self) -> list[dict]:
        selection = sa.select(tables.api_key).order_by(tables.api_key.c.name)
        with self._store.read() as connection:
            return [dict(stored_row) for stored_row in connection.execute(selection).mappings()]


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
