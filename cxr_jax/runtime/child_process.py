"""Work in a forked process, which a signal ends at once, whatever it is in."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from cxr_jax.runtime import interrupts


class ChildFailedError(Exception):
    """The work failed, and the child has said why on stderr."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def run_in_child(
    work: Callable[[], None], report: Callable[[BaseException], int], *, quiet: bool
) -> None:
    """Run `work` in a forked process and wait for it; if this process is interrupted, the child is killed.

    Args:
        report: prints an error that `work` raised, in the child, and returns its exit code.
        quiet: whether all else that the child writes to stderr is dropped.

    Raises:
        ChildFailedError: after `report` has reported an error.
        RuntimeError: if a signal ended the child.
    """
    interrupts.hold_back()  # until each of the two processes knows what to do about them
    sys.stdout.flush()  # or the child would write it once more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks; it has started nothing yet
        child = os.fork()
    if child == 0:
        _work_and_exit(work, report, quiet)
    try:
        interrupts.let_through()
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        # Killed and not asked: the child ignores Ctrl-C, and its work is wanted no more.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    # The exit code is negative where a signal ended the child.
    if exit_code < 0:
        hint = ": out of memory?" if exit_code == -signal.SIGKILL else ""
        raise RuntimeError(f"killed by signal {-exit_code}{hint}")
    if exit_code:
        raise ChildFailedError(exit_code)


def _work_and_exit(
    work: Callable[[], None], report: Callable[[BaseException], int], quiet: bool
) -> NoReturn:
    """All that the child does. It never returns into the parent's code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the parent answers it
    interrupts.let_through()
    # Stderr is kept under another number, to report an error even when all else is dropped.
    exit_code, stderr = 1, os.dup(2)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work()
        exit_code = 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must not get it
        os.dup2(stderr, 2)
        exit_code = report(error)
    finally:
        # By hand: `os._exit` flushes nothing, and a normal exit would run the parent's clean-up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
