"""The store: one chain of events, the tables that fold from it, and a folder for films."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from cxr_jax.errors import UserError
from cxr_jax.store import schema, verifying
from cxr_jax.store.chain import Head
from cxr_jax.store.core import Core
from cxr_jax.store.database import (
    ServingLock,
    Writing,
    database_errors,
    postgres_engine,
    sqlite_engine,
)
from cxr_jax.store.folder import DATABASE, StoreFolder
from cxr_jax.store.records.access import Access
from cxr_jax.store.records.answers import Answers
from cxr_jax.store.records.api_keys import ApiKeys
from cxr_jax.store.records.exports import Exports
from cxr_jax.store.records.images import Images
from cxr_jax.store.records.readings import Readings
from cxr_jax.store.records.reports import Reports
from cxr_jax.store.records.sessions import Sessions
from cxr_jax.store.records.users import Users
from cxr_jax.store.verifying import Problem


class Store(Core):
    """An open store.

    Records are kept by what they are about: `users`, `sessions`, `api_keys`, `access`, `images`, `readings`, `reports`,
    `answers`, `exports`. What has no class here (studies, captures) uses `write()` and the tables.
    """

    def __init__(
        self,
        engine: sa.Engine,
        folder: StoreFolder,
        place: str,
        serving: ServingLock | None,
        announce: Callable[[str], None],
    ) -> None:
        super().__init__(engine, folder, place, announce)
        # Held for as long as the store is open.
        self._serving = serving
        self.users = Users(self)
        self.sessions = Sessions(self)
        self.api_keys = ApiKeys(self)
        self.access = Access(self)
        self.images = Images(self)
        self.readings = Readings(self)
        self.reports = Reports(self)
        self.answers = Answers(self)
        self.exports = Exports(self)

    def verify(self, heads: Sequence[Head] = (), *, files: bool = False) -> list[Problem]:
        """Walk the chain, refold the tables from it, and return what does not agree; empty: all does.

        Args:
            heads: heads that were printed or exported at some time, which the chain must still have.
            files: whether films in the folder are compared with their sha256, too.
        """
        # Files last: they take the longest, and the chain is what they are judged by.
        problems = verifying.verify(self, heads)
        return [*problems, *self.images.damaged_files()] if files else problems

    def close(self) -> None:
        """Close the connections and let another server have the store."""
        if self._serving is not None:
            self._serving.release()
        self.engine.dispose()
        self._folder.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_store(
    place: str | Path,
    *,
    folder: str | Path | None = None,
    exclusive: bool = True,
    announce: Callable[[str], None] = _say,
) -> Store:
    """Open a store, making it where there is none, and bring its tables to this version's.

    Args:
        place: a folder, whose room.db is the database, or `postgresql+pg8000://USER@HOST/DATABASE?folder=DIR`.
        folder: where films lie, of a store by URL (instead of `?folder=`).
        exclusive: as the one server of the store. Commands that stand beside a server open it with False: their
            transactions take turns with the server's.
        announce: is told the head at the start of a server and every 1,000 events.

    Raises:
        UserError: for a store that cannot be used: a network disk, another server's, a later version's.
        RunFailedError: if the database fails.
    """
    # Everything that can be refused is refused before a database is made.
    url, path = _parse_place(str(place), folder)
    store_folder = StoreFolder(path, exclusive=exclusive)
    engine = serving = None
    shown_place = str(path) if url is None else "the PostgreSQL database"
    try:
        if url is None:
            # Before SQLite opens it: the WAL takes its mode from the file, and its first one holds all of the chain.
            (path / DATABASE).touch(mode=0o600)
            (path / DATABASE).chmod(0o600)
        engine = sqlite_engine(path / DATABASE) if url is None else postgres_engine(url)
        with database_errors(shown_place):
            # SQLite's lock is that of the folder, which is held by now.
            if url is not None and exclusive:
                serving = ServingLock(engine)
            with Writing(engine).transaction() as connection:
                schema.upgrade(connection, shown_place)
        store = Store(engine, store_folder, shown_place, serving, announce)
        if exclusive:
            announce(f"store head {store.head()}")
    except BaseException:
        if serving is not None:
            serving.release()
        if engine is not None:
            engine.dispose()
        store_folder.close()
        raise
    return store


def folder_of(place: str | Path) -> Path:
    """Return the folder of a store: the place itself, or where the films of a store by URL lie.

    Raises:
        UserError: for a URL that is none of a store.
    """
    # Without opening it: whoever keeps files of its own beside the films wants to look there first.
    return _parse_place(str(place), None)[1]


def _parse_place(place: str, folder: str | Path | None) -> tuple[str | None, Path]:
    """Return the URL of the database, None for SQLite, and the folder."""
    # A folder of that name is not what anybody means.
    if "://" not in place:
        return None, Path(place).expanduser().absolute()
    try:
        url = make_url(place)
    except sa.exc.ArgumentError:
        raise UserError("--store: is no URL of a database, nor a folder") from None
    if not url.drivername.startswith("postgresql"):
        raise UserError(
            f"--store: {url.drivername[:40]}: a store is a folder (SQLite) or postgresql+pg8000://.."
        )
    chosen = folder or url.query.get("folder")
    if not isinstance(chosen, str | Path) or not str(chosen):
        raise UserError("--store: a store by URL needs ?folder=DIR, where films lie")
    # Ours alone; the driver would take it for an option of its own.
    rest = url.difference_update_query(["folder"])
    return rest.render_as_string(hide_password=False), Path(chosen).expanduser().absolute()
