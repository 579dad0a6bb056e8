"""keys.toml is the one place that knows the keys: presets, typed sections, page and defaults agree with it."""

import dataclasses

import pytest
from places import ROOT

from cxr_jax import phantom, rewards
from cxr_jax.config import schema, sections
from cxr_jax.errors import UserError
from cxr_jax.presets import evaluate, rl, sft
from cxr_jax.rl.algorithms import ALGORITHMS
from cxr_jax.weights import pretrained

PRESETS = {"rl": rl, "sft": sft, "evaluate": evaluate}
SECTIONS = [
    section
    for section in vars(sections).values()
    if isinstance(section, type) and dataclasses.is_dataclass(section)
]


WHOLE = ("rl.reward_weights", "data.train", "data.eval")


def names_of(config, prefix=""):
    """Dotted names of the leaves of a config; the reward weights, and sources by name, count as one."""
    names = set()
    for name, value in config.items():
        dotted = prefix + name
        if hasattr(value, "items") and dotted not in WHOLE:
            names |= names_of(value, f"{dotted}.")
        else:
            names.add(dotted)
    return names


def test_every_key_says_what_it_is():
    for key in schema.keys().values():
        assert key.line and not key.line.endswith("."), key.name
        assert set(key.tasks) <= set(schema.TASKS) and set(key.default) == set(key.tasks)
        assert None not in key.default.values(), f"{key.name} lacks a default for a task"


@pytest.mark.parametrize("task", schema.TASKS)
@pytest.mark.parametrize("source", ["phantom", "files"])
def test_defaults_have_the_keys_of_their_task_and_pass_the_checks(task, source):
    config = schema.defaults(task, source)
    schema.check_values(config)
    assert names_of(config) == {
        key.name
        for key in schema.keys().values()
        if task in key.tasks and key.source in ("", source)
    }


@pytest.mark.parametrize("task", schema.TASKS)
def test_every_preset_has_known_keys_only(task):
    for preset in PRESETS[task].PRESETS:
        config = PRESETS[task].get_config(preset)
        assert names_of(config) <= schema.keys().keys()
        assert config.task == task


def test_the_phantom_presets_are_the_defaults():
    for task, module in PRESETS.items():
        config, defaults = module.get_config(), schema.defaults(task)
        if task == "rl":
            assert config.rl.reward_weights.to_dict() == rewards.weights(rewards.CHECKED)
            config.rl.reward_weights = defaults.rl.reward_weights
        assert config.to_dict() == defaults.to_dict()


def test_each_key_is_a_field_of_a_section_and_each_field_a_key():
    fields = set()
    for section in SECTIONS:
        for field in dataclasses.fields(section):
            if field.type in SECTIONS:
                continue
            fields.add(f"{section.PREFIX}.{field.name}" if section.PREFIX else field.name)
    assert fields == schema.keys().keys()


def test_a_section_reads_what_a_config_says():
    config = rl.get_config("dapo")
    config.optim.lr, config.mesh.fsdp = 3e-5, 4
    settings = sections.RunConfig.from_config(config)
    assert (settings.optim.lr, settings.mesh.fsdp) == (3e-5, 4)
    assert (settings.loss.epsilon_high, settings.learner.updates) == (0.28, 4)
    assert settings.rollout.reward_weights == rewards.weights(rewards.CHECKED)
    assert settings.data.size == 224  # phantoms have no such key: the default
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optim.lr = 1.0


def test_the_table_agrees_with_what_it_speaks_of():
    assert (
        schema.choices("data.hospital") == schema.choices("data.ood_hospital") == phantom.HOSPITALS
    )
    assert schema.choices("dtype") == schema.choices("param_dtype") == tuple(pretrained.DTYPES)
    defaults = schema.defaults("rl").rl
    assert ALGORITHMS["corrected"] == {name: defaults[name] for name in ALGORITHMS["corrected"]}


def test_the_page_is_the_table():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == schema.markdown(), "run: python -m scripts.config_page"
    assert all(f"`{key.name.rpartition('.')[2]}`" in page for key in schema.keys().values())


def test_help_has_every_key():
    text = schema.help_text()
    assert all(f"  {key.name}  [" in text and key.line in text for key in schema.keys().values())


def test_max_pixels_keeps_the_aspect_ratio_of_films_and_says_what_an_export_reads():
    config = schema.defaults("sft", "files")
    config.data.update(size=476)
    assert sections.RunConfig.from_config(config).data.pixel_limits == (476**2, 476**2)
    config.data.update(max_pixels=476**2, min_pixels=128**2)
    schema.check_values(config)
    data = sections.RunConfig.from_config(config).data
    assert data.is_native and data.pixel_limits == (128**2, 476**2)
    assert not sections.RunConfig.from_config(schema.defaults("sft")).data.is_native


@pytest.mark.parametrize("most", [783, 1, -1, 1000.5, True, "many", 2**31, None])
def test_a_max_pixels_that_no_film_meets_is_refused(most):
    config = schema.defaults("rl", "files")
    with config.ignore_type():
        config.data.max_pixels = most
    with pytest.raises(UserError, match="config.data.max_pixels=.* must be a whole number, 0, or"):
        schema.check_values(config)
