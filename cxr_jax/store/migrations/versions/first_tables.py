"""Make the first tables, and the triggers that keep events from being changed."""

from alembic import op

from cxr_jax.store import tables, triggers

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables of the first version."""
    tables.metadata.create_all(op.get_bind())
    for statement in triggers.statements(op.get_bind().dialect.name):
        op.execute(statement)


def downgrade() -> None:
    """Refuse: a store is never made older."""
    raise NotImplementedError
