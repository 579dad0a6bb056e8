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
import functools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.errors import UserError
from cxr_jax.phantom import human_readers
from cxr_jax.phantom import report_writer as phantom_report
from cxr_jax.runtime import processes

ENDLESS = 2**31 - 1
MAX_THREADS = 16  # that `in_threads` starts by itself: more only fight for Python's lock


class PhantomSource:
    """An endless, seeded stream of phantom radiographs of one hospital and split; example i never changes.

    reader_miss: the probability with which its readers leave out what `readers.as_read` says they can (0: never).
    sites: 0, or how many random sites around the hospital the examples come from in turn, example i from site i mod
    sites (phantom/sites.py); a site is drawn from (seed, site) alone, and reports are written as in the hospital.
    UserError for a negative number.
    """

    size = 224
    prompt = FIND_PROMPT
    lexicon = phantom.LEXICON

    def __init__(
        self, hospital: str, split: str, seed: int = 0, reader_miss: float = 0.0, sites: int = 0
    ):
        if sites < 0:
            raise UserError(
                f"config.data.sites={sites} must be a number of sites, 0 for the hospital itself"
            )
        self.hospital, self.split, self.seed, self.reader_miss = hospital, split, seed, reader_miss
        self.sites = sites
        self.name = f"phantom {hospital}" + (f", {sites} sites around it" if sites else "")

    def __len__(self):
        return ENDLESS

    def prompts(self) -> tuple[str, ...]:
        """Every prompt text that batches can hold."""
        return (self.prompt,)

    def about(self, indices) -> dict:
        """prompts and ids, a text each of every index: what there is to say of examples without drawing them."""
        return {"prompts": [self.prompt] * len(indices), "ids": [f"example {i}" for i in indices]}

    def batch(self, indices) -> dict:
        # One by one: a program for B examples rounds each of them according to B and to its place among them (on CPU,
        # by up to 2e-7), so that a shard of a batch would not be the shard. It also compiles once for all B.
        first, *rest = np.asarray(indices)
        # The first alone: threads that come upon a program not yet compiled would compile it once each.
        rows = [self._row(first), *in_threads(self._row, rest)]
        out = dict(jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows))
        out["solution"] = np.asarray(out["labels"]) == 1
        out["known"] = np.ones_like(out["solution"])
        out["hedged"] = np.asarray(out["labels"]) == -1
        return out

    def _row(self, index) -> dict:
        """`phantom.make_batch` of one example, drawn by the CPU: a phantom is the same picture beside any accelerator,
        which is left to the model."""
        index = np.asarray([index])
        with jax.default_device(processes.cpu_device()):
            return phantom.make_batch(
                self.seed, self.split, self.hospital, index, self.sites_of(index)
            )

    def solutions(self, indices) -> np.ndarray:
        """bool [B, 14]: the solutions of `batch`, without drawing the images."""
        indices = np.asarray(indices)
        keys = phantom.example_keys(self.seed, self.split, self.hospital, indices)
        site_keys = phantom.site_keys(self.seed, self.sites_of(indices)) if self.sites else None
        return np.asarray(_labels(keys, self.hospital, site_keys)) == 1

    def sites_of(self, indices) -> np.ndarray | None:
        """int [B]: the site of each example; None without sites."""
        return np.asarray(indices) % self.sites if self.sites else None

    def targets(self, batch: dict, indices) -> list[str]:
        """The text that each scene's reader wrote; misses and wording are drawn from (seed, example index) alone."""
        rng = lambda purpose: [np.random.default_rng([self.seed, purpose, int(i)]) for i in indices]
        rows = [phantom.scene_row(batch["scene"], i) for i in range(len(indices))]
        rows = [
            human_readers.as_read(s, self.reader_miss, r) for s, r in zip(rows, rng(8), strict=True)
        ]
        rngs = rng(7)
        reports = [
            phantom_report.write(s, self.hospital, r) for s, r in zip(rows, rngs, strict=True)
        ]
        return [phantom_report.target(r) for r in reports]


@functools.partial(jax.jit, static_argnames="hospital")
def _labels(keys, hospital, sites):
    return phantom.labels(phantom.sample_scenes(keys, hospital, sites))


class Completions:
    """Target texts to fixed-shape ids, ending in the end-of-turn token: what SFT trains on."""

    def __init__(self, tok, max_completion: int):
        self.tok, self.max_completion = tok, max_completion
        self.stop = tok.get_vocab()["<|im_end|>"]
        self.pad = tok.get_vocab()["<|endoftext|>"]

    def encode(self, texts: list[str]) -> dict:
        """completions int32 [B, C], mask bool [B, C]. UserError for a text longer than C."""
        ids = np.full((len(texts), self.max_completion), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, row in enumerate(self.tok(texts, add_special_tokens=False)["input_ids"]):
            row = [*row, self.stop]
            if len(row) > self.max_completion:
                raise UserError(
                    f"a target text has {len(row)} tokens, more than config.max_completion={self.max_completion}"
                )
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return {"completions": ids, "mask": mask}


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


class Ended(Exception):
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
        raise Ended
    return done


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def indices_of(step: int, batch_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Example indices of a step; a finite source is walked in a fresh seeded order each epoch."""
    flat = step * batch_size + np.arange(batch_size)
    if length >= ENDLESS:
        return flat
    orders = {
        int(e): np.random.default_rng([int(e), 11, seed]).permutation(length)
        for e in np.unique(flat // length)
    }
    return np.array([orders[int(i // length)][i % length] for i in flat])
