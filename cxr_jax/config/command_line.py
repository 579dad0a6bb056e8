"""Command lines with a `--config`: flags parsed, and every mistake one line on stderr and exit code 2."""

import os
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from cxr_jax.config import schema, source_specs
from cxr_jax.config.preset_files import PRESET_FOLDER, preset_names
from cxr_jax.errors import UserError, exit_code, print_any_text

# Defined here once for all commands that take a config, so that one process can import several of them. Each adopts
# them as its own: flags.adopt_module_key_flags(command_line).
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "What to run: rl, sft, evaluate, or an experiment file; with an optional :preset.",
    lock_config=True,
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a bad input, too.")


def main(argv: Sequence[str] | None, module: str, run: Callable[[], int]) -> int:
    """Parse the flags that `module` has and run the command.

    Args:
        argv: program name and arguments; None: those of the process.
        module: `__name__` of the command, whose docstring begins the help.
        run: what the command does once its flags are there; returns the exit code.

    Returns:
        What `run` returns; 2 for bad usage or input, 1 for a failed run.
    """
    print_any_text()  # of which the help is the first
    arguments = list(sys.argv if argv is None else argv)
    # By hand, so that help is the docstring, the flags of this command, and nothing else.
    if {"--help", "-help", "-h"} & set(arguments[1:]):
        print(f"{sys.modules[module].__doc__}\n{_flags_help(module)}\n{schema.help_text()}")
        return 0

    def parse_and_run() -> int:
        _parse(arguments)
        return run()

    # Looked for before parsing, which may be what fails.
    debug = any(argument in ("--debug", "--debug=true") for argument in arguments)
    return exit_code(parse_and_run, debug=debug)


def _flags_help(module: str) -> str:
    # absl prints flags by module; a command shows its own and those of a config as one list.
    module_flags = flags.FlagValues()
    for module_flag in flags.FLAGS.get_key_flags_for_module(sys.modules[module]):
        module_flags[module_flag.name] = module_flag
    return module_flags.get_help(include_special_flags=False)


def _parse(arguments: list[str]) -> None:
    """Set the flags. Raises UserError for whatever is wrong with them, or with the config file."""
    try:
        # The first of what remains is the program's name; all else should have been a flag.
        declared = _with_config_files(_as_declared(arguments))
        declared, sources = _without_sources(declared)
        stray_arguments = flags.FLAGS(declared)[1:]
        _set_sources(sources)
    except UserError:
        raise
    except Exception as error:  # absl, ml_collections and the config file itself raise many kinds
        raise UserError(_flag_error(error, arguments)) from error
    if stray_arguments:
        raise UserError(f"unknown argument {stray_arguments[0]!r}")


def _as_declared(arguments: list[str]) -> list[str]:
    """Return the arguments with every flag spelt as it is declared: `-` is read where a name has `_`."""
    declared = list(arguments)
    for index, argument in enumerate(arguments[1:], 1):
        if argument == "--":  # what follows are no flags
            break
        flag_name, equals, value = argument.partition("=")
        name = flag_name.removeprefix("--").replace("-", "_")
        # Only the whole name of a flag: keys of a config are no names of flags of their own.
        if flag_name.startswith("--") and name in flags.FLAGS:
            declared[index] = f"--{name}{equals}{value}"
    return declared


# ---- Sources by name, a text each ------------------------------------------------------------------

_SOURCES = re.compile(r"--?config\.data\.(train|eval)")


def _without_sources(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take out the flags of keys that hold sources by name: a text is no section, which config_flags wants there."""
    kept: list[str] = []
    sources: dict[str, str] = {}
    waiting = ""  # the key whose text is the next argument
    for argument in arguments:
        flag_name, equals, text = argument.partition("=")
        if waiting:
            sources[waiting], waiting = argument, ""
        elif match := _SOURCES.fullmatch(flag_name):
            sources[match[1]] = text
            waiting = "" if equals else match[1]
        else:
            kept.append(argument)
    if waiting:
        raise UserError(f"--config.data.{waiting} needs a value: sources by name")
    return kept, sources


def _set_sources(sources: dict[str, str]) -> None:
    """Set what `_without_sources` has taken out. Raises UserError for a key that the config has not."""
    for key, text in sources.items():
        data = CONFIG.value.get("data", {})
        if key not in data:
            raise UserError(f"--config.data.{key}={text}: the config has no key {key!r}")
        with data.unlocked():
            data[key] = ml_collections.ConfigDict(source_specs.parse(text, key))


# ---- The flag of a config ----------------------------------------------------------------------------


def _with_config_files(arguments: list[str]) -> list[str]:
    """Return the arguments with the file of each `--config` that names a preset.

    Files are looked for here, because config_flags reports a missing one late and over many lines.
    """
    resolved = list(arguments)
    config_value = ""
    # Both forms of a flag: `--config=FILE`, and `--config FILE` in two arguments.
    for index, argument in enumerate(arguments):
        flag_name, equals, value_here = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or flag_name != "config":
            continue
        if equals:
            config_value = value_here
            resolved[index] = f"--config={_config_file(config_value)}"
        elif index + 1 < len(arguments):
            config_value = arguments[index + 1]
            resolved[index + 1] = _config_file(config_value)
    # What is left is the value of the last `--config`, the one that counts.
    if not config_value:
        raise UserError("--config is missing, for example --config=experiments/rl.py")
    if not os.path.isfile(_config_file(config_value).split(":")[0]):
        # A bare word may be meant as a preset, and a path never is.
        known_presets = preset_names()
        is_bare = not re.search(r"[/.\\]", config_value.split(":")[0])
        hint = ""
        if is_bare and known_presets:
            hint = f", and the presets are {', '.join(known_presets)}"
        raise UserError(f"--config={config_value}: there is no such file{hint}")
    return resolved


def _config_file(config_value: str) -> str:
    """Return `config_value` (a name or file, and what follows a colon) with the file of the preset that it names."""
    preset_name, colon, suffix = config_value.partition(":")
    # A preset wins over a file of that name, so that it means the same in any folder.
    if preset_name in preset_names():
        return f"{PRESET_FOLDER / preset_name}.py{colon}{suffix}"
    return config_value


def _flag_error(error: Exception, arguments: list[str]) -> str:
    """Return one line that names the flag, whatever absl, ml_collections or a config file raised."""
    # Long explanations begin with what is wrong and end with what to do.
    stripped_lines = map(str.strip, str(error).splitlines())
    message_lines = list(filter(None, stripped_lines)) or [type(error).__name__]
    message = message_lines[0]
    if len(message_lines) > 1:
        message += f" {message_lines[-1]}"
    # What absl says already names its flag.
    if isinstance(error, flags.Error):
        return message
    # ml_collections says "'stepz'" and perhaps 'Did you mean "steps" ..?'
    named_key = re.search(r"\w+", message)
    suggestion = re.search(r'Did you mean "(\w+)"', message)
    # None of them says which flag it was: look for the one that names the key.
    for argument in arguments[1:]:
        key_path = argument.lstrip("-").split("=")[0].split(".")
        if key_path[0] == "config" and named_key and named_key[0] in key_path[1:]:
            hint = f"; did you mean {suggestion[1]!r}?" if suggestion else ""
            return f"{argument}: the config has no key {named_key[0]!r}{hint}"
    # What no flag explains came out of the config file itself.
    return f"--config: {type(error).__name__}: {message}"
