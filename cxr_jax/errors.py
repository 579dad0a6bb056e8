"""The one error that means "your input is wrong": printed as one line, exit code 2."""

import sys


class UserError(Exception):
    """Bad usage or bad input. The message is one line that names the file or flag and the reason.

    It must never hold a DICOM header value: patient data does not reach a log.
    """


class RunFailedError(Exception):
    """The run failed for a reason that one line says: exit code 1, and no traceback."""


def exit_code(action) -> int:
    """0 after `action()`; 2 after a UserError, whose line goes to stderr."""
    try:
        action()
    except UserError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    return 0


def bad_usage(message: str):
    """An `argparse.ArgumentParser.error` that is one line, like every other error."""
    raise UserError(message)


def shown(name) -> str:
    """A name from a file, fit for one line of a message."""
    text = str(name)
    text = text if text.isascii() and text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:117] + "..."
