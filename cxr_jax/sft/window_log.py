"""What SFT steps leave for people: a line of metrics every so many steps, the means since the line before."""

import sys
import time
from typing import Any

import jax
import numpy as np

from cxr_jax.config.sections import RunConfig
from cxr_jax.data.sources.base import ENDLESS
from cxr_jax.metrics.progress import Progress
from cxr_jax.runtime.signals import Skips
from cxr_jax.runtime.trees import Tree
from cxr_jax.training import optimizer as optimizers
from cxr_jax.training.run_loop import Hook, RunLoop


class WindowLog:
    """Collects the metrics of steps on the device and writes their means when a line is due."""

    def __init__(self, settings: RunConfig, loop: RunLoop, meta: dict[str, Any], rows: int) -> None:
        """Go on from what the checkpoint kept.

        Args:
            meta: of the checkpoint; {} of a new run.
            rows: that there are to train on, ENDLESS of phantoms.
        """
        self._rows = rows
        self._settings, self._loop = settings, loop
        from_zero = optimizers.began_from_zero(meta)
        self._learning_rate = optimizers.learning_rate(
            settings.optim, settings.steps, from_zero=from_zero
        )
        loop.keep("from_zero", lambda: from_zero)
        self._progress = Progress(
            settings.steps,
            start=loop.start,
            show=("loss", "locate_loss"),
            unit="samples",
            stream=sys.stdout,
        )
        self._skips = Skips(settings.max_skipped, loop.start, loop.skipped)
        # Metrics since the last line: kept in checkpoints, so that a resumed run writes the same lines.
        self._window: list[Tree] = list(meta.get("window", []))
        self._seconds_before: float = meta.get("seconds", 0.0)
        self._began = time.monotonic()
        self._evaluating = 0.0
        self._waited = 0.0
        self._line_began, self._evaluating_then = self._began, 0.0
        loop.keep("seconds", self.seconds)
        loop.keep("window", self._window_as_floats)

    def seconds(self) -> float:
        """Tell the seconds that the run has taken, before a resume too, looks and saves included."""
        return self._seconds_before + time.monotonic() - self._began

    def _window_as_floats(self) -> list[dict[str, float]]:
        return [{name: float(value) for name, value in row.items()} for row in self._window]

    def off_the_clock(self, hook: Hook) -> Hook:
        """Wrap a hook whose time is not counted in samples a second."""

        def timed(step: int) -> None:
            began = time.monotonic()
            hook(step)
            self._evaluating += time.monotonic() - began

        return timed

    def add(self, metrics: Tree) -> None:
        """Take the metrics of a step, which may still be computing."""
        self._waited += self._loop.data_wait
        if self._window:
            # One step ahead of the device, no more: so a wait for data is a wait for data.
            jax.block_until_ready(self._window[-1])
        self._window.append(metrics)

    def end_step(self) -> None:
        """Write a line if the step that has just become whole is due for one.

        Raises:
            RunFailedError: after too many steps in a row whose gradients were not finite.
        """
        settings, done = self._settings, self._loop.done
        if done % settings.log_every and done != settings.steps:
            return
        last = self._window[-1]
        row = {
            name: float(np.mean([float(step[name]) for step in self._window if name in step]))
            for name in last
        }
        now = time.monotonic()
        samples = settings.batch_size * (done - self._loop.start)
        row["samples_per_second"] = samples / (now - self._began - self._evaluating)
        looked = self._evaluating - self._evaluating_then
        row["perf/data_wait_share"] = self._waited / (now - self._line_began - looked)
        row["learning_rate"] = float(self._learning_rate(done - 1))
        # Phantoms never come again, so there is nothing to count.
        row |= self._loop.times.shares()
        if self._rows != ENDLESS:
            row["epoch"] = done * settings.batch_size / self._rows
        self._waited, self._line_began, self._evaluating_then = 0.0, now, self._evaluating
        self._loop.metrics.write(done, row, kind="train")
        self._progress.update(done, row, items=settings.batch_size * settings.log_every)
        self._skips.look(done, int(last["skipped"]))
        self._window = []
