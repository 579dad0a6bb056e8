"""A sitting: which task a reader has next, and everything that happens to a task, as events of the chain.

The server decides the task. What was acknowledged is on the disk: each method returns after its transaction, and a
request that comes twice (its key tells) is answered twice and counted once.
"""

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs.sections import FIELDS
from cxr_jax.store import Store, sha256_of
from cxr_jax.store.records.actors import Actor
from cxr_jax.store.records.answers import KeyReusedError
from cxr_jax.study.allocate import Place
from cxr_jax.study.answers import check_answer, check_events, check_questionnaire, check_ratings
from cxr_jax.study.answers import check_signature as check_signature
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.ledger import Ledger, TaskRecord, refusal_of, unlike_sealed, washout_days
from cxr_jax.study.protocol import CONFIDENCE_QUESTION, CONFIDENCE_SCALE, SHOWN
from cxr_jax.study.refusals import SittingRefusedError
from cxr_jax.study.shown import payload

_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class Mine(NamedTuple):
    """A task of the reader who asks."""

    task_id: str
    place: Place
    record: TaskRecord


class Sitting:
    """The study that one server serves."""

    def __init__(
        self, folder: StudyFolder, store: Store, clock: Callable[[], datetime] | None = None
    ) -> None:
        self.folder, self.store, self.protocol = folder, store, folder.protocol
        self.ledger = Ledger(self.protocol.name)
        self._clock = clock or (lambda: datetime.now(UTC))
        # One writer at a time: what is checked must still be so when it is written.
        self._lock = threading.RLock()
        self._places: dict[int, list[Place]] = {}
        for task_place in folder.places:
            self._places.setdefault(task_place.reader_no, []).append(task_place)
        self._ids = {task_place: self.task_id(task_place) for task_place in folder.places}
        self._place_of = {task_id: task_place for task_place, task_id in self._ids.items()}

    def task_id(self, task_place: Place) -> str:
        """An id that tells neither arm nor case, and is the same after a restart."""
        # By place and not by chance: a server that was killed knows its tasks again.
        numbers = (task_place.reader_no, task_place.session_no, task_place.position)
        return self.store.opaque("task", self.protocol.name, *map(str, numbers))

    def tasks_of(self, reader_no: int) -> dict[str, Place]:
        """Give the tasks of a place in the study, by their ids."""
        return {self._ids[task_place]: task_place for task_place in self._places[reader_no]}

    # ---- Who, and what is next ---------------------------------------------------------------------

    def reader_number(self, actor: Actor) -> int:
        """Give the reader's place in the study; who comes first takes the next free one.

        Raises:
            SittingRefusedError: 403 if all places are taken.
        """
        # Asked at each request, so a reader who comes back keeps his place.
        known = self.ledger.reader_of_user.get(actor.id)
        if known is not None:
            return known
        # Who has given a place back has seen films: another place is given by name alone.
        if any(actor.id == place["user"] for place in self.ledger.released):
            raise SittingRefusedError(403, "your place in this study was given back")
        taken = set(self.ledger.reader_of_user.values())
        free = [number for number in range(self.protocol.readers) if number not in taken]
        if not free:
            raise SittingRefusedError(403, "all readers of this study have their places")
        # An event: who reads what is part of the record.
        self._append("study.reader_assigned", {"user": actor.id, "reader_no": free[0]}, actor)
        return free[0]

    def next(self, actor: Actor) -> dict[str, Any]:
        """Say what the reader has to do next: a task, a card, a questionnaire, or nothing any more.

        Raises:
            SittingRefusedError: 409 if the study is not open, 423 with the date during a washout.
        """
        with self._lock:
            # Closed and sealed studies show nothing, not even a position.
            self._check_open()
            reader_no = self.reader_number(actor)
            previous_end: datetime | None = None
            for session_no in range(self.protocol.sessions):
                places = [p for p in self._places[reader_no] if p.session_no == session_no]
                records = [self.ledger.task(self._ids[task_place]) for task_place in places]
                if not all(task_record.is_done for task_record in records):
                    # A session that has begun goes on; only its first film waits for the washout.
                    is_begun = any(task_record.state != "waiting" for task_record in records)
                    if not is_begun:
                        self._check_washout(previous_end, reader_no, session_no, actor)
                    return self._next_task(places, records, session_no)
                # The last film of a session has no next one that its ratings could come before.
                if self._lacks_ratings(places[-1], records[-1]):
                    return self._ratings_of(places[-1])
                # At the end of each session, before the next is talked of.
                if self._needs_questionnaire(reader_no, session_no):
                    return {
                        "kind": "questionnaire",
                        "session": session_no + 1,
                        **self._questions(session_no),
                    }
                # The washout counts from the last film, whichever it was.
                previous_end = max(_time(task_record.signed_at) for task_record in records)
            return {"kind": "done"}

    def _next_task(
        self, places: list[Place], records: list[TaskRecord], session_no: int
    ) -> dict[str, Any]:
        number = next(index for index, task_record in enumerate(records) if not task_record.is_done)
        # Ratings of the film before come first, or they would be remembered through the next.
        if number and self._lacks_ratings(places[number - 1], records[number - 1]):
            return self._ratings_of(places[number - 1])
        task_place = places[number]
        return {
            "kind": "task",
            "task": self._ids[task_place],
            "session": session_no + 1,
            "sessions": self.protocol.sessions,
            "position": number + 1,
            "of": len(places),
            "practice": task_place.practice,
            # A full-screen card where the arm changes.
            "card": number == 0 or places[number - 1].arm != task_place.arm,
            "shows": list(SHOWN[task_place.arm]),
            "simulated": self.protocol.simulated,
        }

    def _ratings_of(self, task_place: Place) -> dict[str, Any]:
        return {"kind": "ratings", "task": self._ids[task_place], "items": self._items(task_place)}

    def _items(self, task_place: Place) -> list[dict[str, Any]]:
        return [
            {
                "name": rating_item.name,
                "question": rating_item.question,
                "points": list(rating_item.points),
            }
            for rating_item in self.protocol.ratings
            if task_place.arm in rating_item.arms
        ]

    def _lacks_ratings(self, task_place: Place, task_record: TaskRecord) -> bool:
        return (
            task_record.state == "signed"
            and not task_record.is_rated
            and bool(self._items(task_place))
        )

    def _needs_questionnaire(self, reader_no: int, session_no: int) -> bool:
        if not self.protocol.tlx:
            return False
        return (reader_no, session_no) not in self.ledger.questionnaires

    def _questions(self, session_no: int) -> dict[str, Any]:
        # Usability is asked once, when all arms are known.
        is_last = session_no == self.protocol.sessions - 1
        return {"tlx": list(self.protocol.tlx), "sus": list(self.protocol.sus) if is_last else []}

    def _check_washout(
        self, previous_end: datetime | None, reader_no: int, session_no: int, actor: Actor
    ) -> None:
        """Refuse a session that comes too early, with the date from which it may begin."""
        if previous_end is None:
            return
        # The last one that was set, with its reason, holds.
        days = washout_days(self.ledger, self.protocol.washout_days)
        # By the server's clock: a reader's own may be anything.
        earliest = previous_end + timedelta(days=days)
        if self._clock() < earliest:
            date = earliest.strftime("%Y-%m-%dT%H:%M:%SZ")
            event_body = {"reader_no": reader_no, "session_no": session_no, "earliest": date}
            if refusal_of(event_body) not in self.ledger.refused_early:
                self._append("study.too_early", event_body, actor)
            raise SittingRefusedError(
                423,
                f"the next session may begin on {earliest:%Y-%m-%d at %H:%M} UTC",
                {"earliest": date},
            )

    # ---- A task ------------------------------------------------------------------------------------

    def open(self, actor: Actor, task_id: str, page: str) -> dict[str, Any]:
        """Open a task in a browser's tab and give what it shows; another tab that had it is out from now on."""
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=False)
            self._append(
                "task.opened",
                {"page": page, "shown_sha256": self.shown_sha256(own_task.place)},
                actor,
                task_id,
            )
            task_record, task_place = own_task.record, own_task.place
            # Nothing here but what the arm shows.
            film = self.folder.films[task_place.case_no]
            return {
                "task": task_id,
                "film": {"rows": film["rows"], "columns": film["columns"]},
                "shown": self._payload(task_place),
                "shown_sha256": self.shown_sha256(task_place),
                "version": task_record.version,
                "answer": task_record.answer,
                "resumed": len(task_record.opened) > 1,
                "form": self._form(),
            }

    def _form(self) -> dict[str, Any]:
        """The same form in every arm."""
        return {
            "fields": list(FIELDS),
            "labels": list(CHEXPERT_14),
            "suspicion": list(self.protocol.suspicion_labels),
            "confidence": {"question": CONFIDENCE_QUESTION, "points": list(CONFIDENCE_SCALE)},
            "idle_after_s": self.protocol.idle_after_s,
        }

    def film(self, actor: Actor, task_id: str) -> bytes:
        """Give the film of the reader's own, open task, gzip of uint16."""
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=False)
            if own_task.record.state != "open":
                raise SittingRefusedError(409, "the task is not open")
        return self.folder.film_bytes(own_task.place.case_no)

    def add_events(
        self, actor: Actor, task_id: str, page: str, idem_key: str, events: Any
    ) -> dict[str, Any]:
        """Keep what a tab tells of its time."""
        checked = check_events(events)
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=True)
            if idem_key in own_task.record.keys:
                # A key that stands for an answer would make a reader's time vanish unsaid.
                if own_task.record.keys[idem_key] != "task.events":
                    raise SittingRefusedError(409, "this key stands for another request")
                return {"kept": True}
            # What comes after the signature changes no time any more.
            if own_task.record.is_done:
                return {"kept": False}
            # A tab that is out may still tell how long it was there; one that never had the task has no time.
            if page not in own_task.record.pages:
                raise SittingRefusedError(409, "the task was not opened in this tab")
            event_body = {"page": page, "idem_key": idem_key, "events": checked}
            self._append("task.events", event_body, actor, task_id)
            return {"kept": True}

    def save(self, actor: Actor, task_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep an answer as the next version.

        Args:
            request: page, idem_key, shown_sha256, version (that it was made from) and answer.
        """
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=False)
            answer = check_answer(request.get("answer"), SHOWN[own_task.place.arm])
            if request["idem_key"] in own_task.record.keys:
                return self._repeated(own_task, request, answer)
            self._check_binding(own_task, request, actor)
            if request.get("version") != own_task.record.version:
                raise SittingRefusedError(
                    409, "another version was saved since", {"version": own_task.record.version}
                )
            # Version and event in one transaction: nothing is acknowledged that could be lost.
            with self.store.write() as transaction:
                self.store.answers.put(
                    task_id,
                    answer,
                    idem_key=request["idem_key"],
                    actor=actor,
                    study=self.protocol.name,
                    shown_sha256=request["shown_sha256"],
                    transaction=transaction,
                )
            self.ledger.refresh(self.store)
            return {"version": own_task.record.version}

    def _repeated(
        self, own_task: Mine, request: Mapping[str, Any], answer: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Answer a save that came twice as the first time."""
        # By its key, among all versions: others may have come since.
        for stored_row in self.store.answers.versions(own_task.task_id):
            if stored_row["idem_key"] == request["idem_key"]:
                if stored_row["sha256"] != sha256_of(dict(answer)):
                    raise SittingRefusedError(409, "this key stands for another answer")
                return {"version": stored_row["version"]}
        raise SittingRefusedError(409, "this key stands for another request")

    def sign(self, actor: Actor, task_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sign the last version of the answer; after it nothing of the task changes but its ratings.

        Args:
            request: page, idem_key, shown_sha256, version, and confidence (1..7) or cannot_say with a reason.
        """
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=True)
            signature = own_task.record.signature
            if signature is not None and signature["idem_key"] == request["idem_key"]:
                # The same request again, and not another one under its name.
                if request.get("confidence") != signature["confidence"]:
                    raise SittingRefusedError(409, "this key stands for another signature")
                return self._signed(own_task)
            if own_task.record.is_done:
                raise SittingRefusedError(409, "the task is signed")
            self._check_binding(own_task, request, actor)
            if request.get("version") != own_task.record.version:
                raise SittingRefusedError(
                    409, "another version was saved since", {"version": own_task.record.version}
                )
            # Everything that the form asks for has to be set by the reader.
            event_body = check_signature(
                request, own_task.record.answer, self.protocol.suspicion_labels
            )
            event_body |= {
                "page": request["page"],
                "idem_key": request["idem_key"],
                "shown_sha256": request["shown_sha256"],
                "version": own_task.record.version,
            }
            self._append("task.signed", event_body, actor, task_id)
            return self._signed(own_task)

    def _signed(self, own_task: Mine) -> dict[str, Any]:
        return {"state": "signed", "items": self._items(own_task.place)}

    def skip(self, actor: Actor, task_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Pass over a film, with a reason; it is shown in the flow table."""
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=True)
            if own_task.record.keys.get(request["idem_key"]) == "task.skipped":
                return {"state": own_task.record.state}
            if own_task.record.is_done:
                raise SittingRefusedError(409, "the task is done")
            self._check_binding(own_task, request, actor)
            # A skip without a reason would hide a kind of film.
            reason = request.get("reason")
            if not isinstance(reason, str) or not 3 <= len(reason.strip()) <= 500:
                raise SittingRefusedError(400, "a skip needs a reason of 3 to 500 characters")
            event_body = {
                "reason": reason.strip(),
                "page": request["page"],
                "idem_key": request["idem_key"],
            }
            self._append("task.skipped", event_body, actor, task_id)
            return {"state": "skipped"}

    def rate(self, actor: Actor, task_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what the reader thinks of the AI, after the signature and untimed."""
        with self._lock:
            own_task = self._mine(actor, task_id, allow_done=True)
            if own_task.record.is_rated:
                return {"kept": own_task.record.keys.get(request["idem_key"]) == "task.rated"}
            if own_task.record.state != "signed":
                raise SittingRefusedError(409, "ratings come after the signature")
            items = [
                rating_item
                for rating_item in self.protocol.ratings
                if own_task.place.arm in rating_item.arms
            ]
            # Every item of the arm, so that none is missing by habit.
            ratings = check_ratings(request.get("ratings"), items)
            event_body = {"ratings": ratings, "idem_key": request["idem_key"]}
            self._append("task.rated", event_body, actor, task_id)
            return {"kept": True}

    def answer_questionnaire(self, actor: Actor, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the questions at the end of a session; the same session twice is kept once."""
        with self._lock:
            self._check_open()
            reader_no = self.reader_number(actor)
            session_no = request.get("session")
            if not isinstance(session_no, int) or not 1 <= session_no <= self.protocol.sessions:
                raise SittingRefusedError(400, "session: one of this study's")
            # Asked before, they would be about films that nobody has seen.
            places = [p for p in self._places[reader_no] if p.session_no == session_no - 1]
            if not all(self.ledger.task(self._ids[task_place]).is_done for task_place in places):
                raise SittingRefusedError(409, "the session is not over")
            # Those of that session and no others.
            questions = self._questions(session_no - 1)
            answers = check_questionnaire(
                request.get("answers"), questions["tlx"], questions["sus"]
            )
            if not self._needs_questionnaire(reader_no, session_no - 1):
                return {"kept": True}
            event_body = {"reader_no": reader_no, "session_no": session_no - 1, "answers": answers}
            self._append("study.questionnaire", event_body, actor)
            return {"kept": True}

    # ---- Progress ----------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """Count, for the coordinator: no answer, no arm, no result."""
        with self._lock:
            self.ledger.refresh(self.store)
            readers = []
            # Counts alone: whoever runs the study sees no result of it.
            for reader_no, places in sorted(self._places.items()):
                records = [self.ledger.task(self._ids[task_place]) for task_place in places]
                readers.append(
                    {
                        "reader": reader_no + 1,
                        "taken": reader_no in self.ledger.reader_of_user.values(),
                        "signed": sum(task_record.state == "signed" for task_record in records),
                        "skipped": sum(task_record.state == "skipped" for task_record in records),
                        "of": len(records),
                    }
                )
            return {"study": self.protocol.name, "state": self.ledger.state, "readers": readers}

    # ---- Checks ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self.ledger.refresh(self.store)
        if self.ledger.state != "open":
            raise SittingRefusedError(409, f"the study is {self.ledger.state}, not open")

    def _mine(self, actor: Actor, task_id: str, *, allow_done: bool) -> Mine:
        """The task, if it is this reader's current one; others' tasks are told from none by nothing."""
        self._check_open()
        # A task of somebody else and no task at all are told alike.
        task_place = self._place_of.get(task_id)
        if task_place is None or self.ledger.reader_of_user.get(actor.id) != task_place.reader_no:
            raise SittingRefusedError(404, "no such task")
        task_record = self.ledger.task(task_id)
        if task_record.is_done and not allow_done:
            raise SittingRefusedError(409, "the task is done")
        if not task_record.is_done and task_record.state == "waiting":
            # A task is opened in its turn: what comes later would be a look ahead.
            following = self.next(actor)
            if following.get("task") != task_id or following["kind"] != "task":
                raise SittingRefusedError(409, "it is not this task's turn")
        return Mine(task_id, task_place, task_record)

    def _payload(self, task_place: Place) -> dict[str, Any]:
        return payload(self.folder.shown[task_place.case_no], SHOWN[task_place.arm])

    def shown_sha256(self, task_place: Place) -> str:
        """Hash of film and reading as an arm shows them: what every answer has to name."""
        # Film and reading together: either one alone may be another's.
        film = self.folder.films[task_place.case_no]["sha256"]
        return sha256_of({"film": film, "shown": self._payload(task_place)})

    def _check_binding(self, own_task: Mine, request: Mapping[str, Any], actor: Actor) -> None:
        """Refuse an answer to another film than the one before the reader's eyes, and one of a tab that is out."""
        reason = None
        if request.get("shown_sha256") != self.shown_sha256(own_task.place):
            reason = "shown"
        elif own_task.record.state != "open":
            reason = "not open"
        elif request.get("page") != own_task.record.page:
            reason = "page"
        if reason is None:
            return
        self._append("task.refused", {"reason": reason}, actor, own_task.task_id)
        # In words for the page; the event has the reason alone.
        messages = {
            "shown": "the answer is to another film or reading than this task's",
            "not open": "the task is not open",
            "page": "the task is open in another tab",
        }
        raise SittingRefusedError(409, messages[reason], {"reason": reason})

    # ---- Events ------------------------------------------------------------------------------------

    def _append(
        self, kind: str, event_body: Mapping[str, Any], actor: Actor, task_id: str | None = None
    ) -> None:
        self.store.append(
            kind, event_body, study=self.protocol.name, task=task_id, **actor.as_arguments()
        )
        # From the chain: a command may have written since the check, and its event stands before this one.
        self.ledger.refresh(self.store)

    def check_record(self) -> None:
        """Refuse files or a key that the study was not sealed with. Raises UserError."""
        self.ledger.refresh(self.store)
        for problem in unlike_sealed(self.folder, self.ledger, self._place_of, has_truth=False):
            raise UserError(f"{self.folder.path}: {problem}")


def _time(text: str | None) -> datetime:
    """Read the chain's time; a task that is done has one."""
    assert text is not None
    return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)


__all__ = ["KeyReusedError", "Sitting", "SittingRefusedError"]
