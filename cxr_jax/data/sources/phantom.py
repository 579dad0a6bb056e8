"""Synthetic chest radiographs as a source: endless, drawn when they are needed; one film an example, or a study of
several with a question that needs them."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from cxr_jax import phantom
from cxr_jax.config.sections import DataConfig
from cxr_jax.data.loading import map_in_threads
from cxr_jax.data.prompts import FIND_PROMPT, NEW_PROMPT, Conversation, Message, ask_of_roles
from cxr_jax.data.sources.base import ENDLESS, About, Batch, Indices
from cxr_jax.data.sources.views import FRONTAL
from cxr_jax.errors import UserError
from cxr_jax.phantom import follow_ups, human_readers, report_writer, studies
from cxr_jax.phantom.report_writer import Report
from cxr_jax.phantom.studies import reports as study_reports
from cxr_jax.runtime import processes

# What random numbers of texts are for: part of their seed, so that the streams share nothing.
_WORDING, _MISSES, _FOLLOW_UPS = 7, human_readers.MISSES, 9
_OTHER_PATIENTS = (
    2**30
)  # examples from here on are whom confused readers take a finding from: no run gets there


class PhantomSource:
    """An endless, seeded stream of phantom radiographs of one hospital and split; example i never changes.

    Args:
        reader_miss: the probability with which its readers leave out what `human_readers.as_read` says they can
            (0: never).
        sites: 0, or how many random sites around the hospital the examples come from in turn, example i from site i mod
            sites (phantom/sites.py); a site is drawn from (seed, site) alone, and reports are written as in the
            hospital.
        follow_ups: the share of examples in whose conversations more is asked than what a reading answers
            (`phantom.follow_ups`).
        reader_confused: the probability with which its readers report of a finding what another patient has
            (`human_readers.confused`).

    Raises:
        UserError: for a negative number of sites.
    """

    size = phantom.SIZE
    prompt = FIND_PROMPT
    lexicon: str | None = phantom.LEXICON
    views: tuple[str, ...] = (FRONTAL,)  # roles of an example's films (`PhantomStudies`)

    def __init__(
        self,
        hospital: str,
        split: str,
        seed: int = 0,
        reader_miss: float = 0.0,
        sites: int = 0,
        *,
        follow_ups: float = 0.0,
        reader_confused: float = 0.0,
    ) -> None:
        if sites < 0:
            raise UserError(
                f"config.data.sites={sites} must be a number of sites, 0 for the hospital itself"
            )
        self.hospital, self.split, self.seed, self.reader_miss = hospital, split, seed, reader_miss
        self.sites, self.follow_ups, self.reader_confused = sites, follow_ups, reader_confused
        self.name = f"phantom {hospital}" + (f", {sites} sites around it" if sites else "")

    def __len__(self) -> int:
        """Give ENDLESS: any index has an example."""
        return ENDLESS

    def prompts(self) -> tuple[str, ...]:
        """List every prompt text that batches can hold: one, with follow-ups two."""
        return (self.prompt, follow_ups.EXAMINE) if self.follow_ups else (self.prompt,)

    def readable(self, indices: Indices) -> list[int]:
        """List `indices`: every phantom can be drawn."""
        return [int(index) for index in indices]

    def about(self, indices: Indices) -> About:
        """List prompts and ids, a text each of every index: what there is to say of examples without drawing them."""
        return {
            "prompts": [self.prompt] * len(indices),
            "ids": [f"example {index}" for index in indices],
        }

    def batch(self, indices: Indices) -> Batch:
        """Draw the examples of `indices`, with the keys that `sources.base` lists."""
        # One by one: a program for B examples rounds each of them according to B and to its place among them (on CPU,
        # by up to 2e-7), so that a shard of a batch would not be the shard. It also compiles once for all B.
        first, *others = np.asarray(indices)
        # The first alone: threads that come upon a program not yet compiled would compile it once each.
        rows = [self._draw(first), *map_in_threads(self._draw, others)]
        batch = dict(jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows))
        batch["solution"] = np.asarray(batch["labels"]) == 1
        # The world's own truth: nothing is unknown, and what is subtle may be hedged.
        batch["known"] = np.ones_like(batch["solution"])
        batch["hedged"] = np.asarray(batch["labels"]) == -1
        return batch

    def _draw(self, index: int) -> Batch:
        """`phantom.make_batch` of one example, drawn by the CPU: a phantom is the same picture beside any accelerator,
        which is left to the model."""
        indices = np.asarray([index])
        with jax.default_device(processes.cpu_device()):
            return phantom.make_batch(
                self.seed, self.split, self.hospital, indices, self.sites_of(indices)
            )

    def facts(self, indices: Indices) -> Batch:
        """Give what `targets` needs of `batch`, without drawing the images: a fraction of the time."""
        keys, sites = self._keys(indices)
        return {"scene": jax.tree.map(np.asarray, phantom.scenes_of(keys, self.hospital, sites))}

    def solutions(self, indices: Indices) -> np.ndarray:
        """Give the solutions of `batch`, bool [B, 14], without drawing the images."""
        return self._states(indices) == 1

    def masks(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Give `known` and `hedged` of `batch`, bool [B, 14], without drawing the images."""
        states = self._states(indices)
        return np.ones_like(states, bool), states == -1

    def _states(self, indices: Indices) -> np.ndarray:
        """The `labels` of `batch`."""
        keys, sites = self._keys(indices)
        return np.asarray(_labels(keys, self.hospital, sites))

    def _keys(self, indices: Indices) -> tuple[jax.Array, jax.Array | None]:
        """Typed keys [B] of examples, and of their sites, if there are any."""
        indices = np.asarray(indices)
        keys = phantom.example_keys(self.seed, self.split, self.hospital, indices)
        sites = self.sites_of(indices)
        return keys, None if sites is None else phantom.site_keys(self.seed, sites)

    def sites_of(self, indices: Indices) -> np.ndarray | None:
        """Give the site of each example, int [B]; None without sites."""
        return np.asarray(indices) % self.sites if self.sites else None

    def conversations(self, batch: Batch, indices: Indices) -> list[Conversation]:
        """Give the question and the text of `targets`, for each scene; of the share `follow_ups` more turns follow."""
        written = self._write(batch, indices)
        return [
            self._talk(report, int(index)) for report, index in zip(written, indices, strict=True)
        ]

    def _talk(self, report: Report, index: int) -> Conversation:
        # Most examples are a question and its reading.
        target = report_writer.target(report)
        turns = [(self.prompt, target)]
        # Of numbers of its own: readings are the same with follow-ups and without.
        rng = np.random.default_rng([self.seed, _FOLLOW_UPS, index])
        if rng.random() < self.follow_ups:
            turns = follow_ups.talk(self.prompt, target, report, self.hospital, rng)
        return tuple(
            Message(role, text)
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )

    def targets(self, batch: Batch, indices: Indices) -> list[str]:
        """Write the text of each scene's reader; misses and wording are drawn from (seed, example index) alone."""
        return [report_writer.target(report) for report in self._write(batch, indices)]

    def _write(self, batch: Batch, indices: Indices) -> list[Report]:
        if self.reader_confused:
            batch = self._confuse(batch, indices)
        reports = []
        for row, index in enumerate(indices):
            missing, wording = (
                np.random.default_rng([self.seed, purpose, int(index)])
                for purpose in (_MISSES, _WORDING)
            )
            reports.append(self._report(batch, row, missing, wording))
        return reports

    def _confuse(self, batch: Batch, indices: Indices) -> Batch:
        """The scenes of a batch as their readers take them to be, before any of it is missed."""
        # Of the same stream, so that prevalence and places are the hospital's own.
        others = self.facts(np.asarray(indices) + _OTHER_PATIENTS)["scene"]
        # Drawn from the example's own number: whoever asks for it, it is read alike.
        rows = [
            human_readers.confused(
                phantom.scene_row(batch["scene"], row),
                phantom.scene_row(others, row),
                self.reader_confused,
                np.random.default_rng([self.seed, human_readers.CONFUSIONS, int(index)]),
            )
            for row, index in enumerate(indices)
        ]
        return {"scene": jax.tree.map(lambda *leaves: np.stack(leaves), *rows)}

    def _report(
        self, batch: Batch, row: int, missing: np.random.Generator, wording: np.random.Generator
    ) -> report_writer.Report:
        """What the reader of a row writes: first what is seen, then in which words it is said."""
        scene = human_readers.as_read(
            phantom.scene_row(batch["scene"], row), self.reader_miss, missing
        )
        return report_writer.write(scene, self.hospital, wording)


