"""Films that are to train, held against films that are to test: which of them are the same, however they were stored.

    cxr-jax guard TRAIN TEST

`python -m cxr_jax.data.sources.guard` is the same command. TRAIN and TEST: a folder of films, whatever their names, or
a manifest (rows.jsonl) whose films lie beside it. Prints films of TRAIN that are of registered evaluation sets by their
names, or by the patients, studies and splits of its rows; of two manifests the films of patients of both; and those
that are films of TEST by their pixels, a pair a line. docs/inputs.md says what is not found.

Exit codes: 0 none is, 1 some are, 2 bad usage or bad input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.sources import manifest
from cxr_jax.data.sources.guard import findings, hash_files
from cxr_jax.errors import UserError, exit_code, printable


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.data.sources.guard", description=__doc__)
    parser.add_argument("train", metavar="TRAIN", type=Path)
    parser.add_argument("test", metavar="TEST", type=Path)
    return parser.parse_args(argv)


class Films(NamedTuple):
    """Films of a place: the folder that they lie below, their files, and what is said of them."""

    folder: Path
    paths: list[Path]
    columns: findings.Columns


def find_films(place: Path) -> Films:
    """Find the films of a folder, or of a manifest, whose rows may name patients, studies and splits.

    Raises:
        UserError: for a place without films.
    """
    if not place.is_dir():
        rows = manifest.load_rows(place, place.parent)
        film_paths = [film_path for row in rows for film_path in row.image_paths]
        return Films(place.parent, film_paths, findings.columns_of(rows, "files", place.parent))
    # A manifest names its films; in a folder every file may be one. What is hidden is a system's.
    files = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(place)
        for name in names
        if not name.startswith(".")
    )
    if not files:
        raise UserError(f"{place}: holds no files")
    unknown = [None] * len(files)
    columns = findings.Columns(
        name="files",
        ids=[os.path.relpath(film_path, place) for film_path in files],
        patients=unknown,
        studies=unknown,
        splits=unknown,
    )
    return Films(place, files, columns)


def run(args: argparse.Namespace) -> int:
    """Print what was found and return the exit code."""
    # ---- By names, and by what rows say ----
    train, test = find_films(args.train), find_films(args.test)
    told = findings.find_registered(train.columns, [train.folder])
    # Ids of patients mean the same people in one data set alone; two manifests are taken to be of one.
    told += findings.find_patients(train.columns, {str(args.test): test.columns})
    for finding in told:
        print(printable(f"{finding.text}: {finding.named}"))
    # ---- By pixels ----
    hashes = hash_files.hash_files(train.paths, train.folder)
    hashes |= hash_files.hash_files(test.paths, test.folder)
    pairs = findings.same_films(train.paths, test.paths, hashes)
    for film_path, other in pairs.items():
        print(printable(f"{film_path} is {other}"))
    # What was not compared is said: none of it may be taken for clean.
    unread = len({*train.paths, *test.paths} - hashes.keys())
    count = f"{len(pairs):,} of {len(set(train.paths)):,} films are among the {len(set(test.paths)):,} of {args.test}"
    print(printable(f"{count}; {unread:,} files could not be read as films"))
    return int(bool(pairs or told))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
