"""Give transactions on a store's database, its chain, and the files of its folder: what all records stand on."""

import contextlib
import hashlib
import hmac
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cxr_jax.store import chain, folds, tables
from cxr_jax.store.chain import Event, Head
from cxr_jax.store.database import Writing, database_errors
from cxr_jax.store.folder import StoreFolder


class Transaction:
    """One writing transaction: events and the tables that follow from them are committed together, or not at all."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        # Announced once they are committed.
        self.events: list[Event] = []

    def append(
        self,
        kind: str,
        body: Mapping[str, Any],
        *,
        actor: str,
        role: str,
        login: str | None = None,
        study: str | None = None,
        task: str | None = None,
    ) -> Event:
        """Add an event and fold it; the arguments are those of `chain.append_event`."""
        event = chain.append_event(
            self.connection, kind, body, actor=actor, role=role, login=login, study=study, task=task
        )
        # In the same transaction: there is no event without its rows, and no row without its event.
        folds.apply(self.connection, event)
        self.events.append(event)
        return event


class Core:
    """What every kind of record needs. Its methods may be called from any thread; each is one transaction."""

    def __init__(
        self, engine: sa.Engine, folder: StoreFolder, place: str, announce: Callable[[str], None]
    ) -> None:
        self.engine, self.place = engine, place
        self._folder, self._announce = folder, announce
        self._writing = Writing(engine)

    # ---- Files -------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The folder of films and of what else is a file; 0700."""
        return self._folder.path

    @property
    def sealed_path(self) -> Path:
        """Where sealed.db lies, which no server opens before a study is unblinded."""
        return self.folder / "sealed.db"

    def image_file(self, sha256: str, suffix: str) -> Path:
        """Return where a film's file lies, `images/SHA.SUFFIX` of the folder."""
        return self._folder.image_file(sha256, suffix)

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a file of the folder whole or not at all, mode 0600, on the disk when this returns."""
        self._folder.write_file(path, content)

    def opaque(self, *parts: str) -> str:
        """Return an id that tells nothing: an HMAC with this store's own key, 32 hex digits."""
        # A NUL between the parts, so that ("ab", "c") and ("a", "bc") are two things.
        message = "\0".join(parts).encode()
        return hmac.new(self._folder.secret, message, hashlib.sha256).hexdigest()[:32]

    # ---- Transactions ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """Give a transaction that no other writer is in; what it did is on the disk when the block ends."""
        # What the database says becomes one line, here for every record.
        with database_errors(self.place):
            with self._writing.transaction() as connection:
                transaction = Transaction(connection)
                yield transaction
        # Only what is committed is announced.
        for event in transaction.events:
            if event.seq % chain.HEAD_EVERY == 0:
                self._announce(f"store head {event.seq}:{event.hash}")

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection that reads one state of the tables."""
        with database_errors(self.place), self.engine.connect() as connection, connection.begin():
            yield connection

    # ---- The chain ---------------------------------------------------------------------------------------------------

    def append(
        self,
        kind: str,
        body: Mapping[str, Any],
        *,
        actor: str,
        role: str,
        login: str | None = None,
        study: str | None = None,
        task: str | None = None,
    ) -> Event:
        """Add one event in a transaction of its own; the arguments are those of `chain.append_event`."""
        with self.write() as transaction:
            return transaction.append(
                kind, body, actor=actor, role=role, login=login, study=study, task=task
            )

    def head(self) -> Head:
        """Return the newest event's number and hash."""
        with self.read() as connection:
            return chain.last_head(connection)

    def heads(self) -> list[Head]:
        """Return the heads that have been announced, every 1,000 events, and the newest."""
        from_table = tables.event
        with self.read() as connection:
            selection = (
                sa.select(from_table.c.seq, from_table.c.hash)
                .where(from_table.c.seq % chain.HEAD_EVERY == 0)
                .order_by(from_table.c.seq)
            )
            announced = [
                Head(stored_row.seq, stored_row.hash)
                for stored_row in connection.execute(selection)
            ]
            newest = chain.last_head(connection)
        # The newest may be one of them.
        return announced if newest in announced else [*announced, newest]

    def events(
        self, kind: str | None = None, *, study: str | None = None, task: str | None = None
    ) -> list[Event]:
        """Return the events, oldest first, of a kind, a study or a task."""
        from_table = tables.event
        selection = sa.select(from_table).order_by(from_table.c.seq)
        for column, wanted in (
            (from_table.c.kind, kind),
            (from_table.c.study, study),
            (from_table.c.task, task),
        ):
            if wanted is not None:
                selection = selection.where(column == wanted)
        with self.read() as connection:
            return [
                chain.event_of(dict(stored_row))
                for stored_row in connection.execute(selection).mappings()
            ]
