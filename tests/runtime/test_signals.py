"""What a run does when it is asked to stop, when it hangs, and when no step counts. In processes of their own."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import ROOT

from cxr_jax.errors import RunFailedError
from cxr_jax.runtime import layout, signals

BEGIN = """
import os, signal, sys, time
from cxr_jax.runtime import signals
me = os.getpid()
"""


def run(program, send=(), timeout=60):
    """(exit code, stdout, stderr, seconds after the first line) of a program; signals go to it after that line."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for number in send:
        process.send_signal(number)
        time.sleep(0.3)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err, time.monotonic() - began


LOOP = """
stop = signals.Stop(grace=60)
print("ready", flush=True)
try:
    while True:
        time.sleep(0.01)
        stop.{ask}()
except signals.StoppedError as e:
    print("saved on", e)
stop.close()
"""


@pytest.mark.parametrize("ask", ["check", "poll"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_that_asks_is_told(ask, number):
    code, out, err, _ = run(LOOP.format(ask=ask), [number])
    assert code == 0 and err == ""
    assert f"{number.name}: saving after this step (again to stop at once)" in out
    assert out.endswith(f"saved on {number.name}\n")


BUSY = """
stop = signals.Stop(grace={grace})
stop.unsaved = lambda: {unsaved}
import ctypes
for number in (signal.SIGTERM, signal.SIGINT):
    signal.siginterrupt(number, False)
nothing, _ = os.pipe()
print("ready", flush=True)
ctypes.CDLL(None).read(nothing, ctypes.create_string_buffer(1), 1)  # as a compiler: no Python handler runs meanwhile
"""


def test_with_nothing_to_save_it_leaves_from_inside_a_compilation():
    code, out, err, seconds = run(BUSY.format(grace=60, unsaved=0), [signal.SIGTERM])
    assert (code, err) == (0, "") and seconds < 30
    assert "nothing new to save\nthe same command continues from the last checkpoint\n" in out


def test_steps_that_cannot_be_saved_in_time_are_named():
    code, out, err, _ = run(BUSY.format(grace=1, unsaved=3), [signal.SIGTERM])
    assert (code, err) == (0, "") and "no step ended in time: the last 3 are not saved" in out


def test_a_second_signal_ends_it_at_once():
    code, out, _, seconds = run(BUSY.format(grace=60, unsaved=3), [signal.SIGTERM, signal.SIGINT])
    assert code == 128 + signal.SIGINT and "stopped at once" in out and seconds < 30


def test_a_run_that_fails_after_a_signal_has_failed():
    code, out, err, _ = run(
        """
stop = signals.Stop(grace=60)
stop.unsaved = lambda: 3
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.01)
stop.close()
time.sleep(0.5)
sys.exit("the disk is full")
""",
        [signal.SIGTERM],
    )
    assert code == 1 and err == "the disk is full\n" and "not saved" not in out


def test_a_turn_that_takes_too_long_ends_with_a_stack_dump():
    code, out, err, seconds = run("""
stop = signals.Stop(limit=1.0)
print("ready", flush=True)
def hangs():
    time.sleep(50)
stop.check()
hangs()
""")
    assert code == 1 and "Timeout" in err and "in hangs" in err and seconds < 30


def test_turns_in_time_do_not():
    code, _, err, _ = run("""
stop = signals.Stop(limit=2.0)
print("ready", flush=True)
for _ in range(30):
    time.sleep(0.1)
    stop.check()
stop.close()
time.sleep(2.5)
""")
    assert (code, err) == (0, "")


def test_close_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = signals.Stop()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    stop.close()
    stop.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_steps_in_a_row_that_are_not_finite_end_the_run():
    skips = signals.Skips(3)
    skips.look(1, 1)
    skips.look(2, 2)
    skips.look(3, 2)  # a good one
    skips.look(5, 4)  # two steps at once, both skipped
    with pytest.raises(RunFailedError, match="last 3 steps were not finite .*those of step 3$"):
        skips.look(6, 5)
    never = signals.Skips(0)
    never.look(100, 100)
    several = signals.Skips(2, updates=4)
    several.look(1, 1)  # one of its four updates
    several.look(2, 5)
    with pytest.raises(RunFailedError, match="last 2 steps"):
        several.look(3, 9)
    resumed = signals.Skips(2, step=10, skipped=4)
    resumed.look(11, 5)
    with pytest.raises(RunFailedError, match="last 2 steps"):
        resumed.look(12, 6)


def test_programs_are_compiled_while_nobody_watches(monkeypatch):
    """A compilation is not counted as a hang; what runs is."""
    events = []
    monkeypatch.setattr(
        signals.faulthandler, "dump_traceback_later", lambda *_, **__: events.append("watched")
    )
    monkeypatch.setattr(
        signals.faulthandler, "cancel_dump_traceback_later", lambda: events.append("unwatched")
    )
    stop = signals.Stop(limit=1800.0)

    @jax.jit
    def program(state, batch):
        events.append("compiled")
        jax.debug.callback(lambda: events.append("ran"))
        return state + batch

    step = layout.ONE_DEVICE.on_mesh(program, stop.unwatched)
    state = jnp.ones(3)
    for _ in range(2):
        state = jax.block_until_ready(step(state, np.ones(3)))
        jax.effects_barrier()
    stop.close()
    assert events == ["watched", "unwatched", "compiled", "watched", "ran", "ran", "unwatched"]
    np.testing.assert_array_equal(state, 3.0)
