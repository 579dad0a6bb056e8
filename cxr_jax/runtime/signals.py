"""A run that is asked to stop saves and stops; one that hangs ends with a stack dump; one that learns nothing, too.

SIGTERM and SIGINT reach a thread of their own, so that they are heard while the program compiles or waits, too. Of
several processes any one may be asked: they agree at the next point that all of them pass.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from cxr_jax.errors import RunFailedError
from cxr_jax.runtime import processes

_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
    """Raised out of a loop that was asked to stop; the program saves and returns."""


class Stop:
    """What the loops of a run ask between their turns.

    Args:
        grace: seconds from the first signal on within which a loop should ask. If none has by then, the run ends as it
            is, with exit code 0: what was saved before stays, and the same command continues from there. It does so at
            once while there are no steps to save. A second signal ends the process at once.
        limit: seconds that may pass between two turns, without what is `unwatched`, before the process ends with a
            stack dump and exit code 1; 0: any.

    Attributes:
        requested: name of the signal that has come, or None.
        unsaved: set by the program: () -> steps that no checkpoint holds yet.
    """

    def __init__(self, grace: float = 90.0, limit: float = 0.0) -> None:
        self.requested: str | None = None
        self.unsaved: Callable[[], int] = _nothing
        self._grace, self._limit = grace, limit
        self._heard = threading.Event()  # a loop has asked, and knows
        # Python writes the number of each signal into the pipe at once, even while the main thread is in C code.
        self._writes: int | None
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        with contextlib.suppress(ValueError):  # not in the main thread (tests)
            self._before = (
                signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False),
                {number: signal.signal(number, _ignore) for number in _ASKED_TO_STOP},
            )
            threading.Thread(target=self._listen, daemon=True).start()
        self.beat()

    # ---- The thread that listens ----

    def _listen(self) -> None:
        # Other signals write into the pipe, too; only these two ask a run to stop.
        number = self._next(None)
        while number not in _ASKED_TO_STOP:
            if number is None:  # closed: nothing is heard any more
                return
            number = self._next(None)
        self.requested = signal.Signals(number).name
        self._say(f"\n{self.requested}: saving after this step (again to stop at once)")
        grace = self._grace
        if processes.count() == 1 and self.unsaved() == 0:
            grace = min(2.0, grace)  # there is nothing to wait for but a loop that ends by itself
        # Until the grace is over: a second signal, silence, or a pipe that closes as the run ends.
        number = self._next(grace)
        if number in _ASKED_TO_STOP:
            self._say("stopped at once")
            os._exit(128 + number)
        # No loop has heard it: the program is stuck, or a step takes longer than there is time.
        if number is None and not self._heard.is_set():
            lost = self.unsaved()
            if lost == 0:
                self._say("nothing new to save")
            else:
                self._say(f"no step ended in time: the last {lost} are not saved")
            self._say("the same command continues from the last checkpoint")
            os._exit(0)

    def _next(self, seconds: float | None) -> int | None:
        """The number of the next signal; None after so many seconds, or when this is closed."""
        # A wait with a timeout, which a read of the pipe alone does not have.
        ready = select.select([self._reads], [], [], seconds)[0]
        data = os.read(self._reads, 1) if ready else b""
        return data[0] if data else None

    @staticmethod
    def _say(message: str) -> None:
        # Not print: the main thread may be inside print, which is not reentrant.
        with contextlib.suppress(OSError):
            os.write(1, (message + "\n").encode(errors="backslashreplace"))

    # ---- What the loops call ----

    def beat(self) -> None:
        """Start the time limit of a turn anew."""
        if self._limit:
            stderr: Any = sys.__stderr__  # None where there is no console
            faulthandler.dump_traceback_later(self._limit, exit=True, file=stderr)

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let what is done here take any time, as compiling does, and then start the limit anew."""
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self.beat()

    def check(self) -> None:
        """Raise StoppedError if a signal has come, to any process.

        A point that all of them pass, in the same order.
        """
        self.beat()
        # Several processes stop at the same step, whichever of them got the signal.
        if processes.agree(self.requested is not None):
            self._heard.set()
            self.requested = self.requested or "a signal to another process"
            raise StoppedError(self.requested)

    def poll(self) -> None:
        """Raise StoppedError if a signal has come to this process, the only one; several wait for the next `check`."""
        if self.requested and processes.count() == 1:
            self._heard.set()
            raise StoppedError(self.requested)

    def close(self) -> None:
        """Let signals do again what they did before, and watch the time no more."""
        self._heard.set()  # whatever the run came to, the thread no longer decides how it ends
        faulthandler.cancel_dump_traceback_later()
        # Only where `__init__` was in the main thread.
        if hasattr(self, "_before"):
            wakeup, handlers = self._before
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            del self._before
        if self._writes is not None:
            os.close(self._writes)
            self._writes = None


def _nothing() -> int:
    return 0


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal does not end the process; the thread hears it through the pipe."""


class Skips:
    """Ends a run whose gradients were not finite, so skipped and counted, for `limit` steps in a row (0: never).

    Args:
        step: where the run begins, with so many `skipped` before.
        updates: of a step, each of which counts.
    """

    def __init__(self, limit: int, step: int = 0, skipped: int = 0, updates: int = 1) -> None:
        self._limit, self._updates = limit, updates
        self._good, self._step, self._skipped = step, step, skipped

    def look(self, step: int, skipped: int) -> None:
        """Count a step.

        Args:
            skipped: how many until `step`, in all.

        Raises:
            RunFailedError: at the limit.
        """
        # At least one of the updates since the last look was not skipped.
        if skipped - self._skipped < (step - self._step) * self._updates:
            self._good = step  # at the latest
        self._step, self._skipped = step, skipped
        if self._limit and step - self._good >= self._limit:
            raise RunFailedError(
                f"the gradients of the last {step - self._good} steps were not finite "
                f"(config.max_skipped={self._limit}): the learning rate may be too high, or the weights "
                f"damaged; the parameters are those of step {self._good}"
            )
