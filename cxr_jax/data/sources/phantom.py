"""Synthetic chest radiographs as a source: endless, drawn when they are needed."""

import functools

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.data.loading import in_threads
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.sources.base import ENDLESS
from cxr_jax.errors import UserError
from cxr_jax.phantom import human_readers
from cxr_jax.phantom import report_writer as phantom_report
from cxr_jax.runtime import processes


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
