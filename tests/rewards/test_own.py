"""Rewards of the user's: what is refused before a run, what a bad one says at a step, and what a good one is given."""

import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax.config import reward_names
from cxr_jax.config.sections import RolloutConfig
from cxr_jax.errors import UserError
from cxr_jax.rewards import own

MODULE = """
import nowhere_at_all
"""
GOOD = """
import numpy as np
COUNT = 3
def by_ids(tokens, lengths, batch):
    return lengths * 0.5
def by_text(texts, rows):
    return [len(text) for text in texts]
def neither(prompt, answer):
    return 0
class Judge:
    def __call__(self, texts, rows):
        return np.zeros(len(texts))
judge = Judge()
def accuracy(texts, rows):
    return [0.0] * len(texts)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "good_rewards.py").write_text(GOOD)
    (tmp_path / "bad_rewards.py").write_text(MODULE)
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("good_rewards", "bad_rewards", "leaving_rewards"):
        sys.modules.pop(name, None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def one(function):
    return own.OwnReward("mine", function, "texts" in function.__code__.co_varnames, "my:mine")


# ---- Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, said",
    [
        (("reward",), "is not MODULE:FUNCTION"),
        (("m:",), "is not MODULE:FUNCTION"),
        (("m:f*",), "is not MODULE:FUNCTION"),
        (("m:f*two",), "a weight that is no number"),
        (("m:f g",), "is not MODULE:FUNCTION"),
        (("a:f", "b:f*2"), "names 'f' twice"),
        ("m:f", "must be a tuple of texts"),
        ((3,), "must be a tuple of texts"),
    ],
)
def test_names_that_are_none(names, said):
    with pytest.raises(UserError, match="^config.rl.rewards") as refusal:
        reward_names.parse(names)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_weights_stand_in_the_name_or_beside_those_of_the_terms():
    section = lambda **values: (
        RolloutConfig.with_defaults(
            reward_weights={"format": 1.0, "seen": 3.0}, **values
        ).reward_weights
    )
    names = ("a.b:seen", "c:half*0.5", "d/e.py:minus*-2")
    own_weights = {"seen": 3.0, "half": 0.5, "minus": -2.0}
    assert section(rewards=names) == {"format": 1.0, **own_weights}
    assert section(rewards=names, own_rewards_alone=True) == own_weights
    assert section(rewards=("a:plain",))["plain"] == 1.0
    with pytest.raises(UserError, match="seen has two weights"):
        section(rewards=("a.b:seen*2",))


# ---- Import -------------------------------------------------------------------------------------------


def test_both_kinds_are_told_apart_by_their_arguments(folder):
    names = ("good_rewards:by_ids", "good_rewards:by_text*2", "good_rewards:judge")
    rewards = own.load(names)
    assert [(reward.name, reward.on_texts) for reward in rewards] == [
        ("by_ids", False),
        ("by_text", True),
        ("judge", True),
    ]
    (by_file,) = own.load((f"{folder}/good_rewards.py:by_text",))
    assert by_file.of_texts(["ab", ""], [{}, {}]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    "name, said",
    [
        ("no_such_rewards:f", "cannot be imported (ModuleNotFoundError"),
        ("bad_rewards:f", "No module named 'nowhere_at_all'"),
        ("leaving_rewards:f", "cannot be imported (SystemExit)"),
        ("no/such/file.py:f", "cannot be imported (FileNotFoundError"),
        ("good_rewards:missing", "the module has no 'missing'"),
        ("good_rewards:COUNT", "is not callable, but int"),
        ("good_rewards:neither", "takes (prompt, answer), but must take (tokens, lengths, batch)"),
        ("good_rewards:accuracy", "a term of the reward is called 'accuracy'"),
        ("__main__:from_a_script", "was handed over by a script"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(folder, name, said):
    with pytest.raises(UserError, match="^config.rl.rewards: ") as refusal:
        own.load((name,))
    assert name.split("*")[0] in str(refusal.value) and said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_function_that_python_hands_over_needs_no_file():
    def handed(texts, rows):
        return [1.0] * len(texts)

    name = own.hand_over(handed)
    assert own.load((name + "*0.25",))[0].function is handed
    with pytest.raises(UserError, match="give a function by `def`"):
        own.hand_over(lambda texts, rows: [0.0])


def test_other_code_has_another_fingerprint(folder):
    reward = own.load((f"{folder}/good_rewards.py:by_text",))
    before = own.fingerprints(reward)
    assert own.fingerprints(reward) == before and len(before["by_text"]) == 64
    (folder / "good_rewards.py").write_text(GOOD + "#")
    assert own.fingerprints(reward) != before


# ---- What a reward gives ------------------------------------------------------------------------------


TOKENS, LENGTHS = jnp.zeros((2, 3, 5), jnp.int32), jnp.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    "result", [LENGTHS / 2, LENGTHS, LENGTHS > 2, np.ones((2, 3)), [[1, 2, 3], [4, 5, 6]]]
)
def test_numbers_of_any_kind_become_float32(result):
    got = one(lambda tokens, lengths, batch: result).of_tokens(TOKENS, LENGTHS, {})
    assert got.dtype == jnp.float32 and got.tolist() == np.asarray(result, np.float32).tolist()
    flat = np.asarray(result).reshape(-1)
    assert one(lambda texts, rows: flat).of_texts(["x"] * 6, [{}] * 6).tolist() == flat.tolist()


@pytest.mark.parametrize(
    "result", [None, "text", 1.0, LENGTHS[0], LENGTHS[..., None], 1j * LENGTHS]
)
def test_another_shape_is_refused_at_trace_time(result):
    reward = one(lambda tokens, lengths, batch: result)
    with pytest.raises(own.RewardError, match="^my:mine returned"):
        jax.eval_shape(reward.of_tokens, TOKENS, LENGTHS, {})


@pytest.mark.parametrize(
    "result, said",
    [
        (None, "returned None, not 2 numbers"),
        (1.0, "returned float, not 2 numbers"),
        ([1.0], "returned list of length 1, not 2 numbers"),
        ([[1.0], [2.0]], "not 2 numbers"),
        ([[1.0], [2.0, 3.0]], "not 2 numbers"),
        (["a", "b"], "not 2 numbers"),
        ([None, 1.0], "not 2 numbers"),
        ([float("nan"), 1.0], "no finite number (NaN or infinity) for 1 of 2"),
        ([float("inf"), 1e39], "for 2 of 2"),
    ],
)
def test_what_is_no_number_a_text_is_refused(result, said):
    with pytest.raises(own.RewardError) as refusal:
        one(lambda texts, rows: result).of_texts(["a", "b"], [{}, {}])
    assert str(refusal.value).startswith("my:mine ") and said in str(refusal.value)


def test_an_error_of_the_users_code_is_named_and_its_text_is_not_shown():
    def fails(texts, rows):
        raise KeyError(f"report of Jane Doe: {texts[0]}")

    with pytest.raises(
        own.RewardError, match="^my:mine raised KeyError at test_own.py:"
    ) as refusal:
        one(fails).of_texts(["a"], [{}])
    assert "Jane" not in str(refusal.value)

    def fails_too(tokens, lengths, batch):
        return batch["missing"]

    with pytest.raises(own.RewardError, match="raised KeyError at test_own.py:"):
        one(fails_too).of_tokens(TOKENS, LENGTHS, {})


def test_a_reward_cannot_change_what_the_next_one_is_given():
    def greedy(texts, rows):
        rows[0]["id"] = "changed"
        return [float(len(texts)) for _ in range(len(texts))]

    texts, rows = ["a", "b"], [{"id": 1}, {"id": 2}]
    one(greedy).of_texts(texts, rows)
    assert rows == [{"id": 1}, {"id": 2}]


def test_one_that_hangs_is_left_behind():
    hangs = threading.Event()

    def waits(texts, rows):
        hangs.wait()

    with pytest.raises(own.RewardError, match="^my:mine has not returned within 0.05 s"):
        own.call_within(0.05, one(waits), ["a"], [{}])
    hangs.set()

    def leaves(texts, rows):
        sys.exit(1)

    with pytest.raises(own.RewardError, match="raised SystemExit"):
        own.call_within(0, one(leaves), ["a"], [{}])
    assert own.call_within(0, one(lambda texts, rows: [4]), ["a"], [{}]).tolist() == [4.0]
