"""How the labels of other taxonomies map to the 14: a file a map and version, read and checked; README.md says how.

A map has a version, so that a number can say which one it was made with.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.data.sources.table import Table, column_key
from cxr_jax.errors import UserError, shown
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX, NEGATIVE, NOT_MENTIONED, POSITIVE

MAPS = Path(__file__).parent
ASSERTS = ("exact", "narrower")
BLOCKS = "blocks"
RELATIONS = (*ASSERTS, BLOCKS, "unmapped", "meta", "ignore")
_COLUMNS = ("source", "target", "relation")


class MapRow(NamedTuple):
    """One source label and what it says of one of the 14, "" for none."""

    source: str
    target: str
    relation: str


@dataclass(frozen=True)
class LabelMap:
    """How another taxonomy's labels map to the 14."""

    name: str
    version: int
    rows: tuple[MapRow, ...]

    def __str__(self) -> str:
        """Name it, as it stands beside numbers."""
        return f"{self.name} {self.version}"

    # Of a source label with two targets the last; `reader` has all.
    @property
    def labels(self) -> dict[str, str]:
        """Give source label -> label, of those that assert one."""
        return {row.source: row.target for row in self.rows if row.relation in ASSERTS}

    def scored(self) -> np.ndarray:
        """Tell which of the 14 labels something maps to: bool [14]."""
        return np.isin(CHEXPERT_14, [row.target for row in self.rows if row.relation in ASSERTS])

    def reader(self) -> "MapReader":
        """Make what reads lists of source labels by this map."""
        return MapReader(self)


class MapReader:
    """Reads lists of source labels; their case, spaces and signs do not count.

    Attributes:
        unknown: source labels that the map does not have -> how often they were read.
    """

    def __init__(self, label_map: LabelMap) -> None:
        # What nothing maps to is blank, whatever a film is called.
        self._start = np.where(label_map.scored(), NEGATIVE, NOT_MENTIONED).astype(np.int8)
        self._asserted: dict[str, list[int]] = {}
        self._blocked: dict[str, list[int]] = {}
        # A source label may assert one target and hide another.
        for row in label_map.rows:
            for table, relations in ((self._asserted, ASSERTS), (self._blocked, (BLOCKS,))):
                found = table.setdefault(column_key(row.source), [])
                if row.relation in relations:
                    found.append(INDEX[row.target])
        self.unknown: dict[str, int] = {}

    def knows(self, name: str) -> bool:
        """Tell whether the map has a source label, however it is spelt."""
        return column_key(name) in self._asserted

    def states(self, named: Iterable[str]) -> np.ndarray:
        """Give the states of a film of which exactly these source labels are named.

        Returns:
            int8 [14]: 1 what one of them asserts, -2 what one of them blocks and what is not covered, else 0.
        """
        # A source label is looked up once, however it is spelt.
        states = self._start.copy()
        # Names that nobody maps are counted: a set may have been renewed.
        keys = []
        for name in named:
            key = column_key(name)
            if key in self._asserted:
                keys.append(key)
            else:
                self.unknown[name] = self.unknown.get(name, 0) + 1
        # In this order: what is asserted goes before what hides it.
        for key in keys:
            states[self._blocked[key]] = NOT_MENTIONED
        for key in keys:
            states[self._asserted[key]] = POSITIVE
        return states


def load_map(name: str, version: int = 1, folder: str | Path = MAPS) -> LabelMap:
    """Read a map.

    Raises:
        UserError: if there is none of this version, or a target is none of the 14.
    """
    # The version is part of the name: an old one stays beside the new.
    path = Path(folder) / f"{name}_v{version}.csv"
    table = Table(path, _COLUMNS)
    columns = table.columns(_COLUMNS)
    if len(columns) < len(_COLUMNS):
        raise UserError(f"{path}: has no columns {', '.join(_COLUMNS)}")
    # Strict: a map that is read in part would leave labels uncovered without a word.
    rows = []
    for record in table:
        row = MapRow(*(record.cells[column].strip() for column in columns))
        place = f"{path}:{record.line}: {shown(row.source)}"
        if row.relation not in RELATIONS:
            raise UserError(f"{place}: the relation is none of {', '.join(RELATIONS)}")
        # What says something of a label names it; nothing else does.
        if (row.relation in (*ASSERTS, BLOCKS)) != (row.target in CHEXPERT_14):
            raise UserError(
                f"{place} maps to {shown(row.target)!r}, which is none of the 14 labels"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: has a header and no rows")
    return LabelMap(name, version, tuple(rows))
