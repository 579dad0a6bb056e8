"""What a command does when it is asked to end before it is done: Ctrl-C, `kill`, or a terminal that closes."""

import signal
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a command to end."""


def on_interrupt(action: Callable[[], None], *, even_if_ignored: bool) -> None:
    """Call `action` whenever the command is asked to end.

    Args:
        even_if_ignored: whether also for a signal that whoever started the command told it to ignore, as `nohup` does,
            or a shell that starts a job in the background of a script.
    """
    # A program that is told to live on when its terminal closes should do so.
    for number in SIGNALS:
        if even_if_ignored or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: action())


def raise_keyboard_interrupt() -> None:
    """Answer a signal as Python answers Ctrl-C; the clean-up that follows is not interrupted by another one.

    Raises:
        KeyboardInterrupt: always.
    """
    # A second Ctrl-C would break off the clean-up half way.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def hold_back() -> None:
    """Let signals wait until `let_through`."""
    # Blocked and not ignored: a signal that comes in between is delivered later, and not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_through() -> None:
    """Deliver the signals that `hold_back` has kept waiting, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
