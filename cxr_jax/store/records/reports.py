"""Keep reports: every version, who signed it and meaning what, what was flagged, what was added after.

A report begins as the draft that its reading gives (version 1), so whatever a reader changes stands against it. A save
is a new version; a signature is one, too; after it there are addenda alone. All of it folds from events.
"""

import difflib
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cxr_jax.store import tables
from cxr_jax.store.chain import Event, sha256_of, utc_now
from cxr_jax.store.core import Core, Transaction
from cxr_jax.store.folds import compares, folds
from cxr_jax.store.records import access
from cxr_jax.store.records.actors import Actor

# A sentence that is untrue, on the wrong side, lacking, or surer than the film allows.
FLAG_KINDS = ("wrong", "side", "missing", "overconfident")


class StaleError(Exception):
    """Another version has been saved since the one that a change was made from."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the report is at version {version}")
        self.version = version


class StateError(Exception):
    """What is asked for cannot be done to a report in this state: change a signed one, add to a draft."""


class OtherRequestError(Exception):
    """An idempotency key came again with another request."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Who changes which version of a report, seeing what."""

    report: str
    actor: Actor
    # None where any version will do: a flag is put on the reading's sentence.
    version: int | None
    shown_sha256: str | None = None
    # The client's name of this change: the same one comes twice if an answer was lost.
    idem_key: str | None = None


def shown_sha256(image: str, reading: str | None) -> str:
    """Return the hash that binds a change to what the reader sees: sha256 of `IMAGE:READING`, in hex."""
    # Both are hashes themselves; the colon keeps one without a reading apart.
    return hashlib.sha256(f"{image}:{reading or ''}".encode()).hexdigest()


def word_operations(before: str, after: str) -> list[list[Any]]:
    """Return how one text became another: `[operation, first, last, words]`, places in words of the text before."""
    # A word with the blanks before it, so that words put together are the text.
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    # Two texts of thousands of words each would take seconds to compare well.
    if len(old) * len(new) > 4_000_000:
        return [["replace", 0, len(old), after]]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        [operation, first, newest_row, "".join(new[new_first:new_last])]
        for operation, first, newest_row, new_first, new_last in matcher.get_opcodes()
        if operation != "equal"
    ]


# ---- Folds -----------------------------------------------------------------------------------------------------------

compares(tables.report)
compares(tables.report_flag)


def _last(connection: sa.Connection, report: str) -> dict[str, Any] | None:
    from_table = tables.report
    selection = (
        sa.select(from_table)
        .where(from_table.c.id == report)
        .order_by(from_table.c.version.desc())
        .limit(1)
    )
    stored_row = connection.execute(selection).mappings().first()
    return None if stored_row is None else dict(stored_row)


def _add_version(connection: sa.Connection, event: Event, **changes: Any) -> None:
    """Write the next version: the last one, but for what the event changes."""
    newest_row = _last(connection, event.body["report"])
    if newest_row is None:
        raise ValueError("an event of a report that was never begun")
    stored_row = {
        **{
            name: newest_row[name] for name in ("id", "image", "reading", "user", "fields", "state")
        },
        "version": event.body["version"],
        "prev": newest_row["version"],
        "shown_sha256": event.body.get("shown_sha256"),
        "created": event.at_utc,
        **changes,
    }
    connection.execute(tables.report.insert(), stored_row)


@folds("report.begun")
def _begun(connection: sa.Connection, event: Event) -> None:
    event_body = event.body
    stored_row = {
        "id": event_body["report"],
        "version": 1,
        "image": event_body["image"],
        "reading": event_body["reading"],
        "user": event.actor,
        "state": "draft",
        "fields": event_body["fields"],
        "shown_sha256": shown_sha256(event_body["image"], event_body["reading"]),
        "created": event.at_utc,
    }
    connection.execute(tables.report.insert(), stored_row)
    # Whoever has written of a film has seen it: in stores from before there were rights nothing else says so.
    access.give(connection, event, access.FILM, event_body["image"])
    access.give(connection, event, access.READING, event_body["reading"])


@folds("report.saved")
def _saved(connection: sa.Connection, event: Event) -> None:
    newest_row = _last(connection, event.body["report"])
    # Fields that an event does not name stay as they were.
    before = {} if newest_row is None else newest_row["fields"]
    _add_version(connection, event, fields={**before, **event.body["fields"]})


@folds("report.signed")
def _signed(connection: sa.Connection, event: Event) -> None:
    event_body = event.body
    _add_version(
        connection,
        event,
        state="signed",
        signed_at=event.at_utc,
        meaning=event_body["meaning"],
        confidence=event_body["confidence"],
    )


@folds("report.addendum")
def _addendum(connection: sa.Connection, event: Event) -> None:
    _add_version(
        connection, event, state="addendum", body=event.body["text"], signed_at=event.at_utc
    )


@folds("report.flagged")
def _flagged(connection: sa.Connection, event: Event) -> None:
    event_body = event.body
    stored_row = {
        name: event_body[name] for name in ("report", "flag_no", "sentence", "kind", "note")
    }
    connection.execute(
        tables.report_flag.insert(), {**stored_row, "user": event.actor, "created": event.at_utc}
    )


