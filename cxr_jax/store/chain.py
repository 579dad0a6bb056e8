"""Chain events by their hashes: each one's hash covers the hash before it, so none can change or go unnoticed."""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

import cxr_jax
from cxr_jax.errors import UserError
from cxr_jax.store import tables
from cxr_jax.store.tables import canonical_json

# What the first event follows from: no sha256 that anybody knows an origin of.
FIRST_PREVIOUS_HASH = "0" * 64
HEAD_EVERY = 1000
"""Events between two heads that are announced."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened, as the chain holds it; `body` is what its JSON text says."""

    seq: int
    at_utc: str
    kind: str
    body: dict[str, Any]
    actor: str
    role: str
    login_ref: str | None
    study: str | None
    task: str | None
    prev_hash: str
    hash: str


@dataclass(frozen=True)
class Head:
    """The last event of a chain at some time: who knows it can tell whether events are missing."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


def parse_head(text: str) -> Head:
    """Read `SEQ:HASH`, as heads are printed and exported.

    Raises:
        UserError: if it is none.
    """
    # Whoever copies it from a terminal brings blanks along.
    match = re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})", text.strip())
    if match is None:
        raise UserError(f"--head={text[:80]}: a head is NUMBER:HASH, as the server prints it")
    return Head(int(match[1]), match[2])


def utc_now() -> str:
    """Return the time as the store writes it."""
    # Always with microseconds and Z, so that texts of times sort as the times do.
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def event_hash(stored_row: Mapping[str, Any]) -> str:
    """Compute the hash of an event from its row: sha256 of the hash before it and the canonical JSON of the rest."""
    # `body` goes in as the text that is stored: a blank more in it is another event.
    content = {
        name: value for name, value in stored_row.items() if name not in ("prev_hash", "hash")
    }
    return hashlib.sha256((stored_row["prev_hash"] + canonical_json(content)).encode()).hexdigest()


def sha256_of(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def last_head(connection: sa.Connection) -> Head:
    """Return the newest event's number and hash; 0 and zeros of an empty chain."""
    # By the primary key, so it costs the same however long the chain is.
    newest = (
        sa.select(tables.event.c.seq, tables.event.c.hash)
        .order_by(tables.event.c.seq.desc())
        .limit(1)
    )
    stored_row = connection.execute(newest).first()
    return (
        Head(0, FIRST_PREVIOUS_HASH)
        if stored_row is None
        else Head(stored_row.seq, stored_row.hash)
    )


def append_event(
    connection: sa.Connection,
    kind: str,
    body: Mapping[str, Any],
    *,
    actor: str,
    role: str,
    login: str | None = None,
    study: str | None = None,
    task: str | None = None,
) -> Event:
    """Add an event at the end of the chain, inside a transaction that no other writer can be in.

    Args:
        connection: of a transaction that holds the store's writing lock.
        kind: dotted words, such as `report.saved`.
        body: what happened, as JSON; texts that may have to be erased go in as their sha256 only.
        actor: the id of the user or the name of the API key; `server` for what nobody asked for.
        role: the actor's role at that time.
        login: the login's reference, never its token.
    """
    # The number is counted here and not by the database: a sequence has gaps after a rollback, and a gap in the chain
    # is a deleted event.
    head = last_head(connection)
    stored_row: dict[str, Any] = {
        "seq": head.seq + 1,
        "at_utc": utc_now(),
        "mono_ns": time.monotonic_ns(),
        "actor": actor,
        "role": role,
        "login_ref": login,
        "study": study,
        "task": task,
        "kind": kind,
        "body": canonical_json(dict(body)),
        "app_version": cxr_jax.__version__,
        "prev_hash": head.hash,
    }
    # Last, over all that stands in the row by now.
    stored_row["hash"] = event_hash(stored_row)
    connection.execute(tables.event.insert(), stored_row)
    return event_of(stored_row)


def event_of(stored_row: Mapping[str, Any]) -> Event:
    """Make an Event of a row of the table."""
    names = Event.__dataclass_fields__
    values = {name: stored_row[name] for name in names if name != "body"}
    return Event(**values, body=json.loads(stored_row["body"]))
