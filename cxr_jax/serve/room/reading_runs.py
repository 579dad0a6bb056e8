"""Readings that are under way: what the engine says becomes numbered events, which any page may follow or join late.

A reading is named by all that it is a function of. Who asks for one that is running joins it; one that is finished is
in the store, events and all. The engine's thread only queues what it says: a thread of the reading's own cuts the text
into sentences, and hands what has to be computed back to the engine, between two steps of others.
"""

import contextlib
import functools
import json
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.labels.answers import split_answer
from cxr_jax.outputs import document as documents
from cxr_jax.outputs.document import CompletionFacts, ImageFacts, ModelFacts
from cxr_jax.outputs.trace_sentences import SentenceStream
from cxr_jax.serve import asks
from cxr_jax.serve.state import ServerState
from cxr_jax.store.records.users import User

_SECONDS = 120.0  # for a piece of text to be read by the engine's thread
_KEPT = 256  # ended runs whose events can still be asked for: those that were stopped or failed are in no store


@dataclass(frozen=True)
class RoomEvent:
    """One event of a reading: its number from 1, its name, and its JSON on one line."""

    number: int
    name: str
    data: str

    def as_stream(self) -> bytes:
        """Write the event as an EventSource reads it."""
        return f"id: {self.number}\nevent: {self.name}\ndata: {self.data}\n\n".encode()


def events_of(stored: list[list[Any]]) -> list[RoomEvent]:
    """Give the events of a stored reading: `[name, content]` each."""
    return [
        RoomEvent(number, name, json.dumps(content))
        for number, (name, content) in enumerate(stored, 1)
    ]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be read, and how.

    Attributes:
        name: the reading's, see `store.records.readings.reading_name`.
        film: as the shelf describes it.
        prompt: the question.
        seed: of the sampling.
        words: a key of `trace_sentences.WORDS`.
        settings: as the store keeps them.
        ask: for the engine.
    """

    name: str
    film: Mapping[str, Any]
    prompt: str
    seed: int
    words: str
    settings: Mapping[str, Any]
    ask: asks.Ask


class Run:
    """One reading under way, or ended a while ago."""

    def __init__(self, state: ServerState, order: Order, current_user: User) -> None:
        self.order, self._state = order, state
        # Who asked for it; it is stopped when the last of them stops it.
        self.askers = {current_user.id}
        self._user = current_user
        # Only appended to, so that who follows reads it without a lock.
        self.events: list[RoomEvent] = []
        self.has_ended = False
        self._wakers: set[Callable[[], None]] = set()
        self._lock = threading.Lock()
        # Never full: the engine's thread must not wait for a reader.
        self._said: queue.SimpleQueue[asks.Event] = queue.SimpleQueue()
        self._stream = SentenceStream(order.words)
        self._collected = _Collected()
        self.job: Any = None

    def start(self) -> None:
        """Hand the ask to the engine; the rest happens by itself. Raises what `Engine.submit` raises."""
        # First, so that a full queue is told before anything is promised.
        self.job = self._state.engine.submit(self.order.ask, self._said.put)
        # Whoever wanted it may have gone while its prompt was made.
        if not self.askers:
            self.job.cancel()
        thread = threading.Thread(target=self._follow, name="reading", daemon=True)
        thread.start()

    def give_up(self) -> None:
        """Tell those who have joined meanwhile that it could not be begun."""
        self._tell("error", {"message": "the reading could not be begun"}, is_last=True)

    # ---- Those who listen --------------------------------------------------------------------------------------------

    def wake_by(self, waker: Callable[[], None]) -> None:
        """Call `waker` at every event from now on; it must not block."""
        with self._lock:
            self._wakers.add(waker)

    def wake_no_more(self, waker: Callable[[], None]) -> None:
        """Forget a waker."""
        with self._lock:
            self._wakers.discard(waker)

    def _tell(self, name: str, content: Any, *, is_last: bool = False) -> None:
        with self._lock:
            self._collected.told.append([name, content])
            self.events.append(RoomEvent(len(self.events) + 1, name, json.dumps(content)))
            # In this order, or a listener could miss the end.
            self.has_ended = self.has_ended or is_last
            wakers = list(self._wakers)
        for waker in wakers:
            # A loop that has been closed, with its server, hears nothing any more.
            with contextlib.suppress(RuntimeError):
                waker()

    # ---- What the engine says ----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Turn what the engine says into events until it has said its last word."""
        # With the film's name: a page that shows another film shows nothing of this reading.
        self._tell("gate", {**self.order.film["gate"], "image": self.order.film["sha256"]})
        try:
            while not self._take(self._said.get()):
                pass
        except Exception as error:
            # A reading that ends without a last event would be waited for for ever; the message may hold its text.
            self.job.cancel()
            message = str(error) if isinstance(error, UserError) else type(error).__name__
            self._end_badly("failed", f"the reading failed ({message})")

    def _take(self, said: asks.Event) -> bool:
        """Take one event of the engine; True after the last."""
        collected = self._collected
        if isinstance(said, asks.Piece) and said.index == 0:
            self._tell_sentences(functools.partial(self._stream.feed, said.text))
        elif isinstance(said, asks.Finished) and said.index == 0:
            collected.completion = said.completion
            self._tell_sentences(self._stream.finish)
            # At once: the document takes another moment.
            items = split_answer(said.completion.text)
            self._tell("answer", {"labels": items.labels if items else []})
        elif isinstance(said, asks.Probabilities):
            collected.probabilities = dict(said.by_label)
        elif isinstance(said, asks.Done):
            self._end_well()
            return True
        elif isinstance(said, asks.Failed):
            how = "stopped" if said.message == asks.CANCELLED else "failed"
            self._end_badly(how, said.message)
            return True
        return False

    def _tell_sentences(self, read: Callable[[], list]) -> None:
        # Reading computes with JAX, which one thread owns.
        for sentence in self._state.engine.call(read).result(_SECONDS):
            self._tell("sentence", sentence.as_json())

    def _end_well(self) -> None:
        """Build the document, keep it, and only then say that the reading is done."""
        collected, order = self._collected, self.order
        # It cannot be, and a document of nothing would be worse than an error.
        if collected.completion is None:
            raise RuntimeError("the engine ended without a completion")
        build = functools.partial(documents.build, *self._facts())
        document = self._state.engine.call(build).result(_SECONDS)
        self._tell("contradictions", document["contradictions"])
        if collected.probabilities is not None:
            self._tell("probabilities", collected.probabilities)
        done = {"id": order.name}
        stored_row = {
            "sha256": order.name,
            "image": order.film["sha256"],
            "weights_sha256": self._state.weights_sha256,
            "renderer": order.film["renderer"],
            "prompt": order.prompt,
            "settings": dict(order.settings),
            "seed": order.seed,
            "text": collected.completion.text,
            "tokens": len(collected.completion.token_ids),
            "finish": collected.completion.finish_reason,
            "labels": document["answer"],
            "probs": collected.probabilities,
            "sentences": document["trace"],
            "document": document,
            "events": [*collected.told, ["done", done]],
        }
        # On the disk before anybody is told that it is done.
        self._state.store.readings.add(stored_row, actor=self._user.actor)
        self._tell("done", done, is_last=True)

    def _facts(self) -> tuple[ImageFacts, ModelFacts, CompletionFacts]:
        described_film, state, completion = self.order.film, self._state, self._collected.completion
        image = ImageFacts(
            sha256=described_film["sha256"],
            view=described_film["view"],
            renderer=described_film["renderer"],
            gate=described_film["gate"]["state"],
            gate_reasons=described_film["gate"]["reasons"],
        )
        model = ModelFacts(
            name=state.model_name, weights_sha256=state.weights_sha256, words=self.order.words
        )
        return (
            image,
            model,
            CompletionFacts(
                text=completion.text,
                finish_reason=completion.finish_reason,
                prompt=self.order.prompt,
                seed=self.order.seed,
                probabilities=self._collected.probabilities,
                warnings=described_film["warnings"],
            ),
        )

    def _end_badly(self, how: str, message: str) -> None:
        # What had come is not kept: half a reading is none.
        body = {"reading": self.order.name, "image": self.order.film["sha256"]}
        try:
            self._state.store.append(f"reading.{how}", body, **self._user.actor.as_arguments())
        finally:
            # Also where the store itself has failed: whoever follows would wait for ever, and joiners with them.
            self._tell("error", {"message": message}, is_last=True)


