"""What a run says while it goes: how far, how fast, how long still."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO


def duration(seconds: float) -> str:
    """Write a time as a person says it: 9s, 3m 05s, 2h 07m."""
    seconds = int(round(seconds))
    # Two units at most: a longer time needs no seconds.
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


class Compilations:
    """Counts the programs that this process has compiled or taken from the compilation cache since it was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self._events = 0
        import jax  # here: reading metrics needs none

        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, *details: Any, **named_details: Any) -> None:
        # The same event is reported for a compilation and for a program from the cache.
        self._events += event == "/jax/core/compile/backend_compile_duration"

    def count(self) -> int:
        """Return how many programs there have been."""
        return self._events


class Progress:
    """Prints a line for the first step, the last, and every so often between.

        step   120/2000   6.0%  loss 1.234  reward 0.451  3.2 step/s  51.2 samples/s  ETA 9m 47s

    The same plain lines on a terminal and in a log file. The rate leaves the first step out: it compiles.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every_s: float = 5.0,
        every_steps: int | None = None,
        show: Sequence[str] = ("loss", "reward"),
        unit: str = "samples",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            total: steps of the run.
            start: the step a resumed run begins at.
            every_s: seconds between lines, at most.
            every_steps: steps between lines, at most; None: any number.
            show: the metrics to print, where present.
            unit: what a step uses a number of.
            stream: where to print; None: stderr.
            clock: in seconds.
        """
        self.total, self.show, self.unit = total, show, unit
        self.every_s, self.every_steps = every_s, every_steps
        self._stream, self._clock = stream, clock
        self._step = self._printed_step = start
        # The wait for the next line counts from here.
        self._printed_at = clock()
        self._first: tuple[float, int] | None = None  # when which step was the first to end
        self._items = 0

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, items: int = 0) -> None:
        """Take note of a step that ended.

        Args:
            step: from 1.
            metrics: of the step.
            items: how many samples it used.
        """
        current_time = self._clock()
        # The first step compiles: its samples would spoil the rate.
        if self._first is None:
            self._first = (current_time, step)
        else:
            self._items += items
        self._step = step
        # To stderr by default: stdout is for results.
        if self._is_due(current_time):
            print(
                self.line(current_time, metrics or {}), file=self._stream or sys.stderr, flush=True
            )
            self._printed_at, self._printed_step = current_time, step

    def _is_due(self, current_time: float) -> bool:
        # The first line tells that the run has come alive, the last one that it ends.
        is_first = self._first == (current_time, self._step)
        if is_first or self._step >= self.total:
            return True
        # A run on a fixed rhythm prints at the same steps on every machine.
        if self.every_steps and self._step - self._printed_step >= self.every_steps:
            return True
        return current_time - self._printed_at >= self.every_s

    def line(self, current_time: float, metrics: Mapping[str, Any]) -> str:
        """Write the line of the present step. current_time: as the clock says."""
        # As wide as the last step, so that lines stand below each other.
        step_digits = len(str(self.total))
        # An empty run has no share.
        percentage = 100 * self._step / max(self.total, 1)
        line_parts = [f"step {self._step:{step_digits}d}/{self.total} {percentage:5.1f}%"]
        line_parts += [
            f"{metric_name} {float(metrics[metric_name]):.4g}"
            for metric_name in self.show
            if metric_name in metrics
        ]
        rate_start, first_step = self._first or (current_time, self._step)
        # After the first step there is no rate yet.
        if current_time > rate_start and self._step > first_step:
            steps_per_second = (self._step - first_step) / (current_time - rate_start)
            line_parts.append(f"{steps_per_second:.3g} step/s")
            # A caller that counts no samples gets no rate of them.
            if self._items:
                line_parts.append(f"{self._items / (current_time - rate_start):.3g} {self.unit}/s")
            if self._step < self.total:
                line_parts.append(f"ETA {duration((self.total - self._step) / steps_per_second)}")
            else:
                line_parts.append(f"done in {duration(current_time - rate_start)}")
        return "  ".join(line_parts)
