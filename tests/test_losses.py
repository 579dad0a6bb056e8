"""losses.py against plain NumPy and plain Python: chunking, gradients, advantages, the three aggregations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax import losses

N, D, V = 11, 8, 29


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    f32 = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return f32(N, D), f32(D, V), rng.integers(0, V - 4, N)


def plain(hidden, head, targets, temperature=1.0, suppress=None):
    logits = hidden.astype(jnp.float32) @ head / temperature
    if suppress is not None:
        logits = jnp.where(suppress, -1e30, logits)
    logp = jax.nn.log_softmax(logits)
    p = jnp.exp(logp)
    return logp[jnp.arange(len(targets)), targets], -jnp.sum(jnp.where(p > 0, p * logp, 0.0), -1)


@pytest.mark.parametrize("chunk", [1, 4, 11, 12, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("suppressed", [False, True])
def test_token_logprobs_and_gradients(case, chunk, temperature, suppressed):
    hidden, head, targets = case
    suppress = np.arange(V) >= V - 4 if suppressed else None
    options = dict(temperature=temperature, suppress=suppress)
    ours = lambda h, w: losses.token_logprobs(h, w, targets, chunk=chunk, **options)
    theirs = lambda h, w: plain(h, w, targets, **options)
    for a, b in zip(ours(hidden, head), theirs(hidden, head), strict=True):
        assert a.shape == (N,) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5)
    weights = np.linspace(-1, 1, N, dtype=np.float32)
    total = lambda f: lambda h, w: sum(jnp.sum(x * weights) for x in f(h, w))
    grads = [jax.grad(total(f), argnums=(0, 1))(hidden, head) for f in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    if suppressed:
        assert not np.asarray(grads[0][1])[:, suppress].any()  # ids that are never sampled learn nothing


def test_extreme_logits_stay_finite(case):
    hidden, head, targets = case
    logp, entropy = losses.token_logprobs(hidden * 1e4, head, targets, chunk=4)
    grad = jax.grad(lambda h: sum(x.sum() for x in losses.token_logprobs(h, head, targets, chunk=4)))(hidden * 1e4)
    assert np.isfinite(logp).all() and np.isfinite(grad).all() and (np.asarray(entropy) >= -1e-3).all()


def test_masked_mean():
    x = jnp.array([1.0, 2.0, 30.0])
    assert losses.masked_mean(x, jnp.array([True, True, False])) == 1.5
    assert losses.masked_mean(x, jnp.zeros(3, bool)) == 0.0


def test_group_advantages():
    rewards = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    centred = rewards - rewards.mean(1, keepdims=True)
    expected = {
        "group": centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4),
        "batch": centred / (rewards.std(ddof=1) + 1e-4),
        "none": centred,
    }
    for scale, want in expected.items():
        np.testing.assert_allclose(losses.group_advantages(rewards, scale=scale), want, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="scale_rewards"):
        losses.group_advantages(rewards, scale="groups")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_zero_variance_has_zero_advantage(scale):
    assert not np.asarray(losses.group_advantages(jnp.full((3, 4), 0.25), scale=scale)).any()


def python_loss(logp, old, advantages, mask, loss_type, low, high, max_tokens):
    rows, clipped = [], []
    for lp, ol, a, m in zip(logp, old, advantages, mask, strict=True):
        terms = []
        for x, y, keep in zip(lp, ol, m, strict=True):
            if keep:
                ratio = math.exp(x - y)
                terms.append(-min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a))
                clipped.append((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))
        rows.append(terms)
    count = sum(map(len, rows))
    total = {
        "grpo": sum(sum(r) / max(len(r), 1) for r in rows) / len(rows),
        "dapo": sum(map(sum, rows)) / max(count, 1),
        "dr_grpo": sum(map(sum, rows)) / (len(rows) * max_tokens),
    }
    return total[loss_type], sum(clipped) / max(count, 1)


@pytest.mark.parametrize("high", [None, 0.4])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_policy_loss(loss_type, high):
    rng = np.random.default_rng(2)
    logp, old = rng.normal(-1, 0.3, (2, 6, 7))
    advantages = rng.normal(size=6)
    mask = np.arange(7) < np.array([7, 3, 0, 1, 5, 7])[:, None]  # one row does not train at all
    args = [jnp.float32(logp), jnp.float32(old), jnp.float32(advantages), mask]
    kwargs = dict(loss_type=loss_type, epsilon=0.2, epsilon_high=high, max_tokens=10)
    loss, acts = losses.policy_loss(*args, **kwargs)
    want, clipped = python_loss(logp, old, advantages, mask, loss_type, 0.2, high or 0.2, 10)
    assert loss == pytest.approx(want, abs=1e-5)
    assert (np.asarray(acts) & mask).sum() / mask.sum() == pytest.approx(clipped, abs=1e-6) and clipped > 0
    totals = dict(rows=6, tokens=mask.sum())
    parts = [losses.policy_loss(*(x[s] for x in args), **kwargs, **totals)[0] for s in (slice(4), slice(4, 6))]
    assert sum(parts) == pytest.approx(want, abs=1e-5)  # parts of unequal length sum to the loss of the whole


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_on_policy_gradient_is_the_policy_gradient(loss_type):
    """With old = stop_gradient(new) the ratio is 1, and the gradient -A / (the number that divides)."""
    logp = jnp.float32(np.random.default_rng(3).normal(-1, 0.3, (2, 4)))
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    a = jnp.array([0.5, -2.0])
    loss = lambda x: losses.policy_loss(x, jax.lax.stop_gradient(x), a, mask, loss_type=loss_type, max_tokens=4)[0]
    per_row = {"grpo": 2 * mask.sum(1), "dapo": mask.sum().repeat(2), "dr_grpo": np.array([8, 8])}[loss_type]
    np.testing.assert_allclose(jax.grad(loss)(logp), -(np.asarray(a) / per_row)[:, None] * mask, rtol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("what", ["zero variance", "all truncated"])
def test_nothing_to_learn_is_zero_and_not_nan(loss_type, what):
    logp = jnp.full((4, 3), -1.0)
    zero = what == "zero variance"
    advantages = losses.group_advantages(jnp.ones((2, 2))).reshape(-1) if zero else jnp.ones(4)
    mask = np.full((4, 3), zero)
    f = lambda x: losses.policy_loss(
        x, jax.lax.stop_gradient(x), advantages, mask, loss_type=loss_type, max_tokens=3
    )
    (loss, clipped), grad = jax.value_and_grad(f, has_aux=True)(logp)
    assert loss == 0 and not np.asarray(clipped).any() and not np.asarray(grad).any()


def test_masked_positions_cannot_poison_the_gradient():
    """Log-probabilities of padding may be anything: neither value nor gradient may see them."""
    logp = jnp.array([[-1.0, -jnp.inf]])
    f = lambda x: losses.policy_loss(x, jnp.array([[-1.0, -1.0]]), jnp.ones(1), jnp.array([[1, 0]]))[0]
    loss, grad = jax.value_and_grad(f)(logp)
    assert loss == -1 and np.array_equal(grad, [[-1, 0]])


def test_binary_cross_entropy():
    rng = np.random.default_rng(4)
    x, t, w = rng.normal(0, 3, 20), rng.uniform(size=20), rng.uniform(1, 5, 20)
    p = 1 / (1 + np.exp(-x))
    plain = -(t * np.log(p) + (1 - t) * np.log1p(-p))
    assert losses.binary_cross_entropy(x, t) == pytest.approx(plain.mean(), rel=1e-5)
    assert losses.binary_cross_entropy(x, t, w) == pytest.approx((plain * w).mean(), rel=1e-5)
    assert losses.binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([1.0, 0.0])) == 0
