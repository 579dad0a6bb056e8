"""Where rows may be written: never over a file of the data set, whether it was read or not."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cxr_jax.data.sources.films import Films, summary
from cxr_jax.data.sources.films.places import Place
from cxr_jax.errors import UserError
from cxr_jax.runtime import whole_files


def check_out(out: str, films: Films, place: Place | None) -> None:
    """Refuse a place for rows where something of the data set stands.

    Args:
        out: as the user gave it.
        place: where films are, None where none were found.

    Raises:
        UserError: naming the place.
    """
    whole_files.check_output(out, (*films.tables, *_films_called(out, films, place)))
    if not os.path.isfile(out) or not os.path.getsize(out) or _holds_rows(out):
        return
    # Tables that this run has not read, masks, reports: nobody has a copy at hand.
    folders = {films.root, *films.tables}
    folders |= {path.parent for path in folders if not path.is_dir()}
    real_path = os.path.realpath(out)
    for folder in filter(Path.is_dir, folders):
        if real_path.startswith(os.path.join(os.path.realpath(folder), "")):
            raise UserError(f"{out}: stands in the data set and is no file of rows: not replaced")


def _films_called(out: str, films: Films, place: Place | None) -> Iterator[Path]:
    """The films that may be the file, by its name: of some hundred thousand none is asked about for nothing."""
    if place is None:
        return
    file_name = os.path.basename(os.path.realpath(out))
    for image_name in films.images:
        if image_name.endswith(file_name):
            yield place.path(image_name)


def _holds_rows(out: str) -> bool:
    """Tell whether a file begins as those that are written here do."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(out, "rb") as file:
        return tuple(json.loads(file.readline(1 << 20)))[: len(summary.KEYS)] == summary.KEYS
    return False
