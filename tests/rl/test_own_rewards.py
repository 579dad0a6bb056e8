"""Rewards of the user's in RL: checked before a run, called between its programs, and a failure that all agree on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import FailedBetweenStepsError, UserError
from cxr_jax.labels import CHEXPERT_14
from cxr_jax.rewards import own
from cxr_jax.rl import checks, own_rewards, rollout
from cxr_jax.rl.reward_columns import RewardColumns
from cxr_jax.runtime.signals import Stop
from experiments import rl as experiment

P, G, C = 3, 2, 4
CALLS = []


def by_length(tokens, lengths, batch):
    return lengths / tokens.shape[-1] + batch["columns"]["density"][:, None]


def by_sides(tokens, lengths, batch):
    return batch["sides"].any((1, 2))[:, None] + 0.0 * lengths


def by_text(texts, rows):
    CALLS.append((texts, rows))
    return [len(text) for text in texts]


def is_nan(texts, rows):
    return [float("nan")] * len(texts)


def config_with(*functions, preset="phantom", **changes):
    config = experiment.get_config(preset)
    config.model = "random:phantom"
    config.rl.update(prompts_per_step=P, oversample=1, group_size=G)
    config.max_completion = C
    config.rl.rewards = tuple(own.hand_over(function) for function in functions)
    for name, value in changes.items():
        config.rl[name] = value
    return config


@pytest.fixture
def films(tmp_path):
    """A manifest of three rows that have columns of their own."""
    rows = []
    for number, name in enumerate("abc"):
        Image.fromarray(np.full((60, 60), 40 * number, np.uint8)).save(tmp_path / f"{name}.png")
        talk = [{"from": "human", "value": "Find abnormalities."}]
        row = {"id": name, "image": f"{name}.png", "conversations": talk, "solution": "Edema"}
        rows.append(row | {"density": number, "scores": [number, 0.5], "grade": f"B{number}"})

    def write(change=lambda rows: None):
        change(rows)
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def films_config(manifest, *functions, columns=("density",)):
    config = config_with(*functions, preset="files")
    config.data.manifest, config.data.image_root = manifest, manifest.rpartition("/")[0]
    config.data.columns = columns
    return config


# ---- Before the run -----------------------------------------------------------------------------------


def test_good_ones_pass_and_those_of_texts_are_tried_once(films):
    CALLS.clear()
    checks.check(films_config(films(), by_length, by_text, columns=("density", "grade")))
    ((texts, rows),) = CALLS
    assert len(texts) == len(rows) == 2 and rows[0]["grade"] in ("B0", "B1", "B2")
    assert {"id", "prompt", "solution", "known", "density", "grade"} == set(rows[0])
    checks.check(config_with(by_sides, own_rewards_alone=True))


@pytest.mark.parametrize(
    "config, said",
    [
        (lambda: config_with(by_length), "by_length raised KeyError at test_own_rewards.py"),
        (lambda: config_with(is_nan), "is_nan gave no finite number"),
        (lambda: config_with(own_rewards_alone=True), "reward_weights weighs nothing"),
        (lambda: config_with(by_sides, rewards=("a:b*nan",)), "reward_weights.b=nan"),
        (lambda: config_with(rewards=("no_such:f",)), "no_such:f: cannot be imported"),
    ],
)
def test_bad_ones_are_refused_before_the_run(config, said):
    with pytest.raises(UserError) as refusal:
        checks.check(config())
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


# ---- Columns ------------------------------------------------------------------------------------------


def test_columns_are_looked_up_by_the_id_of_a_row(films):
    columns = RewardColumns(("grade", "density", "scores"), films())
    assert columns.shapes == {"density": (), "scores": (2,)}
    arrays = columns.arrays(["c", "a", "c"])
    assert arrays["density"].tolist() == [2.0, 0.0, 2.0]
    assert arrays["scores"].dtype == np.float32 and arrays["scores"][0].tolist() == [2.0, 0.5]
    assert columns.rows(["b"]) == [{"grade": "B1", "density": 1, "scores": [1, 0.5]}]


def test_a_batch_holds_all_rows_and_the_arrays_of_those_here(films):
    columns = RewardColumns(("grade", "density"), films())
    keys = columns.of_batch({"ids": ["b", "a"], "prompts": ["What?", "Why?"]}, ["a"])
    assert keys["rows"] == [
        {"id": "b", "prompt": "What?", "grade": "B1", "density": 1},
        {"id": "a", "prompt": "Why?", "grade": "B0", "density": 0},
    ]
    assert keys["columns"]["density"].tolist() == [0.0] and "grade" not in keys["columns"]
    assert RewardColumns().of_batch({"ids": ["x"], "prompts": ["?"]}, ["x"]) == {
        "rows": [{"id": "x", "prompt": "?"}]
    }


def test_columns_of_numbers_in_some_rows_are_no_arrays(films):
    for odd in (None, "high", [1, 2], [], {"a": 1}):
        manifest = films(lambda rows, odd=odd: rows[1].update(density=odd))
        assert RewardColumns(("density",), manifest).shapes == {}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows[1].pop("density"), "line 2: has no density, a column"),
        (lambda rows: rows[2].pop("id"), "line 3: has no id"),
    ],
)
def test_rows_without_a_column_are_refused(films, change, said):
    with pytest.raises(UserError, match="rows.jsonl: ") as refusal:
        RewardColumns(("density",), films(change))
    assert said in str(refusal.value)


def test_columns_that_nobody_reads_are_refused(films):
    with pytest.raises(UserError, match="nobody reads them"):
        checks.check(films_config(films()))


# ---- At a step ----------------------------------------------------------------------------------------


class Words:
    """A tokenizer of one letter a token."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(token) for token in ids)


