"""Keep readings: each is named by what it was made from, and its document by its hash in the chain."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

import cxr_jax
from cxr_jax.store import tables
from cxr_jax.store.chain import sha256_of, utc_now
from cxr_jax.store.core import Core
from cxr_jax.store.records.actors import Actor


def reading_name(
    *,
    image: str,
    weights_sha256: str | None,
    renderer: str,
    prompt: Any,
    settings: Mapping[str, Any],
    seed: int,
) -> str:
    """Return the name of a reading: the sha256 of all that it is a function of, the program's version too."""
    return sha256_of(
        {
            "image": image,
            "weights_sha256": weights_sha256,
            "renderer": renderer,
            "prompt": prompt,
            "settings": dict(settings),
            "seed": seed,
            "app_version": cxr_jax.__version__,
        }
    )


class Readings:
    """The finished readings of a store."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def add(self, stored_row: Mapping[str, Any], *, actor: Actor) -> bool:
        """Keep a finished reading; False if it is there.

        Args:
            row: columns of the table `reading`, `sha256` and `image` at least; `document` is what the chain holds the
                sha256 of.
            actor: who asked for it.
        """
        event_body = {
            "reading": stored_row["sha256"],
            "image": stored_row["image"],
            "document_sha256": sha256_of(stored_row.get("document")),
        }
        # Two readers may ask for one reading at once; the second finds it.
        with self._store.write() as transaction:
            condition = tables.reading.c.sha256 == stored_row["sha256"]
            if transaction.connection.execute(sa.select(tables.reading).where(condition)).first():
                return False
            fixed = {"app_version": cxr_jax.__version__, "created": utc_now()}
            transaction.connection.execute(tables.reading.insert(), {**fixed, **stored_row})
            transaction.append("reading.done", event_body, **actor.as_arguments())
        return True

    def get(self, sha256: str) -> dict[str, Any] | None:
        """Return a reading's row, None if it is not there."""
        selection = sa.select(tables.reading).where(tables.reading.c.sha256 == sha256)
        with self._store.read() as connection:
            stored_row = connection.execute(selection).mappings().first()
        return None if stored_row is None else dict(stored_row)
