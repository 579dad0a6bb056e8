"""Change a store's tables from one version of the program to the next (alembic)."""
