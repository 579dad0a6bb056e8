"""Connect to SQLite or PostgreSQL so that what is committed is on the disk, and only one writer writes at a time."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from cxr_jax.errors import RunFailedError, UserError

WRITING_LOCK = 0x6378725F7772  # any two numbers that no other program takes: "cxr_wr", "cxr_se"
SERVING_LOCK = 0x6378725F7365
# How long a statement waits for another process that writes; a transaction here takes milliseconds.
BUSY_SECONDS = 30


def sqlite_engine(path: Path) -> sa.Engine:
    """Return an engine of a SQLite file: WAL, synchronous=FULL, foreign keys, transactions that begin when we say."""
    # As many connections as a server has threads; each is a file handle and no more.
    engine = sa.create_engine(
        f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, pool_size=8, max_overflow=56
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        # The driver's own notion of a transaction would let the first SELECT run outside of one.
        connection.isolation_level = None
        cursor = connection.cursor()
        # Readers go on while one writes.
        cursor.execute("PRAGMA journal_mode=WAL")
        # FULL: a commit waits for the disk. The default of WAL, NORMAL, may lose it with the power.
        cursor.execute("PRAGMA synchronous=FULL")
        # Off by default, for old programs; it is a property of the connection.
        cursor.execute("PRAGMA foreign_keys=ON")
        # Without it INSERT OR REPLACE deletes a row and no trigger is asked.
        cursor.execute("PRAGMA recursive_triggers=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # IMMEDIATE takes the writing lock at once: one that comes later in a transaction can fail with "busy".
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def postgres_engine(url: str) -> sa.Engine:
    """Return an engine of a PostgreSQL database, whose commits wait for the disk whatever the server's default is.

    Raises:
        UserError: if the driver is not installed or the URL names another.
    """
    try:
        parsed = make_url(url)
        engine = sa.create_engine(parsed, pool_size=8, max_overflow=56, pool_pre_ping=True)
    except (sa.exc.ArgumentError, ImportError, ValueError) as error:
        # The URL may hold a password, so it is not repeated.
        raise UserError(
            "--store: PostgreSQL is given as postgresql+pg8000://USER@HOST/DATABASE?folder=DIR, and needs the extra "
            f"`postgres` ({type(error).__name__})"
        ) from None

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        # An administrator may have turned it off for the whole server.
        cursor.execute("SET synchronous_commit TO on")
        connection.commit()
        cursor.close()

    return engine


# SQLite has one writer at a time by nature; PostgreSQL gets as many, and a chain that forks, unless it is told.
class Writing:
    """The writing lock of a database: threads of this process wait here, other processes at the database."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        # SQLite wakes waiting writers by polling, in no order; a lock of threads wakes the next one at once.
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Give a connection in a transaction that no other writer is in; committed at the end, or rolled back."""
        with self._lock, self.engine.connect() as connection:
            writing = connection.execution_options(writes=True)
            with writing.begin():
                # PostgreSQL has no BEGIN IMMEDIATE; a lock that ends with the transaction is the same.
                if self.engine.dialect.name == "postgresql":
                    writing.execute(sa.text(f"SELECT pg_advisory_xact_lock({WRITING_LOCK})"))
                yield writing


class ServingLock:
    """The lock of the one server that a PostgreSQL database may have; it ends with its connection."""

    def __init__(self, engine: sa.Engine) -> None:
        # Kept open: a lock of a session ends when its connection does, also after a kill.
        self._connection = engine.connect()
        got_it = self._connection.execute(sa.text(f"SELECT pg_try_advisory_lock({SERVING_LOCK})"))
        if not got_it.scalar():
            # Back to the pool without the lock.
            self._connection.close()
            raise UserError("--store: in use by another server; a store has one")
        self._connection.commit()

    def release(self) -> None:
        """Let another server have it."""
        with contextlib.suppress(sa.exc.SQLAlchemyError):
            self._connection.execute(sa.text(f"SELECT pg_advisory_unlock({SERVING_LOCK})"))
            self._connection.commit()
        self._connection.close()


def reason(error: sa.exc.SQLAlchemyError) -> str:
    """Return one line of what a database said, without the statement and its values, which may hold texts."""
    # The driver's own error; SQLAlchemy's would show the statement and its values.
    original = getattr(error, "orig", None)
    message = " ".join(str(original if original is not None else type(error).__name__).split())
    return message[:200]


@contextlib.contextmanager
def database_errors(place: str) -> Iterator[None]:
    """Turn errors of the database into one line.

    Raises:
        RunFailedError: with the place and what the database said.
    """
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        raise RunFailedError(f"{place}: the database failed ({reason(error)})") from error
