"""Keep films: what is known of each, and its files in the store's folder. No header's text, no name of a file."""

import hashlib
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cxr_jax.errors import UserError, shown
from cxr_jax.store import tables
from cxr_jax.store.chain import utc_now
from cxr_jax.store.core import Core
from cxr_jax.store.records.access import FILM, is_given
from cxr_jax.store.records.actors import OPERATOR, Actor
from cxr_jax.store.verifying import Problem

ORIGINAL = "film"
"""The file of a film as it was uploaded, for exports; never served."""


class Images:
    """The films of a store."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def add(
        self, stored_row: Mapping[str, Any], *, actor: Actor, byte_count: int | None = None
    ) -> bool:
        """Add a film, whose files lie in the folder already; False if it is there (a film is its bytes).

        Whoever brings a film may see it, also one that another has brought before.

        Args:
            row: `sha256, kind, rows, cols, bits` and, where there are, `voi, meta, gate, study_ref`.
            actor: who uploaded it.
            byte_count: what its files take; None: as they lie in the folder.
        """
        if byte_count is None:
            byte_count = self.file_bytes(stored_row["sha256"])
        event_body = {
            "image": stored_row["sha256"],
            "kind": stored_row["kind"],
            "gate": stored_row.get("gate"),
            "bytes": byte_count,
        }
        with self._store.write() as transaction:
            condition = tables.image.c.sha256 == stored_row["sha256"]
            there = transaction.connection.execute(sa.select(tables.image).where(condition)).first()
            # The same film again changes nothing, and is no event; but of another reader it is one.
            if there is not None and there.erased_at is None:
                brought = {"image": stored_row["sha256"], "bytes": byte_count}
                if not is_given(transaction.connection, actor.id, FILM, stored_row["sha256"]):
                    transaction.append("image.brought", brought, **actor.as_arguments())
                return False
            if there is None:
                transaction.connection.execute(
                    tables.image.insert(), {**stored_row, "created": utc_now()}
                )
            else:  # it was erased, and is brought again
                transaction.connection.execute(
                    tables.image.update().where(condition).values(**stored_row, erased_at=None)
                )
            transaction.append("image.added", event_body, **actor.as_arguments())
        return True

    def file_bytes(self, sha256: str) -> int:
        """Return how much the files of a film take in the folder."""
        files = self._store.image_file(sha256, ORIGINAL).parent.glob(f"{sha256}.*")
        return sum(file.stat().st_size for file in files)

    def get(self, sha256: str) -> dict[str, Any] | None:
        """Return a film's row, None if it is not there or erased."""
        from_table = tables.image
        selection = sa.select(from_table).where(
            from_table.c.sha256 == sha256, from_table.c.erased_at.is_(None)
        )
        with self._store.read() as connection:
            stored_row = connection.execute(selection).mappings().first()
        return None if stored_row is None else dict(stored_row)

    def original(self, sha256: str) -> bytes | None:
        """Return a film's bytes as they were uploaded, None if they are gone."""
        try:
            return self._store.image_file(sha256, ORIGINAL).read_bytes()
        except FileNotFoundError:
            return None

    def erase(self, sha256: str, reason: str, *, actor: Actor = OPERATOR) -> int:
        """Delete a film's files; its hash stays in the chain, and reports on it stay. Returns how many files went.

        Raises:
            UserError: if it is not there.
        """
        if self.get(sha256) is None:
            raise UserError(f"{shown(sha256)}: no such film, or erased")
        # The files first: a kill in between leaves a film that can be erased again.
        files = list(self._store.image_file(sha256, ORIGINAL).parent.glob(f"{sha256}.*"))
        for file in files:
            file.unlink(missing_ok=True)
        with self._store.write() as transaction:
            condition = tables.image.c.sha256 == sha256
            erased = tables.image.update().where(condition).values(erased_at=utc_now(), meta=None)
            transaction.connection.execute(erased)
            # The gate's state is in the chain: whether a film that was read was fit to be read.
            event_body = {"image": sha256, "files": len(files), "reason": reason}
            transaction.append("image.erased", event_body, **actor.as_arguments())
        return len(files)

    def damaged_files(self) -> list[Problem]:
        """Return films whose uploaded bytes are not those that their name says."""
        from_table = tables.image
        selection = sa.select(from_table.c.sha256).where(from_table.c.erased_at.is_(None))
        with self._store.read() as connection:
            names = list(connection.execute(selection).scalars())
        problems = []
        for sha256 in names:
            # A film may have no file: one of a phantom, or of a study's list.
            content = self.original(sha256)
            if content is not None and hashlib.sha256(content).hexdigest() != sha256:
                problems.append(Problem("image", sha256, "its file has other bytes"))
        return problems
