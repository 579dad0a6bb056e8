"""The engine of the reading room: one thread owns JAX, and completions join and leave as they come and end.

Asks come from any thread (`Engine.submit`) and are checked and rendered there. The engine's thread goes round: it takes
away what was cancelled, begins what waits, as far as there are places and for a limited time, and lets all rows draw
a few tokens. What they have drawn goes to the listeners at once. A completion is token for token what `Model.generate`
gives (in float32; in narrower types, as near as rounding lets it), whoever sits beside it.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.inference import sampling
from cxr_jax.inference.prompts import count_image_tokens
from cxr_jax.inference.token_choice import StepSettings
from cxr_jax.serve.asks import (
    CANCELLED,
    Ask,
    Done,
    Event,
    Failed,
    Finished,
    Listener,
    NotReadyError,
    Piece,
    Probabilities,
    QueueFullError,
    StoppedError,
)
from cxr_jax.serve.slots import warm_up
from cxr_jax.serve.slots.jobs import Job
from cxr_jax.serve.slots.layout import Layout, bytes_a_token, layout_of
from cxr_jax.serve.slots.prompts import Prompts, prepare
from cxr_jax.serve.slots.rooms import Machine, Rooms, Row
from cxr_jax.serve.slots.texts import RowText
from cxr_jax.serve.slots.traces import probabilities_of

_LOG = logging.getLogger(__name__)

# Seconds between two turns that may go to prompts and probabilities: longer, and streams stutter; shorter, and a burst
# waits for its first words.
_STALL_S = 0.2
# Long prompts whose keys are kept, where nobody says how many bytes they may take.
_KEPT_PROMPTS = 32
# Asks that have ended, by whose times the waiting time is estimated.
_RECENT = 64
# Turns that may fail one after the other before the engine gives up.
_FAILURES = 3


class Engine:
    """Reads for many at once; see the module.

    Attributes:
        failure: why the engine has given up, or None.
        layout: how many completions it holds, and how long each may be.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int | None = None,
        queue_limit: int = 128,
        prompt_buckets: Sequence[int] | None = None,
        new_token_buckets: Sequence[int] | None = None,
        cache_bytes: int | None = None,
        warm: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Choose the sizes; nothing runs before `start`.

        Args:
            model: of `cxr_jax.load`.
            slots: completions at once, see `layout_of`, as for the two kinds of buckets.
            queue_limit: asks that may wait for their first place.
            cache_bytes: of prompts that are kept; None: of 32 long ones.
            warm: further calls that compile what `call` will run; made on the engine's thread, before it is ready.

        Raises:
            UserError: for sizes that mean nothing, and for a model without a tokenizer.
        """
        self.model = model
        # The largest image that the model takes: what its prompt needs, every other has, too.
        [shown] = model.pictures(warm_up.picture())
        self.layout: Layout = layout_of(
            model,
            *count_image_tokens(model.config, [shown.grid]),
            slots=slots,
            prompt_buckets=prompt_buckets,
            new_token_buckets=new_token_buckets,
        )
        if cache_bytes is None:
            # By the model: a prompt of the 3B takes as many megabytes as one of the phantom takes kilobytes.
            a_token = bytes_a_token(model.config, model.dtype.itemsize)
            cache_bytes = _KEPT_PROMPTS * a_token * self.layout.long.prompt_slots
        self.prompts = Prompts(model, self.layout, cache_bytes)
        self.queue_limit = queue_limit
        self.failure: str | None = None
        self._arrivals = itertools.count()
        self._warm = tuple(warm)
        # ---- Between threads; the rest is of the engine's alone ----
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future]] = deque()
        self._is_stopping = False
        self._is_ready = False
        self._thread: threading.Thread | None = None
        # ---- ----
        self._begun: list[Job] = []
        self._totals: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._machine: Machine
        self._rooms: Rooms

    # ---- From any thread -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, which warms up and is then ready. To be called once."""
        assert self._thread is None, "it has been started"
        # A daemon: a process that ends must not wait for a warm-up.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether asks are taken: everything is compiled, and nobody has stopped it."""
        return self._is_ready and not self._is_stopping

    def submit(self, ask: Ask, listener: Listener) -> Job:
        """Take an ask; events go to the listener, on the engine's thread, `Done` or `Failed` last.

        Raises:
            UserError: for an ask that cannot be answered.
            QueueFullError: if too many wait.
            NotReadyError: before the warm-up has ended.
            StoppedError: after `stop`, or if the engine has given up.
        """
        # Before the work of rendering: who is refused should cost little.
        self._check_open()
        prepared = prepare(self.model, self.layout, ask)
        job = Job(ask, prepared, listener, next(self._arrivals), self.wake)
        with self._changed:
            # Once more: rendering takes a while, and others have come meanwhile.
            self._check_open()
            self._waiting.append(job)
            self._totals["asks_total"] += 1
            self._changed.notify()
        return job

    def _check_open(self) -> None:
        if self._is_stopping or self.failure:
            raise StoppedError(self.failure or "the engine has stopped")
        if not self._is_ready:
            raise NotReadyError("the engine is warming up")
        if (waiting := len(self._waiting)) >= self.queue_limit:
            self._totals["refused_total"] += 1
            raise QueueFullError(waiting, self.retry_after_s())

    def retry_after_s(self) -> int:
        """Estimate the seconds after which those who wait now are served, from the asks that ended last."""
        ends = list(self._ends)
        if len(ends) < 2 or ends[-1] <= ends[0]:
            return 1
        # By the last ones alone: a burst of readers says nothing of the hour before it.
        a_second = (len(ends) - 1) / (ends[-1] - ends[0])
        return min(600, max(1, math.ceil(len(self._waiting) / a_second)))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Run a function at the next boundary, on the thread that owns JAX; nobody draws meanwhile.

        Raises:
            StoppedError: after `stop`, or if the engine has given up.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            if self._is_stopping or self.failure:
                raise StoppedError(self.failure or "the engine has stopped")
            # In the order in which they came, and before the next turn.
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def wake(self) -> None:
        """Let the engine's thread look for what has changed."""
        with self._changed:
            self._changed.notify()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End all asks with `Failed`, and the thread, at the next boundary; returns when it has ended."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        thread = self._thread
        # A listener, too, may stop the engine, and cannot wait for itself.
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def counts(self) -> dict[str, int]:
        """Count what there is and what there was, for monitoring."""
        rooms = getattr(self, "_rooms", None)
        # The thread may be at work meanwhile: a count may be a turn old, and no lock is worth it.
        live = len(rooms.live_rows) if rooms is not None else 0
        programs = {f"programs_{kind}": count for kind, count in self.model.programs().items()}
        totals = dict.fromkeys(_TOTALS, 0) | dict(self._totals)
        return {
            "slots": self.layout.slots,
            "slots_busy": live,
            "waiting": len(self._waiting),
            "prompts_kept": len(self.prompts),
            "prompts_kept_bytes": self.prompts.bytes,
            **totals,
            **programs,
        }

    # ---- The thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine has stopped"
        try:
            # Until the warm-up has ended, asks are refused, and calls wait.
            self._prepare()
            while not self._is_stopping:
                self._go_round()
        except Exception as error:
            # Its message could hold the text of an ask.
            # Everybody who waits hears of it, and whoever asks for readiness does.
            reason = self.failure = f"the engine failed ({type(error).__name__})"
            if isinstance(error, UserError):
                self.failure = str(error)
            _LOG.error("%s", reason, exc_info=_LOG.isEnabledFor(logging.DEBUG))
        finally:
            self._close(reason)

    def _prepare(self) -> None:
        """Load what is loaded at first use, and run every program once."""
        began = time.monotonic()
        model = self.model
        # Each row says by its temperature whether it is greedy.
        settings = StepSettings(
            greedy=False,
            stop_ids=model.special["stop"],
            suppress_ids=model.special["suppress"],
            dtype=model.dtype,
        )
        try:
            rules = model.answers
        except UserError as error:
            # Asks that need them are refused in the same words.
            rules = None
            _LOG.info("no constrained answers: %s", error)
        # Once for all turns: the loop wants its layers apart.
        layers = sampling.decode_layers(model.params, model.config)
        self._machine = Machine(model, layers, settings, rules)
        self._rooms = Rooms(self._machine, self.layout)
        # A stop must not wait for all of it: compiling takes most of a minute.
        for name, work in warm_up.steps(self._machine, self.layout, self.prompts):
            if self._is_stopping:
                return
            began_step = time.monotonic()
            work()
            _LOG.info("warmed up %s in %.1f s", name, time.monotonic() - began_step)
        # What others will ask this thread for, such as reading sentences.
        for function in self._warm:
            function()
        self._is_ready = True
        _LOG.info("ready after %.1f s", time.monotonic() - began)

    def _go_round(self) -> None:
        """Do once what there is to do, or wait until there is something."""
        with self._changed:
            # Asleep as long as there is nothing to do: no turn without rows.
            while not (self._is_stopping or self._calls or self._waiting or self._begun):
                self._changed.wait()
            if self._is_stopping:
                return
            calls, self._calls = self._calls, deque()
        # Outside the lock: they may take as long as they like, and ask the engine for more.
        for function, future in calls:
            _run_call(function, future)
        self._drop_cancelled()
        # Prompts and probabilities share the time between two turns.
        until = time.monotonic() + _STALL_S
        try:
            self._begin_rows(until)
            self._weigh_answers(until)
            self._turn()
        except Exception as error:
            # Whatever of it failed, no room can be trusted any more.
            self._recover(error)
            return
        # Only failures one after the other are a reason to give up.
        self._totals["failed_turns"] = 0

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [job for job in [*self._begun, *self._waiting] if job.is_cancelled]
        # Also those that wait: their place in the queue is free at once.
        for job in cancelled:
            self._totals["cancelled_total"] += 1
            self._tell(job, Failed(CANCELLED))
            self._end(job)

    # ---- Beginning -----------------------------------------------------------------------------------------

    def _begin_rows(self, until: float) -> None:
        """Begin completions while there are places and time, at least one."""
        while (job := self._next_job()) is not None:
            # At least one, or a slow machine would never begin anything.
            self._begin_row(job)
            if time.monotonic() > until or self._is_stopping:
                return

    def _next_job(self) -> Job | None:
        """Choose who has the fewest completions under way, then who came first: so one ask takes all places only if
        nobody waits."""
        with self._changed:
            jobs = [*self._begun, *self._waiting]
        # Who waits for the long room keeps nobody from the usual one.
        wanting = [
            job
            for job in jobs
            if job.begun < job.ask.settings.n
            and not job.is_cancelled
            and self._rooms.has_place(len(job.prepared.request.ids))
        ]
        return min(wanting, key=lambda job: (len(job.rows), job.arrival), default=None)

    def _begin_row(self, job: Job) -> None:
        if not job.begun:
            with self._changed:
                # From here on it is the thread's, and no longer in the queue.
                self._waiting.remove(job)
            self._begun.append(job)
            try:
                job.prefix, job.cached_tokens = self.prompts.of(job.prepared)
            # A prompt that fails takes nobody with it: no room has been touched.
            except Exception as error:
                self._fail(job, error)
                return
        request, ask = job.prepared.request, job.ask
        text = RowText(self.model.tokenizer, request.opened, ask.stop, ask.settings.max_new_tokens)
        # Completions of one ask differ by their number alone, and so by their noise.
        entry = job.prepared.entry._replace(number=np.int32(job.begun))
        row = Row(job, job.begun, text, entry)
        job.begun += 1
        job.rows.append(row)
        assert job.prefix is not None
        self._rooms.join(row, job.prefix)

    # ---- Drawing -------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Let all rows draw, and tell what they have drawn."""
        self._rooms.start_turn()
        # Room by room: what the first has drawn is told while the others still draw.
        for row, token_ids, logprobs, has_stopped in self._rooms.end_turn():
            # A listener may have ended its ask, or another one, since the turn began.
            job: Job = row.owner
            if job.is_over:
                continue
            text, new_ids, new_logprobs = row.text.add(token_ids, logprobs, has_stopped)
            # A turn may show nothing: half a character, or the beginning of a stop text.
            if text or new_ids:
                self._tell(job, Piece(row.index, text, new_ids, new_logprobs))
            if row.text.finish_reason is not None and not job.is_over:
                self._finish(job, row)

    def _finish(self, job: Job, row: Row) -> None:
        completion = row.text.completion()
        # Its keys are those that the answers are weighed by; copied, since somebody else takes the place.
        if row.index == 0 and job.owes_probabilities:
            job.trace = self._rooms.keys_of(row), completion
        # The slot is free from now on; the device hears of it with the next turn.
        self._rooms.leave(row)
        job.rows.remove(row)
        job.finished += 1
        job.tokens += len(completion.token_ids)
        self._totals["tokens_total"] += len(completion.token_ids)
        self._totals["completions_total"] += 1
        self._tell(job, Finished(row.index, completion))
        self._end_if_done(job)

    def _weigh_answers(self, until: float) -> None:
        """Compute probabilities that are owed, while there is time, at least one."""
        for job in [job for job in self._begun if job.trace is not None]:
            assert job.trace is not None and job.prefix is not None
            (row, completion), job.trace = job.trace, None
            try:
                by_label = probabilities_of(
                    self._machine, job.prefix, row, completion, job.ask.settings.seed
                )
            except Exception as error:
                self._fail(job, error)
                continue
            # Only now may the last event follow.
            job.owes_probabilities = False
            self._tell(job, Probabilities(by_label))
            self._end_if_done(job)
            if time.monotonic() > until or self._is_stopping:
                return

    # ---- Telling and ending --------------------------------------------------------------------------------

    def _tell(self, job: Job, event: Event) -> None:
        if job.is_over:
            return
        try:
            job.listener(event)
        except Exception as error:
            # Nobody hears it any more; what the error says may be the text of the ask.
            _LOG.warning("a listener failed (%s)", type(error).__name__)
            self._totals["listener_failures_total"] += 1
            self._end(job)

    def _end_if_done(self, job: Job) -> None:
        if job.is_over or job.finished < job.ask.settings.n or job.owes_probabilities:
            return
        prompt_tokens = len(job.prepared.request.ids)
        self._totals["prompt_tokens_total"] += prompt_tokens
        self._totals["cached_tokens_total"] += job.cached_tokens
        self._totals["done_total"] += 1
        # What was cancelled or has failed says nothing of how long readings take.
        self._ends.append(time.monotonic())
        self._tell(job, Done(prompt_tokens, job.tokens, job.cached_tokens))
        self._end(job)

    def _fail(self, job: Job, error: Exception) -> None:
        # The message of a UserError is made for users, that of any other error may hold text.
        message = (
            str(error) if isinstance(error, UserError) else f"it failed ({type(error).__name__})"
        )
        _LOG.error("an ask failed (%s)", type(error).__name__)
        self._totals["failed_total"] += 1
        self._tell(job, Failed(message))
        self._end(job)

    def _end(self, job: Job) -> None:
        """Let go of everything that it has."""
        job.is_over = True
        # Completions that still grow are cut off: nobody hears them any more.
        for row in job.rows:
            self._rooms.leave(row)
        job.rows, job.prefix, job.trace = [], None, None
        if job in self._begun:
            self._begun.remove(job)
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _recover(self, error: Exception) -> None:
        """Begin with empty rooms after a turn that has failed: what it took over is lost."""
        self._totals["failed_turns"] += 1
        if self._totals["failed_turns"] >= _FAILURES:
            raise error
        # Those that wait have lost nothing, and go on waiting.
        for job in list(self._begun):
            self._fail(job, error)
        self._rooms = Rooms(self._machine, self.layout)

    def _close(self, reason: str) -> None:
        """Tell everybody that nothing more comes."""
        with self._changed:
            self._is_stopping = True
            jobs, calls = [*self._begun, *self._waiting], self._calls
            self._calls = deque()
        # In the order in which they came.
        for job in jobs:
            self._tell(job, Failed(reason))
            job.is_over = True
        self._begun, self._waiting = [], []
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppedError(reason))


_TOTALS = (
    "asks_total",
    "refused_total",
    "cancelled_total",
    "failed_total",
    "listener_failures_total",
    "done_total",
    "completions_total",
    "tokens_total",
    "prompt_tokens_total",
    "cached_tokens_total",
)


def _run_call(function: Callable[[], Any], future: concurrent.futures.Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001  whoever waits for it decides
        future.set_exception(error)
