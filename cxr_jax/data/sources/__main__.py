"""A data set in its own layout, before a run: what it holds, in what state, and whether its films are there.

    cxr-jax sources NAME ROOT [--out=rows.jsonl] [--check=all|sample|none] [--labels=KIND]

`python -m cxr_jax.data.sources` is the same command. NAME: chexpert, chexpert_test, chexpert_plus, mimic, nih, vindr,
padchest, padchest_gr, openi, brax, rsna, siim, rexgradient, nv_reason, tfds. ROOT: the folder of the set, of one of its
splits, or a table. docs/inputs.md says what each is read from.

Prints rows, patients, studies, views, splits, the four states of each label, what was left out and why, whether films
are where the tables say, and films of registered evaluation sets. `--out` writes an object a film, whatever its view:
id, image, patient_id, study_id, view, split, labels (1, 0, -1, null) and, where there is one, solution and prompt.

Exit codes: 0 done; 1 stdout was closed or is full, rows are written then; 2 bad usage or bad input; nothing is written
then. `--out` may be a device or a pipe; it may not be a file of the data set.
"""

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.sources import sets
from cxr_jax.data.sources.films import outputs, places, summary
from cxr_jax.data.sources.label_table import write_rows
from cxr_jax.errors import exit_code, print_lines
from cxr_jax.runtime import whole_files


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.data.sources", description=__doc__)
    parser.add_argument("name", metavar="NAME", choices=tuple(sets.SETS))
    parser.add_argument("root", metavar="ROOT")
    parser.add_argument("--out", metavar="rows.jsonl", help="write an object a film")
    parser.add_argument(
        "--check",
        choices=places.CHECKS,
        default="",
        help=f"films that are looked for (default: all up to {places.CHECK_ALL:,}, else a sample of {places.SAMPLE:,})",
    )
    parser.add_argument("--labels", default="", help="which of the set's kinds of labels")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Read the tables, print what they hold and write the rows."""
    if args.out is not None:
        whole_files.check_output(args.out)
    # Tables, then the disk: a bad table is refused before anything is looked for.
    films = sets.open_films(args.name, args.root, args.labels)
    found = places.look_for(films, args.check)
    films = places.with_files(films, found.place)
    # All that may be refused before anything is written: lists of registered films are read here, too.
    lines = [*summary.describe(films), found.description, *summary.describe_overlaps(films)]
    # Rows first: who reads the summary has them.
    if args.out is not None:
        outputs.check_out(args.out, films, found.place)
        write_rows(args.out, summary.rows_of(films))
        lines.append(f"{len(films):,} rows written to {args.out}")
    # Rows that go to stdout are read by a program.
    print_lines(lines, on_stderr=args.out is not None and whole_files.is_stdout(args.out))


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Put the garbage collector off: a Ctrl-C that lands in what jax calls from it would be lost."""
    # Of a large table it costs seconds, too, and finds nothing there.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the arguments of the process) and return the exit code."""
    with _without_collector():
        return exit_code(lambda: run(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
