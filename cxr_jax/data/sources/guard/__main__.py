"""Films that are to train, held against films that are to test: which of them are the same, however they were stored.

    cxr-jax guard TRAIN TEST

`python -m cxr_jax.data.sources.guard` is the same command. TRAIN and TEST: a folder of films, whatever their names, or
a manifest (rows.jsonl) whose films lie beside it. Prints films of TRAIN that are of registered evaluation sets by their
names, and those that are films of TEST by their pixels, a pair a line. docs/inputs.md says what is not found.

Exit codes: 0 none is, 1 some are, 2 bad usage or bad input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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


def find_films(place: Path) -> tuple[Path, list[Path]]:
    """Find the films of a folder, or of a manifest.

    Returns:
        The folder that they lie below, and their files.

    Raises:
        UserError: for a place without films.
    """
    # A manifest names its films; in a folder every file may be one.
    if place.is_dir():
        # What is hidden is a system's.
        files = [
            Path(folder, name)
            for folder, _, names in os.walk(place)
            for name in names
            if not name.startswith(".")
        ]
        if not files:
            raise UserError(f"{place}: holds no files")
        return place, sorted(files)
    rows = manifest.load_rows(place, place.parent)
    return place.parent, [film_path for row in rows for film_path in row.image_paths]


def run(args: argparse.Namespace) -> int:
    """Print what was found and return the exit code."""
    # ---- By names ----
    train_folder, train = find_films(args.train)
    test_folder, test = find_films(args.test)
    unknown = [None] * len(train)
    columns = findings.Columns(
        name="files",
        ids=[os.path.relpath(film_path, train_folder) for film_path in train],
        patients=unknown,
        studies=unknown,
        splits=unknown,
    )
    registered = findings.find_registered(columns, [train_folder])
    for finding in registered:
        print(printable(f"{finding.text}: {finding.named}"))
    # ---- By pixels ----
    hashes = hash_files.hash_files(train, train_folder) | hash_files.hash_files(test, test_folder)
    pairs = findings.same_films(train, test, hashes)
    for film_path, other in pairs.items():
        print(printable(f"{film_path} is {other}"))
    # What was not compared is said: none of it may be taken for clean.
    unread = len({*train, *test} - hashes.keys())
    count = f"{len(pairs):,} of {len(set(train)):,} films are among the {len(set(test)):,} of {args.test}"
    print(printable(f"{count}; {unread:,} files could not be read as films"))
    return int(bool(pairs or registered))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
