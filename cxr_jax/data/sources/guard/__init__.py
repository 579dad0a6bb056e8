"""The guard: no film trains a model that an evaluation set has, a registered one or one of the run.

`registered` knows published evaluation sets by rule, `film_hash` films that were stored anew, `findings` is what a run
asks. docs/inputs.md says what is refused, and what is not found.
"""

from cxr_jax.data.sources.guard.findings import (
    Columns,
    Finding,
    find_films,
    find_patients,
    find_registered,
)
from cxr_jax.data.sources.guard.registered import Films, overlaps, registered_rows

__all__ = [
    "Columns",
    "Films",
    "Finding",
    "find_films",
    "find_patients",
    "find_registered",
    "overlaps",
    "registered_rows",
]
