"""Keep rows of the chain from being changed by ordinary statements, in both databases.

A trigger does not stop whoever may drop it, or edit the file: the hashes are for that.
"""

APPEND_ONLY = ("event",)
"""Tables whose rows are written once. (Versions of reports and answers are folds of it, and compared.)"""

_SQLITE = """
CREATE TRIGGER {table}_no_{word} BEFORE {WORD} ON {table}
BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END
"""

_POSTGRES_FUNCTION = """
CREATE OR REPLACE FUNCTION cxr_append_only() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$
"""

_POSTGRES = """
CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
FOR EACH STATEMENT EXECUTE FUNCTION cxr_append_only()
"""


def statements(dialect: str) -> list[str]:
    """Return the statements that make the triggers of a database, `sqlite` or `postgresql`."""
    # Per row: SQLite has no triggers of statements.
    if dialect == "sqlite":
        return [
            _SQLITE.format(table=table, word=word, WORD=word.upper())
            for table in APPEND_ONLY
            for word in ("update", "delete")
        ]
    # Per statement, so that TRUNCATE, which has no rows, is refused, too.
    return [_POSTGRES_FUNCTION, *(_POSTGRES.format(table=table) for table in APPEND_ONLY)]
