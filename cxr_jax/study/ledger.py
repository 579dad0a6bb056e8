"""What has happened in a study, folded from the chain: its state, its readers, every task and what was answered.

The chain is the only truth: this is built from it at a server's start and after each event, and nothing else is kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from cxr_jax.store import Event, Store
from cxr_jax.store.chain import event_of
from cxr_jax.store.tables import event as event_table
from cxr_jax.study.folder import SEALED, StudyFolder

STATES = ("draft", "sealed", "open", "closed", "unblinded")
# What a command does to a study, and in which state it may.
_NEXT_STATE = {
    "study.created": "draft",
    "study.sealed": "sealed",
    "study.opened": "open",
    "study.closed": "closed",
    "study.unblinded": "unblinded",
}


@dataclass
class TaskRecord:
    """One task as its events tell.

    Attributes:
        state: "waiting", "open", "signed" or "skipped".
        page: of the browser's tab that has it; another one is told so.
        opened: times of each opening, UTC.
        openers: the tab of each opening.
        pages: the events that each tab sent, in their order.
        keys: names of requests that were taken, so that none counts twice, and the kind of event each made.
    """

    state: str = "waiting"
    page: str | None = None
    opened: list[str] = field(default_factory=list)
    openers: list[str] = field(default_factory=list)
    pages: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    version: int = 0  # of the newest answer
    answer: dict[str, Any] | None = None  # the newest
    signed_at: str | None = None  # or skipped at, UTC of the server
    signature: dict[str, Any] | None = None  # confidence and what was signed
    skip_reason: str | None = None  # in words
    ratings: dict[str, Any] | None = None  # of what the AI said
    is_rated: bool = False
    refusals: int = 0  # answers to another film, or of a tab that was out

    @property
    def is_done(self) -> bool:
        """Whether the reader is through with it."""
        return self.state in ("signed", "skipped")


@dataclass
class Ledger:
    """A study's state after event number `seq`."""

    slug: str
    seq: int = 0  # of the last event that is in here
    state: str = "none"  # or one of STATES
    sealed: dict[str, Any] = field(default_factory=dict)  # hashes, by file
    reader_of_user: dict[str, int] = field(default_factory=dict)  # user's id -> place
    released: list[dict[str, Any]] = field(default_factory=list)  # places that were given back
    tasks: dict[str, TaskRecord] = field(default_factory=dict)  # by opaque id
    questionnaires: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    washouts: list[dict[str, Any]] = field(default_factory=list)  # changes on the way, with reasons
    # Reader, session and the date that was told: a page that is loaded again is no other refusal.
    refused_early: set[tuple[int, int, str]] = field(default_factory=set)
    unblinded_at: str | None = None
    analysed: dict[str, str] = field(default_factory=dict)  # hashes of what was written last

    def task(self, task_id: str) -> TaskRecord:
        """Give a task's record, a fresh one if nothing has happened to it."""
        return self.tasks.setdefault(task_id, TaskRecord())

    def refresh(self, store: Store) -> None:
        """Take in what the chain has beyond `seq`; another process may have written it."""
        # Only this study's: a store may serve a room beside it.
        selection = (
            sa.select(event_table)
            .where(event_table.c.seq > self.seq, event_table.c.study == self.slug)
            .order_by(event_table.c.seq)
        )
        with store.read() as connection:
            rows = connection.execute(selection).mappings().all()
        for stored_row in rows:
            self.apply(event_of(dict(stored_row)))

    def apply(self, event: Event) -> None:
        """Fold one event; kinds that are none of these change nothing."""
        self.seq = max(self.seq, event.seq)
        # Steps of the whole study first, then tasks, then what concerns readers.
        if event.kind in _NEXT_STATE:
            self._apply_state(event)
        elif event.task is not None:
            # Sent by somebody who has had a place, in the moment in which it was taken back: the next one's it is not.
            if event.actor in self.reader_of_user:
                self._apply_task(event, self.task(event.task))
        elif event.kind == "study.reader_assigned":
            self.reader_of_user[event.body["user"]] = event.body["reader_no"]
        elif event.kind == "study.reader_released":
            self._release(event)
        elif event.kind == "study.washout_changed":
            self.washouts.append(event.body | {"at": event.at_utc})
        elif event.kind == "study.questionnaire":
            session_key = (event.body["reader_no"], event.body["session_no"])
            self.questionnaires[session_key] = event.body["answers"]
        elif event.kind == "study.too_early":
            self.refused_early.add(refusal_of(event.body))
        elif event.kind == "study.analysed":
            self.analysed = dict(event.body)

    def _apply_state(self, event: Event) -> None:
        self.state = _NEXT_STATE[event.kind]
        # Kept, for `verify` and `unblind` to compare with.
        if event.kind == "study.sealed":
            self.sealed = dict(event.body)
        if event.kind == "study.unblinded":
            self.unblinded_at = event.at_utc

    def _release(self, event: Event) -> None:
        """Set aside what was read at a place: two people's readings are no one reader's."""
        reader_no = event.body["reader_no"]
        self.reader_of_user.pop(event.body["user"], None)
        for task_id in event.body["tasks"]:
            self.tasks[task_id] = TaskRecord()
        self.questionnaires = {
            session_key: answers
            for session_key, answers in self.questionnaires.items()
            if session_key[0] != reader_no
        }
        self.released.append(event.body | {"at": event.at_utc})

    def _apply_task(self, event: Event, record: TaskRecord) -> None:
        event_body: Mapping[str, Any] = event.body
        if "idem_key" in event_body:
            record.keys[event_body["idem_key"]] = event.kind
        # Whoever opens last has the task; what another tab told stays its own.
        if event.kind == "task.opened":
            record.state, record.page = "open", event_body["page"]
            record.opened.append(event.at_utc)
            record.openers.append(event_body["page"])
            record.pages.setdefault(event_body["page"], [])
        elif event.kind == "task.events":
            record.pages.setdefault(event_body["page"], []).extend(event_body["events"])
        elif event.kind == "task.answer":
            record.version, record.answer = event_body["version"], event_body["answer"]
        # From here on only ratings may still come.
        elif event.kind == "task.signed":
            record.state, record.signed_at, record.signature = (
                "signed",
                event.at_utc,
                dict(event_body),
            )
        elif event.kind == "task.skipped":
            record.state, record.signed_at = "skipped", event.at_utc
            record.skip_reason = event_body["reason"]
        elif event.kind == "task.rated":
            record.ratings, record.is_rated = event_body["ratings"], True
        elif event.kind == "task.refused":
            record.refusals += 1


