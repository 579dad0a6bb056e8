"""Bring a store's tables to this version of the program, and refuse those of a later one."""

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from cxr_jax.errors import UserError


def _config(connection: sa.Connection | None = None) -> Config:
    # No alembic.ini: the scripts are found as part of the package, wherever it is installed.
    config = Config()
    config.set_main_option("script_location", "cxr_jax.store:migrations")
    config.attributes["connection"] = connection
    return config


def newest() -> str:
    """Return the revision of the tables that this version of the program has."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current(connection: sa.Connection) -> str | None:
    """Return the revision of a database's tables, None of an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: sa.Connection, place: str) -> None:
    """Bring the tables to this version's, inside the caller's transaction.

    Raises:
        UserError: if they are of a later version than this program.
    """
    # Asked first, so that nothing of a later version's tables is touched.
    scripts = ScriptDirectory.from_config(_config())
    revision = current(connection)
    # A revision that no script here has was made by a program that is newer than this one.
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        raise UserError(
            f"--store={place}: its tables are of version {revision}, which this program (tables {newest()}) does not "
            "know; update the program"
        )
    # Also an empty database, which all migrations run on.
    if revision != newest():
        command.upgrade(_config(connection), "head")
