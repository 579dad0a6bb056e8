"""The argument parser of the commands that have no config: one flag style, and every mistake a UserError."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from cxr_jax.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser in the style of all commands.

    Flags are declared with `_` (`--max_new_tokens`) and read with `-`, too; none may be abbreviated; `--debug` is
    there; a mistake raises UserError, so that it is one line on stderr.
    """

    def __init__(self, module: str, **settings: Any) -> None:
        """Make a parser.

        Args:
            module: the command as `python -m` names it, e.g. "cxr_jax.predict".
            **settings: as of argparse; a text of several paragraphs is shown as it is written.
        """
        # Descriptions are module docstrings, whose paragraphs argparse would join into one.
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        # No abbreviations: a flag that is added later could make one of them ambiguous.
        super().__init__(prog=program_name(module), allow_abbrev=False, **settings)
        # Every command has it, so that `wants_debug` can look for it before anything is parsed.
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and leaving."""
        raise UserError(message)

    def parse_known_args(  # type: ignore[override]  # argparse overloads it by the type of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse `args` (None: those of the process) with every flag spelt as it is declared."""
        # Here, where all ways of parsing come by.
        if args is None:
            args = sys.argv[1:]
        return super().parse_known_args(self._as_declared(args), namespace)

    def _as_declared(self, given_arguments: Sequence[str]) -> list[str]:
        arguments = list(given_arguments)
        for index, argument in enumerate(arguments):
            if argument == "--":  # what follows are no flags
                break
            # Of "--flag=value" only the flag is respelt: a value may hold any dash.
            flag_name, equals, flag_value = argument.partition("=")
            declared_name = "--" + flag_name[2:].replace("-", "_")
            # What is no flag of this command stays as it was typed, since a message will show it.
            if flag_name.startswith("--") and declared_name in self._option_string_actions:
                arguments[index] = declared_name + equals + flag_value
        return arguments


def program_name(module: str) -> str:
    """Return what the user called: `cxr-jax COMMAND` through the console script, else `python -m MODULE`."""
    # The console script puts its own name and the command into argv[0].
    called_program = sys.argv[0] if sys.argv else ""
    if called_program.startswith("cxr-jax "):
        return called_program
    return f"python -m {module}"


def wants_debug(argv: Sequence[str] | None) -> bool:
    """Return whether `--debug` is among the arguments (None: those of the process), before they are parsed."""
    # Before parsing, because parsing itself may be what fails.
    return "--debug" in (sys.argv if argv is None else argv)
