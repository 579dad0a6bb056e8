"""The sources of a run: what trains, what a checkpoint is chosen by, what is reported.

Phantoms: disjoint streams ("train", "select", "test") of the training hospital and of the out-of-distribution one.
Files: some patients are held out (`manifest.open_split`), a third of them for selection and the others for the test.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import manifest, phantom
from cxr_jax.data.sources.base import Batch, Source

HELD_OUT_PART = 64  # examples that `held_out` asks a source for at a time


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The sources of a run; no patient is in two of the three splits, unless the manifest has very few.

    Attributes:
        train: what trains.
        select: by display name, what a checkpoint is chosen by.
        test: by display name, what is reported.
        out_of_distribution: the name, in `select` and `test`, of the set that decides which checkpoint is best.
    """

    train: Source
    select: dict[str, Source]
    test: dict[str, Source]
    out_of_distribution: str

    def prompts(self) -> tuple[str, ...]:
        """List every prompt text, each once: held-out rows may ask what training rows do not."""
        sources = [self.train, *self.select.values(), *self.test.values()]
        return tuple(dict.fromkeys(prompt for source in sources for prompt in source.prompts()))


def open_splits(data: DataConfig) -> Splits:
    """Open the sources that a run's `config.data` names.

    Raises:
        UserError: for a bad manifest, or a number that is out of range.
    """
    if data.source == "phantom":
        return _phantom_splits(data)
    return _file_splits(data)


def _phantom_splits(data_config: DataConfig) -> Splits:
    def hold_out(split: str) -> dict[str, Source]:
        return {
            hospital: phantom.PhantomSource(hospital, split, 0)
            for hospital in (data_config.hospital, data_config.ood_hospital)
        }

    # Readers that miss things, and other sites, belong to training alone.
    train = phantom.PhantomSource(
        data_config.hospital, "train", data_config.seed, data_config.reader_miss, data_config.sites
    )
    return Splits(
        train=train,
        select=hold_out("select"),
        test=hold_out("test"),
        out_of_distribution=data_config.ood_hospital,
    )


def _file_splits(data_config: DataConfig) -> Splits:
    train, held_source = manifest.open_split(
        data_config.manifest,
        data_config.image_root,
        size=data_config.side,
        seed=data_config.seed,
        cache_mib=data_config.cache_mib,
        threads=data_config.threads,
    )
    patients = list(dict.fromkeys(row.group for row in held_source.rows))
    # In the order of the manifest's held-out rows.
    for_selection = set(patients[: max(1, len(patients) // 3)])

    def open_part(name: str, selected: bool) -> Source:
        rows = [row for row in held_source.rows if (row.group in for_selection) == selected]
        # A single held-out patient serves for both: an empty set could not be scored.
        return manifest.FilesSource(
            rows or held_source.rows,
            data_config.side,
            name=f"files ({name})",
            cache=held_source.cache,
            threads=held_source.threads,
        )

    return Splits(
        train=train,
        select={"files": open_part("selection", True)},
        test={"files": open_part("test", False)},
        out_of_distribution="files",
    )


def held_out(source: Source, count: int, poll: Callable[[], object] | None = None) -> Batch:
    """Make the first `count` examples of a source, in order; all of a smaller one.

    Args:
        poll: called before every HELD_OUT_PART examples; what it raises ends this.

    Returns:
        The keys that every source fills (`base`), "texts" (the prompts) and, of files, "ids".
    """
    count = min(count, len(source))
    parts = []
    # In parts, so that a signal is seen between them.
    for start in range(0, count, HELD_OUT_PART):
        if poll is not None:
            poll()
        parts.append(source.batch(np.arange(start, min(start + HELD_OUT_PART, count))))
    batch: Batch = {
        key: np.concatenate([np.asarray(part[key]) for part in parts])
        for key in ("image", "solution", "known", "hedged", "sides")
    }
    batch["texts"] = source.about(range(count))["prompts"]
    # Phantoms have no ids of their own.
    if "ids" in parts[0]:
        batch["ids"] = [name for part in parts for name in part["ids"]]
    return batch
