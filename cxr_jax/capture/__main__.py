"""Corrected thoughts of readers -> rows to train on: `cxr-jax capture export STORE -o rows.jsonl`.

    cxr-jax capture export STORE -o rows.jsonl [--test=PLACE ..] [--prompt=..] [--contradictions=keep] [--force]
    cxr-jax capture verify STORE
    cxr-jax capture erase STORE ID

`python -m cxr_jax.capture` is the same command. STORE is what `cxr-jax serve --store=` was given. Rows are in the
published form of sft.jsonl (id, image, solution, messages) with `cxr_jax.provenance` beside it; films are named below
STORE, so that they train by

    cxr-jax train --config=experiments/sft.py:files --config.data.manifest=rows.jsonl --config.data.image_root=STORE

Films of reader studies are refused, and with --test=PLACE (a folder of films, or a manifest that lies beside them;
may be given again) those of evaluation sets, whatever their names and formats. Why a thought gave no row is counted
on stderr. `verify` compares recordings and texts with their hashes in the chain. `erase` erases a thought as its
reader can on the page.

Exit codes: 0 done; 1 the run failed, or `verify` found something; 2 bad usage, bad input, or no row at all. Research
use only. Not for diagnosis.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.prompts import FIND_PROMPT, check_prompt
from cxr_jax.data.sources.policy import UNCERTAIN_CHOICES, LabelPolicy
from cxr_jax.errors import UserError, exit_code, failure_without_text, print_lines
from cxr_jax.runtime import whole_files

if TYPE_CHECKING:
    from cxr_jax.store import Store

# ---- Flags -----------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.capture", description=__doc__)
    # Not `required`: without one argparse would say so in its own words.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Subparser)
    exporting = commands.add_parser("export", help="write rows")
    exporting.add_argument("store", metavar="STORE")
    exporting.add_argument("-o", "--out", required=True, metavar="OUT.jsonl")
    exporting.add_argument("--test", action="append", default=[], type=Path, metavar="PLACE")
    exporting.add_argument("--prompt", default=FIND_PROMPT, help="what is asked of every film")
    exporting.add_argument("--uncertain", choices=UNCERTAIN_CHOICES, default=UNCERTAIN_CHOICES[0])
    exporting.add_argument("--contradictions", choices=("refuse", "keep"), default="refuse")
    exporting.add_argument("--force", action="store_true", help="replace OUT")
    verifying = commands.add_parser("verify", help="compare with the chain")
    verifying.add_argument("store", metavar="STORE")
    erasing = commands.add_parser("erase", help="erase one thought")
    erasing.add_argument("store", metavar="STORE")
    erasing.add_argument("capture", metavar="ID")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        raise UserError("say export, verify or erase")
    return arguments


class _Subparser(ArgumentParser):
    """A parser of one of the three."""

    def __init__(self, **settings: object) -> None:
        settings.pop("prog", None)
        super().__init__("cxr_jax.capture", **settings)


# ---- What each does --------------------------------------------------------------------------------


def _open(place: str) -> "Store":
    from cxr_jax.store import open_store

    # A store is made where there is none: here that would be a slip of the name.
    if "://" not in place and not (Path(place) / "room.db").is_file():
        raise UserError(f"{place}: is no store (it holds no room.db)")
    # Beside a running server: their transactions take turns.
    return open_store(place, exclusive=False)


def _export(arguments: argparse.Namespace) -> int:
    from cxr_jax.capture import rows
    from cxr_jax.store.records.actors import OPERATOR

    # Before the store is opened: a slip in a flag costs no wait.
    if not arguments.out.lower().endswith(".jsonl"):
        raise UserError(f"{arguments.out}: OUT must be named .jsonl")
    whole_files.check_output(arguments.out)
    if os.path.exists(arguments.out) and not arguments.force:
        raise UserError(f"{arguments.out}: exists; --force replaces it")
    options = rows.ExportOptions(
        prompt=check_prompt(arguments.prompt),
        policy=LabelPolicy(uncertain=arguments.uncertain),
        tests=tuple(arguments.test),
        contradictions=arguments.contradictions == "keep",
    )
    opened_store = _open(arguments.store)
    try:
        # Taken before the rows are made: an export names the state of the chain that it is of.
        head = opened_store.head()
        made = rows.export(opened_store, options)
        if made.rows:
            text = rows.write_lines(made.rows)
            # In the chain before it is on the disk: what leaves the house is known, whatever becomes of it.
            params = {"rows": [row["id"] for row in made.rows]}
            digest = hashlib.sha256(text.encode()).hexdigest()
            opened_store.exports.add(
                "capture.jsonl", digest, head=head, actor=OPERATOR, params=params
            )
            whole_files.write_text(arguments.out, text)
    finally:
        opened_store.close()
    print_lines(rows.summarise(made, arguments.out), on_stderr=True)
    if not made.rows:
        raise UserError(f"{arguments.store}: no thought gave a row")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cxr_jax.capture.records import Captures

    opened_store = _open(arguments.store)
    try:
        problems = [*map(str, opened_store.verify()), *Captures(opened_store).verify()]
    finally:
        opened_store.close()
    print_lines(problems or ["the chain, recordings and texts agree"])
    return 1 if problems else 0


def _erase(arguments: argparse.Namespace) -> int:
    from cxr_jax.capture.records import Captures
    from cxr_jax.store.records.actors import OPERATOR

    opened_store = _open(arguments.store)
    try:
        Captures(opened_store).erase(OPERATOR, arguments.capture)
    finally:
        opened_store.close()
    print_lines(["erased; what was exported or trained before is not called back"])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""

    def work() -> int:
        arguments = parse_args(argv)
        return {"export": _export, "verify": _verify, "erase": _erase}[arguments.command](arguments)

    def failure(error: BaseException) -> str:
        return failure_without_text(error, "nothing was written")

    return exit_code(work, debug=wants_debug(argv), failure=failure)


if __name__ == "__main__":
    sys.exit(main())
