"""An engine that says what a test has written down: the interface of `cxr_jax.serve.engine.Engine`, without a model."""

import collections
import concurrent.futures
import itertools
import threading
from types import SimpleNamespace

from cxr_jax.inference.requests import Completion
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.serve.asks import (
    CANCELLED,
    Done,
    Failed,
    Finished,
    NotReadyError,
    Piece,
    Probabilities,
    QueueFullError,
    StoppedError,
)

READING = (
    "<think> The heart is normal.",
    " No effusion.",
    " </think> <ans",
    "wer>No Finding</answer>",
)


class ScriptedEngine:
    """Every ask is answered by the same pieces, each choice in a thread of the ask's own.

    Args:
        pieces: of every completion.
        gate: a threading.Event that every piece but the first waits for, or None.
        slots: asks that run at a time; one more is refused with QueueFullError.
    """

    def __init__(self, pieces=READING, gate=None, slots=1_000):
        self.pieces, self.gate, self.slots = tuple(pieces), gate, slots
        self.is_ready, self.failure = True, None
        self.asks, self.jobs = collections.deque(maxlen=20), set()
        self.cancelled_total = self.submitted = 0
        self._numbers = itertools.count()
        self._is_stopped = threading.Event()

    def start(self):
        pass

    def counts(self):
        busy = len(self.jobs)
        return {"busy": busy, "cancelled_total": self.cancelled_total, "programs": {"decode": 1}}

    def submit(self, ask, listener):
        if self._is_stopped.is_set():
            raise StoppedError
        if not self.is_ready:
            raise NotReadyError
        if len(self.jobs) >= self.slots:
            raise QueueFullError(len(self.jobs), 7)
        self.asks.append(ask)
        self.submitted += 1
        job = SimpleNamespace(id=str(next(self._numbers)), is_cancelled=threading.Event())
        job.cancel = job.is_cancelled.set
        token = object()
        self.jobs.add(token)

        def run():
            try:
                self._run(ask, listener, job)
            except RuntimeError:  # the loop of a test has closed
                pass
            finally:
                self.jobs.discard(token)

        threading.Thread(target=run, daemon=True).start()
        return job

    def _run(self, ask, listener, job):
        for index in range(ask.settings.n):
            for number, text in enumerate(self.pieces):
                while number and self.gate is not None and not self.gate.wait(0.01):
                    if job.is_cancelled.is_set() or self._is_stopped.is_set():
                        break
                if job.is_cancelled.is_set():
                    self.cancelled_total += 1
                    return listener(Failed(CANCELLED))
                if self._is_stopped.is_set():
                    return listener(Failed("stopped"))
                listener(Piece(index, text, [number], [-0.5]))
            count = len(self.pieces)
            text = "".join(self.pieces)
            completion = Completion(text, list(range(count)), [-0.5] * count, "stop")
            listener(Finished(index, completion))
        if ask.probabilities:
            listener(Probabilities(dict.fromkeys(CHEXPERT_14, 0.25)))
        listener(Done(40, ask.settings.n * len(self.pieces), 8))

    def call(self, function):
        future = concurrent.futures.Future()
        future.set_result(function())
        return future

    def stop(self, timeout_s=1.0):
        self._is_stopped.set()
