"""A run from Python: which config it makes, what it refuses, and that a script's own flags stay its own."""

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

import cxr_jax
from cxr_jax import run
from cxr_jax.errors import UserError
from cxr_jax.presets import rl as rl_preset


def test_each_way_to_say_a_config():
    by_name = run.resolve("rl:files", {"steps": 7, "optim": {"lr": 1e-3}})
    assert by_name.data.source == "files" and by_name.steps == 7 and by_name.optim.lr == 1e-3
    by_keys = run.resolve(
        {"task": "rl", "data": {"source": "files"}, "steps": 7}, {"optim.lr": 1e-3}
    )
    assert by_keys == by_name
    given = rl_preset.get_config("files")
    assert run.resolve(given, {"steps": 7, "optim.lr": 1e-3}) == by_name and given.steps == 5
    assert run.resolve("experiments/rl.py:dapo", {}).rl.epsilon_high == 0.28
    films = run.resolve({"task": "sft", "data.source": "files"}, {})
    assert films.locate_steps == 0 and "manifest" in films.data
    weighed = run.resolve("rl", {"rl.reward_weights.mine": 2.0, "lora.targets": ["vision"]})
    assert weighed.rl.reward_weights.mine == 2.0 and weighed.lora.targets == ("vision",)


@pytest.mark.parametrize(
    "config, overrides, said",
    [
        ("rl:nope", {}, "no preset 'nope'"),
        ("nope.py", {}, "there is no such file"),
        ({"task": "fly"}, {}, "config.task='fly'"),
        ({"data.source": "dreams"}, {}, "config.data.source='dreams'"),
        ("rl", {"rl.group": 3}, "no key 'rl.group'; did you mean 'rl.group_size'?"),
        ("rl", {"steps.more": 3}, "no key 'steps.more'"),
        ("rl", {"steps": "many"}, "config.steps='many'"),
        ("rl", {"steps": 0}, "config.steps=0"),
        (ConfigDict({"steps": 3}), {}, "config.task=None"),
    ],
)
def test_bad_configs_raise_and_leave_nothing(tmp_path, config, overrides, said):
    with pytest.raises(UserError) as refusal:
        cxr_jax.train(config, tmp_path / "run", overrides)
    assert said in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_bad_rewards_and_changes_raise(tmp_path):
    def reward(texts, rows):
        return [0.0]

    for config, more, said in (
        ("sft", {"rewards": [reward]}, "config.task='sft' has none"),
        ("rl", {"rewards": [reward]}, "reward returned list of length 1, not 2 numbers"),
        ("rl", {"rewards": [(reward, 0.5), reward]}, "names 'reward' twice"),
        ("rl", {"rewards": [3]}, "int has no name"),
        ("rl", {"may_change": ["seed"]}, "--may_change=seed"),
    ):
        with pytest.raises(UserError) as refusal:
            cxr_jax.train(config, tmp_path / "run", **more)
        assert said in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_flags_of_a_script_stay_its_own():
    code = "import cxr_jax.run, absl.flags as f; f.DEFINE_string('config', '', ''); f.DEFINE_string('workdir', '', '')"
    subprocess.run([sys.executable, "-c", code], check=True)
