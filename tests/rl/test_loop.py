"""rl.py: which groups a step learns from, and that it learns from those alone."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cxr_jax.config.sections import RunConfig
from cxr_jax.data.sources import phantom
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.labels import answers
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.metrics.progress import Compilations
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.rl import batches, learner, losses, rollout
from cxr_jax.training import optimizer, trainable
from cxr_jax.weights import pretrained
from experiments import rl as experiment


def test_groups_that_vary_come_first_in_order():
    advantages = np.zeros((6, 4), np.float32)
    advantages[[1, 4, 5], 2] = -1.0
    assert rollout.groups_to_learn(advantages, 2).tolist() == [1, 4]
    assert rollout.groups_to_learn(advantages, 4).tolist() == [
        1,
        4,
        5,
        0,
    ]  # filled up, so that shapes stay
    assert rollout.groups_to_learn(advantages * 0, 3).tolist() == [0, 1, 2]


def terms_of(groups):
    """Two terms whose weighted sum says nothing of group 1; group 0 is flat."""
    a = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1]], np.float32)
    b = np.array([[2, 2, 2, 2], [2, 0, 2, 0], [0, 0, 2, 2]], np.float32)
    return {"accuracy": a[groups].reshape(-1), "format": b[groups].reshape(-1)}


def test_gdpo_takes_groups_whose_terms_vary_though_their_sum_does_not():
    weights = {"accuracy": 1.0, "format": 0.5, "tag_count": 0.0}
    r = ConfigDict(
        dict(advantage="gdpo", scale_rewards="group", prompts_per_step=2, reward_weights=weights)
    )
    terms = terms_of([0, 1, 2])
    reward = (terms["accuracy"] + 0.5 * terms["format"]).reshape(3, 4)
    assert reward[1].std() == 0
    got = rollout.advantages(r, terms, reward)
    assert got["kept"].tolist() == [1, 2]
    alone = {k: v.reshape(2, 4) for k, v in terms_of([1, 2]).items()}
    want = losses.gdpo_advantages(
        alone, {"accuracy": 1.0, "format": 0.5}
    )  # over the groups that are learned from
    np.testing.assert_allclose(got["advantages"][1:], want, rtol=1e-5)
    r.advantage = "grpo"
    assert rollout.advantages(r, terms, reward)["kept"].tolist() == [2, 0]
    r.scale_rewards = "batch"
    got = rollout.advantages(r, terms, reward)["advantages"]
    np.testing.assert_allclose(
        got[2], (reward[2] - reward[2].mean()) / (reward[[2, 0]].std(ddof=1) + 1e-4), rtol=1e-5
    )


def test_a_key_is_of_its_seed_step_prompt_and_sample():
    data = lambda *args: np.asarray(jax.random.key_data(rollout.sampling_keys(*args)))
    first = data(0, 0, 3, 4)
    assert len({tuple(k) for k in first}) == 12
    for other in (data(1, 0, 3, 4), data(0, 1, 3, 4)):
        assert not (first == other).all(1).any()
    np.testing.assert_array_equal(data(0, 0, 2, 4), first[:8])  # not of how many prompts there are
    np.testing.assert_array_equal(
        data(0, 0, 3, 2).reshape(3, 2, -1), first.reshape(3, 4, -1)[:, :2]
    )  # nor samples


@pytest.fixture(scope="module")
def step():
    """One rollout of four prompts x 3 by the embedded model, of which a step learns from two."""
    config = experiment.get_config()
    config.max_completion = 16
    config.rl.update(
        dict(prompts_per_step=2, oversample=2, group_size=3, mask_truncated=False, temperature=2.0)
    )
    m = pretrained.load_starting_model(config.model, config.seed)
    source = phantom.PhantomSource("A", "train", 3)
    grid = PROCESSOR.grid(source.size, source.size)
    prompts = inference_prompts.Prompts(m.tokenizer, m.config, grid, config.max_completion)
    special = tokenizers.special_ids(m.tokenizer, m.config.text.vocab_size)
    # Some words end a completion as well: of 16 tokens few would come to the model's own end.
    words = set(range(300, m.config.text.vocab_size, 8)) - {*special["suppress"]}
    special = {**special, "stop": (*special["stop"], *sorted(words))}
    tx = optax.sgd(1.0)  # the config's schedule starts at a learning rate of 0
    batch = batches.make_batch_fn(RunConfig.from_config(config), source, prompts)(0)
    shown = batch.pop("shown")
    assert shown["prompts"] == [source.prompt] * 4 and len(set(shown["ids"])) == 4
    table = answers.TokenBytes.from_tokenizer(m.tokenizer)
    settings = RunConfig.from_config(config)
    what = trainable.Trainable.create(
        settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
    )
    train, fixed = what.split({"model": m.params}, None)

    def programs(parts, rows=batch):
        config.rl.micro_batches = config.rl.sample_micro_batches = parts
        settings = RunConfig.from_config(config)
        roll = rollout.make_rollout(
            settings.rollout,
            m.config,
            prompts.images,
            special,
            table,
            what,
            load_phrase_bank(None, source.lexicon),
            seed=settings.seed,
            max_completion=settings.max_completion,
        )
        learn = learner.make_learn(
            settings.learner,
            settings.loss,
            m.config,
            prompts.images,
            special,
            tx,
            what,
            max_completion=settings.max_completion,
            remat=settings.remat,
        )
        again = lambda batch, step: roll(train, fixed, batch, step)
        return again(rows, 0), lambda state, batch, ro: learn(state, fixed, batch, ro), again

    new_state = lambda: optimizer.init_state(tx, jax.tree.map(jax.numpy.array, train))
    ro, learn, again = programs(1)
    other = batches.make_batch_fn(RunConfig.from_config(config), source, prompts)(1)
    other.pop("shown")
    return config, batch, ro, learn, new_state, programs, lambda: again(other, 1)


def test_a_step_samples_more_prompts_than_it_learns_from(step):
    config, batch, ro, *_ = step
    assert batch["image"].shape[0] == ro["reward"].shape[0] == 4 and ro["kept"].shape == (2,)
    m = rollout.rollout_metrics(ro)
    assert m["groups/learned"] <= 2
    done = np.asarray(ro["finished"])
    assert m["completions/clipped_ratio"] == pytest.approx(1 - done.mean()) and not done.all()
    assert m["rewards/trace_coverage/std"] == pytest.approx(
        np.asarray(ro["terms"]["trace_coverage"]).std(ddof=1)
    )


def test_truncated_completions_are_masked_if_asked(step):
    config, batch, ro, _, _, programs, _ = step
    assert (ro["train_mask"] == ro["mask"]).all()
    config.rl.mask_truncated = True
    masked = programs(1)[0]
    config.rl.mask_truncated = False
    np.testing.assert_array_equal(
        masked["train_mask"], np.asarray(ro["mask"]) & np.asarray(ro["finished"])[..., None]
    )


def test_the_learner_computes_what_the_sampler_recorded(step):
    """At a temperature of 2: log-probs and the ids that are never drawn are the same on both sides."""
    _, batch, ro, learn, new_state, *_ = step
    metrics = learn(new_state(), batch, ro)[1]
    assert (
        0 < metrics["sampling/sampling_logp_difference/max"] < 1e-4
        and metrics["sampling/outside_0.9_1.1"] == 0
    )


def test_a_step_learns_from_the_kept_groups_alone(step):
    _, batch, ro, learn, new_state, *_ = step
    advantages = np.asarray(jax.random.normal(jax.random.key(0), ro["advantages"].shape))
    update = lambda ro, batch: learn(new_state(), batch, ro)[0]["params"]
    ro = {**ro, "kept": np.array([3, 1]), "advantages": advantages}
    got = update(ro, batch)
    scrambled = {
        **ro,
        "advantages": advantages + np.array([[5.0], [0.0], [-5.0], [0.0]], np.float32),
    }
    noise = {
        **batch,
        "image": np.where(np.array([1, 0, 1, 0], bool)[:, None, None], 0.3, batch["image"]),
    }
    other = update(scrambled, noise)
    changed = update({**ro, "kept": np.array([0, 2])}, batch)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), got, other)
    assert all(jax.tree.leaves(same))
    assert not all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), got, changed))
    )


def test_a_step_in_turns_with_groups_over_several_rows_is_the_same_step(step):
    _, batch, ro, learn, new_state, programs, _ = step
    # As over twelve devices: each prompt three times, for one completion each.
    rows = {name: np.repeat(values, 3, 0) for name, values in batch.items() if name != "prompts"}
    rows["prompts"] = {
        name: np.repeat(values, 3, 1 if name == "positions" else 0)
        for name, values in batch["prompts"].items()
    }
    in_turns, learn_in_turns, _ = programs(2, rows)
    assert ro["mask"].sum(-1).std() > 0  # rows of unequal weight
    np.testing.assert_array_equal(in_turns["tokens"], ro["tokens"])
    np.testing.assert_allclose(in_turns["sampler_log_probs"], ro["sampler_log_probs"], atol=1e-4)
    advantages = np.asarray(jax.random.normal(jax.random.key(0), ro["advantages"].shape))
    ro = {**ro, "advantages": advantages}
    (want, metrics), (got, metrics_in_turns) = (
        learn(new_state(), batch, ro),
        learn_in_turns(new_state(), rows, ro),
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(
            metrics_in_turns[name], value, rtol=1e-3, atol=1e-5, err_msg=name
        )
    start = new_state()["params"]
    for a, b, c in zip(
        *(jax.tree.leaves(x) for x in (got["params"], want["params"], start)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6 + 1e-4 * np.abs(np.asarray(b) - c).max())


def test_a_second_step_compiles_nothing(step):
    _, batch, ro, learn, new_state, _, another = step
    state = learn(new_state(), batch, ro)[0]
    another()["reward"].block_until_ready()
    count = Compilations()
    state, _ = learn(state, batch, {**another(), "kept": ro["kept"]})
    state["step"].block_until_ready()
    assert count.count() == 0
