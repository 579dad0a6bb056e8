"""Run migrations on the connection that `schema.upgrade` hands over; alembic runs this file."""

from alembic import context

from cxr_jax.store import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    # SQLite alters a table by copying it.
    render_as_batch=True,
)
# Inside the transaction of whoever opens the store: half a migration is none.
with context.begin_transaction():
    context.run_migrations()
