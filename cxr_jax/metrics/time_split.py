"""Where the time of a run goes: what it is spent on, as shares (goodput is the share of steps)."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What compiles programs, or takes them from the compilation cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"


class TimeSplit:
    """Adds up seconds by what they are spent on, one thing at a time.

    Attributes:
        seconds: of each kind so far: "start", "data", "step", "look", "save" and, out of all of them, "compile".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with "start".

        Args:
            clock: in seconds.
        """
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock, self._kind, self._since = clock, "start", clock()

    def listen(self) -> None:
        """Take the seconds that JAX compiles out of what they happen in."""
        import jax  # here: reading metrics needs none

        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **named_details: Any) -> None:
        # Told when it is over, in the thread that waited for it.
        if event == _COMPILED:
            self.seconds["compile"] += duration_secs
            self.seconds[self._kind] -= duration_secs

    def enter(self, kind: str) -> str:
        """Count from now on as `kind`; returns what was counted until now."""
        # Every second is counted once: as what was going on when it passed.
        now, before = self._clock(), self._kind
        self.seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Count what happens inside as `kind`, and then go on with what it was before."""
        # Nested: a look inside a step is a look.
        before = self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def shares(self) -> dict[str, float]:
        """Give the share of each kind until now, as "goodput/KIND"; together they are 1."""
        self.enter(self._kind)
        # What has no seconds yet has no share.
        # Threads that compile at once may count more seconds than have passed.
        spent = {kind: max(seconds, 0.0) for kind, seconds in self.seconds.items()}
        total = sum(spent.values()) or 1.0
        return {f"goodput/{kind}": seconds / total for kind, seconds in sorted(spent.items())}
