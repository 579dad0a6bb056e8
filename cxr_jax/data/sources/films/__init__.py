"""A data set as columns: every film of its tables, before anybody has chosen views, a split or a policy."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.labels.taxonomy import CHEXPERT_14, NOT_MENTIONED

# What a view is called here; "" of a row that is a study without a film.
VIEWS = ("PA", "AP", "FRONTAL", "LATERAL", "UNKNOWN")
FRONTAL_VIEWS = ("PA", "AP", "FRONTAL")


# A finding that somebody has drawn, as the set spells it: maps are for states.
class Box(NamedTuple):
    """Where a finding is, as shares of the film's width and height."""

    label: str  # as the data set spells it
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Films:
    """N films of a data set. Texts are arrays of objects: a text each.

    Attributes:
        name: of the data set.
        root: as the user gave it.
        ids: [N] what the set calls a film; no two are equal.
        images: [N] its path, as the tables have it, with / between.
        patients: [N] text of an id; where the set has none (`has_patients`), the film's.
        studies: [N].
        views: [N] of VIEWS, or "".
        splits: [N] as the set calls them, "" where it has none.
        states: int8 [N, 14], four states: 1, 0, -1 uncertain, -2 blank.
        sexes: [N] F, M or "".
        ages: float32 [N], years, NaN where unknown.
        reports: [N] text, "" where there is none.
        dates: [N] of the study, YYYYMMDD or "".
        numbers: int [N], of the study among those of its patient, -1 where unknown.
        boxes: [N] tuples of `Box`.
        prompts, solutions, targets: [N] of sets that ask and answer.
        tables: the files that were read.
        lines: int [N], where each film is listed, in that of the tables that `line_tables`, int [N], has (None: the
            first): for messages.
        basis: whose labels they are; `basis_of_split` where those of a split are others'.
        label_map: name and version of the map of the labels.
        edition: of the set, as its folder says, or "".
        has_patients: whether `patients` are patients.
        has_labels: whether any label is known of the set.
        image_folders: patterns of folders below the root that images may lie in, beside the root itself.
        suffixes: that files may have instead of that of `images`.
        left_out: reason -> rows of the tables that are no film here.
        notes: what a person should know of the set, a line each.
    """

    name: str
    root: Path
    ids: np.ndarray
    images: np.ndarray
    patients: np.ndarray
    studies: np.ndarray
    views: np.ndarray
    splits: np.ndarray
    states: np.ndarray
    sexes: np.ndarray | None = None
    ages: np.ndarray | None = None
    reports: np.ndarray | None = None
    dates: np.ndarray | None = None
    numbers: np.ndarray | None = None
    boxes: np.ndarray | None = None
    prompts: np.ndarray | None = None
    solutions: np.ndarray | None = None
    targets: np.ndarray | None = None
    tables: tuple[Path, ...] = ()
    lines: np.ndarray | None = None
    line_tables: np.ndarray | None = None
    basis: str = "labels as given"
    basis_of_split: dict[str, str] = field(default_factory=dict)
    label_map: str = "none"
    edition: str = ""
    has_patients: bool = True
    has_images: bool = True
    image_folders: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Count the films."""
        return len(self.ids)

    def select(self, chosen: np.ndarray) -> "Films":
        """Give some of the films.

        Args:
            chosen: bool [N], or indices.
        """
        # Whatever is a column; notes and counts stay those of the whole set.
        columns = {
            column.name: getattr(self, column.name)[chosen]
            for column in fields(self)
            if isinstance(getattr(self, column.name), np.ndarray)
        }
        return replace(self, **columns)

    def place_of(self, row: int) -> str:
        """Say where a film is listed, as messages do: table.csv:12."""
        table = 0 if self.line_tables is None else int(self.line_tables[row])
        path = self.tables[table] if self.tables else self.root
        return f"{path}: film {row + 1}" if self.lines is None else f"{path}:{self.lines[row]}"

    def describe_basis(self) -> str:
        """Say whose labels these films have."""
        # Each once, in the order in which they come.
        found = (self.basis_of_split.get(split, self.basis) for split in self.splits)
        return ", ".join(dict.fromkeys(found)) or self.basis

    def is_frontal(self) -> np.ndarray:
        """Tell which films are frontal by their view: bool [N]."""
        return np.isin(self.views.astype(str), FRONTAL_VIEWS)


def as_texts(texts: Sequence[object]) -> np.ndarray:
    """Make a column of texts (or of tuples), [N] objects."""
    # Item by item: of tuples of one length numpy would make a table.
    return np.fromiter(texts, object, len(texts))


def no_states(count: int) -> np.ndarray:
    """Make the states of films of which nobody knows a label: int8 [count, 14]."""
    return np.full((count, len(CHEXPERT_14)), NOT_MENTIONED, np.int8)
