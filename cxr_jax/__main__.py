"""The console script: `cxr-jax COMMAND ..`, or `python -m cxr_jax COMMAND ..`. Each command is a module of its own."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cxr_jax import __version__
from cxr_jax.errors import print_any_text


class Command(NamedTuple):
    """Where a command is: a function of a module that reads `sys.argv` and returns the exit code."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "train": Command(
        "cxr_jax.main", "main", "run SFT, RL or an evaluation: --config=rl --workdir=DIR"
    ),
    "predict": Command("cxr_jax.predict", "main", "read chest radiographs: PNG, JPEG, DICOM"),
    "label": Command(
        "cxr_jax.label", "command", "label free-text reports with the 14 CheXpert labels"
    ),
    "traces": Command(
        "cxr_jax.traces", "command", "reports and labels -> verified reasoning traces to imitate"
    ),
    "convert": Command("cxr_jax.convert", "command", "Hugging Face folder <-> our checkpoint"),
    "plan": Command("cxr_jax.plan", "main", "what a run needs on N devices that need not exist"),
    "report": Command("cxr_jax.report.__main__", "main", "draw a run's report.html again"),
    "compare": Command(
        "cxr_jax.evaluation.paired", "main", "two evaluated runs on the same films: differences"
    ),
    "card": Command("cxr_jax.card", "main", "the evaluation section of a model card"),
    "serve": Command(
        "cxr_jax.serve.__main__",
        "main",
        "the reading room: page for readers, OpenAI-compatible API",
    ),
    "store": Command(
        "cxr_jax.store.__main__", "main", "users, keys, checks and backups of the room"
    ),
    "capture": Command(
        "cxr_jax.capture.__main__", "main", "corrected thoughts of readers -> rows to train on"
    ),
    "study": Command(
        "cxr_jax.study.__main__", "main", "a reader study, from the protocol to the report"
    ),
    "sources": Command(
        "cxr_jax.data.sources.__main__", "main", "a data set in its own layout: what it holds"
    ),
    "manifest": Command(
        "cxr_jax.data.sources.label_table", "main", "a label table -> rows to train and evaluate on"
    ),
    "guard": Command(
        "cxr_jax.data.sources.guard.__main__", "main", "films to train on that are films to test on"
    ),
    "shards": Command(
        "cxr_jax.data.shards.__main__", "main", "films -> ArrayRecord shards, a tfds folder as well"
    ),
    "agreement": Command(
        "cxr_jax.evaluation.label_agreement", "main", "our labels of reports against gold labels"
    ),
}


def usage() -> str:
    """Return the help: all commands, one a line."""
    command_lines = [
        f"  {command_name:<10} {command.summary}" for command_name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: cxr-jax COMMAND ..    (cxr-jax COMMAND --help says what it takes)",
            "",
            *command_lines,
            "",
            "Exit codes: 0 done, 1 failed, 2 bad usage or bad input. Research use only. Not for diagnosis.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names and return its exit code.

    Args:
        argv: command and arguments; None: those of the process.
    """
    print_any_text()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # No command at all gets the help, not an error.
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    command_name, *remaining = arguments
    if command_name in ("--version", "version"):
        print(f"cxr_jax {__version__}")
        return 0
    # A mistyped command is told what it is closest to, if it is close to one.
    if command_name not in COMMANDS:
        close_matches = difflib.get_close_matches(command_name, COMMANDS, n=1)
        hint = f"there are {', '.join(COMMANDS)}"
        if close_matches:
            hint = f"did you mean {close_matches[0]!r}?"
        print(f"error: unknown command {command_name!r}; {hint}", file=sys.stderr)
        return 2
    # Commands read the arguments of the process, and say in their help how they were called. They are imported only
    # now: most take seconds.
    sys.argv = [f"cxr-jax {command_name}", *remaining]
    command = COMMANDS[command_name]
    return getattr(importlib.import_module(command.module), command.function)()


if __name__ == "__main__":
    sys.exit(main())
