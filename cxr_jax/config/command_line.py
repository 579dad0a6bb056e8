"""Command lines with a `--config` file: flags parsed, and every mistake one line on stderr and exit code 2."""

import os
import re
import sys
import traceback

from absl import flags

from cxr_jax.errors import RunFailedError, UserError


def main(argv, module: str, run) -> int:
    """Parses argv for the flags that `module` defined and returns what `run()` does, or 2 for bad usage or input."""
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(sys.modules[module].__doc__ + flags.FLAGS.module_help(sys.modules[module]))
        return 0
    debug = any(a in ("--debug", "--debug=true") for a in argv)
    try:
        _check_config_file(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unknown argument {rest[1]!r}")
    except UserError as e:
        return _bad(e, debug)
    except Exception as e:  # noqa: BLE001 - absl, ml_collections and the config file itself raise many kinds
        return _bad(UserError(_flag_error(e, argv)), debug)
    try:
        return run()
    except UserError as e:
        return _bad(e, debug)
    except RunFailedError as e:
        _bad(e, debug)
        return 1
    except KeyboardInterrupt:
        return 1


def _check_config_file(argv):
    # Looked at first: config_flags reports a missing file late and over many lines.
    value = None
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, text = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            value = text if equals else following
    if not value:
        raise UserError("--config is missing, for example --config=experiments/rl.py")
    if not os.path.isfile(value.split(":")[0]):
        raise UserError(f"--config={value}: there is no such file")


def _flag_error(e, argv) -> str:
    """One line that names the flag, whatever absl, ml_collections or a config file raised."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    if isinstance(e, flags.Error):
        return text
    key = re.search(
        r"\w+", text
    )  # ml_collections says "'stepz'" and perhaps 'Did you mean "steps" ..?'
    hint = re.search(r'Did you mean "(\w+)"', text)
    for arg in argv[1:]:
        path = arg.lstrip("-").split("=")[0].split(".")
        if path[0] == "config" and key and key[0] in path[1:]:
            return f"{arg}: the config has no key {key[0]!r}" + (
                f"; did you mean {hint[1]!r}?" if hint else ""
            )
    return f"--config: {type(e).__name__}: {text}"


def _bad(e, debug) -> int:
    if debug:
        traceback.print_exc()
    print("error: " + " ".join(str(e).split()), file=sys.stderr)
    return 2
