"""Batches as a function of the step: phantoms (rendered on the fly) and files, behind one small interface.

A source has `size` (pixels a side), `prompts()` (its prompt texts), `len`, `solutions(indices)` (bool [B, 14]),
`targets(batch, indices)` (the texts that SFT imitates) and `batch(indices) -> dict` with image float32 [B, S, S] in
0..1; solution, known and hedged bool [B, 14] (a label that is not known counts neither way; a hedged one may be there
or not) and sides bool [B, 14, 2] (right, left; neither where unknown); phantoms add labels int8 [B, 14], regions
[B, 12, 8, 8] and the scene. `lexicon`: phrases of its reports beyond labels/lexicon.toml, or None.
"""

import functools
import queue
import threading
from collections.abc import Callable

import jax
import numpy as np

from cxr_jax.data import phantom
from cxr_jax.data.phantom import readers
from cxr_jax.data.phantom import report as phantom_report
from cxr_jax.data.tokenizer import FIND_PROMPT
from cxr_jax.errors import UserError

ENDLESS = 2**31 - 1


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

    def __init__(self, hospital: str, split: str, seed: int = 0, reader_miss: float = 0.0, sites: int = 0):
        if sites < 0:
            raise UserError(f"config.data.sites={sites} must be a number of sites, 0 for the hospital itself")
        self.hospital, self.split, self.seed, self.reader_miss = hospital, split, seed, reader_miss
        self.sites = sites
        self.name = f"phantom {hospital}" + (f", {sites} sites around it" if sites else "")

    def __len__(self):
        return ENDLESS

    def prompts(self) -> tuple[str, ...]:
        """Every prompt text that batches can hold."""
        return (self.prompt,)

    def batch(self, indices) -> dict:
        indices = np.asarray(indices)
        out = dict(phantom.make_batch(self.seed, self.split, self.hospital, indices, self.sites_of(indices)))
        out["solution"] = np.asarray(out["labels"]) == 1
        out["known"] = np.ones_like(out["solution"])
        out["hedged"] = np.asarray(out["labels"]) == -1
        return out

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
        rows = [readers.as_read(s, self.reader_miss, r) for s, r in zip(rows, rng(8), strict=True)]
        rngs = rng(7)
        reports = [phantom_report.write(s, self.hospital, r) for s, r in zip(rows, rngs, strict=True)]
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


def step_loader(make: Callable[[int], dict], start: int, stop: int, *, prefetch: int = 2, poll=lambda: None):
    """Iterates make(step) for step in [start, stop) through grain, prepared ahead in a thread.

    The position is the step itself, so resuming reads nothing twice and replays nothing. `poll` is called several
    times a second while waiting for data; what it raises ends the iteration.
    """
    import grain

    steps = grain.MapDataset.range(start, stop).map(make) if start < stop else ()
    ready, ended = queue.Queue(prefetch), threading.Event()

    def put(item):
        while not ended.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def prepare():
        try:
            for i in range(len(steps)):
                put((steps[i], None))
                if ended.is_set():
                    return
        except Exception as e:  # noqa: BLE001 - raised again where the batch is wanted
            put((None, e))

    # A daemon: a read that hangs must not keep the process alive.
    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    try:
        for _ in range(len(steps)):
            batch, error = _wait(ready, poll)
            if error is not None:
                raise error
            yield batch
    finally:
        ended.set()
        thread.join(timeout=5.0)


def _wait(ready, poll):
    while True:
        poll()
        try:
            return ready.get(timeout=0.2)
        except queue.Empty:
            continue


def indices_of(step: int, batch_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Example indices of a step; a finite source is walked in a fresh seeded order each epoch."""
    flat = step * batch_size + np.arange(batch_size)
    if length >= ENDLESS:
        return flat
    orders = {
        int(e): np.random.default_rng([int(e), 11, seed]).permutation(length) for e in np.unique(flat // length)
    }
    return np.array([orders[int(i // length)][i % length] for i in flat])