@dataclass
class _Collected:
    """What of a reading has come so far."""

    completion: Any = None
    probabilities: dict[str, float] | None = None
    told: list[list[Any]] = field(default_factory=list)


class Runs:
    """The readings of one server that are under way, and the last ones that ended."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: str) -> Run | None:
        """Return a run by its reading's name, None if there is none."""
        with self._lock:
            return self._runs.get(name)

    def join_or_start(self, order: Order, current_user: User) -> None:
        """Begin a reading, or be one more who wants it. Raises what `Engine.submit` raises."""
        with self._lock:
            running = self._runs.get(order.name)
            if running is not None and not running.has_ended:
                running.askers.add(current_user.id)
                return
            # Before it starts: of two who ask at once the second joins, and a stop finds the one that runs.
            run = self._runs[order.name] = Run(self._state, order, current_user)
        body = {"reading": order.name, "image": order.film["sha256"]}
        try:
            # Outside of the lock: the engine may take its time.
            run.start()
        except BaseException:
            run.give_up()
            with self._lock:
                if self._runs.get(order.name) is run:
                    del self._runs[order.name]
            raise
        with self._lock:
            # The oldest that have ended go first; those under way are at most as many as the engine admits.
            ended = [name for name, other in self._runs.items() if other.has_ended]
            for name in ended[: max(0, len(self._runs) - _KEPT)]:
                del self._runs[name]
        self._state.store.append("reading.started", body, **current_user.actor.as_arguments())

    def stop(self, name: str, current_user: User) -> bool:
        """Stop a reading for one who asked for it: at the engine, once nobody else wants it. False: not theirs."""
        with self._lock:
            running = self._runs.get(name)
            if running is None or current_user.id not in running.askers:
                return False
            running.askers.discard(current_user.id)
            is_wanted = bool(running.askers)
        # Without a job it is just being begun, and looks itself whether anybody is left.
        if not is_wanted and not running.has_ended and running.job is not None:
            running.job.cancel()
        return True
