"""optimizer.py: which leaves decay, float32 masters, and updates that are skipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from cxr_jax.config import schema
from cxr_jax.config.sections import OptimizerConfig, RunConfig
from cxr_jax.runtime import trees
from cxr_jax.training import optimizer
from cxr_jax.training.setup import as_computed

CONFIG = dict(
    lr=0.1,
    warmup_steps=1,
    final_fraction=0.1,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.5,
    clip_norm=1.0,
)


@pytest.mark.parametrize(("grad_dtype", "is_wide"), [("compute", False), ("float32", True)])
def test_the_type_of_sums_is_in_the_model_s_config(grad_dtype, is_wide):
    defaults = schema.defaults("sft", "phantom")
    assert defaults.optim.grad_dtype == "compute"
    defaults.optim.grad_dtype = grad_dtype
    computed = as_computed(tiny_model.CFG, RunConfig.from_config(defaults))
    assert (computed.text.wide_gradients, computed.vision.wide_gradients) == (is_wide, is_wide)


def config(**changes):
    return OptimizerConfig.with_defaults(**CONFIG | changes)


@pytest.fixture
def params():
    return {
        "vision": {"patch": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}},
        "text": {"layers": {"norm1": {"scale": jnp.ones(2)}, "q": {"kernel": jnp.ones((2, 2))}}},
        "merger": {"ln_q": {"scale": jnp.ones(2)}},
    }


def leaves(tree):
    return {
        trees.path_string(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def two_steps(params, grads, **changes):
    """After one step, whose warm-up rate is 0, and one at the full rate."""
    tx = optimizer.make_optimizer(config(**changes), steps=10, from_zero=True)
    state = optimizer.init_state(tx, params)
    step = jax.jit(lambda s, g: optimizer.guarded_update(tx, s, g)[0])
    return step(step(state, grads), grads)


def test_decay_mask(params):
    assert {k: bool(v) for k, v in leaves(optimizer.decay_mask(params)).items()} == {
        "vision/patch/kernel": True,
        "vision/patch/bias": False,
        "text/layers/norm1/scale": False,
        "text/layers/q/kernel": True,
        "merger/ln_q/scale": False,
    }


def test_decay_reaches_matrices_only(params):
    after = leaves(two_steps(params, jax.tree.map(jnp.zeros_like, params))["params"])
    for name, value in after.items():
        np.testing.assert_allclose(
            value, 1 - 0.1 * 0.5 if name.endswith("kernel") else 1, rtol=1e-6
        )


def test_narrow_parameters_follow_float32_masters(params):
    """Steps far below bfloat16's resolution add up, and give what float32 parameters would."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optimizer.make_optimizer(config(lr=1e-4, weight_decay=0.0, warmup_steps=1), 400)
    step = jax.jit(lambda s, g: optimizer.guarded_update(tx, s, g)[0])
    wide, both = optimizer.init_state(tx, params), optimizer.init_state(tx, narrow)
    assert "master" not in wide
    for _ in range(100):
        wide, both = (
            step(wide, grads),
            step(both, jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)),
        )
    for name, value in leaves(both["params"]).items():
        assert value.dtype == jnp.bfloat16 and (value < 1).all(), name
        np.testing.assert_array_equal(leaves(both["master"])[name], leaves(wide["params"])[name])
        np.testing.assert_array_equal(value, leaves(wide["params"])[name].astype(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(both["opt_state"]) if x.ndim} == {np.dtype(np.float32)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_non_finite_gradients_are_skipped_and_counted(params, bad):
    tx = optimizer.make_optimizer(config(), steps=10)
    good = jax.tree.map(jnp.ones_like, params)
    poisoned = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(bad), good)
    step = jax.jit(lambda s, g: optimizer.guarded_update(tx, s, g))
    state = step(step(optimizer.init_state(tx, params), good)[0], good)[0]
    after, norm = step(state, poisoned)
    assert not np.isfinite(norm)
    assert (int(after["step"]), int(after["skipped"])) == (
        3,
        1,
    )  # the position in the data moves on
    before, now = leaves({k: state[k] for k in ("params", "opt_state")}), leaves(after)
    changed = [k for k in before if not np.array_equal(before[k], now[k])]
    assert (
        len(changed) == 1 and now[changed[0]] == before[changed[0]] + 1
    )  # the schedule's count of steps
    again, _ = step(after, good)
    assert int(again["skipped"]) == 1 and not np.array_equal(
        again["params"]["text"]["layers"]["q"]["kernel"],
        after["params"]["text"]["layers"]["q"]["kernel"],
    )


def rates(steps, **changes):
    return [
        float(rate) for rate in map(optimizer.learning_rate(config(**changes), steps), range(steps))
    ]


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_learning_rate_rises_to_the_peak_and_falls_along_a_cosine(warmup):
    got = rates(20, warmup_steps=warmup, final_fraction=0.2)
    want = [
        0.1 * (i + 1) / warmup
        if i < warmup
        # Hugging Face's cosine, above the least rate.
        else 0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * (i - warmup) / (20 - warmup))) / 2)
        for i in range(20)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_no_step_learns_nothing(steps, warmup):
    assert min(rates(steps, warmup_steps=warmup, final_fraction=0.0)) > 0


