"""optimizer.py: which leaves decay, float32 masters, and updates that are skipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax.config.sections import OptimizerConfig
from cxr_jax.runtime import trees
from cxr_jax.training import optimizer

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
    tx = optimizer.make_optimizer(config(**changes), steps=10)
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


def test_learning_rate():
    rate = optimizer.learning_rate(config(warmup_steps=4), 20)
    np.testing.assert_allclose(
        [rate(0), rate(2), rate(4), rate(20), rate(99)], [0, 0.05, 0.1, 0.01, 0.01], rtol=1e-6
    )
    short = optimizer.learning_rate(config(warmup_steps=200), 1)  # a run shorter than its warm-up
    assert 0 <= float(short(1)) < 0.1


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
        steps, [0, 0, 0.25, 0, 0.5, 0.5, 0.75, 0.75], atol=1e-6
    )  # Adam's step is the rate
    assert state["skipped"] == 1
