"""Where a run's time goes, and which steps the profiler traces."""

import contextlib

import jax
import pytest

from cxr_jax.errors import UserError
from cxr_jax.metrics.profile import Profile, parse
from cxr_jax.metrics.time_split import TimeSplit


def test_shares_are_of_what_the_seconds_went_to():
    now = [0.0]
    times = TimeSplit(clock=lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    pass_seconds(1)
    with times.spend("step"):
        pass_seconds(2)
        with times.spend("look"):
            pass_seconds(3)
        # A program that is compiled inside of a step is no step.
        times._hear("/jax/core/compile/backend_compile_duration", 1.5)
        times._hear("/another/event", 100.0)
        pass_seconds(4)
        shares = times.shares()
    assert shares == {
        "goodput/compile": 0.15,
        "goodput/look": 0.3,
        "goodput/start": 0.1,
        "goodput/step": 0.45,
    }
    with contextlib.suppress(ValueError), times.spend("save"):
        pass_seconds(10)
        raise ValueError
    assert times.shares()["goodput/save"] == 0.5 and sum(times.shares().values()) == 1


@pytest.mark.parametrize("steps", ["x", "3", "3:", ":3", "0:2", "3:2", "1:2:3", "-1:2", "1.0:2"])
def test_steps_that_mean_nothing(steps):
    with pytest.raises(UserError, match="^config.profile=.* must be FIRST:LAST"):
        parse(steps)


def test_the_steps_named_are_traced_and_no_others(tmp_path, monkeypatch):
    traced = []

    @contextlib.contextmanager
    def trace(folder):
        traced.append(folder)
        yield

    monkeypatch.setattr(jax.profiler, "trace", trace)
    profile = Profile("2:3", tmp_path)
    done = []
    for step in range(1, 6):
        with profile.of_step(step):
            done.append((step, len(traced)))
    assert done == [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert set(traced) == {str(tmp_path / "profile")}
    with Profile("", tmp_path).of_step(2):
        assert len(traced) == 2
