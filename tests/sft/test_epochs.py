"""sft/loop.py: how many steps epochs are."""

import pytest

from cxr_jax.config import schema
from cxr_jax.config.sections import RunConfig
from cxr_jax.data.sources.base import ENDLESS
from cxr_jax.errors import UserError
from cxr_jax.presets import sft as presets
from cxr_jax.sft import loop


def steps_of(rows=100, **changes):
    config = schema.defaults("sft", "files")
    config.update(batch_size=64, **changes)
    return loop.steps_of(RunConfig.from_config(config), range(rows))


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"), [(2, 256, 8), (1, 65, 2), (0.5, 64, 1), (0.1, 3, 1), (3, 1000, 47)]
)
def test_epochs_are_steps_that_see_every_row_so_often(capsys, epochs, rows, steps):
    assert steps_of(rows, steps=0, epochs=float(epochs)) == steps
    said = f"config.epochs={epochs}: {steps} steps of 64 for {rows:,} rows\n"
    assert capsys.readouterr().out == said


def test_steps_alone_stay(capsys):
    assert steps_of(steps=7) == 7 and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (9, {"steps": 5, "epochs": 2.0}, "config.epochs=2 and config.steps=5: one of both says"),
        (9, {"steps": 0}, "config.epochs=0 and config.steps=0: one of both says"),
        (ENDLESS, {"steps": 0, "epochs": 2.0}, "config.epochs must be 0 for phantoms"),
    ],
)
def test_both_neither_and_epochs_of_phantoms_are_refused(rows, changes, message):
    with pytest.raises(UserError, match=message):
        steps_of(rows, **changes)


@pytest.mark.parametrize("task", ["rl", "sft"])
def test_no_steps_at_all_are_refused_where_there_are_no_epochs(task):
    config = schema.defaults(task, "files")
    config.steps = 0
    if task == "sft":
        schema.check_values(config)
    else:
        with pytest.raises(UserError, match="config.steps=0"):
            schema.check_values(config)


def test_the_published_recipe_is_two_epochs():
    settings = RunConfig.from_config(presets.get_config("nv_reason_3b"))
    assert settings.epochs == 2 and loop.steps_of(settings, range(256)) == 8
