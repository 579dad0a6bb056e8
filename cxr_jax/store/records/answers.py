"""Keep answers to a study's tasks: versions, each the fold of one event, none twice."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cxr_jax.store import tables
from cxr_jax.store.chain import Event, sha256_of
from cxr_jax.store.core import Core, Transaction
from cxr_jax.store.folds import compares, folds
from cxr_jax.store.records.actors import Actor

compares(tables.answer)


@folds("task.answer")
def _answered(connection: sa.Connection, event: Event) -> None:
    event_body = event.body
    stored_row = {
        "task": event.task,
        "version": event_body["version"],
        "body": event_body["answer"],
        "sha256": sha256_of(event_body["answer"]),
        "idem_key": event_body["idem_key"],
        "shown_sha256": event_body.get("shown_sha256"),
        "created": event.at_utc,
    }
    connection.execute(tables.answer.insert(), stored_row)


class KeyReusedError(Exception):
    """An idempotency key came again with another content."""


class Answers:
    """The answers of a store's tasks."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def put(
        self,
        task: str,
        answer: Mapping[str, Any],
        *,
        idem_key: str,
        actor: Actor,
        study: str | None = None,
        shown_sha256: str | None = None,
        transaction: Transaction | None = None,
    ) -> dict[str, Any]:
        """Keep an answer as the task's next version and return its row; the same key gives the same row again.

        Args:
            task: the task's id.
            answer: as JSON.
            idem_key: the client's name of this answer.
            actor: who answered.
            study: the study's id, for the event.
            shown_sha256: what the reader had before the eyes.
            transaction: one that is under way, where more belongs to the answer.

        Raises:
            KeyReusedError: if the key stands for another answer.
        """
        # A task that is signed with its answer is one transaction of the caller's.
        if transaction is None:
            with self._store.write() as own_transaction:
                return self.put(
                    task,
                    answer,
                    idem_key=idem_key,
                    actor=actor,
                    study=study,
                    shown_sha256=shown_sha256,
                    transaction=own_transaction,
                )
        rows = _versions(transaction.connection, task)
        for stored_row in rows:
            # A client that lost the reply sends the answer again; it must not count twice.
            if stored_row["idem_key"] == idem_key:
                if stored_row["sha256"] != sha256_of(dict(answer)):
                    raise KeyReusedError(f"task {task}: this key stands for another answer")
                return stored_row
        event_body = {
            "version": len(rows) + 1,
            "answer": dict(answer),
            "idem_key": idem_key,
            "shown_sha256": shown_sha256,
        }
        transaction.append(
            "task.answer", event_body, study=study, task=task, **actor.as_arguments()
        )
        return _versions(transaction.connection, task)[-1]

    def versions(self, task: str) -> list[dict[str, Any]]:
        """Return a task's answers, oldest first."""
        with self._store.read() as connection:
            return _versions(connection, task)


def _versions(connection: sa.Connection, task: str) -> list[dict[str, Any]]:
    selection = (
        sa.select(tables.answer)
        .where(tables.answer.c.task == task)
        .order_by(tables.answer.c.version)
    )
    return [dict(stored_row) for stored_row in connection.execute(selection).mappings()]
