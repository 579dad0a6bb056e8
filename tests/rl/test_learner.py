"""learner.py: one jitted step against the same updates made by hand, and what must change nothing."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from cxr_jax.config.sections import PolicyLossConfig, RunConfig
from cxr_jax.data import prompts as data_prompts
from cxr_jax.inference import compaction
from cxr_jax.inference import prompts as inference_prompts
from cxr_jax.models import network
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.image_batches import SquareImages
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR
from cxr_jax.rl import learner, losses
from cxr_jax.training import log_probs, micro_batches, needed_slots, optimizer, targets
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import pretrained
from experiments import rl as experiment

SIDE, GRID, P, G, C = 56, (1, 4, 4), 4, 2, 6


@pytest.fixture(scope="module")
def world():
    """A small untrained model, and a rollout of random completions: ragged, some truncated."""
    tokenizer = tokenizers.load(pretrained.PHANTOM)
    model_config = tiny_model.small_phantom(tokenizer)
    params = tiny_model.draw_params(model_config, seed=1)
    params["text"]["embed"]["embedding"] *= 20.0
    prompts = inference_prompts.Prompts(tokenizer, model_config, GRID, C)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, C + 1, (P, G))
    finished = rng.random((P, G)) < 0.7
    mask = np.arange(C) < lengths[:, :, None]
    image = rng.random((P, SIDE, SIDE)).astype(np.float32)
    ro = {
        "tokens": rng.integers(0, 300, (P, G, C)).astype(np.int32),
        "mask": mask,
        "train_mask": mask & finished[:, :, None],
        "lengths": lengths.astype(np.int32),
        "finished": finished,
        "sampler_log_probs": np.full((P, G, C), -5.0, np.float32),
        "reward": rng.random((P, G)).astype(np.float32),
        "advantages": rng.normal(0, 1, (P, G)).astype(np.float32),
        "kept": np.arange(P),
    }
    batch = {"image": image, "prompts": prompts.encode([data_prompts.FIND_PROMPT] * P)}
    completions = targets.Completions(tokenizer, C).encode(["Edema.", "No."])
    batch["replay"] = {
        "image": image[:2],
        "prompts": prompts.encode([data_prompts.FIND_PROMPT] * 2),
        **completions,
    }
    special = tokenizers.special_ids(tokenizer, model_config.text.vocab_size)
    batch, ro = jax.tree.map(jnp.asarray, (batch, ro))
    w = types.SimpleNamespace(
        config=model_config, params=params, batch=batch, ro=ro, special=special
    )
    w.logprobs = jax.jit(lambda params: logprobs(w, params))
    return w


def make(w, **knobs):
    """(learn, new state, config) of plain gradient descent with a rate of 1."""
    config = experiment.get_config()
    config.max_completion = C
    config.rl.update(dict(prompts_per_step=P, oversample=1, group_size=G, **knobs))
    tx = optax.sgd(1.0)
    settings = RunConfig.from_config(config)
    trainable = Trainable.create(
        settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
    )
    learn = learner.make_learn(
        settings.learner,
        settings.loss,
        w.config,
        SquareImages(model_config=w.config, grid=GRID),
        w.special,
        tx,
        trainable,
        max_completion=C,
        remat=settings.remat,
    )
    return (
        learn,
        lambda: optimizer.init_state(tx, {"model": jax.tree.map(jnp.array, w.params)}),
        config,
    )


@pytest.fixture(scope="module")
def base(world):
    return make(world)


def step(made, batch, ro, reference=None):
    learn, new_state, _ = made
    state, metrics = learn(new_state(), {}, batch, ro, reference)
    return state["params"]["model"], {k: float(v) for k, v in metrics.items()}


def logprobs(w, params, at=slice(None)):
    """[P, G, C], for the prompts `at`."""
    prompts = {k: v[:, at] if k == "positions" else v[at] for k, v in w.batch["prompts"].items()}
    suppress = np.isin(np.arange(w.config.text.vocab_size), w.special["suppress"])
    features = network.vision(params, w.config, PROCESSOR.patchify(w.batch["image"][at]), GRID)
    return log_probs.completion_log_probs(
        params, w.config, features, prompts, w.ro["tokens"][at], w.ro["mask"][at], suppress=suppress
    )[0]


def loss(w, logp, old, knobs, at=slice(None), sampler=None, reference=None, **options):
    rows = lambda x: x.reshape(-1, C)
    mask, trained = rows(w.ro["mask"][at]), rows(w.ro["train_mask"][at])
    totals = losses.divisors(
        mask, trained, aggregation=knobs["aggregation"], denominator=knobs["denominator"]
    )
    settings = PolicyLossConfig.with_defaults(
        epsilon=knobs["epsilon"],
        epsilon_high=knobs["epsilon_high"],
        aggregation=knobs["aggregation"],
        **options,
    )
    return losses.policy_loss(
        rows(logp),
        rows(old),
        w.ro["advantages"][at].reshape(-1),
        trained,
        settings,
        max_tokens=C,
        divisors=totals,
        sampler_log_probs=sampler,
        reference_log_probs=None if reference is None else rows(reference),
    )[0]


def assert_same(got, want, start):
    """Parameters equal to 1e-4 of how far a leaf moved from `start`."""
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, start)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-4 * float(np.abs(np.subtract(b, c)).max()))


def moved(a, b):
    return any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_one_update_is_a_gradient_step(world, base):
    got, metrics = step(base, world.batch, world.ro)
    knobs = base[2].rl
    value, grads = jax.jit(
        jax.value_and_grad(
            lambda p: (lambda x: loss(world, x, jax.lax.stop_gradient(x), knobs))(
                logprobs(world, p)
            )
        )
    )(world.params)
    assert_same(got, jax.tree.map(np.subtract, world.params, grads), world.params)
    assert metrics["loss"] == pytest.approx(float(value), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    assert metrics["clip_ratio/region_mean"] == 0  # on-policy nothing is clipped
    gap = np.abs(np.asarray(world.logprobs(world.params)) + 5.0)[world.ro["mask"]]
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean(), rel=1e-3)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(gap.max(), rel=1e-3)


@pytest.mark.parametrize(
    "knobs",
    [
        {"sampler_correction": "tis", "sampler_cap": 1.5, "denominator": "all"},
        {"aggregation": "constant", "micro_batches": 2},
    ],
)
def test_knobs_reach_the_loss(world, monkeypatch, knobs):
    for name, value in {"SHORTEST": 4, "GRAIN": 2}.items():
        monkeypatch.setattr(
            compaction, name, value
        )  # so that micro-batches of short completions take fewer slots
    assert compaction.stage_ends(C) == [2, 4, 6]
    logp = np.asarray(world.logprobs(world.params))
    off = np.random.default_rng(1).normal(0, 0.5, logp.shape).astype(np.float32)
    lengths = jnp.minimum(world.ro["lengths"], jnp.array([[2], [6], [2], [6]]))
    mask = jnp.arange(C) < lengths[:, :, None]
    ro = {
        **world.ro,
        "sampler_log_probs": logp + off,
        "lengths": lengths,
        "mask": mask,
        "train_mask": world.ro["train_mask"] & mask,
    }
    made = make(world, **knobs)
    got, metrics = step(made, world.batch, ro)
    r, w = made[2].rl, types.SimpleNamespace(**{**vars(world), "ro": ro})
    options = {k: r[k] for k in ("sampler_correction", "sampler_cap")}

    def of(params):
        x = logprobs(w, params)
        return loss(
            w,
            x,
            jax.lax.stop_gradient(x),
            r,
            sampler=ro["sampler_log_probs"].reshape(-1, C),
            **options,
        )

    value, grads = jax.jit(jax.value_and_grad(of))(world.params)
    assert_same(got, jax.tree.map(np.subtract, world.params, grads), world.params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-4, abs=1e-7)


def test_several_updates_keep_the_log_probs_of_the_rollout(world):
    made = make(
        world,
        num_iterations=2,
        minibatches=2,
        micro_batches=2,
        aggregation="sequence",
        epsilon=0.05,
        beta=0.5,
    )
    other = jax.tree.map(lambda leaf: leaf * 1.01, world.params)
    got, metrics = step(made, world.batch, world.ro, other)
    knobs, params = made[2].rl, world.params
    old, reference = world.logprobs(params), world.logprobs(other)

    def update(params, at):
        f = lambda p: loss(
            world,
            logprobs(world, p, at),
            old[at],
            knobs,
            at,
            reference=reference[at],
            beta=knobs["beta"],
        )
        return jax.tree.map(jnp.subtract, params, jax.grad(f)(params))

    update = jax.jit(update)
    for at in (np.array([0, 2]), np.array([1, 3])) * 2:  # minibatch i: groups i, i + 2
        params = update(params, at)
    assert_same(got, params, world.params)
    assert metrics["clip_ratio/region_mean"] > 0


def test_a_reference_pulls_back(world, base):
    made = make(world, beta=0.5)
    same, metrics = step(made, world.batch, world.ro, world.params)
    plain = step(base, world.batch, world.ro)[0]
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert_same(same, plain, world.params)  # k3 has no gradient where policy and reference are one
    other = jax.tree.map(lambda x: x * 1.01, world.params)
    pulled, metrics = step(made, world.batch, world.ro, other)
    assert metrics["kl"] > 1e-6 and moved(pulled, same)


def test_replay_adds_the_gradient_of_sft(world, base, monkeypatch):
    # In as few slots as its texts need, where it is not computed as short as this.
    monkeypatch.setattr(needed_slots, "LEAST_SLOTS", 1)
    monkeypatch.setattr(needed_slots, "GRAIN", 4)
    made = make(world, replay_weight=0.3, micro_batches=2)
    got, metrics = step(made, world.batch, world.ro)
    replay = world.batch["replay"]

    def ce(params):
        features = network.vision(params, world.config, PROCESSOR.patchify(replay["image"]), GRID)
        return log_probs.completion_loss(
            params, world.config, features, replay, replay["mask"].sum()
        )[0]

    value, grads = jax.jit(jax.value_and_grad(ce))(world.params)
    alone = step(base, world.batch, world.ro)[0]
    assert_same(got, jax.tree.map(lambda p, g: p - 0.3 * g, alone, grads), world.params)
    assert metrics["replay_loss"] == pytest.approx(0.3 * float(value), rel=1e-4)


@pytest.mark.parametrize("what", ["no advantage", "all truncated"])
def test_nothing_to_learn_changes_nothing(world, base, what):
    nothing = {
        "no advantage": {"advantages": np.zeros((P, G), np.float32)},
        "all truncated": {"train_mask": np.zeros((P, G, C), bool)},
    }[what]
    got, metrics = step(base, world.batch, {**world.ro, **nothing})
    assert not moved(got, world.params) and metrics["loss"] == 0 and metrics["skipped_steps"] == 0
    assert np.isfinite(list(metrics.values())).all()


def test_an_update_that_is_not_finite_is_left_out_and_counted(world, base):
    image = world.batch["image"].at[1].set(np.nan)
    got, metrics = step(base, {**world.batch, "image": image}, world.ro)
    assert not moved(got, world.params) and metrics["skipped_steps"] == 1


def test_groups_of_about_equal_length_share_a_micro_batch():
    lengths = np.array([[9, 1], [3, 3], [8, 8], [1, 2]])
    order = learner.order_groups(lengths, np.ones(4, bool), 2)
    parts = micro_batches.cut({"lengths": lengths[np.asarray(order)]}, 2)["lengths"]
    assert sorted(np.asarray(parts).max((1, 2)).tolist()) == [3, 9]


def test_groups_that_are_not_needed_share_a_micro_batch():
    lengths, needed = (
        np.array([[9, 1], [3, 3], [8, 8], [1, 2]]),
        np.array([True, False, False, True]),
    )
    order = np.asarray(learner.order_groups(lengths, needed, 2))
    parts = micro_batches.cut({"needed": needed[order]}, 2)["needed"]
    assert np.asarray(parts).tolist() == [[False, False], [True, True]]
    computed = learner.is_computed(needed[order], 2)
    np.testing.assert_array_equal(computed, needed[order])
    # Something is computed where nothing is needed.
    assert np.asarray(learner.is_computed(np.zeros(4, bool), 2)).tolist() == [False, True] * 2


def test_the_shortest_flat_groups_fill_up_a_part_that_is_computed():
    lengths = np.array([[4, 4], [2, 1], [8, 7], [9, 3], [6, 6], [5, 5]])
    needed = np.array([True, False, True, False, True, False])
    order = np.asarray(learner.order_groups(lengths, needed, 3))
    parts = micro_batches.cut({"longest": lengths[order].max(1)}, 3)["longest"]
    assert np.asarray(parts).tolist() == [[9, 5], [2, 4], [6, 8]]


def test_flat_groups_are_not_computed(world, base):
    # Nothing of the first trains, the two others have no advantage; the longest two of these are not looked at.
    ro, image = dict(world.ro), world.batch["image"]
    ro["train_mask"] = ro["train_mask"].at[0].set(False)
    ro["advantages"] = ro["advantages"].at[jnp.array([1, 2])].set(0.0)
    assert np.asarray(ro["lengths"]).max(1).tolist() == [6, 4, 2, 1]
    damaged = {**world.batch, "image": image.at[jnp.array([0, 1])].set(jnp.nan)}
    got, metrics = step(make(world, micro_batches=2), damaged, ro)
    expected, whole = step(base, world.batch, ro)
    assert metrics["skipped_steps"] == 0
    assert metrics["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_a_group_over_several_rows_is_one_group(world, base):
    batch = {name: world.batch[name] for name in ("image", "prompts")}
    rows = {
        "image": jnp.repeat(batch["image"], G, axis=0),
        "prompts": {
            name: jnp.repeat(values, G, axis=1 if name == "positions" else 0)
            for name, values in batch["prompts"].items()
        },
    }
    # Not all are kept, and not in their order.
    ro = {**world.ro, "kept": jnp.array([2, 0])}
    got, metrics = step(base, rows, ro)
    want, expected = step(base, batch, ro)
    assert_same(got, want, world.params)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_does_not_change_within_a_rollout_is_computed_once(world, monkeypatch):
    seen, scored = [], []
    see, score = SquareImages.features, learner.completion_log_probs
    monkeypatch.setattr(
        SquareImages, "features", lambda *args, **kw: seen.append(1) or see(*args, **kw)
    )
    monkeypatch.setattr(
        learner, "completion_log_probs", lambda *args, **kw: scored.append(1) or score(*args, **kw)
    )
    learn, new_state, _ = make(world, num_iterations=3, beta=0.1)
    arguments = {}, world.batch, world.ro, world.params
    jax.eval_shape(learn, new_state(), *arguments)
    # The policy before the updates, the reference, and the policy in an update.
    assert (len(seen), len(scored)) == (3, 3)

    # A frozen tower sees the same for all of them.
    frozen, train = ({"model": dict(world.params)} for _ in range(2))
    frozen["model"] = {"vision": train["model"].pop("vision")}
    state = optimizer.init_state(optax.sgd(1.0), train)
    seen.clear()
    learn = make(world, num_iterations=3, beta=0.1, minibatches=2)[0]
    jax.eval_shape(learn, state, frozen, *arguments[1:])
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("knobs", "is_skipped"),
    [
        ({"micro_batches": 2}, True),
        ({"micro_batches": 2, "num_iterations": 2}, True),
        ({"micro_batches": 1}, False),
        # A group without an advantage is pulled to the reference; and it divides its own micro-batch.
        ({"micro_batches": 2, "beta": 0.1}, False),
        ({"micro_batches": 2, "aggregation": "token_local"}, False),
    ],
    ids=str,
)
def test_groups_that_count_are_always_computed(world, knobs, is_skipped):
    learn, new_state, _ = make(world, **knobs)
    reference = world.params if knobs.get("beta") else None
    program = jax.make_jaxpr(learn)(new_state(), {}, world.batch, world.ro, reference)
    assert (" cond[" in str(program)) == is_skipped


def test_a_short_part_is_computed_in_fewer_slots():
    ends, seen = [2, 4, 6], []

    def fn(part):
        seen.append(part["samples"]["mask"].shape[2])
        return part["samples"]["mask"].sum() + part["samples"]["answer"].sum(), {
            "of_tokens": part["samples"]["mask"] * 2.0
        }

    ro = {
        "mask": np.where(np.arange(6) < 3, 1.0, 0.0) * np.ones((2, 1, 1)),
        "lengths": np.array([[3], [2]]),
    }
    total, out = learner.in_needed_slots(fn, ends)(
        {"samples": {**ro, "answer": np.ones((2, 1, 6))}}
    )  # not of tokens
    assert seen == ends and total == 6 + 12
    np.testing.assert_array_equal(out["of_tokens"], 2 * ro["mask"])
