"""Copy a store into a new folder, whole or not at all."""

import os
import shutil
import sqlite3
from pathlib import Path

from cxr_jax.errors import UserError
from cxr_jax.store.folder import DATABASE
from cxr_jax.store.store import Store

# Of a database that is copied by its own means, and of the lock, which belongs to the place.
_NOT_COPIED = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", "lock")


def back_up(store: Store, target: Path) -> str:
    """Copy the database and the films of a store into a folder that is not there yet, and return a line about it.

    Raises:
        UserError: for a folder that is there or cannot be made, or a store in PostgreSQL.
    """
    if store.engine.dialect.name != "sqlite":
        raise UserError(
            "backup: a database of PostgreSQL is copied by pg_dump, and the folder of films with it"
        )
    # Never over an older copy: that may be the last good one.
    if target.exists():
        raise UserError(f"{target}: is there already; a backup gets a folder of its own")
    # Beside it, so that the rename at the end is on one disk.
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(store.folder, partial, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        # By SQLite itself: a file that is copied without its WAL lacks the newest commits.
        source = sqlite3.connect(store.folder / DATABASE)
        copy = sqlite3.connect(partial / DATABASE)
        try:
            source.backup(copy)
        finally:
            # Also after a failure, or the copy stays open.
            source.close()
            copy.close()
        (partial / DATABASE).chmod(0o600)
        os.rename(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    return f"backed up to {target}, head {store.head()}"