@functools.partial(jax.jit, static_argnames="hospital")
def _labels(keys: jax.Array, hospital: str, sites: jax.Array | None) -> jax.Array:
    return phantom.labels(phantom.sample_scenes(keys, hospital, sites))


# ---- Studies of several films -----------------------------------------------------------------------


class PhantomStudies(PhantomSource):
    """A stream of phantom studies: the frontal films of a `PhantomSource`, each with the films of other roles.

    Of batches "image" is float32 [B, n, S, S] in the order of `views`, "regions" float32 [B, 12, n * 8, 8] and
    "located" float32 [B, 12] (`studies.make_batch`). With a lateral, findings that the frontal hides belong to the
    solution; with a prior the question is what is new, and nothing else does.

    Args:
        views: roles, one of `studies.STUDIES`.
        others: those of `PhantomSource`.

    Raises:
        UserError: for other roles, or a negative number of sites.
    """

    def __init__(
        self,
        hospital: str,
        split: str,
        seed: int = 0,
        reader_miss: float = 0.0,
        sites: int = 0,
        views: Sequence[str] = (studies.FRONTAL, studies.LATERAL),
    ) -> None:
        super().__init__(hospital, split, seed, reader_miss, sites)
        self.views = studies.check_views(views)
        self.name = f"{self.name}, {' + '.join(self.views)}"
        question = FIND_PROMPT
        if studies.PRIOR in self.views:
            question, self.lexicon = NEW_PROMPT, studies.CHANGES_LEXICON
        if len(self.views) > 1:
            self.prompt = ask_of_roles(self.views, question)

    def facts(self, indices: Indices) -> Batch:
        """Give what `targets` needs of `batch`, without drawing the films."""
        keys, sites = self._keys(indices)
        study = studies.sample(keys, self.hospital, self.views, sites)
        return {
            name: jax.tree.map(np.asarray, study[name]) for name in studies.FACTS if name in study
        }

    def _draw(self, index: int) -> Batch:
        indices = np.asarray([index])
        with jax.default_device(processes.cpu_device()):
            return studies.make_batch(
                self.seed, self.split, self.hospital, indices, self.views, self.sites_of(indices)
            )

    def _states(self, indices: Indices) -> np.ndarray:
        return np.asarray(phantom.labels(studies.asked(self.facts(indices))))

    def _report(
        self, batch: Batch, row: int, missing: np.random.Generator, wording: np.random.Generator
    ) -> report_writer.Report:
        study = {
            name: jax.tree.map(lambda leaf: leaf[row], batch[name])
            for name in studies.FACTS
            if name in batch
        }
        study = study_reports.as_studied(study, self.reader_miss, missing)
        return study_reports.write(study, self.hospital, self.views, wording)


def open_phantoms(data: DataConfig, hospital: str, split: str) -> PhantomSource:
    """Open the phantoms of a split as a run's `config.data` asks for them; readers that miss things, other sites and
    the seed belong to training alone.

    Raises:
        UserError: for roles that make no study, follow-ups of one, or a number that is out of range.
    """
    is_train = split == "train"
    settings = (data.seed, data.reader_miss, data.sites) if is_train else (0, 0.0, 0)
    if studies.check_views(data.views) == (studies.FRONTAL,):
        follow_ups, confused = (data.follow_ups, data.reader_confused) if is_train else (0.0, 0.0)
        return PhantomSource(
            hospital, split, *settings, follow_ups=follow_ups, reader_confused=confused
        )
    if data.follow_ups:
        raise UserError(
            f"config.data.follow_ups={data.follow_ups} must be 0 with several films an example: follow-ups are written "
            "of one film alone"
        )
    # Of two scenes of studies nobody has said which findings go together.
    if data.reader_confused:
        raise UserError(
            f"config.data.reader_confused={data.reader_confused} must be 0 with several films an example: such readers "
            "are made for one film alone"
        )
    return PhantomStudies(hospital, split, *settings, views=data.views)
