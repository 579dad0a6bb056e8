"""RunLoop: what happens every K steps happens in order, a stop saves, another error does not, and all is closed."""

import types

import pytest

from cxr_jax.errors import RunFailedError
from cxr_jax.runtime.signals import StoppedError
from cxr_jax.training.run_loop import RunLoop
from cxr_jax.training.train_state import StartState


class Checkpoints:
    """Remembers what is saved; a save is through at once."""

    def __init__(self, log):
        self.log, self.saved = log, 0

    def save(self, step, state, meta):
        self.log.append(("save", step, dict(meta)))
        self.saved = step

    def poll(self):
        pass

    wait = poll

    def drop(self):
        self.log.append("drop")

    def close(self):
        self.log.append("close checkpoints")


class Loader:
    """Gives the numbers of the steps as batches."""

    def __init__(self, start, log):
        self.step, self.log = start, log

    def __next__(self):
        self.step += 1
        return self.step - 1

    def close(self):
        self.log.append("close loader")


@pytest.fixture
def make_loop(tmp_path):
    log = []

    def make(start=0, steps=5, save_every=2, stop_at=None):
        stop = types.SimpleNamespace(unsaved=None)

        def check():
            if stop_at is not None and loop.done == stop_at:
                raise StoppedError("SIGTERM")

        stop.check = check
        begun = StartState(state={"params": start}, train=None, frozen={}, meta={}, step=start)
        folder = types.SimpleNamespace(path=str(tmp_path), about={})
        loop = RunLoop(folder, Checkpoints(log), stop, begun, steps, save_every)
        return loop, Loader(start, log)

    return make, log


def run(loop, loader, log):
    with loop:
        for step, batch in loop.steps(loader):
            assert step == batch == loop.done
            log.append(("step", step))
            loop.finish_step({"params": step + 1})
        log.append("after")
        return loop.take_params()


def test_hooks_and_saves_come_after_the_step_in_their_order(make_loop):
    make, log = make_loop
    loop, loader = make()
    loop.every(2, lambda step: log.append(("groups", step)), before_save=True)
    loop.every(2, lambda step: log.append(("look", step)))
    loop.every(2, lambda step: log.append(("late look", step)), after=2)
    loop.keep("params", lambda: loop.params)
    assert run(loop, loader, log) == 5
    assert log == [
        ("look", 0),
        ("step", 0),
        ("step", 1),
        ("groups", 2),
        ("save", 2, {"params": 2}),
        ("look", 2),
        ("step", 2),
        ("step", 3),
        ("groups", 4),
        ("save", 4, {"params": 4}),
        ("look", 4),
        ("late look", 4),
        ("step", 4),
        ("groups", 5),
        ("save", 5, {"params": 5}),
        ("look", 5),
        ("late look", 5),
        "after",
        "close loader",
        "close checkpoints",
    ]
    assert loop.state is None  # saved: its moments make room


def test_a_resumed_run_looks_again_where_its_checkpoint_is_and_shows_no_groups(make_loop):
    make, log = make_loop
    loop, loader = make(start=4)
    loop.every(2, lambda step: log.append(("groups", step)), before_save=True)
    loop.every(2, lambda step: log.append(("look", step)))
    run(loop, loader, log)
    assert log[:2] == [("look", 4), ("step", 4)]


def test_a_stop_saves_the_last_whole_step(make_loop):
    make, log = make_loop
    loop, loader = make(stop_at=3)
    assert run(loop, loader, log) is None and loop.done == 3
    assert log[-3:] == [("save", 3, {}), "close loader", "close checkpoints"]
    assert loop.stop.unsaved() == 0


def test_a_stop_right_after_a_save_saves_nothing_twice(make_loop):
    make, log = make_loop
    loop, loader = make(stop_at=2)
    run(loop, loader, log)
    assert [entry[1] for entry in log if entry[0] == "save"] == [2]


def test_any_other_error_goes_on_and_saves_nothing(make_loop):
    make, log = make_loop
    loop, loader = make()

    def fail(step):
        raise RunFailedError("no")

    loop.every(3, fail, after=0)
    with pytest.raises(RunFailedError, match="no"):
        run(loop, loader, log)
    assert log[-3:] == ["drop", "close loader", "close checkpoints"]
    assert [entry[1] for entry in log if entry[0] == "save"] == [2]


def test_a_run_that_ends_early_saves_and_goes_on_to_its_end(make_loop):
    make, log = make_loop
    loop, loader = make()
    loop.end_early_if(lambda step: step == 3)
    assert run(loop, loader, log) == 3
    assert [entry[1] for entry in log if entry[0] == "save"] == [2, 3] and "after" in log
