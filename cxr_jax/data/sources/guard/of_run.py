"""What of a run's training films must not train: the films of its sources, held against evaluation sets."""

from collections.abc import Sequence
from pathlib import Path

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources.films import rows as set_rows
from cxr_jax.data.sources.guard.findings import (
    Columns,
    Finding,
    columns_of,
    find_films,
    find_patients,
    find_registered,
)
from cxr_jax.data.sources.rows import Row
from cxr_jax.data.sources.several.mixture import films_of
from cxr_jax.data.sources.splits import Splits
from cxr_jax.runtime import processes


def find_in_run(data: DataConfig, opened: Splits) -> list[Finding]:
    """Find the training films of a run that an evaluation set has, a registered one or one of the run.

    Args:
        data: of the run; its `guard` says whether films are compared by their pixels, too.
        opened: its sources; phantoms are nobody's.

    Raises:
        UserError: for a published list beside the data that cannot be read.
    """
    # Whoever chooses the checkpoint must not have trained it, either.
    held = [*opened.select.values(), *opened.test.values()]
    tests = {source.name: source for part in held for source in films_of(part)}
    findings = []
    for train in films_of(opened.train):
        own_data = train.opened_from or data
        # By what rows say first: it costs a second for hundreds of thousands of them.
        columns = _columns(train.rows, own_data)
        findings += find_registered(columns, _folders(own_data))
        tested = {
            name: _columns(test.rows, test.opened_from or data) for name, test in tests.items()
        }
        findings += find_patients(columns, tested)
        # Of several processes each would hash all films: the first one's word is enough, and ends the others.
        if data.guard == "hash" and processes.is_main():
            findings += find_films(
                _paths(train.rows),
                {name: _paths(test.rows) for name, test in tests.items()},
                own_data.root or own_data.image_root,
                data.threads,
            )
    return findings


def _columns(film_rows: Sequence[Row], data: DataConfig) -> Columns:
    return columns_of(film_rows, data.source, data.root or data.image_root)


def _paths(film_rows: Sequence[Row]) -> list[Path]:
    return [path for film_row in film_rows for path in film_row.image_paths]


def _folders(data: DataConfig) -> list[Path]:
    """Where the published lists of a data set lie, if they lie beside its films or its rows."""
    if data.is_data_set:
        return set_rows.table_folders(data)
    # Beside the rows, in the folder of films, and above it, where tables lie beside images/.
    root = Path(data.image_root)
    return [Path(data.manifest).parent, root, root.parent]
