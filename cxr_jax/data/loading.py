"""Batches as a function of the step: phantoms (rendered on the fly) and files, behind one small interface.

A source has `size` (pixels a side), `prompts()` (its prompt texts), `len`, `about(indices)` (lists prompts and ids),
`solutions(indices)` (bool [B, 14]), `targets(batch, indices)` (the texts that SFT imitates) and `batch(indices)` ->
dict with image float32 [B, S, S] in 0..1; solution, known and hedged bool [B, 14] (a label that is not known counts
neither way; a hedged one may be there or not) and sides bool [B, 14, 2] (right, left; neither where unknown); phantoms
add labels int8 [B, 14], regions [B, 12, 8, 8] and the scene. `lexicon`: phrases of its reports beyond
labels/lexicon.toml, or None.

A row of `batch` depends on its index alone, bit for bit, and not on the rows beside it: each of several processes asks
for its own indices, and together they hold the batch that one process would have made.
"""

import collections
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence

MAX_THREADS = 16  # that `in_threads` starts by itself: more only fight for Python's lock


def step_loader(
    make: Callable[[int], dict], start: int, stop: int, *, prefetch: int = 2, poll=lambda: None
):
    """-> `StepLoader` of make(step) for step in [start, stop), in order: a Grain data set whose position is the step.

    To resume, start at the step that the checkpoint names: nothing is replayed, and there is no iterator state to
    save. In Grain's own terms the batches are `grain.MapDataset.range(start, stop).map(make)`; with `to_iter_dataset`
    it gives the same ones in the same order, and its state `{"next_index": n}` is step - start. That iterator is not
    used here, because its `next` cannot be interrupted by a signal and its threads are waited for at exit, even one
    that hangs in a read. The rows of a batch are prepared by several threads where that pays (`in_threads`).
    """
    import grain

    steps = grain.MapDataset.range(start, stop).map(make) if start < stop else ()
    return StepLoader(steps, prefetch, poll)


class StepLoader:
    """Iterates a sequence of batches, of which a thread prepares up to `prefetch` + 1 ahead, from now on.

    An error is raised by the `next` that would have given its batch; then the iteration is over. `poll` is called
    several times a second while `next` waits; what it raises ends the iteration. `close` ends it and the thread; a
    loader that is dropped ends its thread, too.

    last_wait: seconds that the last `next` waited for its batch. A program whose step waits for the device shows
    last_wait / (seconds of the step) as the share of the time that data cost it.
    """

    def __init__(self, steps: Sequence, prefetch: int = 2, poll=lambda: None):
        self.last_wait, self._waited, self._taken = 0.0, 0.0, 0
        self._left, self._poll, self._worked = len(steps), poll, [0.0]
        self._ready, self._ended = queue.Queue(prefetch), threading.Event()
        weakref.finalize(self, self._ended.set)
        # A daemon: a read that hangs must not keep the process alive.
        self._thread = threading.Thread(
            target=_prepare,
            args=(steps, self._ready, self._ended, self._worked),
            daemon=True,
            name="batches",
        )
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        if not self._left or self._ended.is_set():
            raise StopIteration
        began = time.monotonic()
        try:
            batch, error = self._wait()
            if error is not None:
                raise error
        except BaseException:
            self._ended.set()  # `close` waits for the thread: what must be saved now is saved first
            raise
        finally:
            self.last_wait = time.monotonic() - began
            self._waited += self.last_wait
        self._left -= 1
        self._taken += 1
        return batch

    def _wait(self):
        while True:
            self._poll()
            try:
                return self._ready.get(timeout=0.2)
            except queue.Empty:
                continue

    def stats(self) -> dict:
        """Since the start: batches (given out), wait_seconds (that `next` waited), prepare_seconds (that the thread
        worked, batches still ahead included)."""
        return {
            "batches": self._taken,
            "wait_seconds": self._waited,
            "prepare_seconds": self._worked[0],
        }

    def close(self) -> None:
        """Ends the iteration and, within 5 s, the thread: it finishes the rows that it is at."""
        self._ended.set()
        self._thread.join(timeout=5.0)


_preparing = threading.local()  # .ended: of the loader that this thread prepares batches for


def _prepare(steps, ready, ended, worked):
    _preparing.ended = ended

    def put(item):
        while not ended.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for i in range(len(steps)):
            began = time.monotonic()
            batch = steps[i]
            worked[0] += time.monotonic() - began
            put((batch, None))
            if ended.is_set():
                return
    except BaseException as e:  # noqa: BLE001 - raised again where the batch is wanted
        put((None, e))


class EndedError(Exception):
    """The batch is no longer wanted: its loader was closed."""


def in_threads(work: Callable, items, threads: int = 0) -> list:
    """[work(item) for item in items], by several threads; 0: one a core, up to MAX_THREADS.

    For work that is outside Python's lock: C code, compiled programs, other processes. Of several errors the first in
    the order of items is raised, once what had begun is done; Ended if the loader that wanted the rows was closed.
    The threads end with the call: nothing is left to shut down.
    """
    items = list(items)
    ended = getattr(_preparing, "ended", None)
    left, done, errors = collections.deque(enumerate(items)), [None] * len(items), {}

    def run():
        while not errors and not (ended and ended.is_set()):
            try:
                i, item = left.popleft()
            except IndexError:
                return
            try:
                done[i] = work(item)
            except BaseException as e:  # noqa: BLE001 - raised again below
                errors[i] = e

    count = min(threads or min(cores(), MAX_THREADS), len(items))
    others = [threading.Thread(target=run, daemon=True, name="rows") for _ in range(count - 1)]
    for t in others:
        t.start()
    run()
    for t in others:
        t.join()
    if errors:
        raise errors[min(errors)]
    if left:
        raise EndedError
    return done


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
