"""training/losses.py against plain arithmetic: log-probabilities of tokens in chunks and shards, means, a loss."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cxr_jax.training import losses

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


@pytest.mark.parametrize("chunk", [1, 4, 2048])
@pytest.mark.parametrize("temperature, suppressed", [(1.0, False), (0.7, True)])
def test_token_log_probs_and_gradients(case, chunk, temperature, suppressed):
    hidden, head, targets = case
    suppress = np.arange(V) >= V - 4 if suppressed else None
    if suppressed:
        targets[0] = V - 1  # a sampler never emits it: no gradient may come of it
    options = dict(temperature=temperature, suppress=suppress)
    weights = np.linspace(-1, 1, N, dtype=np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *args):
        """(logp, entropy), and the gradients of both and of logp alone, as RL takes it."""
        total = lambda h, w: (sum(jnp.sum(x * weights) for x in f(h, w)), f(h, w))
        both, out = jax.grad(total, argnums=(0, 1), has_aux=True)(*args)
        return out, (
            *both,
            *jax.grad(lambda h, w: jnp.sum(f(h, w)[0] * weights), argnums=(0, 1))(*args),
        )

    ours = lambda h, w: losses.token_log_probs(h, w, targets, chunk=chunk, **options)
    theirs = lambda h, w: plain(h, w, targets, **options)
    (values, grads), (want, want_grads) = (run(f, hidden, head) for f in (ours, theirs))
    for a, b in zip(values, want, strict=True):
        assert a.shape == (N,) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    if suppressed:
        assert not np.asarray(grads[1])[
            :, suppress
        ].any()  # ids that are never sampled learn nothing


def test_extreme_logits_stay_finite(case):
    hidden, head, targets = case
    f = lambda h: (sum(map(jnp.sum, out := losses.token_log_probs(h, head, targets, chunk=4))), out)
    grad, (logp, entropy) = jax.jit(jax.grad(f, has_aux=True))(hidden * 1e4)
    assert (
        np.isfinite(logp).all() and np.isfinite(grad).all() and (np.asarray(entropy) >= -1e-3).all()
    )


def test_token_log_probs_in_a_scan_from_a_tied_bfloat16_table():
    """As the model calls it: bfloat16 hidden, the float32 embedding transposed, inside a scan over micro-batches."""
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.normal(size=(2, N, D)), jnp.bfloat16)
    table, targets = (
        jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (2, N))),
    )

    def total(f, table):
        def body(carry, part):
            logp, entropy = f(part[0], table.T, part[1])
            return carry + jnp.sum(logp) + 0.5 * jnp.sum(entropy), logp

        return jax.lax.scan(body, 0.0, (hidden, targets))

    rounded = lambda h, w, t: plain(h, w.astype(jnp.bfloat16).astype(jnp.float32), t)
    run = lambda f: jax.jit(jax.value_and_grad(functools.partial(total, f), has_aux=True))(table)
    (ours, logp), grad = run(functools.partial(losses.token_log_probs, chunk=4))
    (theirs, want), want_grad = run(rounded)
    assert logp.dtype == jnp.float32 and grad.dtype == jnp.float32
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    np.testing.assert_allclose(logp, want, atol=1e-4)
    np.testing.assert_allclose(grad, want_grad, atol=0.01 * float(np.abs(want_grad).max()))


def arrays_in(jaxpr):
    """Shapes of every value that a program computes, loops and calls included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for sub in jaxprs_in_params(eqn.params):
            yield from arrays_in(sub)


def test_no_array_of_tokens_by_vocabulary():
    """Nor the two halves of it: nothing larger than a chunk's logits, forward and backward."""
    n, chunk, d, v = 96, 8, 4, 50
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    loss = lambda h, w, t: sum(jnp.sum(x) for x in losses.token_log_probs(h, w, t, chunk=chunk))
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        shape(n, d), shape(d, v), shape(n, dtype=jnp.int32)
    )
    largest = max(math.prod(s) for s in arrays_in(program.jaxpr))
    assert largest == chunk * v
    plain_program = jax.make_jaxpr(
        jax.grad(lambda h, w, t: sum(jnp.sum(x) for x in plain(h, w, t)), argnums=(0, 1))
    )(shape(n, d), shape(d, v), shape(n, dtype=jnp.int32))
    assert (
        max(math.prod(s) for s in arrays_in(plain_program.jaxpr)) >= n * v
    )  # the measure can tell


@pytest.mark.parametrize(
    "n, chunk, longest", [(3300, 2048, 1650), (11, 4, 4), (4096, 2048, 2048), (5, 8, 5)]
)
def test_chunks_are_even_and_strided(n, chunk, longest, monkeypatch):
    """No token is computed in vain where a divisor is near, and chunk i has tokens i, i + chunks, ..."""
    seen, real = [], losses._logits
    monkeypatch.setattr(losses, "_logits", lambda h, *rest: seen.append(h.shape) or real(h, *rest))
    jax.eval_shape(
        lambda h, t: losses.token_log_probs(h, jnp.zeros((2, 3)), t, chunk=chunk),
        jnp.zeros((n, 2)),
        jnp.zeros(n, int),
    )
    assert seen == [(longest, 2)]
    x = np.arange(n)
    chunks = losses._to_chunks(x, 1, 3)
    assert np.array_equal(chunks[1][: n // 3], x[1::3][: n // 3])
    assert np.array_equal(losses._from_chunks(chunks, 1, n), x)


def test_chunks_of_shards():
    """Every chunk has tokens of every shard; what pads the last of a shard is not given back."""
    x = np.arange(1, 21)
    chunks = losses._to_chunks(x, 4, 2)
    first, second = (
        [1, 3, 5, 6, 8, 10, 11, 13, 15, 16, 18, 20],
        [2, 4, 0, 7, 9, 0, 12, 14, 0, 17, 19, 0],
    )
    assert np.array_equal(chunks, [first, second])
    assert np.array_equal(losses._from_chunks(chunks, 4, 20), x)


@pytest.mark.parametrize("n, chunk", [(24, 2), (20, 2), (24, 100)])
def test_shards_change_nothing(n, chunk):
    rng = np.random.default_rng(0)
    h, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((n, 8), (8, 11)))
    targets = jnp.asarray(rng.integers(0, 11, n))

    @functools.partial(jax.jit, static_argnums=0)
    def both(shards):
        f = lambda h, w: losses.token_log_probs(
            h, w, targets, chunk=chunk, shards=shards, temperature=0.7
        )
        out, pull = jax.vjp(f, h, w)
        return *out, *pull((jnp.sin(jnp.arange(n) * 1.0), jnp.cos(jnp.arange(n) * 1.0)))

    for a, b in zip(both(1), both(4), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_masked_mean():
    x = jnp.array([1.0, 2.0, 30.0])
    assert losses.masked_mean(x, jnp.array([True, True, False])) == 1.5
    assert losses.masked_mean(x, jnp.zeros(3, bool)) == 0.0


def test_binary_cross_entropy():
    rng = np.random.default_rng(4)
    x, t, w = rng.normal(0, 3, 20), rng.uniform(size=20), rng.uniform(1, 5, 20)
    p = 1 / (1 + np.exp(-x))
    plain = -(t * np.log(p) + (1 - t) * np.log1p(-p))
    assert losses.binary_cross_entropy(x, t) == pytest.approx(plain.mean(), rel=1e-5)
    assert losses.binary_cross_entropy(x, t, w) == pytest.approx((plain * w).mean(), rel=1e-5)
    assert losses.binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([1.0, 0.0])) == 0
