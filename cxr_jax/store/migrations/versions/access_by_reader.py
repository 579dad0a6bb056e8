"""Make the table of who may see which film and which reading, filled from what the chain says."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# What gave a right before there was a table of rights: kind of event -> {kind of thing: key of the body}.
_GIVING = {
    "image.added": {"image": "image"},
    "reading.started": {"reading": "reading"},
    "report.begun": {"image": "image", "reading": "reading"},
}


def upgrade() -> None:
    """Make the table, and give every reader what the reader has brought or asked for until now."""
    op.execute(
        """CREATE TABLE access (
            "user" TEXT NOT NULL,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            bytes BIGINT NOT NULL,
            created TEXT NOT NULL,
            PRIMARY KEY ("user", kind, name)
        )"""
    )
    connection = op.get_bind()
    kinds = ", ".join(f"'{kind}'" for kind in (*_GIVING, "image.erased"))
    events = connection.execute(
        sa.text(f"SELECT kind, actor, body, at_utc FROM event WHERE kind IN ({kinds}) ORDER BY seq")
    ).all()
    # In the order of the chain, as `verify` folds it: an erasure takes a right, and a new upload gives it again.
    rights: dict[tuple[str, str, str], dict[str, object]] = {}
    for kind, actor, body_text, at_utc in events:
        body = json.loads(body_text)
        if kind == "image.erased":
            gone = ("image", body["image"])
            rights = {key: right for key, right in rights.items() if key[1:] != gone}
            continue
        for thing, key in _GIVING[kind].items():
            if body.get(key) is not None:
                right = {"bytes": 0, "created": at_utc}
                rights.setdefault((actor, thing, body[key]), right)
    insertion = sa.text(
        'INSERT INTO access ("user", kind, name, bytes, created) VALUES (:user, :kind, :name, :bytes, :created)'
    )
    for (user, thing, name), right in rights.items():
        connection.execute(insertion, {"user": user, "kind": thing, "name": name, **right})


def downgrade() -> None:
    """Refuse: a store goes forward only."""
    raise NotImplementedError
