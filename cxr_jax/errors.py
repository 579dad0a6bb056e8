"""The errors that a call can end in, their exit codes (1 the run failed, 2 bad usage or bad input), and how any text,
names of files above all, gets to a terminal or into a file of ours.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad usage or bad input. The message is one line that names the file or flag and the reason.

    It must never hold a DICOM header value: patient data does not reach a log.
    """


class RunFailedError(Exception):
    """The run failed for a reason that one line says: exit code 1, and no traceback."""


class FailedBetweenStepsError(RunFailedError):
    """The same, between two whole steps and on all processes at the same point: what is whole is saved first."""


def exit_code(
    action: Callable[[], int | None],
    *,
    debug: bool = False,
    failure: Callable[[BaseException], str] | None = None,
) -> int:
    """Run what a command does, turn errors into one line on stderr, and return the exit code.

    Args:
        action: returns the exit code, or None for 0.
        debug: whether the traceback of an error stands above its line.
        failure: says in one line what any other error than the two of this module means. None: such an error is
            raised on, and Ctrl-C ends without a line.

    Returns:
        What `action` returns; 2 after a UserError; 1 after any other error and after Ctrl-C.
    """
    # Here, where all commands come by.
    print_any_text()
    try:
        return action() or 0
    except (Exception, KeyboardInterrupt) as error:
        # These two say all in their message; what any other error means, the command knows.
        if isinstance(error, (UserError, RunFailedError)):
            line = str(error)
        elif failure is not None:
            line = failure(error)
        elif isinstance(error, KeyboardInterrupt):
            return 1
        else:
            raise
        if debug:
            traceback.print_exc()
        # One line, whatever the message holds: scripts read stderr line by line.
        print("error: " + printable(" ".join(line.split())), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


# ---- Any text, anywhere ----------------------------------------------------------------------------


def print_any_text() -> None:
    """Let this process print any text, whatever the terminal can show: what it cannot, is escaped (\\u4e2d).

    Names of files may hold bytes that are no text, and terminals are not all UTF-8; neither may end a batch.
    """
    for stream in (sys.stdout, sys.stderr):
        # A stream that somebody has put in place may be of another kind, or none.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def print_lines(lines: Iterable[object], *, on_stderr: bool = False) -> None:
    """Print lines of any text, all of them, and see that they have gone out; `on_stderr` where rows go to stdout.

    Raises:
        RunFailedError: where stdout has been closed, or is full.
    """
    try:
        for line in lines:
            print(printable(line), file=sys.stderr if on_stderr else sys.stdout)
        # None where the process has none.
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # What is still to be flushed at the end of the process would fail again, with a traceback.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise RunFailedError(f"stdout cannot be written ({error.strerror})") from None


def failure_without_text(error: BaseException, left: str) -> str:
    """Return one line for an error that is nobody's input; it could hold report text, so its message is not shown.

    Args:
        left: what a stop before the end has left.
    """
    if isinstance(error, KeyboardInterrupt):
        return f"stopped before the end; {left}"
    # What the system says names no text of a report.
    known = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    return f"the run failed ({type(error).__name__}){known}"


def as_utf8(text: object) -> str:
    """Make a name fit for a file in UTF-8 that others read: bytes that are no text are escaped (\\xff).

    Under a locale that knows ASCII alone, Python holds every other byte of a name as such; most are text all the same.
    """
    try:
        return str(text).encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a character, which is in no name of a file
        return str(text).encode(errors="backslashreplace").decode()


def printable(text: object) -> str:
    """Escape what does not print: line ends, control characters, those that turn the direction of text, lone bytes.

    For one line of a message or a screen: whatever a name holds, it neither moves the cursor nor begins a new line.
    """
    # Python's own notion of what prints, so that letters of every alphabet stay.
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in as_utf8(text)
    )


def shown(name: object) -> str:
    """Make a name from a file fit for one line of a message: ASCII, printable, at most 120 characters."""
    text = str(name)
    if not (text.isascii() and text.isprintable()):
        text = ascii(text)
    return text if len(text) <= 120 else text[:117] + "..."
