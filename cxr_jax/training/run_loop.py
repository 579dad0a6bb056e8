"""What the loops of SFT and RL do alike: resume, take batches, log, save, look, stop, and what happens every K steps.

    with RunLoop(...) as loop:
        for step, batch in loop.steps(loader):
            state, metrics = update(loop.state, batch)
            loop.finish_step(state)
        params = loop.take_params()
        ...
    # here after a stop, too: what there was to save is saved

A step is whole or it never was: `finish_step` is called once its last update is made, and what happens every K steps
happens after it, in the order in which a run that is killed at any point resumes to the same bits.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cxr_jax.data.loading import StepLoader
from cxr_jax.errors import FailedBetweenStepsError
from cxr_jax.metrics.profile import Profile
from cxr_jax.metrics.run_log import MetricsWriter
from cxr_jax.metrics.time_split import TimeSplit
from cxr_jax.metrics.trackers import Tracking
from cxr_jax.runtime import processes
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.run_folder import RunFolder, history_of
from cxr_jax.runtime.signals import Stop, StoppedError
from cxr_jax.runtime.trees import Tree
from cxr_jax.training.optimizer import params_to_use
from cxr_jax.training.train_state import StartState

Hook = Callable[[int], object]


@dataclass(frozen=True)
class _Periodic:
    """A hook that is due after every `every` steps beyond `after`, and after the last."""

    hook: Hook
    every: int
    after: int
    before_save: bool

    def is_due(self, step: int, steps: int) -> bool:
        return step > self.after and (step % self.every == 0 or step == steps)


class RunLoop:
    """The loop of a run, from the step that its newest checkpoint holds.

    Attributes:
        state: the train state after the last whole step; None once nothing needs it.
        done: steps that are whole, those before the resume included.
        loader: gives the batches.
        metrics: writes metrics.jsonl.
        times: what the seconds of this process go to.
        step_began: `time.monotonic()` when the step at hand asked for its batch.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        checkpoints: Checkpoints,
        stop: Stop,
        begun: StartState,
        steps: int,
        save_every: int,
    ) -> None:
        """Open the log of the run.

        Args:
            begun: where the run starts or goes on.
            steps: steps of the whole run.
        """
        self.checkpoints, self.stop = checkpoints, stop
        self.state: Tree | None = begun.state
        self.start = self.done = start = begun.step
        self.step_began = 0.0
        self.steps_in_all, self.save_every = steps, save_every
        self._folder, self._tracking = (
            Path(run_folder.path),
            Tracking.of_run(run_folder.about.get("config", {})),
        )
        self.profile = Profile(self._tracking.profile, self._folder)
        # Lines after the checkpoint are cut off: their steps are done again. Those of a look are written anew, too.
        self.metrics = MetricsWriter(
            run_folder.path,
            resume_step=start or -1,
            redo="eval",
            trackers=self._tracking.names,
            numbers=self._tracking.numbers,
            enabled=processes.is_main(),
        )
        if processes.is_main():
            self.metrics.write_changes(history_of(run_folder.about))
        # From here on every second is counted as something.
        self.times = TimeSplit()
        self.times.listen()
        self.loader: StepLoader | None = None
        self._periodic: list[_Periodic] = []
        self._kept: dict[str, Callable[[], Any]] = {}
        self._ends_early: Callable[[int], bool] = lambda step: False

    # ---- What a program sets before it loops ---------------------------------------------------------

    def every(self, steps: int, hook: Hook, *, after: int = -1, before_save: bool = False) -> None:
        """Call `hook(step)` after every so many steps, after the last one, and at the start if that is due.

        Args:
            after: steps up to this one are never due; -1: even step 0, before anything is trained, is.
            before_save: for what a run that resumes from the checkpoint could not make again; never at the start.
        """
        self._periodic.append(_Periodic(hook, steps, after, before_save))

    def keep(self, name: str, value: Callable[[], Any]) -> None:
        """Write `value()`, JSON-able, into every checkpoint as `name`."""
        self._kept[name] = value

    def end_early_if(self, is_over: Callable[[int], bool]) -> None:
        """Ask `is_over(step)` before each step; a run that is over saves and leaves the loop."""
        self._ends_early = is_over

    # ---- The loop --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        # Asked when a signal comes: without steps to save the run may end at once.
        self.stop.unsaved = lambda: self.done - self.checkpoints.saved
        return self

    def steps(self, loader: StepLoader) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) of each step that is left; in between, do what is due after it."""
        self.loader = loader
        # The checkpoint is older than the look that followed it, so that look is made again.
        self._call_due(before_save=False)
        for step in range(self.start, self.steps_in_all):
            if self._ends_early(step):
                self.save()
                return
            self.stop.check()
            self.step_began = time.monotonic()
            with self.times.spend("data"):
                batch = next(loader)
            with self.times.spend("step"), self.profile.of_step(step + 1):
                yield step, batch
            self._after_step()

    @property
    def params(self) -> Tree:
        """What trains, after the last whole step."""
        assert self.state is not None
        return self.state["params"]

    @property
    def params_to_use(self) -> Tree:
        """What is evaluated and exported: what trains, or its mean over the run (`config.optim.ema`)."""
        assert self.state is not None
        return params_to_use(self.state)

    @property
    def data_wait(self) -> float:
        """Seconds that the step at hand waited for its batch."""
        assert self.loader is not None
        return self.loader.last_wait

    @property
    def skipped(self) -> int:
        """Optimizer steps left out so far because a gradient was not finite."""
        assert self.state is not None
        return int(self.state["skipped"])

    def finish_step(self, state: Tree) -> None:
        """Take over the state of a step whose last update is made; from here on it is what a signal saves."""
        self.state = state
        self.done += 1
        # Ends a save that is through without waiting for it; raises what went wrong in the background.
        self.checkpoints.poll()

    def _after_step(self) -> None:
        self._call_due(before_save=True)
        if self.done % self.save_every == 0 or self.done == self.steps_in_all:
            self.save()
        self._call_due(before_save=False)

    def _call_due(self, *, before_save: bool) -> None:
        for periodic in self._periodic:
            is_due = periodic.is_due(self.done, self.steps_in_all)
            if is_due and periodic.before_save == before_save:
                with self.times.spend("look"):
                    periodic.hook(self.done)

    def save(self) -> None:
        """Save the state after the last whole step, with what `keep` named."""
        assert self.state is not None
        kept = {name: value() for name, value in self._kept.items()}
        with self.times.spend("save"):
            self.checkpoints.save(self.done, self.state, kept)

    # ---- The end ---------------------------------------------------------------------------------------

    def take_params(self) -> Tree:
        """Give `params_to_use` after the last step, once it is saved, and let go of the state.

        The optimizer's moments make room for the models that are compared.
        """
        params = self.params_to_use
        self.checkpoints.wait()
        if self.checkpoints.saved == self.done:
            self.state = None
        return params

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Save what a stop has left unsaved and close everything; a stop, but no other error, ends here."""
        is_stop = isinstance(error, StoppedError)
        is_whole = is_stop or isinstance(error, FailedBetweenStepsError)
        try:
            if is_whole and self.done > self.checkpoints.saved:
                self.save()
            if error is not None and not is_whole:
                # A process that fails alone must not wait, on closing, for a save that its peers will not end.
                self.checkpoints.drop()
        finally:
            if self.loader is not None:
                self.loader.close()
            # A run that is stopped, or fails, goes on: what it hands over is that of the end.
            files = [] if error else [self._folder / name for name in self._tracking.files]
            self.metrics.close([file for file in files if file.exists()])
            self.checkpoints.close()
        return is_stop
