"""Attention with float32 statistics, and attention over two parts that share one softmax."""

import functools

import jax
import jax.numpy as jnp

from cxr_jax.runtime.batch_rows import put_rows, take_rows

NEG = -1e30  # finite, so that a fully masked row gives no NaN


@jax.custom_vjp
def _softmax_attention(q, k, v, bias):
    return _softmax_attention_fwd(q, k, v, bias)[0]


def _softmax_attention_fwd(q, k, v, bias):
    """q [B, K, G, T, d] already scaled, k and v [B, K, S, d], bias float32 over [B, K, G, T, S] or None."""
    B, K, G, T, d = q.shape
    s = jnp.einsum(
        "bktd,bksd->bkts", q.reshape(B, K, G * T, d), k, preferred_element_type=jnp.float32
    )
    if bias is not None:
        s = (s.reshape(B, K, G, T, -1) + bias).reshape(s.shape)
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    o = jnp.einsum("bkts,bksd->bktd", p, v)
    return o.reshape(q.shape), (q, k, v, p, o)


def _softmax_attention_bwd(saved, g):
    # Written out: keeps only the probabilities, and takes the row sums from g * o instead of over all keys.
    q, k, v, p, o = saved
    g = g.reshape(o.shape)
    dp = jnp.einsum("bktd,bksd->bkts", g, v, preferred_element_type=jnp.float32)
    row = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True)
    ds = (p.astype(jnp.float32) * (dp - row)).astype(q.dtype)
    dq = jnp.einsum("bkts,bksd->bktd", ds, k).reshape(q.shape)
    dk = jnp.einsum("bkts,bktd->bksd", ds, q.reshape(o.shape))
    return dq, dk, jnp.einsum("bkts,bktd->bksd", p, g), None


def attention(q, k, v, bias=None):
    """Softmax attention in plain XLA. q [B, T, H, d], k and v [B, S, K, d] with H a multiple of K.

    bias: float32 added to the scores, broadcastable to [B, K, H/K, T, S]; no gradient flows to it. Softmax
    in float32.
    The query heads that share a key head are folded into the rows of one matrix product, so that keys are
    never repeated. Returns [B, T, H, d].
    """
    B, T, H, d = q.shape
    K = k.shape[2]
    G = H // K
    q = (q * d**-0.5).reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4)
    o = _softmax_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), bias)
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_group(x, B: int):
    """[B * n, K, G, T, d] -> [B, K, n * G * T, d]: all that asks the same keys as the rows of one product."""
    R, K, G, T, d = x.shape
    return (
        x.reshape(B, R // B, K, G * T, d).transpose(0, 2, 1, 3, 4).reshape(B, K, R // B * G * T, d)
    )


def _by_row(x, shape: tuple):
    """The inverse of `_by_group`: back to [*shape, d] for a shape [B * n, K, G, T]."""
    R, K, G, T = shape
    B, n = len(x), R // len(x)
    return x.reshape(B, K, n, G * T, -1).transpose(0, 2, 1, 3, 4).reshape(R, K, G, T, -1)


def _part(q, k, v, bias):
    """Attention of q [B * n, K, G, T, d], scaled, over some of its keys [B, K, S, d], not yet normalised.

    bias: broadcastable to [B, K, n, G, T, S]. Returns (o float32 [B * n, K, G, T, d], the sum of the exponentials and
    their largest score [B * n, K, G, T, 1], the exponentials [B, K, n * G * T, S]).
    """
    R, K, G, T, d = q.shape
    B = len(k)
    s = _dot("bkqd,bksd->bkqs", _by_group(q, B), k).reshape(B, K, R // B, G, T, -1) + bias
    top = s.max(-1, keepdims=True)
    e = jnp.exp(s - top).reshape(B, K, R // B * G * T, -1)
    rows = lambda x: _by_row(x, (R, K, G, T))
    total, e = rows(e.sum(-1, keepdims=True)), e.astype(v.dtype)
    return rows(_dot("bkqs,bksd->bkqd", e, v)), total, rows(top.reshape(B, K, -1, 1)), e


def _joined(first, second):
    """(o, w1, w2) of two `_part`s in one softmax: o = w1 o1 + w2 o2, normalised."""
    (o1, sum1, top1, _), (o2, sum2, top2, _) = first, second
    top = jnp.maximum(top1, top2)
    w1, w2 = jnp.exp(top1 - top), jnp.exp(top2 - top)
    total = w1 * sum1 + w2 * sum2
    w1, w2 = w1 / total, w2 / total
    return w1 * o1 + w2 * o2, w1, w2


@jax.custom_vjp
def _two_part_softmax(q, first, second, first_bias, second_bias):
    return _two_part_softmax_fwd(q, first, second, first_bias, second_bias)[0]


def _two_part_softmax_fwd(q, first, second, first_bias, second_bias):
    parts = _part(q, *first, first_bias), _part(q, *second, second_bias)
    o, *w = _joined(*parts)
    o = o.astype(q.dtype)
    return o, (q, (first, second), [p[3] for p in parts], w, o)


def _two_part_softmax_bwd(saved, g):
    # Written out: keeps only the exponentials, and takes the row sums from g * o instead of over all keys.
    q, keys, exponentials, weights, o = saved
    shape, g = q.shape[:-1], g.astype(jnp.float32)
    row = jnp.sum(g * o.astype(jnp.float32), -1, keepdims=True)
    dq, d_keys = 0.0, []
    for (k, v), e, w in zip(keys, exponentials, weights, strict=True):
        gb, rb, wb, qb = (_by_group(x, len(k)) for x in (g.astype(q.dtype), row, w, q))
        ds = (e * (wb * (_dot("bkqd,bksd->bkqs", gb, v) - rb))).astype(q.dtype)
        dq = dq + _by_row(jnp.einsum("bkqs,bksd->bkqd", ds, k), shape)
        gw = (wb * gb).astype(q.dtype)
        d_keys.append((jnp.einsum("bkqs,bkqd->bksd", ds, qb), jnp.einsum("bkqs,bkqd->bksd", e, gw)))
    return dq, *d_keys, None, None


def two_part_attention(q, first, second, first_bias, second_bias, place=None):
    """Attention of each row over keys shared by its group and keys of its own, in a single softmax.

    q [R, T, H, d]; first = (k, v) [B, K, S, d] for R = B * n rows in group order, stored once a group;
    second = (k, v) [R, K, N, d]. Biases float32, without gradient: first broadcastable to [B, K, n, G, T, S],
    second to [R, K, 1, G, T, N], with G = H / K. Returns [R, T, H, d].

    place: (index, rows) where only some of the `rows` = B * n rows in group order are left, those at `index` (see
    `take_rows`); not differentiable then.
    """
    R, T, H, d = q.shape
    K = first[0].shape[1]
    q = (q * d**-0.5).reshape(R, T, K, H // K, d).transpose(0, 2, 3, 1, 4)
    if place is None:
        o = _two_part_softmax(q, first, second, first_bias, second_bias)
    else:
        index, rows = place
        grid = put_rows(jnp.zeros((rows, *q.shape[1:]), q.dtype), index, q)
        shared = [take_rows(x, index) for x in _part(grid, *first, first_bias)[:3]]
        o = _joined((*shared, None), _part(q, *second, second_bias))[0].astype(q.dtype)
    return o.transpose(0, 3, 1, 2, 4).reshape(R, T, H, d)
