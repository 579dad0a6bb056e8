"""What a run says while it goes: how far, how fast, how long still."""

import sys
import time


def duration(seconds: float) -> str:
    """9 s, 3m 05s, 2h 07m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


class Compilations:
    """Counts the programs that this process has compiled or taken from the compilation cache since it was made."""

    def __init__(self):
        self._events = 0
        import jax  # here: reading metrics needs none

        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, *_, **__) -> None:
        self._events += event == "/jax/core/compile/backend_compile_duration"

    def count(self) -> int:
        return self._events


class Progress:
    """Prints a line for the first step, the last, and every `every_s` seconds or `every_steps` steps between.

        step   120/2000   6.0%  loss 1.234  reward 0.451  3.2 step/s  51.2 samples/s  ETA 9m 47s

    The same plain lines on a terminal and in a log file. `start`: the step a resumed run begins at. `show`:
    the metrics to print, where present. The rate leaves the first step out: it compiles.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every_s: float = 5.0,
        every_steps: int | None = None,
        show=("loss", "reward"),
        unit: str = "samples",
        stream=None,
        clock=time.monotonic,
    ):
        self.total, self.every_s, self.every_steps, self.show, self.unit = (
            total,
            every_s,
            every_steps,
            show,
            unit,
        )
        self._stream, self._clock = stream, clock
        self._step = self._printed_step = start
        self._printed_at, self._first = clock(), None
        self._items = 0

    def update(self, step: int, metrics: dict | None = None, items: int = 0) -> None:
        """Call after each step (1-based) with its metrics and the number of samples it used."""
        now = self._clock()
        if self._first is None:
            self._first = (now, step)
        else:
            self._items += items
        self._step = step
        if self._due(now):
            print(self.line(now, metrics or {}), file=self._stream or sys.stderr, flush=True)
            self._printed_at, self._printed_step = now, step

    def _due(self, now):
        if self._first == (now, self._step) or self._step >= self.total:
            return True
        if self.every_steps and self._step - self._printed_step >= self.every_steps:
            return True
        return now - self._printed_at >= self.every_s

    def line(self, now: float, metrics: dict) -> str:
        width = len(str(self.total))
        parts = [
            f"step {self._step:{width}d}/{self.total} {100 * self._step / max(self.total, 1):5.1f}%"
        ]
        parts += [f"{name} {float(metrics[name]):.4g}" for name in self.show if name in metrics]
        begun, first_step = self._first
        if now > begun and self._step > first_step:
            rate = (self._step - first_step) / (now - begun)
            parts.append(f"{rate:.3g} step/s")
            if self._items:
                parts.append(f"{self._items / (now - begun):.3g} {self.unit}/s")
            if self._step < self.total:
                parts.append(f"ETA {duration((self.total - self._step) / rate)}")
            else:
                parts.append(f"done in {duration(now - begun)}")
        return "  ".join(parts)
