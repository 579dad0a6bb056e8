"""How the labels of other taxonomies map to the 14: maps.toml, read and checked.

A map has a version, so that a number can say which one it was made with. A source label that a map does not list is
not scored.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.labels.lexicon import read_toml
from cxr_jax.labels.taxonomy import CHEXPERT_14

MAPS = Path(__file__).parent / "maps.toml"


class LabelMap(NamedTuple):
    """How another taxonomy's labels map to the 14: source label -> label."""

    name: str
    version: int
    labels: dict[str, str]

    def scored(self) -> np.ndarray:
        """Tell which of the 14 labels something maps to: bool [14]."""
        return np.isin(CHEXPERT_14, list(self.labels.values()))


def load_map(name: str, path: str | Path = MAPS) -> LabelMap:
    """Read the table [name] of a file of maps.

    Raises:
        UserError: if it cannot be read or a target is none of the 14.
    """
    entry: Any = read_toml(Path(path)).get(name)
    labels = entry.get("map") if isinstance(entry, dict) else None
    # A map without a version could change without a trace.
    if not isinstance(labels, dict) or not labels or not isinstance(entry.get("version"), int):
        raise UserError(f"{path}: has no table [{name}] with a version and a map")
    for source, target in labels.items():
        if target not in CHEXPERT_14:
            raise UserError(
                f"{path}: [{name}.map]: {source} maps to {target!r}, which is none of the 14 labels"
            )
    return LabelMap(name, entry["version"], labels)
