"""Keep what left the house: each export with its hash, who took it, and the head of the chain that it names."""

import secrets
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cxr_jax.store import tables
from cxr_jax.store.chain import Event, Head
from cxr_jax.store.core import Core
from cxr_jax.store.folds import compares, folds
from cxr_jax.store.records.actors import Actor

compares(tables.export)


@folds("export")
def _exported(connection: sa.Connection, event: Event) -> None:
    event_body = event.body
    names = ("id", "kind", "sha256", "params", "head_seq", "head_hash")
    stored_row = {name: event_body[name] for name in names}
    connection.execute(
        tables.export.insert(), {**stored_row, "user": event.actor, "created": event.at_utc}
    )


class Exports:
    """The exports of a store."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def add(
        self,
        kind: str,
        sha256: str,
        *,
        head: Head,
        actor: Actor,
        params: Mapping[str, Any] | None = None,
        study: str | None = None,
    ) -> str:
        """Put an export down before it is handed over, and return its id.

        Args:
            kind: such as `sr.dcm`.
            sha256: of its bytes.
            head: the head that it names, taken from `store.head()` before it was made.
            actor: who gets it.
            params: what it is of, `{"report": .., "version": ..}`.
            study: the study's id, of a study's export.
        """
        # Before the bytes are sent: an export that nobody received is in the chain all the same.
        event_body = {
            "id": secrets.token_hex(8),
            "kind": kind,
            "sha256": sha256,
            "params": dict(params or {}),
            "head_seq": head.seq,
            "head_hash": head.hash,
        }
        self._store.append("export", event_body, study=study, **actor.as_arguments())
        return str(event_body["id"])
