"""Several sources as one, each with its share of the examples: a mixture to train on.

Which source an index belongs to is a function of the index alone, so a resumed run takes what the stopped one would
have, and each of several processes makes its own rows. A cycle of CYCLE indices holds every source as often as its
share says, spread evenly; films are walked in a fresh seeded order each time that all of them have been shown, phantoms
without an end.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cxr_jax.data.prompts import Conversation, Prompt
from cxr_jax.data.sources.base import ENDLESS, About, Batch, Indices, Source
from cxr_jax.data.sources.manifest import FilesSource
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.data.sources.rows import conversations_of
from cxr_jax.errors import UserError

CYCLE = 1_000  # indices in which each source has its share: a share below half a thousandth would have none
_ARRAYS = ("solution", "known", "hedged", "sides")  # keys that every source has, beside its images
_TEXTS = ("targets", "prompts", "ids")  # those of films alone


def spread(shares: Sequence[float]) -> np.ndarray:
    """Lay out a cycle: which source each of its places belongs to, int [CYCLE].

    Each source has its share rounded to thousandths (largest remainder), and its places lie as evenly as they can.

    Args:
        shares: positive, of any sum.

    Raises:
        UserError: for a share that is not positive, or too small for a place in the cycle.
    """
    weights = np.asarray(shares, float)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise UserError("the weight of a source must be a positive number")
    exact = weights / weights.sum() * CYCLE
    counts = np.floor(exact).astype(int)
    # Whoever lost most by rounding gets the places that are left.
    for source in np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]:
        counts[source] += 1
    if not counts.all():
        raise UserError(f"the weight of a source must be at least 1/{CYCLE} of all")
    # The k-th of n places of a source would lie best at (k + 1/2) / n of the cycle.
    wanted = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners[np.argsort(wanted, kind="stable")]


class Mixture:
    """Sources as one endless source: see the head of this file.

    Args:
        sources: name -> (source, weight); of a finite one every row is shown before one is shown again.
        seed: of the orders in which films are walked.

    Raises:
        UserError: for no sources, weights that `spread` refuses, and images of several kinds: sizes that differ, or
            squares beside films in their own aspect ratio.
    """

    def __init__(self, sources: Mapping[str, tuple[Source, float]], seed: int = 0) -> None:
        if not sources:
            raise UserError("a mixture of no sources")
        self.sources = [source for source, _ in sources.values()]
        self.seed, self.name = seed, " + ".join(sources)
        sizes = {source.size for source in self.sources}
        natives = {getattr(source, "native", None) is not None for source in self.sources}
        if len(sizes) > 1 or len(natives) > 1:
            raise UserError(
                f"{self.name}: images of one mixture must be of one kind: squares of one size (config.data.size; "
                "phantoms have 224), or all in their own aspect ratio"
            )
        self.size, self.prompt = self.sources[0].size, self.sources[0].prompt
        # Words of one source's reports are no harm to the others.
        self.lexicon = next(filter(None, (source.lexicon for source in self.sources)), None)
        self.shares = {name: weight for name, (_, weight) in sources.items()}
        self._owners = spread([weight for _, weight in sources.values()])
        # How many places of the cycle before each one belong to the same source.
        is_owner = self._owners == np.arange(len(self.sources))[:, None]
        self._ranks = (np.cumsum(is_owner, axis=1) - is_owner)[self._owners, np.arange(CYCLE)]
        self._counts = is_owner.sum(axis=1)
        # Of one source several steps are of one pass, whose order is drawn once.
        self._order = functools.lru_cache(maxsize=4 * len(self.sources))(self._draw_order)

    def __len__(self) -> int:
        """Give ENDLESS: any index has an example."""
        return ENDLESS

    def owner(self, index: int) -> tuple[int, int]:
        """Find the source of an index, by its place among `sources`, and the index of the example there."""
        cycle, cycle_place = divmod(int(index), CYCLE)
        source = int(self._owners[cycle_place])
        number = int(cycle * self._counts[source] + self._ranks[cycle_place])
        length = len(self.sources[source])
        if length >= ENDLESS:
            return source, number
        lap, position = divmod(number, length)
        return source, int(self._order(source, lap)[position])

    def _draw_order(self, source: int, lap: int) -> np.ndarray:
        length = len(self.sources[source])
        return np.random.default_rng([lap, 11, self.seed, source]).permutation(length)

    def prompts(self) -> tuple[Prompt, ...]:
        """List every prompt that batches can hold, each once."""
        return tuple(dict.fromkeys(text for source in self.sources for text in source.prompts()))

    # ---- Rows of several sources, in the order that was asked for --------------------------------------------

    def _split(self, indices: Indices) -> list[tuple[Source, np.ndarray, np.ndarray]]:
        """Each source with the places in `indices` that are its own, and its examples there."""
        found = np.array([self.owner(index) for index in np.asarray(indices).ravel()]).reshape(
            -1, 2
        )
        parts = []
        for number, source in enumerate(self.sources):
            batch_places = np.flatnonzero(found[:, 0] == number)
            if batch_places.size:
                parts.append((source, batch_places, found[batch_places, 1]))
        return parts

    def _gather(
        self, indices: Indices, ask_source: Callable[[Source, np.ndarray], Any]
    ) -> list[Any]:
        """What `ask_source` tells of the examples of each source, a value an index."""
        # Each source is asked once, for all of its examples.
        values: list[Any] = [None] * len(indices)
        for source, batch_places, own_indices in self._split(indices):
            for batch_place, value in zip(
                batch_places, ask_source(source, own_indices), strict=True
            ):
                values[batch_place] = value
        return values

    def readable(self, indices: Indices) -> list[int]:
        """List those of `indices` that `batch` can give."""
        asked = [int(index) for index in indices]

        def tell_source(source: Source, own_indices: np.ndarray) -> list[bool]:
            good = set(source.readable(own_indices))
            return [int(index) in good for index in own_indices]

        return [
            index
            for index, is_good in zip(asked, self._gather(asked, tell_source), strict=True)
            if is_good
        ]

    def batch(self, indices: Indices) -> Batch:
        """Make the examples of `indices`, with the keys that every source fills, those of films, and "parts": of each
        source (source, places in the batch, indices there, batch of its own)."""
        parts = [(*part, part[0].batch(part[2])) for part in self._split(indices)]
        batch: Batch = {"parts": parts}
        rows = sum(len(batch_places) for _, batch_places, _, _ in parts)
        for name in ("image", "images", *_ARRAYS):
            if name not in parts[0][3]:
                continue
            values: list[Any] = [None] * rows
            for _, batch_places, _, own_batch in parts:
                for batch_place, value in zip(batch_places, own_batch[name], strict=True):
                    values[batch_place] = value
            batch[name] = (
                values if name == "images" else np.stack([np.asarray(value) for value in values])
            )
        about = self.about(indices)
        batch["prompts"], batch["ids"] = about["prompts"], about["ids"]
        return batch

    def about(self, indices: Indices) -> About:
        """List prompts and ids, one each of every index; ids begin with the name of their source."""
        names = list(self.shares)

        def tell_source(source: Source, own_indices: np.ndarray) -> list[tuple[Prompt, str]]:
            about = source.about(own_indices)
            name = names[self.sources.index(source)]
            ids = [f"{name}: {identifier}" for identifier in about["ids"]]
            return list(zip(about["prompts"], ids, strict=True))

        told = self._gather(indices, tell_source)
        return {"prompts": [prompt for prompt, _ in told], "ids": [name for _, name in told]}

    def solutions(self, indices: Indices) -> np.ndarray:
        """Give the `solution` of `batch`, bool [B, 14], without making the images."""

        def tell_source(source: Source, own_indices: np.ndarray) -> np.ndarray:
            return source.solutions(own_indices)

        return np.stack(self._gather(indices, tell_source))

    def masks(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Give `known` and `hedged` of `batch`, bool [B, 14] each, without making the images."""

        def tell_source(
            source: Source, own_indices: np.ndarray
        ) -> list[tuple[np.ndarray, np.ndarray]]:
            return list(zip(*source.masks(own_indices), strict=True))

        known, hedged = zip(*self._gather(indices, tell_source), strict=True)
        return np.stack(known), np.stack(hedged)

    def conversations(self, batch: Batch, indices: Indices) -> list[Conversation]:
        """Give the conversations that SFT imitates, one a row of `batch(indices)`."""
        said: list[Any] = [None] * len(indices)
        for source, batch_places, own_indices, own_batch in batch["parts"]:
            for batch_place, words in zip(
                batch_places, source.conversations(own_batch, own_indices), strict=True
            ):
                said[batch_place] = words
        return said


def films_of(source: Source) -> list[FilesSource]:
    """List the sources of films that a source is, or is mixed from."""
    sources = source.sources if isinstance(source, Mixture) else [source]
    return [part for part in sources if isinstance(part, FilesSource)]


def tried(source: Source, count: int) -> tuple[list[Conversation], list[str]]:
    """Give the conversations that a source trains on, all of films and `count` of phantoms, and names of their rows.

    Raises:
        UserError: for films without texts to imitate.
    """
    if isinstance(source, Mixture):
        parts = [
            (name, *tried(part, count))
            for name, part in zip(source.shares, source.sources, strict=True)
        ]
        said = [words for _, of_part, _ in parts for words in of_part]
        return said, [f"{name}: {row}" for name, _, rows in parts for row in rows]
    if isinstance(source, FilesSource):
        # Of the rows as they are written: that some films cannot be read is no matter here, and takes long to find.
        return conversations_of(source.rows, source.name), [row.id for row in source.rows]
    assert isinstance(source, PhantomSource)
    indices = np.arange(count)
    return source.conversations(source.facts(indices), indices), source.about(indices)["ids"]
