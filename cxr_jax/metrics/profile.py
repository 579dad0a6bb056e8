"""A trace of some steps by JAX's profiler, for TensorBoard's profile plugin and for Perfetto."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from cxr_jax.errors import UserError


def parse(steps: str) -> tuple[int, int] | None:
    """Read `config.profile`: the first and the last step that are traced; None for "".

    Raises:
        UserError: for what is no FIRST:LAST.
    """
    # The default of a run.
    if not steps:
        return None
    # Both ends are traced.
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f"config.profile={steps!r} must be FIRST:LAST, as in 10:12; steps count from 1"
        )
    return int(match[1]), int(match[2])


class Profile:
    """Traces the steps that `config.profile` names into `profile/` of the run's folder, if it names any."""

    def __init__(self, steps: str, workdir: Path) -> None:
        self._steps, self._folder = parse(steps), workdir / "profile"

    @contextlib.contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Trace what happens inside if the step, from 1, is one of them; a trace for each step."""
        import jax  # here: reading metrics needs none

        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        # One a step: a run that is stopped, or resumes, leaves whole traces.
        with (
            jax.profiler.trace(str(self._folder)),
            jax.profiler.StepTraceAnnotation("step", step_num=step),
        ):
            yield