# ---- The records -----------------------------------------------------------------------------------------------------


class Reports:
    """The reports of a store."""

    def __init__(self, store: Core) -> None:
        self._store = store

    def begin(
        self,
        image: str,
        reading: str | None,
        fields: Mapping[str, str],
        *,
        actor: Actor,
        idem_key: str | None = None,
    ) -> dict[str, Any]:
        """Begin a report with the draft that its reading gives, and return its row (version 1)."""
        content = {"image": image, "reading": reading}
        with self._store.write() as transaction:
            remembered = _Once(transaction, f"begin:{actor.id}", idem_key, content)
            if remembered.answer is not None:
                return self._at(transaction.connection, remembered.answer["report"], 1)
            # Random and not counted: an id tells nothing about how many reports there are.
            report = secrets.token_hex(8)
            event_body = {**content, "report": report, "fields": dict(fields)}
            transaction.append("report.begun", event_body, **actor.as_arguments())
            remembered.remember({"report": report, "version": 1})
            return self._at(transaction.connection, report, 1)

    def save(self, change: Change, fields: Mapping[str, str]) -> dict[str, Any]:
        """Keep changed fields as the next version, and return its row.

        Raises:
            StaleError: if another version has come since `change.version`.
            StateError: if the report is signed.
            OtherRequestError: if the idempotency key stands for another request.
        """
        with self._store.write() as transaction:
            remembered = _Once(
                transaction, f"report:{change.report}", change.idem_key, dict(fields)
            )
            if remembered.answer is not None:
                return self._at(transaction.connection, change.report, remembered.answer["version"])
            newest_row = _checked(transaction.connection, change, "draft")
            before = newest_row["fields"]
            changed = {name: text for name, text in fields.items() if text != before.get(name, "")}
            # Nothing has changed: no version, and the same answer.
            if not changed:
                remembered.remember({"version": newest_row["version"]})
                return newest_row
            # Kept in the event, so that nobody has to compute them again by another rule.
            operations = {
                name: word_operations(before.get(name, ""), text) for name, text in changed.items()
            }
            event_body = {"fields": changed, "operations": operations}
            return _next_version(
                transaction, "report.saved", change, newest_row, event_body, remembered
            )

    def sign(self, change: Change, meaning: str, confidence: int | None = None) -> dict[str, Any]:
        """Sign a draft, meaning what the signer says, and return the signed version's row.

        Raises:
            StaleError: if another version has come since `change.version`.
            StateError: if it is signed already.
            OtherRequestError: if the idempotency key stands for another request.
        """
        event_body = {"meaning": meaning, "confidence": confidence}
        with self._store.write() as transaction:
            remembered = _Once(transaction, f"report:{change.report}", change.idem_key, event_body)
            if remembered.answer is not None:
                return self._at(transaction.connection, change.report, remembered.answer["version"])
            newest_row = _checked(transaction.connection, change, "draft")
            # What is signed is named by its hash: the signature stands for this text and no other.
            event_body["fields_sha256"] = sha256_of(newest_row["fields"])
            return _next_version(
                transaction, "report.signed", change, newest_row, event_body, remembered
            )

    def add(self, change: Change, text: str) -> dict[str, Any]:
        """Add a text to a signed report, and return that version's row.

        Raises:
            StaleError: if another version has come since `change.version`.
            StateError: if the report is a draft.
            OtherRequestError: if the idempotency key stands for another request.
        """
        with self._store.write() as transaction:
            remembered = _Once(
                transaction, f"report:{change.report}", change.idem_key, {"text": text}
            )
            if remembered.answer is not None:
                return self._at(transaction.connection, change.report, remembered.answer["version"])
            newest_row = _checked(transaction.connection, change, "signed", "addendum")
            return _next_version(
                transaction, "report.addendum", change, newest_row, {"text": text}, remembered
            )

    def flag(
        self, change: Change, kind: str, sentence: int | None, note: str | None = None
    ) -> dict[str, Any]:
        """Flag a sentence of the reading, or that one is missing, and return the flag's row.

        Raises:
            ValueError: if the kind is none of FLAG_KINDS.
            OtherRequestError: if the idempotency key stands for another request.
        """
        if kind not in FLAG_KINDS:
            raise ValueError(f"a flag is one of {', '.join(FLAG_KINDS)}")
        content = {"kind": kind, "sentence": sentence, "note": note}
        from_table = tables.report_flag
        with self._store.write() as transaction:
            remembered = _Once(transaction, f"report:{change.report}", change.idem_key, content)
            mine = (
                sa.select(from_table)
                .where(from_table.c.report == change.report)
                .order_by(from_table.c.flag_no)
            )
            flags = transaction.connection.execute(mine).mappings().all()
            if remembered.answer is not None:
                return dict(flags[remembered.answer["flag_no"] - 1])
            _checked(transaction.connection, change, "draft", "signed", "addendum")
            event_body = {**content, "report": change.report, "flag_no": len(flags) + 1}
            event_body["shown_sha256"] = change.shown_sha256
            transaction.append("report.flagged", event_body, **change.actor.as_arguments())
            remembered.remember({"flag_no": len(flags) + 1})
            return dict(transaction.connection.execute(mine).mappings().all()[-1])

    def get(self, report: str) -> dict[str, Any] | None:
        """Return the newest version's row, None of no report."""
        with self._store.read() as connection:
            return _last(connection, report)

    def versions(self, report: str) -> list[dict[str, Any]]:
        """Return all versions, oldest first."""
        from_table = tables.report
        selection = (
            sa.select(from_table).where(from_table.c.id == report).order_by(from_table.c.version)
        )
        with self._store.read() as connection:
            return [dict(stored_row) for stored_row in connection.execute(selection).mappings()]

    def flags(self, report: str) -> list[dict[str, Any]]:
        """Return the flags, oldest first."""
        from_table = tables.report_flag
        selection = (
            sa.select(from_table)
            .where(from_table.c.report == report)
            .order_by(from_table.c.flag_no)
        )
        with self._store.read() as connection:
            return [dict(stored_row) for stored_row in connection.execute(selection).mappings()]

    def of_user(self, user: str) -> list[dict[str, Any]]:
        """Return the newest version of each of a user's reports, newest first."""
        from_table = tables.report
        # Its newest version; older ones are its history.
        newest = (
            sa.select(from_table.c.id, sa.func.max(from_table.c.version).label("version"))
            .where(from_table.c.user == user)
            .group_by(from_table.c.id)
            .subquery()
        )
        selection = (
            sa.select(from_table)
            .join(
                newest,
                (from_table.c.id == newest.c.id) & (from_table.c.version == newest.c.version),
            )
            .order_by(from_table.c.created.desc())
        )
        with self._store.read() as connection:
            return [dict(stored_row) for stored_row in connection.execute(selection).mappings()]

    def _at(self, connection: sa.Connection, report: str, version: int) -> dict[str, Any]:
        from_table = tables.report
        selection = sa.select(from_table).where(
            from_table.c.id == report, from_table.c.version == version
        )
        return dict(connection.execute(selection).mappings().one())


