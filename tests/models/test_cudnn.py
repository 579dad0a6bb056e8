"""attention/cudnn.py: what surrounds cuDNN's kernel, with a plain one in its place, and its call, lowered for a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from cxr_jax.config import schema
from cxr_jax.config.sections import RunConfig
from cxr_jax.errors import UserError
from cxr_jax.models import attention as attentions
from cxr_jax.models.attention import blocked, cudnn
from cxr_jax.training import checks


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def scores(queries, keys, is_causal):
    """Float32 [R, H, T, S] of rows [R, H, T, d] and [R, K, S, d]."""
    repeated = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    product = jnp.einsum("rhtd,rhsd->rhts", *(x.astype(jnp.float32) for x in (queries, repeated)))
    T, S = product.shape[2:]
    seen = np.tri(T, S, dtype=bool) if is_causal else np.ones((T, S), bool)
    return jnp.where(seen, product, -jnp.inf)


def plain_forward(queries, keys, values, is_causal):
    product = scores(queries, keys, is_causal)
    values = jnp.repeat(values, queries.shape[1] // values.shape[1], axis=1).astype(jnp.float32)
    output = jnp.einsum("rhts,rhsd->rhtd", jax.nn.softmax(product), values)
    return output.astype(queries.dtype), jax.nn.logsumexp(product, -1)


def plain_backward(arrays, output, log_totals, gradient, is_causal):
    """By the formulas of FlashAttention-2 (arXiv 2307.08691, section 3.1.2), of any log and output."""
    queries, keys, values = (array.astype(jnp.float32) for array in arrays)
    repeats = queries.shape[1] // keys.shape[1]
    weights = jnp.exp(scores(queries, keys, is_causal) - log_totals[..., None])
    gradient, output = gradient.astype(jnp.float32), output.astype(jnp.float32)
    d_weights = jnp.einsum("rhtd,rhsd->rhts", gradient, jnp.repeat(values, repeats, axis=1))
    d_scores = weights * (d_weights - (gradient * output).sum(-1, keepdims=True))
    d_queries = jnp.einsum("rhts,rhsd->rhtd", d_scores, jnp.repeat(keys, repeats, axis=1))
    d_keys, d_values = (
        jnp.einsum("rhts,rhtd->rhsd", left, right)
        .reshape(*keys.shape[:2], repeats, *keys.shape[2:])
        .sum(2)
        for left, right in ((d_scores, queries), (weights, gradient))
    )
    return d_queries, d_keys, d_values


def as_the_kernel_takes_them(arrays):
    assert all(array.shape[2] % 2 == 0 for array in arrays[:3])
    return arrays


@pytest.fixture
def plain_kernel(monkeypatch):
    calls = []

    def forward(*arguments):
        calls.append(arguments[-1])
        return plain_forward(*as_the_kernel_takes_them(arguments))

    def backward(arrays, *rest):
        return plain_backward(as_the_kernel_takes_them(arrays), *rest)

    monkeypatch.setattr(cudnn, "forward", forward)
    monkeypatch.setattr(cudnn, "backward", backward)
    monkeypatch.setattr(blocked, "LEAST_BLOCK", 16)
    return calls


def assert_same(attend, arrays):
    """Values and gradients by `cudnn` equal those by `xla`, to what bfloat16 rounds."""
    cotangent = normal(*jax.eval_shape(attend("xla"), *arrays).shape, seed=9)

    def value_and_gradients(kind):
        value, pull = jax.vjp(attend(kind), *arrays)
        return value, *pull(cotangent)

    got, want = (jax.jit(value_and_gradients, static_argnums=0)(kind) for kind in ("cudnn", "xla"))
    for one, other in zip(got, want, strict=True):
        one, other = (np.asarray(array, np.float32) for array in (one, other))
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


@pytest.mark.parametrize("length", [40, 39])
def test_causal_sequences_are_the_kernels(plain_kernel, length):
    mask = np.arange(length) < np.array([[length], [23]])
    attend = lambda kind: (
        lambda *arrays: (  # noqa: E731
            attentions.causal_attention(mask, heads=4, kind=kind)(*arrays) * mask[..., None, None]
        )
    )
    assert_same(attend, [normal(2, length, heads, 16, seed=heads) for heads in (4, 2, 2)])
    assert plain_kernel == [True]


@pytest.mark.parametrize("slots", [40, 39])
def test_a_shared_prompt_joins_by_the_log_of_the_sums(plain_kernel, slots):
    """Two prompts, the second shorter, two completions of each: one softmax over kept and own keys."""
    kept = [normal(2, 2, 30, 16, seed=seed) for seed in (2, 3)]
    own = [normal(4, 2, slots, 16, seed=seed) for seed in (4, 5)]

    def attend(kind):
        options = {"slots": 30, "own_slots": slots, "rows": 16, "kind": kind}
        following = attentions.following_attention(jnp.array([30, 11]), **options)
        return lambda queries, *keys: following(queries, keys[:2], keys[2:])

    assert_same(attend, [normal(4, slots, 4, 16, seed=1), *kept, *own])
    assert plain_kernel == [True]


def test_what_the_kernel_has_no_mask_for_goes_by_blocks(plain_kernel):
    parts = jnp.asarray(np.repeat([[0, 1, 2], [0, 1, 1]], [9, 20, 11], axis=1))
    arrays = [normal(2, 40, heads, 16, seed=heads) for heads in (4, 2, 2)]
    assert_same(lambda kind: lambda *x: attentions.part_attention(parts, *x, kind=kind), arrays)
    windows = np.ones((2, 40), bool)
    assert_same(
        lambda kind: attentions.causal_attention(windows, heads=4, window=7, kind=kind), arrays
    )
    assert plain_kernel == []
    in_float32 = [array.astype(jnp.float32) for array in arrays]
    with pytest.raises(UserError, match="^config.attention='cudnn' is a kernel for config.dtype="):
        attentions.causal_attention(windows, heads=4, kind="cudnn")(*in_float32)


@pytest.mark.parametrize("length", [256, 255])
def test_the_kernel_and_its_gradient_are_called(monkeypatch, length):
    """Lowered for a GPU that is not there, with as many key heads as there are: none is repeated."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    mask = np.ones((2, length), bool)

    def loss(*arrays):
        return attentions.causal_attention(mask, heads=4, kind="cudnn")(*arrays).sum()

    arrays = [normal(2, length, heads, 64) for heads in (4, 2, 2)]
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 2 and "Backward" in calls[1]
    for line in calls:
        assert "tensor<2x2x256x64xbf16>" in line and "tensor<2x4x256xf32>" in line
    assert "CAUSAL" in text


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "reason"),
    [
        ("cudnn", "cpu", "bfloat16", "is a kernel of GPUs, and the devices are CPUs: use 'auto'"),
        ("cudnn", "gpu", "float32", "is a kernel of bfloat16, and config.dtype is 'float32'"),
        ("splash", "gpu", "bfloat16", "is a kernel of TPUs, and the devices are GPUs: use 'auto'"),
    ],
)
def test_a_run_without_its_kernel_is_refused(monkeypatch, kind, platform, dtype, reason):
    config = schema.defaults("sft", "phantom")
    config.update(attention=kind, dtype=dtype, model="random:phantom")
    settings = RunConfig.from_config(config)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with pytest.raises(UserError, match=f"^config.attention='{kind}' {reason}"):
        checks.check_attention(settings)
    # On its platform, in its type, it is taken.
    monkeypatch.setattr(jax, "default_backend", lambda: {"cudnn": "gpu", "splash": "tpu"}[kind])
    checks.check_attention(dataclasses.replace(settings, dtype="bfloat16"))
