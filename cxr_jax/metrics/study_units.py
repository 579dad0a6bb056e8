"""Films -> studies: what a model says of a study is what it says of any of its films.

A label is named in a study if it is named for one of its films; its probability is the largest; it is so if it is so
in one film, and is not so if it is known to be absent in one and so in none.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jax.typing import ArrayLike

from cxr_jax.metrics.label_counts import Answers, Reference, check_rows


@dataclass(frozen=True)
class Studies:
    """Which study each of N films is of.

    Attributes:
        of_film: int [N], numbers from 0 in the order of the studies' first films.
        first: int [studies], the first film of each.
    """

    of_film: np.ndarray
    first: np.ndarray

    @classmethod
    def from_names(cls, names: Sequence[Hashable]) -> "Studies":
        """Number the studies of films by what they are called."""
        # In the order of their first films, so that studies stay in the order of the table.
        numbers: dict[Hashable, int] = {}
        of_film = np.array([numbers.setdefault(name, len(numbers)) for name in names])
        return cls(of_film, np.unique(of_film, return_index=True)[1])

    def any(self, flags: ArrayLike) -> np.ndarray:
        """Tell whether a flag [N, ..] holds of any film: bool [studies, ..]."""
        flags = np.asarray(flags, bool)
        # Unlike |=, this takes every film of a study.
        of_studies = np.zeros((len(self.first), *flags.shape[1:]), bool)
        np.logical_or.at(of_studies, self.of_film, flags)
        return of_studies

    def largest(self, values: ArrayLike) -> np.ndarray:
        """Take the largest value [N, ..] of each study's films."""
        values = np.asarray(values, float)
        of_studies = np.full((len(self.first), *values.shape[1:]), -np.inf)
        np.maximum.at(of_studies, self.of_film, values)
        return of_studies

    def mean(self, values: ArrayLike) -> np.ndarray:
        """Average values [N] over the films of each study."""
        # Each film counts alike within its study.
        sums = np.bincount(self.of_film, np.asarray(values, float))
        return sums / np.bincount(self.of_film)

    def answers(self, answers: Answers) -> Answers:
        """Join answers: labels of any film whose answer could be parsed."""
        # What could not be parsed names nothing, and takes nothing from the other films.
        labels = np.asarray(answers.labels, bool)
        valid = (
            np.ones(len(labels), bool) if answers.valid is None else np.asarray(answers.valid, bool)
        )
        return Answers(self.any(labels & valid[:, None]), self.any(valid))

    def reference(self, reference: Reference) -> Reference:
        """Join what is so; a study is of the patient of its first film."""
        checked = check_rows(Answers(reference.truth), reference)
        # What is not known of a film says nothing of its study.
        positive = self.any(checked.truth & checked.known)
        known = self.any(checked.known)
        # Blank only if nobody said anything of any film.
        said = self.any(~checked.blank)
        groups = None if reference.groups is None else np.asarray(reference.groups)[self.first]
        return replace(reference, truth=positive, known=known, groups=groups, blank=~said & ~known)

    def columns(self, columns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Take the parts of `subgroups` of each study's first film."""
        return {name: [values[film] for film in self.first] for name, values in columns.items()}