def refusal_of(event_body: Mapping[str, Any]) -> tuple[int, int, str]:
    """Name a session that came before its washout was over: reader, session and the date that was told."""
    return event_body["reader_no"], event_body["session_no"], event_body["earliest"]


def washout_days(ledger: Ledger, planned_days: float) -> float:
    """Give the washout that holds: the protocol's, or the last one that was set with a reason."""
    return float(ledger.washouts[-1]["days"]) if ledger.washouts else planned_days


# ---- What was sealed -------------------------------------------------------------------------------


def unlike_sealed(
    folder: StudyFolder, ledger: Ledger, task_ids: Iterable[str], *, has_truth: bool
) -> Iterator[str]:
    """Yield what is not as it was sealed, a line each; nothing of a draft, which may still change.

    Args:
        folder: the files as they are now.
        ledger: what the chain says.
        task_ids: of the allocation, made with the folder's secret.
        has_truth: whether the sealed file is asked for, too; a server leaves it alone.
    """
    if not ledger.sealed:
        return
    found = folder.hashes()
    wanted = dict(ledger.sealed["files"])
    if has_truth:
        found[SEALED], wanted[SEALED] = folder.sealed_sha256(), ledger.sealed["seal_sha256"]
    for name, digest in wanted.items():
        if found.get(name) != digest:
            yield f"{name}: is not the one that was sealed"
    # Ids are HMACs: with another key no task is known, and every film seems never to have been read.
    if set(ledger.tasks) - set(task_ids):
        yield "secret: is not the one that the study's tasks were named with"
