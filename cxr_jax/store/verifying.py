"""Check a store against itself: the chain's hashes, given heads, and every table that folds from events."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cxr_jax.store import chain, folds, tables
from cxr_jax.store.chain import Event, Head
from cxr_jax.store.core import Core

MOST_PROBLEMS = 100
"""Rows named at most: behind a changed event there may be a million."""

_BATCH = 5000


@dataclass(frozen=True)
class Problem:
    """One thing that does not agree; `where` is the number of an event, or the key of a row."""

    table: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.table} {self.where}: {self.reason}"


def verify(store: Core, heads: Sequence[Head] = ()) -> list[Problem]:
    """Walk the chain and compare the tables; what is wrong with the chain comes first, in its order.

    Args:
        store: an open store.
        heads: heads that the chain must have: printed, exported, or kept somewhere else.
    """
    with store.read() as connection:
        # One connection and one transaction for all of it: a server may be writing. SQLite then shows one state;
        # PostgreSQL does if it is told to, and else tables would be newer than the events that they are held against.
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        known_heads = [*heads, *_exported_heads(connection)]
        problems, events = _walk(connection, known_heads)
        # A refold of a changed chain would repeat what the walk has said, row by row.
        problems += _compare_folds(connection, events)
        problems += _compare_documents(connection, events)
    return problems[:MOST_PROBLEMS]


# ---- The chain -------------------------------------------------------------------------------------------------------


def _exported_heads(connection: sa.Connection) -> list[Head]:
    """Return the heads that exports named: they left the house, so the chain must have them."""
    from_table = tables.export
    rows = connection.execute(sa.select(from_table.c.head_seq, from_table.c.head_hash))
    return [Head(stored_row.head_seq, stored_row.head_hash) for stored_row in rows]


def _rows(connection: sa.Connection) -> Iterator[Mapping[str, Any]]:
    """Yield the events in order, a batch at a time."""
    from_table, last_seq = tables.event, -(2**62)
    # From below any number that a chain has, so that an event put before the first one is found, too.
    while True:
        selection = (
            sa.select(from_table)
            .where(from_table.c.seq > last_seq)
            .order_by(from_table.c.seq)
            .limit(_BATCH)
        )
        batch = connection.execute(selection).mappings().all()
        if not batch:
            return
        yield from (dict(stored_row) for stored_row in batch)
        last_seq = batch[-1]["seq"]


def _walk(connection: sa.Connection, heads: Sequence[Head]) -> tuple[list[Problem], list[Event]]:
    """Compare each event's hash with its content and with the event before it."""
    # All rows are looked at, also behind the first bad one: one edit, or many, is a different story.
    problems: list[Problem] = []
    events: list[Event] = []
    wanted = {head.seq: head.hash for head in heads if head.seq}
    previous = Head(0, chain.FIRST_PREVIOUS_HASH)
    for stored_row in _rows(connection):
        where = str(stored_row["seq"])
        if stored_row["seq"] != previous.seq + 1:
            problems.append(Problem("event", where, f"no event {previous.seq + 1} before it"))
        if stored_row["prev_hash"] != previous.hash:
            problems.append(Problem("event", where, "does not follow from the event before it"))
        if chain.event_hash(stored_row) != stored_row["hash"]:
            problems.append(Problem("event", where, "its content is not what its hash was made of"))
        # The chain may have been rewritten whole, hashes and all; then only a head from outside tells.
        if wanted.pop(stored_row["seq"], stored_row["hash"]) != stored_row["hash"]:
            problems.append(
                Problem("event", where, "another event stood here when its head went out")
            )
        previous = Head(stored_row["seq"], stored_row["hash"])
        try:
            events.append(chain.event_of(stored_row))
        except ValueError:
            problems.append(Problem("event", where, "its body is no JSON"))
    # What is left are heads beyond the end: the tail has been cut off.
    for seq in sorted(wanted):
        problems.append(
            Problem(
                "event",
                str(seq),
                f"is gone: the chain ends at {previous.seq}, a head was given for it",
            )
        )
    return problems, events


# ---- What folds from it ----------------------------------------------------------------------------------------------


def _compare_folds(connection: sa.Connection, events: Sequence[Event]) -> list[Problem]:
    """Fold all events into empty tables and compare those with the store's."""
    problems: list[Problem] = []
    # In memory and without foreign keys: films and readings are no folds, and are not there.
    scratch = sa.create_engine("sqlite://")
    tables.metadata.create_all(scratch)
    with scratch.begin() as refolded:
        for event in events:
            try:
                folds.apply(refolded, event)
            except Exception as error:  # a changed body may lack anything
                problems.append(
                    Problem("event", str(event.seq), f"cannot be folded ({type(error).__name__})")
                )
        for name, columns in folds.FOLDED_COLUMNS.items():
            from_table = tables.metadata.tables[name]
            # Only columns that follow from events; a password's hash does not.
            problems += _differences(
                from_table,
                _keyed(connection, from_table, columns),
                _keyed(refolded, from_table, columns),
            )
    scratch.dispose()
    return problems


def _keyed(
    connection: sa.Connection, from_table: sa.Table, columns: Sequence[str]
) -> dict[tuple, dict[str, Any]]:
    """Return a table's rows by their key, those columns alone."""
    # The columns begin with the key.
    keys = [column.name for column in from_table.primary_key.columns]
    selection = sa.select(*(from_table.c[name] for name in columns))
    rows = connection.execute(selection).mappings()
    return {tuple(stored_row[name] for name in keys): dict(stored_row) for stored_row in rows}


def _differences(from_table: sa.Table, stored: dict, refolded: dict) -> Iterator[Problem]:
    """Yield one problem a row that is not what the events say; values are not shown, they may be patients' texts."""
    for key in sorted(stored.keys() | refolded.keys(), key=str):
        # As an operator would look it up.
        where = "/".join(str(part) for part in key)
        if key not in refolded:
            yield Problem(from_table.name, where, "no event says so")
        elif key not in stored:
            yield Problem(from_table.name, where, "is gone, though events say so")
        else:
            names = [name for name in stored[key] if stored[key][name] != refolded[key][name]]
            if names:
                yield Problem(
                    from_table.name, where, f"differs from its events: {', '.join(names)}"
                )


def _compare_documents(connection: sa.Connection, events: Sequence[Event]) -> list[Problem]:
    """Compare readings with the sha256 that the chain has of their documents."""
    # The last event of a reading is the one of its document; there is one.
    hashes = {
        event.body.get("reading"): event.body.get("document_sha256")
        for event in events
        if event.kind == "reading.done"
    }
    # A reading is no fold: its text is the model's and long, so the chain has its hash alone.
    from_table = tables.reading
    problems = []
    gone = dict.fromkeys(hashes)
    for stored_row in connection.execute(sa.select(from_table.c.sha256, from_table.c.document)):
        gone.pop(stored_row.sha256, None)
        if stored_row.document is None:
            continue
        if stored_row.sha256 not in hashes:
            problems.append(Problem("reading", stored_row.sha256, "no event says so"))
        elif chain.sha256_of(stored_row.document) != hashes[stored_row.sha256]:
            problems.append(
                Problem("reading", stored_row.sha256, "its document is not the one that was read")
            )
    # Nothing erases a reading: one that was read and is not there has been taken away.
    return [
        *problems,
        *(Problem("reading", str(name), "is gone, though events say so") for name in gone),
    ]
