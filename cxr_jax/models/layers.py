"""Building blocks shared by the vision tower and the decoder, as flax NNX modules.

They are used functionally: `graph(cls, cfg)` gives the static structure once, `apply(graph, params, ...)`
runs it on a plain nested dict. Nothing is mutated, and no NNX object crosses a `jax.jit` border. Weights are
cast to the dtype of the activations where they are used.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from cxr_jax.runtime.batch_rows import put_rows, rows_apart, take_rows

NEG = -1e30  # finite, so that a fully masked row gives no NaN


@jax.custom_vjp
def matmul(x, w):
    """x [..., din] @ w [din, dout]. The gradients are written out because the automatic one for w is formed
    transposed and then copied, which halves the speed of small models on a CPU."""
    return x @ w


def _matmul_bwd(saved, g):
    x, w = saved
    lead = tuple(range(x.ndim - 1))
    return jnp.tensordot(g, w, ((g.ndim - 1,), (1,))), jnp.tensordot(x, g, (lead, lead))


matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_bwd)


class Linear(nnx.Module):
    """x [..., din] -> [..., dout]; kernel [din, dout].

    With `lora_a` [din, r] and `lora_b` [r, dout] beside the kernel (see `lora.join`): x kernel + x lora_a lora_b.
    """

    lora_a = lora_b = None  # `apply` sets them, on the module of one call

    def __init__(self, din: int, dout: int, *, bias: bool, rngs: nnx.Rngs, scale: float = 1.0):
        init = jax.nn.initializers.truncated_normal(scale * din**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (din, dout), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((dout,), jnp.float32))
        self.use_bias = bias

    def __call__(self, x):
        kernel = self.kernel[...].astype(x.dtype)
        if self.lora_a is None:
            y = matmul(x, kernel)
        else:  # a plain product: `matmul` would write out the gradient of a kernel that is frozen
            y = x @ kernel + matmul(
                matmul(x, self.lora_a.astype(x.dtype)), self.lora_b.astype(x.dtype)
            )
        return y + self.bias[...].astype(x.dtype) if self.use_bias else y


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, statistics in float32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.scale[...].astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(
        self, dim: int, hidden: int, *, bias: bool, rngs: nnx.Rngs, out_scale: float = 1.0
    ):
        self.gate = Linear(dim, hidden, bias=bias, rngs=rngs)
        self.up = Linear(dim, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, dim, bias=bias, rngs=rngs, scale=out_scale)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class FusedMLP(nnx.Module):
    """MLP without biases whose gate and up kernels lie side by side (see `decoder.fuse`)."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_up = Linear(dim, 2 * hidden, bias=False, rngs=rngs)
        self.down = Linear(hidden, dim, bias=False, rngs=rngs)

    def __call__(self, x):
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


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


_softmax_attention.defvjp(_softmax_attention_fwd, _softmax_attention_bwd)


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


_two_part_softmax.defvjp(_two_part_softmax_fwd, _two_part_softmax_bwd)


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


@functools.lru_cache(maxsize=256)
def graph(cls, *args):
    """The static structure of module `cls(*args, rngs=...)`; no array is made."""
    return nnx.split(nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0))))[0]


LORA = ("lora_a", "lora_b")


def split_adapters(params: dict, path: tuple[str, ...] = ()) -> tuple[dict, list]:
    """(params without the LORA leaves, [(path of their module, {name: leaf})]). The tree is not changed."""
    rest, found = {}, []
    for name, value in params.items():
        if isinstance(value, dict):
            rest[name], inner = split_adapters(value, (*path, name))
            found += inner
        elif name not in LORA:
            rest[name] = value
    if len(rest) < len(params):
        found.append((path, {name: params[name] for name in LORA}))
    return rest, found


def merge_adapters(linear: dict) -> dict:
    """A Linear's parameters, maybe stacked, with its adapters, if any, added to the kernel.

    The sum is formed in float32 and rounded once to the kernel's type; stacks go layer by layer, so that memory
    holds one float32 kernel.
    """
    if "lora_a" not in linear:
        return linear
    rest, [(_, adapters)] = split_adapters(linear)

    def add(w, a, b):
        delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        return (w.astype(jnp.float32) + delta).astype(w.dtype)

    args = (rest["kernel"], *(adapters[name] for name in LORA))
    kernel = add(*args) if args[0].ndim == 2 else jax.lax.map(lambda x: add(*x), args)
    return {**rest, "kernel": kernel}


def apply(graphdef, params, *args, method: str = "__call__"):
    """Run a module on a plain nested dict of arrays."""
    params, adapters = split_adapters(params)
    module = nnx.merge(graphdef, nnx.State(params))
    for path, leaves in adapters:
        linear = functools.reduce(getattr, path, module)
        linear.lora_a, linear.lora_b = (leaves[name] for name in LORA)
    return getattr(module, method)(*args)


def init(cls, *args, key):
    """Fresh parameters of `cls(*args)` as a plain nested dict."""
    return nnx.to_pure_dict(nnx.state(cls(*args, rngs=nnx.Rngs(key)), nnx.Param))


def init_stacked(cls, *args, key, n: int):
    """Parameters of n such modules, stacked along axis 0."""
    return jax.vmap(lambda k: init(cls, *args, key=k))(jax.random.split(key, n))


def unstack(tree, n: int) -> list:
    """The n layers of a stacked tree. One `lax.split` a leaf: its gradient is one concatenation, where n
    slices would each pad a full-size array."""
    leaves, treedef = jax.tree.flatten(tree)
    parts = [jax.lax.split(x, (1,) * n, 0) for x in leaves]
    return [treedef.unflatten([p[i][0] for p in parts]) for i in range(n)]


def checkpointed(fn, remat: str):
    """Wrap a layer for rematerialisation: "none" keeps all activations, "full" none, "dots" the products."""
    if remat == "none":
        return fn
    if remat == "full":
        return jax.checkpoint(fn)
    if remat == "dots":
        return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ValueError(f"remat must be 'none', 'full' or 'dots', got {remat!r}")


UNROLL_UP_TO = 8
"""Stacks of at most this many layers are unrolled: a scan costs small CPU models more than it saves."""


def run_layers(layer, stacked, x, n: int, remat: str = "none"):
    """(x, aux) = layer(params_i, x) for i in 0..n-1 over trees stacked on axis 0; unrolled when shallow, or when
    `stacked` is a list of n trees.

    Returns the last x and the aux outputs stacked on axis 0 (None if layers give None).
    """
    layer, apart = checkpointed(layer, remat), isinstance(stacked, list)
    step = lambda h, p: layer(p, rows_apart(h))
    if n > UNROLL_UP_TO and not apart:
        return jax.lax.scan(step, x, stacked)
    aux = []
    for p in stacked if apart else unstack(stacked, n):
        x, a = step(x, p)
        aux.append(a)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *aux)
