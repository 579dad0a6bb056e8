"""A reader study from protocol to report: does the reasoning help, and whom does it mislead?

    python -m cxr_jax.study COMMAND NAME [flags]

new       make a study in the folder ./NAME (or --store, which may be PostgreSQL): cases, frozen readings, plants, order
seal      write the hashes of all that into the chain; nothing of it can change unnoticed after that
open      let readers in (python -m cxr_jax.serve --store=NAME --study=NAME); close: no more
readers   who has which place; --assign=HANDLE=PLACE, --release=PLACE --reason=..
washout   change the washout of a study that runs, with --days and --reason
simulate  readers made of random numbers do the whole study over HTTP
unblind   open the sealed file, if it is the one that was sealed
analyse   analysis.json, report.html and rows.csv, once the study is unblinded
export    --format=csv|imrmc|mrmcaov|r
verify    walk the chain and compare files, answers and heads
power     what a study of these readers and cases would see

Exit codes: 0 done, 1 failed (verify: something does not agree), 2 bad usage. Research use only. Not for diagnosis.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code, print_lines
from cxr_jax.study.commands import manage, readers
from cxr_jax.study.folder import StudyFolder, place_of
from cxr_jax.study.protocol import LONGEST_WASHOUT, make_protocol, read_protocol


def _place(arguments: argparse.Namespace) -> str:
    return place_of(arguments.name, arguments.store)


# ---- The commands ----------------------------------------------------------------------------------


def _given(arguments: argparse.Namespace) -> dict[str, object]:
    """What flags say of the protocol; the rest is its own default."""
    flags = {
        "design": arguments.design,
        "arms": tuple(arguments.arms.split(",")) if arguments.arms else None,
        "cases": arguments.cases,
        "readers": arguments.readers,
        "seed": arguments.seed,
        "washout_days": arguments.washout_days,
        "plant_share": arguments.plant_share,
    }
    return {name: value for name, value in flags.items() if value is not None}


def _new(arguments: argparse.Namespace) -> int:
    """A protocol from flags, or from a file that flags may add to."""
    given = _given(arguments)
    base = read_protocol(Path(arguments.protocol)).model_dump() if arguments.protocol else {}
    # Phantoms are read by programs; a clock of the wall would make a demonstration take days.
    if arguments.simulated:
        given |= {"simulated": True, "clock_speed": arguments.clock_speed}
    # The folder's name is the study's name.
    values = base | given | {"name": Path(arguments.name).name}
    print_lines(manage.new(_place(arguments), make_protocol(**values)))
    return 0


def _seal(arguments: argparse.Namespace) -> int:
    print_lines(manage.seal(_place(arguments)))
    return 0


def _open(arguments: argparse.Namespace) -> int:
    print_lines(manage.start(_place(arguments)))
    return 0


def _close(arguments: argparse.Namespace) -> int:
    print_lines(manage.close(_place(arguments)))
    return 0


def _unblind(arguments: argparse.Namespace) -> int:
    print_lines(manage.unblind(_place(arguments)))
    return 0


def _washout(arguments: argparse.Namespace) -> int:
    # Held like this, so that what is no number is refused, too.
    if arguments.days is None or not 0 <= arguments.days <= LONGEST_WASHOUT:
        raise UserError(f"--days: a number of days, 0 to {LONGEST_WASHOUT}")
    print_lines(manage.set_washout(_place(arguments), arguments.days, arguments.reason))
    return 0


def _readers(arguments: argparse.Namespace) -> int:
    place, reason = _place(arguments), arguments.reason
    print_lines(readers.change(place, arguments.assign, arguments.release, reason))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    # All of them, not the first alone: they show what was done.
    place = _place(arguments)
    problems = manage.verify(place, arguments.head)
    if problems:
        print_lines(problems)
        return 1
    print_lines([f"{StudyFolder.at(place).path}: all agrees; store head {manage.head_of(place)}"])
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    # Imported where they are needed: others of these commands take a blink.
    from cxr_jax.study.simulation.run import simulate

    effects = Path(arguments.effects) if arguments.effects else None
    print_lines(simulate(_place(arguments), effects, arguments.threads, arguments.kills))
    return 0


def _analyse(arguments: argparse.Namespace) -> int:
    from cxr_jax.study.commands.results import analyse

    print_lines(analyse(_place(arguments)))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from cxr_jax.study.commands.results import export

    print_lines(
        export(_place(arguments), arguments.format, Path(arguments.out) if arguments.out else None)
    )
    return 0


def _power(arguments: argparse.Namespace) -> int:
    from cxr_jax.study.analysis.power import power_lines

    study_path = StudyFolder.at(_place(arguments)).path
    # Of a study that is there, or of a protocol that is only thought of; flags ask what another one would see.
    is_there = (study_path / "protocol.json").exists()
    base = read_protocol(study_path / "protocol.json").model_dump() if is_there else {}
    protocol = make_protocol(**{"name": Path(arguments.name).name} | base | _given(arguments))
    effects = Path(arguments.effects) if arguments.effects else None
    print_lines(power_lines(protocol, effects, arguments.studies))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "new": _new,
    "seal": _seal,
    "open": _open,
    "close": _close,
    "unblind": _unblind,
    "readers": _readers,
    "washout": _washout,
    "verify": _verify,
    "simulate": _simulate,
    "analyse": _analyse,
    "export": _export,
    "power": _power,
}


# ---- Flags -----------------------------------------------------------------------------------------


# Flags that count something, and how far.
_COUNTS = {"threads": (1, 500), "kills": (0, 10_000), "studies": (1, 100_000)}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.study", description=__doc__)
    parser.add_argument("command", metavar="COMMAND", choices=tuple(COMMANDS))
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--store",
        help="the study's folder, if it is not ./NAME, or postgresql+pg8000://USER@HOST/DATABASE[?folder=DIR]",
    )
    # ---- Of new ----
    parser.add_argument("--protocol", help="a protocol.json to begin from")
    parser.add_argument("--design", choices=("crossed", "split"))
    parser.add_argument("--arms", help="manual,labels,full[,report]")
    parser.add_argument("--cases", help="phantom:N or a manifest")
    parser.add_argument("--readers", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--washout_days", type=float)
    parser.add_argument("--plant_share", type=float)
    parser.add_argument(
        "--simulated",
        action="store_true",
        help="readers will be programs; said on every page (`new` of phantoms with a washout of 0 implies it)",
    )
    parser.add_argument("--clock_speed", type=float, default=1000.0)
    # ---- Of the others ----
    parser.add_argument("--days", type=float)
    parser.add_argument(
        "--assign",
        action="append",
        default=[],
        metavar="HANDLE=PLACE",
        help="give a user a place of the study, by name",
    )
    parser.add_argument(
        "--release",
        action="append",
        default=[],
        type=int,
        metavar="PLACE",
        help="take a place back; what was read there is set aside",
    )
    parser.add_argument("--reason", default="")
    parser.add_argument("--effects", help="E.json: what simulated readers are like")
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--kills", type=int, default=0, help="kill the server so often on the way")
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--format", choices=("csv", "imrmc", "mrmcaov", "r"), default="csv")
    parser.add_argument("--out")
    parser.add_argument(
        "--head", action="append", default=[], help="NUMBER:HASH to be in the chain"
    )
    arguments = parser.parse_args(argv)
    for name, (low, high) in _COUNTS.items():
        if not low <= getattr(arguments, name) <= high:
            raise UserError(f"--{name}: a number from {low} to {high}")
    # A demonstration on phantoms without any washout can only be one of simulated readers.
    is_phantom = (arguments.cases or "").startswith("phantom:")
    if arguments.command == "new" and is_phantom and arguments.washout_days == 0:
        arguments.simulated = True
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def action() -> int:
        arguments = parse_args(argv)
        return COMMANDS[arguments.command](arguments)

    return exit_code(action, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
