"""Building blocks shared by the vision tower and the decoder, as flax NNX modules.

They are used functionally: `graph(cls, model_config)` gives the static structure once, `apply(graph, params, ...)`
runs it on a plain nested dict. Nothing is mutated, and no NNX object crosses a `jax.jit` border. Weights are
cast to the dtype of the activations where they are used.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from cxr_jax.models.attention import (
    _softmax_attention,
    _softmax_attention_bwd,
    _softmax_attention_fwd,
    _two_part_softmax,
    _two_part_softmax_bwd,
    _two_part_softmax_fwd,
)
from cxr_jax.runtime.batch_rows import rows_apart


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


_softmax_attention.defvjp(_softmax_attention_fwd, _softmax_attention_bwd)


_two_part_softmax.defvjp(_two_part_softmax_fwd, _two_part_softmax_bwd)


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
