"""Batches as a function of the step, prepared ahead by a thread, their rows by several.

What a batch holds stands in `sources.base`.
"""

import collections
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 16  # that `map_in_threads` starts by itself: more only fight for Python's lock
POLL_SECONDS = 0.2  # how often `next` looks for a signal while it waits
CLOSE_SECONDS = 5.0  # how long `close` waits for the thread


class _Prepared(NamedTuple):
    """A batch, or the error that came in its place."""

    batch: Any
    error: BaseException | None


def step_loader(
    make: Callable[[int], Any],
    start: int,
    stop: int,
    *,
    prefetch: int = 2,
    poll: Callable[[], object] | None = None,
) -> "StepLoader":
    """Load make(step) for step in [start, stop), in order: a Grain data set whose position is the step.

    To resume, start at the step that the checkpoint names: nothing is replayed, and there is no iterator state to
    save. In Grain's own terms the batches are `grain.MapDataset.range(start, stop).map(make)`; with `to_iter_dataset`
    it gives the same ones in the same order, and its state `{"next_index": n}` is step - start. That iterator is not
    used here, because its `next` cannot be interrupted by a signal and its threads are waited for at exit, even one
    that hangs in a read (docs/decisions.md). The rows of a batch are prepared by several threads where that pays
    (`map_in_threads`).

    Args:
        make: the batch of a step; called in a thread, one step after the other.
        prefetch, poll: see `StepLoader`.
    """
    import grain  # takes long to import, and only runs that train need it

    steps: Sequence[Any] = ()
    if start < stop:
        steps = grain.MapDataset.range(start, stop).map(make)
    return StepLoader(steps, prefetch, poll)


class StepLoader:
    """Iterates a sequence of batches, of which a thread prepares up to `prefetch` + 1 ahead, from now on.

    An error is raised by the `next` that would have given its batch; then the iteration is over. `close` ends it and
    the thread; a loader that is dropped ends its thread, too.

    Args:
        poll: called several times a second while `next` waits; what it raises ends the iteration.

    Attributes:
        last_wait: seconds that the last `next` waited for its batch. A program whose step waits for the device shows
            last_wait / (seconds of the step) as the share of the time that data cost it.
    """

    def __init__(
        self, steps: Sequence[Any], prefetch: int = 2, poll: Callable[[], object] | None = None
    ) -> None:
        self.last_wait = 0.0
        self._wait_seconds, self._given_out = 0.0, 0
        self._prepare_seconds = [0.0]  # a list, because the thread adds to it
        self._remaining, self._poll = len(steps), poll
        self._ready: queue.Queue[_Prepared] = queue.Queue(prefetch)
        self._ended = threading.Event()
        weakref.finalize(self, self._ended.set)
        # A daemon: a read that hangs must not keep the process alive. It holds no reference to the loader, which
        # could not be dropped otherwise.
        self._thread = threading.Thread(
            target=_prepare,
            args=(steps, self._ready, self._ended, self._prepare_seconds),
            daemon=True,
            name="batches",
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        """Give the loader itself: there is one pass."""
        return self

    def __next__(self) -> Any:
        """Give the next batch, waiting for it; raises what `make` or `poll` raises."""
        if not self._remaining or self._ended.is_set():
            raise StopIteration
        began = time.monotonic()
        try:
            prepared = self._wait()
            if prepared.error is not None:
                raise prepared.error
        except BaseException:
            self._ended.set()  # `close` waits for the thread: what must be saved now is saved first
            raise
        finally:
            self.last_wait = time.monotonic() - began
            self._wait_seconds += self.last_wait
        # Counted only once it is given out.
        self._remaining -= 1
        self._given_out += 1
        return prepared.batch

    def _wait(self) -> _Prepared:
        while True:
            if self._poll is not None:
                self._poll()
            try:
                return self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue

    def stats(self) -> dict[str, float]:
        """Count since the start: batches (given out), wait_seconds (that `next` waited), prepare_seconds (that the
        thread worked, batches still ahead included)."""
        return {
            "batches": self._given_out,
            "wait_seconds": self._wait_seconds,
            "prepare_seconds": self._prepare_seconds[0],
        }

    def close(self) -> None:
        """End the iteration and, within CLOSE_SECONDS, the thread: it finishes the rows that it is at."""
        self._ended.set()
        self._thread.join(timeout=CLOSE_SECONDS)


_preparing = threading.local()  # .ended: of the loader that this thread prepares batches for


def _prepare(
    steps: Sequence[Any],
    ready: "queue.Queue[_Prepared]",
    ended: threading.Event,
    prepare_seconds: list[float],
) -> None:
    """Fill `ready` until all steps are in it, one fails, or `ended` is set."""
    _preparing.ended = ended

    # With a timeout, because a full queue must not hold a thread that is to end.
    def put(prepared: _Prepared) -> None:
        while not ended.is_set():
            try:
                return ready.put(prepared, timeout=0.1)
            except queue.Full:
                continue

    try:
        for position in range(len(steps)):
            began = time.monotonic()
            batch = steps[position]
            prepare_seconds[0] += time.monotonic() - began
            put(_Prepared(batch, None))
            if ended.is_set():
                return
    except BaseException as error:  # noqa: BLE001 - raised again where the batch is wanted
        put(_Prepared(None, error))


class EndedError(Exception):
    """The batch is no longer wanted: its loader was closed."""


def map_in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = 0
) -> list[Result]:
    """Compute [work(item) for item in items] by several threads.

    For work that is outside Python's lock: C code, compiled programs, other processes. The threads end with the call:
    nothing is left to shut down.

    Args:
        threads: 0 for one a core, up to MAX_THREADS.

    Raises:
        Exception: of several errors the first in the order of items, once what had begun is done.
        EndedError: if the loader that wanted the rows was closed.
    """
    items = list(items)
    ended: threading.Event | None = getattr(_preparing, "ended", None)
    waiting = collections.deque(enumerate(items))
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}

    def take_items() -> None:
        while not errors and not (ended and ended.is_set()):
            try:
                position, item = waiting.popleft()
            except IndexError:
                return
            try:
                results[position] = work(item)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors[position] = error

    # This thread works, too: of `count` workers it is one.
    count = min(threads or min(count_cores(), MAX_THREADS), len(items))
    helpers = [
        threading.Thread(target=take_items, daemon=True, name="rows") for _ in range(count - 1)
    ]
    for helper in helpers:
        helper.start()
    take_items()
    for helper in helpers:
        helper.join()
    # The first in the order of items: which thread was first is chance.
    if errors:
        raise errors[min(errors)]
    if waiting:
        raise EndedError
    return results


def count_cores() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