def test_runs_of_earlier_versions_keep_their_schedule():
    # Written down by the version before: warm-up from 0, of at least one step.
    old = optimizer.learning_rate(config(warmup_steps=4), 20, from_zero=True)
    np.testing.assert_allclose(
        [old(0), old(2), old(4), old(12), old(20), old(99)],
        [0, 0.05, 0.1, 0.055, 0.01, 0.01],
        rtol=1e-6,
    )
    new = optimizer.learning_rate(config(warmup_steps=4), 20)
    # Behind the warm-up both are one, to the bit.
    assert [float(old(i)) for i in range(4, 25)] == [float(new(i)) for i in range(4, 25)]
    none = optimizer.learning_rate(config(warmup_steps=0), 20, from_zero=True)
    np.testing.assert_allclose([none(0), none(1)], [0, 0.1], rtol=1e-6)
    short = optimizer.learning_rate(config(warmup_steps=200), 1, from_zero=True)
    assert 0 <= float(short(1)) < 0.1
    assert optimizer.began_from_zero({"seconds": 3.0})
    assert optimizer.began_from_zero({"from_zero": True})
    assert not optimizer.began_from_zero({}) and not optimizer.began_from_zero({"from_zero": False})


def test_several_updates_a_step_share_its_learning_rate_and_a_skipped_one_counts():
    settings = config(
        lr=1.0,
        warmup_steps=4,
        final_fraction=1.0,
        b1=0.0,
        b2=0.0,
        weight_decay=0.0,
        clip_norm=math.inf,
    )
    tx = optimizer.make_optimizer(settings, 10, updates=2)
    state = optimizer.init_state(tx, {"w": jnp.zeros(())})
    steps = []
    for i in range(8):
        before = float(state["params"]["w"])
        state, _ = optimizer.guarded_update(
            tx, state, {"w": jnp.float32(np.nan if i == 3 else 1.0)}
        )
        steps.append(before - float(state["params"]["w"]))
    np.testing.assert_allclose(
        steps, [0.25, 0.25, 0.5, 0, 0.75, 0.75, 1, 1], atol=1e-6
    )  # Adam's step is the rate
    assert state["skipped"] == 1


# ---- Rates of parts, the type of a moment, the mean of the parameters --------------------------------------------


TRAIN = {
    "model": {
        "vision": {
            "blocks": {"qkv": {"kernel": jnp.ones((2, 2))}},
            "merger": {"fc1": {"kernel": jnp.ones((2, 2))}},
            "taps": {"fc1": {"kernel": jnp.ones((2, 2))}},
        },
        "text": {"embed": {"embedding": jnp.ones((2, 2))}},
    },
    "lora": {
        "vision": {"merger": {"fc2": {"a": jnp.ones((2, 2))}}},
        "text": {"layers": {"q": {"a": jnp.ones((2, 2))}}},
    },
    "locate": {"kernel": jnp.ones((2, 2))},
}


