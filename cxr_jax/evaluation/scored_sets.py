"""Scored sets part by part: which examples, what is known of them without their images, and their batches in turn.

Never more images than those of a part are in memory, whatever the size of the set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_jax.data import resize
from cxr_jax.data.images import read_image
from cxr_jax.data.prompts import Prompt
from cxr_jax.data.sources import phantom
from cxr_jax.data.sources.base import ENDLESS, Batch, Source
from cxr_jax.data.sources.manifest import FilesSource
from cxr_jax.data.sources.rows import Row
from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.metrics.subgroups import UNKNOWN, age_group
from cxr_jax.models.image_batches import images_of
from cxr_jax.runtime import processes

# What is kept of a part once its images are gone.
_FACTS = ("solution", "known", "hedged", "sides")


@dataclass(frozen=True, kw_only=True)
class ScoredSet:
    """The examples of a set that are scored.

    Attributes:
        name: shown to people.
        source: whose they are.
        examples: int [N], their indices there.
        texts: the prompt of each.
        ids: the id of each; phantoms are numbered.
        patients: the patient of each, so that intervals draw patients; None where no patient is known.
        studies: what the study of each is called; None where films are no parts of studies.
        columns: what divides the set into subgroups -> the part of each example.
        views: of phantom studies the roles of their films.
    """

    name: str
    source: Source
    examples: np.ndarray
    texts: list[Prompt]
    ids: list[str]
    patients: list[str] | None
    studies: list[str] | None
    columns: dict[str, list[str]]
    views: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.examples)

    def parts(self, size: int, poll: Callable[[], object]) -> Iterator[tuple[np.ndarray, Batch]]:
        """Make the examples in order, so many at a time.

        Args:
            size: of a part.
            poll: called before each; described_count it raises ends this.

        Yields:
            Places within the set, int [size or fewer], and their batch.
        """
        for start in range(0, len(self), size):
            poll()
            # The last part is as short as it comes; a reader fills it up.
            places = np.arange(start, min(start + size, len(self)))
            yield places, self.source.batch(self.examples[places])

    def images(self, places: np.ndarray) -> Any:
        """Make the images of some places (`image_batches.images_of`)."""
        return images_of(self.source.batch(self.examples[places]))

    def box_mask(self, place: int) -> np.ndarray | None:
        """Mark where findings are drawn on a film, bool of the shape of its image; None where nobody has, of phantoms.

        Reads the file again: its own sides say where a box is, and few films have one.
        """
        if not isinstance(self.source, FilesSource):
            return None
        index = int(self.examples[place])
        row = self.source.rows[index]
        # Of several films nobody says which one was drawn on.
        if not row.boxes or len(row.image_paths) != 1:
            return None
        film_shape = read_image(row.image_path, self.source.renderer).pixels.shape
        size: int | tuple[int, int] = self.source.size
        if self.source.native is not None:
            # Without margins: the whole film is resized to the shape of its levels.
            height, width = self.source.image(index).shape
            size = (height, width)
        return resize.fit_boxes(row.boxes, (film_shape[0], film_shape[1]), size)


def facts_of(batches: list[Batch]) -> Batch:
    """Join what parts say of the truth: "solution", "known", "hedged", "sides"."""
    return {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in _FACTS}


def without_images(batch: Batch) -> Batch:
    """Keep of a batch described_count `facts_of` joins."""
    return {name: np.asarray(batch[name]) for name in _FACTS}


def choose_examples(length: int, count: int, seed: int) -> np.ndarray:
    """Choose examples of a source: the first of an endless one; of others `count` drawn by seed, in order.

    The first rows of a table are no sample: in the order of patients they are the oldest ones.

    Args:
        length: of the source.
        count: how many, 0 for all.
        seed: of the draw.

    Raises:
        UserError: for all examples of an endless source.
    """
    if length >= ENDLESS:
        if not count:
            raise UserError("config.eval.n_final=0 reads all images, and phantoms have no end")
        return np.arange(count)
    if not count or count >= length:
        return np.arange(length)
    # In the order of the table again, for neighbours on a disk.
    return np.sort(np.random.default_rng([seed, 23]).permutation(length)[:count])


def open_scored_set(name: str, source: Source, count: int, seed: int) -> ScoredSet:
    """Choose the examples of a source that are scored, and tell what is known of them. Unreadable files are left out.

    Args:
        name: shown to people.
        source: endless, or files.
        count: see `choose_examples`.
        seed: of the draw.

    Raises:
        UserError: for one file too many that cannot be read, or none that can.
        RunFailedError: if the processes of a run can read different files.
    """
    chosen_examples = choose_examples(len(source), count, seed)
    readable_examples = source.readable(chosen_examples)
    # Every process reads its share of one set: with different ones they would wait for each other.
    if not processes.have_same(repr(readable_examples)):
        raise RunFailedError(f"{source.name}: not every process can read the same held-out films")
    if not readable_examples:
        raise UserError(f"{source.name}: none of {len(chosen_examples)} films can be read")
    # From here on only what can be read counts.
    about = source.about(readable_examples)
    is_files = isinstance(source, FilesSource)
    rows = (
        [source.rows[index] for index in readable_examples]
        if isinstance(source, FilesSource)
        else []
    )
    # Of rows some of which name a patient, the others are patients by themselves.
    has_patients = any(row.patient is not None for row in rows)
    return ScoredSet(
        name=name,
        source=source,
        examples=np.array(readable_examples),
        texts=about["prompts"],
        # Files have names of their own.
        ids=about["ids"]
        if is_files
        else [f"{name}-{place}" for place in range(len(readable_examples))],
        patients=[row.group for row in rows] if has_patients else None,
        studies=_studies_of(rows) if is_files else None,
        columns=_columns_of(rows),
        views=source.views if isinstance(source, phantom.PhantomSource) else (),
    )


def _studies_of(rows: list[Row]) -> list[str]:
    """What the study of each row is called; one that no table names is a study of its own."""
    return [
        f"film {place}" if row.study is None else f"study {row.group} {row.study}"
        for place, row in enumerate(rows)
    ]


def _columns_of(rows: list[Row]) -> dict[str, list[str]]:
    # Phantoms are nobody.
    if not rows:
        return {}
    return {
        "view": [row.subject.projection or row.view or UNKNOWN for row in rows],
        "sex": [row.subject.sex or UNKNOWN for row in rows],
        "age": [age_group(row.subject.age) for row in rows],
        "source": [row.subject.source or UNKNOWN for row in rows],
    }


def protocol(scored_set: ScoredSet, unit: str, label_policy: str) -> str:
    """Say in one line what the numbers of a set are numbers of.

    Args:
        scored_set: that is scored.
        unit: "image" or "study".
        label_policy: what blank and uncertain labels count as; "" where all are known.
    """
    described_count = f"{len(scored_set)} images"
    if scored_set.studies is not None:
        described_count += f" of {len(set(scored_set.studies))} studies"
    if scored_set.patients is not None:
        described_count += f" of {len(set(scored_set.patients))} patients"
    views = scored_set.columns.get("view", [])
    # Views in a fixed order, so that two protocols can be compared as text.
    counts = {view: views.count(view) for view in sorted(set(views))}
    view_counts = ", ".join(f"{view} {count}" for view, count in counts.items())
    # Without patients an interval takes each film for a person, and says so.
    interval_units = "patients" if scored_set.patients is not None else "images"
    return "; ".join(
        filter(
            None,
            (
                f"{scored_set.name}: {described_count}",
                f"views: {view_counts}" if view_counts else "",
                label_policy or "all labels known",
                f"unit {unit}",
                f"intervals by {interval_units}",
            ),
        )
    )