class _Once:
    """A request with the client's own name: the second time, `answer` is what the first one was answered."""

    def __init__(self, transaction: Transaction, scope: str, key: str | None, request: Any) -> None:
        self._transaction, self._scope, self._key = transaction, scope, key
        self._sha256 = sha256_of(request)
        self.answer: dict[str, Any] | None = None
        if key is None:
            return
        from_table = tables.idempotency
        selection = sa.select(from_table).where(
            from_table.c.scope == scope, from_table.c.idem_key == key
        )
        stored_row = transaction.connection.execute(selection).first()
        if stored_row is None:
            return
        # A client's mistake: two changes under one name. To answer with the first would lose the second.
        if stored_row.request_sha256 != self._sha256:
            raise OtherRequestError("this idempotency key stands for another request")
        self.answer = stored_row.answer

    def remember(self, answer: Mapping[str, Any]) -> None:
        """Keep the answer, in the transaction of what it tells of."""
        if self._key is None:
            return
        stored_row = {
            "scope": self._scope,
            "idem_key": self._key,
            "request_sha256": self._sha256,
            "answer": dict(answer),
            "created": utc_now(),
        }
        self._transaction.connection.execute(tables.idempotency.insert(), stored_row)


def _checked(connection: sa.Connection, change: Change, *states: str) -> dict[str, Any]:
    """Return the newest version, if the change was made from it and its state allows the change."""
    newest_row = _last(connection, change.report)
    if newest_row is None:
        raise StateError("no such report")
    if newest_row["state"] not in states:
        raise StateError(
            "it is signed: there are addenda only" if "draft" in states else "it is not signed yet"
        )
    # Two tabs: the second one would overwrite what it never showed.
    if change.version is not None and change.version != newest_row["version"]:
        raise StaleError(newest_row["version"])
    return newest_row


def _next_version(
    transaction: Transaction,
    kind: str,
    change: Change,
    newest_row: Mapping[str, Any],
    event_body: Mapping[str, Any],
    remembered: _Once,
) -> dict[str, Any]:
    """Append the event that makes the next version, and return that version's row."""
    version = newest_row["version"] + 1
    content = {
        **event_body,
        "report": change.report,
        "version": version,
        "shown_sha256": change.shown_sha256,
    }
    transaction.append(kind, content, **change.actor.as_arguments())
    remembered.remember({"version": version})
    newest = _last(transaction.connection, change.report)
    assert newest is not None
    return newest


def changes_between(versions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each version changed of the one before: its operations by field, the first one's none."""
    # Computed anew, so that the versions alone are enough; the events have the same operations.
    history = []
    for before, after in zip([None, *versions], versions, strict=False):
        old = {} if before is None else before["fields"]
        operations = {
            name: word_operations(old.get(name, ""), text)
            for name, text in after["fields"].items()
            if before is not None and text != old.get(name, "")
        }
        kept = ("version", "state", "user", "created", "meaning", "confidence", "body", "fields")
        history.append({**{name: after[name] for name in kept}, "operations": operations})
    return history