def a_step():
    """Samples of a rollout without the rewards of texts, with the batch that they come from."""
    texts = [["ab", "abc"], ["", "x"], ["abcd", "abcd"]]
    tokens = np.full((P, G, C), ord("?"), np.int32)
    for p, group in enumerate(texts):
        for g, text in enumerate(group):
            tokens[p, g, : len(text)] = [ord(letter) for letter in text]
    lengths = np.array([[len(text) for text in group] for group in texts], np.int32)
    samples = {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths)}
    samples["terms"] = {"by_sides": jnp.ones((P, G)), "format": jnp.zeros((P, G))}
    solution = np.zeros((P, 14), bool)
    solution[1, CHEXPERT_14.index("Edema")] = True
    batch = {"solution": solution, "known": ~solution, "prompts": {}}
    return samples, batch, [{"id": f"row {p}"} for p in range(P)], texts


@pytest.fixture
def opened():
    """Opens rewards of texts; what listens to signals is closed again."""
    stop = Stop()

    def open_rewards(*functions, **settings):
        config = config_with(*functions, **settings)
        config.rl.reward_weights = {}
        return own_rewards.OwnRewards(RunConfig.from_config(config), Words(), stop)

    yield open_rewards
    stop.close()


@pytest.mark.parametrize("shares", [1, 2])
def test_rewards_of_texts_join_the_others(opened, shares):
    samples, batch, rows, texts = a_step()
    # Over many devices a batch has each prompt in several rows.
    batch = {name: np.repeat(v, shares, 0) if name != "prompts" else v for name, v in batch.items()}
    CALLS.clear()
    whole = opened(by_sides, by_text).complete(samples, batch, rows)
    ((given, told),) = CALLS
    assert given == [text for group in texts for text in group]
    assert [row["id"] for row in told] == [f"row {p}" for p in (0, 0, 1, 1, 2, 2)]
    assert told[2]["solution"] == ["Edema"] and "Edema" not in told[2]["known"]
    want = np.array([[2, 3], [0, 1], [4, 4]], np.float32)
    assert whole["terms"]["by_text"].tolist() == want.tolist()
    np.testing.assert_array_equal(whole["reward"], want + 1)
    assert (np.asarray(whole["advantages"])[2] == 0).all() and whole["kept"].tolist() == [0, 1, 2]
    want_shapes = own_rewards.complete_shapes(
        RunConfig.from_config(config_with(by_text, reward_weights={})),
        {name: samples[name] for name in ("lengths", "terms")},
    )
    assert {name: want_shapes[name].shape for name in ("reward", "advantages", "kept")} == {
        name: whole[name].shape for name in ("reward", "advantages", "kept")
    }


def test_without_rewards_of_ones_own_nothing_is_touched(opened):
    samples = {"reward": object()}
    assert opened().complete(samples, {}, []) is samples


@pytest.mark.parametrize(
    "functions, said",
    [((is_nan,), "is_nan gave no finite number"), ((by_sides, is_nan), "is_nan gave")],
)
def test_a_failure_is_one_of_the_whole_run(functions, said, opened):
    samples, batch, rows, _ = a_step()
    with pytest.raises(FailedBetweenStepsError, match=said) as failure:
        opened(*functions).complete(samples, batch, rows)
    assert "the run is saved" in str(failure.value) and "\n" not in str(failure.value)


def test_a_compiled_reward_that_is_no_number_ends_the_run(opened):
    samples, batch, rows, _ = a_step()
    samples["terms"]["by_sides"] = jnp.full((P, G), jnp.nan)
    with pytest.raises(FailedBetweenStepsError, match="by_sides gave no finite number .* 6 of 6"):
        opened(by_sides).complete(samples, batch, rows)


def test_a_reward_inside_the_program_sees_the_groups(films):
    columns = RewardColumns(("density",), films())
    program = rollout._Rollout(
        **dict.fromkeys(
            ("model_config", "images", "special", "table", "trainable", "bank", "seed")
        ),
        rollout=RunConfig.from_config(config_with(by_length)).rollout,
        max_completion=C,
        own=own.load(tuple(own.hand_over(function) for function in (by_length, by_text))),
    )
    completions = {"tokens": jnp.zeros((P * G, C), int), "lengths": jnp.arange(P * G)}
    batch = {"columns": columns.arrays("abc"), "image": None}
    terms = program.own_terms(batch, completions)
    assert terms.keys() == {"by_length"}
    np.testing.assert_allclose(terms["by_length"], [[0, 0.25], [1.5, 1.75], [3, 3.25]])


def test_rewards_of_tokens_see_a_row_a_prompt():
    samples, *_ = a_step()
    sides = np.arange(P)[:, None, None] > np.zeros((P, 14, 2))
    program = rollout._Rollout(
        rollout=RunConfig.from_config(config_with(by_sides, group_size=G)).rollout,
        **dict.fromkeys(("model_config", "images", "special", "table", "trainable", "bank")),
        seed=0,
        max_completion=C,
        own=(own.OwnReward("mine", by_sides, False, "my:mine"),),
    )
    for shares in (1, 2):
        terms = program.own_terms({"sides": np.repeat(sides, shares, 0)}, samples)
        np.testing.assert_array_equal(terms["mine"], [[0, 0], [1, 1], [1, 1]])
