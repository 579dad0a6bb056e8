"""Keep who may see what: a film whoever brought it, a reading whoever asked for it; both fold from those events."""

from typing import Any

import sqlalchemy as sa

from cxr_jax.store import tables
from cxr_jax.store.chain import Event
from cxr_jax.store.core import Core
from cxr_jax.store.folds import compares, folds
from cxr_jax.store.records.actors import Actor

FILM, READING = "image", "reading"
"""What there are rights to; a report is its writer's, as its own table says."""

compares(tables.access)


def is_given(connection: sa.Connection, user: str, kind: str, name: str) -> bool:
    """Return whether somebody has a right, inside a transaction."""
    from_table = tables.access
    selection = sa.select(from_table.c.created).where(
        from_table.c.user == user, from_table.c.kind == kind, from_table.c.name == name
    )
    return connection.execute(selection).first() is not None


def give(
    connection: sa.Connection, event: Event, kind: str, name: str | None, byte_count: int = 0
) -> None:
    """Write down a right of the event's actor; for folds. The first event of it counts, and no name gives none."""
    if name is None or is_given(connection, event.actor, kind, name):
        return
    stored_row = {
        "user": event.actor,
        "kind": kind,
        "name": name,
        "bytes": byte_count,
        "created": event.at_utc,
    }
    connection.execute(tables.access.insert(), stored_row)


# ---- Folds -----------------------------------------------------------------------------------------------------------


def _brought(connection: sa.Connection, event: Event) -> None:
    # Events of older versions tell no size.
    give(connection, event, FILM, event.body["image"], event.body.get("bytes", 0))


def _wanted(connection: sa.Connection, event: Event) -> None:
    give(connection, event, READING, event.body["reading"])


# Of who comes first, and of who comes with the same film, or asks for the same reading, later.
folds("image.added")(_brought)
folds("image.brought")(_brought)
folds("reading.started")(_wanted)
folds("reading.wanted")(_wanted)


@folds("image.erased")
def _erased(connection: sa.Connection, event: Event) -> None:
    # For everybody: whoever brings the film again has it again, and nobody else.
    from_table = tables.access
    condition = sa.and_(from_table.c.kind == FILM, from_table.c.name == event.body["image"])
    connection.execute(from_table.delete().where(condition))


# ---- The records -----------------------------------------------------------------------------------------------------


class Access:
    """The rights of a store's readers."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def has(self, user_id: str, kind: str, name: str) -> bool:
        """Return whether a user may see a film or a reading."""
        with self._store.read() as connection:
            return is_given(connection, user_id, kind, name)

    def want_reading(self, reading: str, image: str, *, actor: Actor) -> None:
        """Put down that somebody asked for a reading that another has begun; again it changes nothing."""
        body: dict[str, Any] = {"reading": reading, "image": image}
        # Nearly always it is there: who reads waits for no writer.
        if self.has(actor.id, READING, reading):
            return
        with self._store.write() as transaction:
            if not is_given(transaction.connection, actor.id, READING, reading):
                transaction.append("reading.wanted", body, **actor.as_arguments())

    def film_bytes(self, user_id: str) -> int:
        """Return how much the films of a user take on the disk; one that two have brought counts for both."""
        from_table = tables.access
        selection = sa.select(sa.func.sum(from_table.c.bytes)).where(
            from_table.c.user == user_id, from_table.c.kind == FILM
        )
        with self._store.read() as connection:
            return int(connection.execute(selection).scalar_one() or 0)