def take_steps(params, gradients, **changes):
    """The state after a step of each gradient, which is one number for all parameters."""
    tx = optimizer.make_optimizer(config(warmup_steps=0, final_fraction=1.0, **changes), 100)
    state = optimizer.init_state(tx, params)
    step = jax.jit(lambda state, g: optimizer.guarded_update(tx, state, g)[0])
    for value in gradients:
        state = step(state, jax.tree.map(lambda leaf, v=value: jnp.full_like(leaf, v), params))
    return state


def test_each_part_has_its_rate_and_decays_by_it():
    state = take_steps(TRAIN, [1.0], lr_tower=0.2, lr_merger=0.01, eps=1e-12)
    # A step of Adam is its rate whatever the gradient, and the decay of 0.5 goes by it, too.
    moved = {name: 1 - value[0, 0] for name, value in leaves(state["params"]).items()}
    want = dict.fromkeys(moved, 0.1)
    for name in moved:
        if "vision" in name:
            want[name] = 0.2 if "blocks" in name else 0.01
    assert moved == pytest.approx({name: 1.5 * rate for name, rate in want.items()}, rel=1e-5)


def test_what_is_not_asked_for_is_not_in_the_state():
    plain = take_steps(TRAIN, [1.0, 0.5])
    settings = config()
    old = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(lambda count: 0.1, b2=0.99, weight_decay=0.5, mask=optimizer.decay_mask),
    )
    state = optimizer.init_state(old, TRAIN)
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    for value in (1.0, 0.5):
        grads = jax.tree.map(lambda leaf, v=value: jnp.full_like(leaf, v), TRAIN)
        state, _ = jax.jit(lambda s, g: optimizer.guarded_update(old, s, g))(state, grads)
    np.testing.assert_array_equal(
        leaves(state["params"])["locate/kernel"], plain["params"]["locate"]["kernel"]
    )
    assert optimizer.params_to_use(plain) is plain["params"]


def test_a_moment_in_bfloat16_is_that_of_gradients_alone():
    state = take_steps(TRAIN, [1.0, 0.5], mu_dtype="bfloat16")
    types = {name: leaf.dtype for name, leaf in leaves(state["opt_state"]).items() if leaf.ndim}
    assert {t for name, t in types.items() if ".mu/" in name} == {np.dtype(jnp.bfloat16)}
    assert {t for name, t in types.items() if ".mu/" not in name} == {np.dtype(np.float32)}
    wide = take_steps(TRAIN, [1.0, 0.5])
    for a, b in zip(*map(jax.tree.leaves, (state["params"], wide["params"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_follows_what_trains_and_changes_nothing_of_it(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), TRAIN)
    gradients = [1.0, 0.5, np.nan, -2.0, 1.0]
    mean, count = 1.0, 0
    for number, value in enumerate(gradients):
        plain = take_steps(params, gradients[: number + 1])
        if np.isfinite(value):
            decay = min(0.15, (1 + count) / (10 + count))
            wide = plain.get("master", plain["params"])
            mean = decay * mean + (1 - decay) * float(wide["locate"]["kernel"][0, 0])
            count += 1
    state = take_steps(params, gradients, ema=0.15)
    for a, b in zip(*map(jax.tree.leaves, (state["params"], plain["params"])), strict=True):
        np.testing.assert_array_equal(a, b)
    used = optimizer.params_to_use(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(used)} == {np.dtype(dtype)}
    got = float(used["locate"]["kernel"][0, 0])
    assert got == pytest.approx(mean, rel=1e-5 if dtype == jnp.float32 else 4e-3)
    assert got != float(state["params"]["locate"]["kernel"][0, 0])


def test_the_warm_up_as_a_share_is_rounded_up():
    assert rates(30, warmup_steps=0, warmup_ratio=0.09) == rates(30, warmup_steps=3)
    assert rates(8, warmup_steps=0, warmup_ratio=0.03)[0] == pytest.approx(0.1)
    assert rates(30, warmup_steps=5, warmup_ratio=0.5) == rates(30, warmup_steps=5)
