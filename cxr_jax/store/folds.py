"""Register what events make of tables, so that the same code writes a row and, from the chain alone, checks it.

A fold is a function of an event and of the tables as the events before it have left them; it never reads a clock, a
file or the request. `verify` runs all folds of a chain on an empty database and compares the tables.
"""

from collections.abc import Callable

import sqlalchemy as sa

from cxr_jax.store.chain import Event

Fold = Callable[[sa.Connection, Event], None]

FOLDS: dict[str, Fold] = {}
"""Kind of event -> what it makes of the tables."""

FOLDED_COLUMNS: dict[str, tuple[str, ...]] = {}
"""Table -> the columns that follow from events alone, its key first."""


def folds(kind: str) -> Callable[[Fold], Fold]:
    """Register a function as the fold of a kind of event.

    Raises:
        ValueError: if the kind has another one already.
    """

    def register(function: Fold) -> Fold:
        # A module that is imported under two names would fold twice.
        if FOLDS.setdefault(kind, function) is not function:
            raise ValueError(f"{kind} has two folds")
        return function

    return register


def compares(table: sa.Table, *left_out: str) -> None:
    """Let `verify` compare a table with its refold, but for the columns named (a password's hash, say)."""
    # The key is what rows are matched by, so it comes first.
    keys = [column.name for column in table.primary_key.columns]
    others = [name for name in table.c.keys() if name not in keys and name not in left_out]
    FOLDED_COLUMNS[table.name] = (*keys, *others)


def apply(connection: sa.Connection, event: Event) -> None:
    """Do to the tables what an event says; most kinds change none."""
    # A login or a refusal is worth an event and is in no table.
    fold = FOLDS.get(event.kind)
    if fold is not None:
        fold(connection, event)
