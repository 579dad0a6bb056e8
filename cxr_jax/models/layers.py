"""Building blocks shared by the vision tower and the decoder, as flax NNX modules.

They are used functionally: `graph(cls, model_config)` gives the static structure once, `apply(graph, params, ...)`
runs it on a plain nested dict. Nothing is mutated, and no NNX object crosses a `jax.jit` border. Weights are
cast to the dtype of the activations where they are used.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cxr_jax.runtime.batch_rows import divide_rows, gather_key_kernel, head_shards
from cxr_jax.runtime.trees import Tree

# ---- Modules -----------------------------------------------------------------------------------------------


@jax.custom_vjp
def matmul(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply inputs [..., din] and kernel [din, dout].

    The gradients are written out because the automatic one for the kernel is formed transposed and then copied, which
    halves the speed of small models on a CPU.
    """
    return inputs @ kernel


def _matmul_fwd(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return inputs @ kernel, (inputs, kernel)


def _matmul_bwd(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = saved
    leading_axes = tuple(range(inputs.ndim - 1))  # rows, however many axes they take
    # The sum over the kernel's outputs, without a transposed copy of the kernel.
    d_inputs = jnp.tensordot(gradient, kernel, ((gradient.ndim - 1,), (1,)))
    return d_inputs, jnp.tensordot(inputs, gradient, (leading_axes, leading_axes))


matmul.defvjp(_matmul_fwd, _matmul_bwd)


# ---- The same numbers, with gradients of weights that are summed in float32 ---------------------------------

# Over rows, and over devices, too: a product's sum over devices has the type in which the product gives it out. It is
# rounded to the type of the weights behind that.


@jax.custom_vjp
def _wide_matmul(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return inputs @ kernel.astype(inputs.dtype)


def _wide_matmul_bwd(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = saved
    axes = tuple(range(inputs.ndim - 1))
    narrow = kernel.astype(inputs.dtype)
    d_inputs = jnp.tensordot(gradient, narrow, ((gradient.ndim - 1,), (1,)))
    d_kernel = jnp.tensordot(inputs, gradient, (axes, axes), preferred_element_type=jnp.float32)
    return d_inputs, d_kernel.astype(kernel.dtype)


_wide_matmul.defvjp(
    lambda inputs, kernel: (_wide_matmul(inputs, kernel), (inputs, kernel)), _wide_matmul_bwd
)


@jax.custom_vjp
def _wide_add(outputs: jax.Array, bias: jax.Array) -> jax.Array:
    return outputs + bias.astype(outputs.dtype)


def _wide_add_bwd(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(gradient.ndim - 1))
    return gradient, gradient.astype(jnp.float32).sum(axes).astype(bias.dtype)


_wide_add.defvjp(lambda outputs, bias: (_wide_add(outputs, bias), bias), _wide_add_bwd)


@jax.custom_vjp
def _wide_scale(inputs: jax.Array, scale: jax.Array) -> jax.Array:
    return inputs * scale.astype(inputs.dtype)


def _wide_scale_bwd(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, scale = saved
    axes = tuple(range(gradient.ndim - 1))
    d_scale = (inputs.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axes)
    return gradient * scale.astype(gradient.dtype), d_scale.astype(scale.dtype)


_wide_scale.defvjp(
    lambda inputs, scale: (_wide_scale(inputs, scale), (inputs, scale)), _wide_scale_bwd
)


class Linear(nnx.Module):
    """A product [..., din] -> [..., dout]; kernel [din, dout].

    With `lora_a` [din, r] and `lora_b` [r, dout] beside the kernel (see `lora.join`): x kernel + x lora_a lora_b. With
    `lora_b` alone the kernel is [din, dout + r], lora_a's columns the last of it: one product for both.
    """

    lora_a = lora_b = None  # `apply` sets them, on the module of one call
    wide_gradients = False  # `graph` sets it

    def __init__(
        self,
        din: int,
        dout: int,
        *,
        bias: bool,
        rngs: nnx.Rngs | None,
        scale: float = 1.0,
        is_of_keys: bool = False,
    ) -> None:
        """Draw a kernel of standard deviation scale / sqrt(din); the bias is zero.

        rngs: None draws zeros, for who asks for shapes alone: to trace what draws a kernel takes longer than all else.
        is_of_keys: its columns are those of key heads, which a mesh may divide less than others.
        """
        initializer = jax.nn.initializers.truncated_normal(scale * din**-0.5)
        # Parameters are float32; products take the type of their inputs.
        kernel = (
            initializer(rngs.params(), (din, dout), jnp.float32)
            if rngs is not None
            else jnp.zeros((din, dout), jnp.float32)
        )
        self.kernel = nnx.Param(kernel)
        if bias:
            self.bias = nnx.Param(jnp.zeros((dout,), jnp.float32))
        self.use_bias = bias
        self.is_of_keys = is_of_keys

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Multiply, in the type of the inputs."""
        # What stands beside the kernel decides: the same module serves with adapters and without.
        dtype = inputs.dtype
        kernel = self.kernel[...]
        # One whose gradient is wide is narrowed in the product.
        if not self.wide_gradients or self.lora_b is not None:
            kernel = kernel.astype(dtype)
        # Narrow already, if it may be, so that half as much is gathered.
        if self.is_of_keys:
            kernel = gather_key_kernel(kernel)
        if self.lora_b is None:
            outputs = self._product(inputs, kernel)
        elif self.lora_a is None:
            outputs, lowered = jnp.split(inputs @ kernel, [self.lora_b.shape[-1]], -1)
            outputs = outputs + lowered @ self.lora_b.astype(dtype)
        else:
            # A plain product: `matmul` would write out the gradient of a kernel that is frozen. It comes first:
            # the gradient of the inputs is summed in the order of their uses.
            outputs = inputs @ kernel
            lowered = self._product(inputs, self.lora_a)
            outputs = outputs + self._product(lowered, self.lora_b)
        if not self.use_bias:
            return outputs
        if self.wide_gradients:
            return _wide_add(outputs, self.bias[...])
        return outputs + self.bias[...].astype(dtype)

    def _product(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.wide_gradients:
            return _wide_matmul(inputs, kernel)
        return matmul(inputs, kernel.astype(inputs.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, statistics in float32.

    is_one_plus: times 1 + scale, all of it in float32, as Gemma has it.
    """

    wide_gradients = False  # `graph` sets it

    def __init__(self, width: int, eps: float, *, is_one_plus: bool = False) -> None:
        """Begin with a factor of 1."""
        self.scale = nnx.Param(jnp.full((width,), 0.0 if is_one_plus else 1.0, jnp.float32))
        self.eps = eps
        self.is_one_plus = is_one_plus

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalise over the last axis."""
        inputs32 = inputs.astype(jnp.float32)
        # In float32: a mean of bfloat16 squares loses digits.
        mean_square = jnp.mean(jnp.square(inputs32), -1, keepdims=True)
        normalised = inputs32 * jax.lax.rsqrt(mean_square + self.eps)
        scale = self.scale[...].astype(inputs.dtype)
        if self.is_one_plus:
            return (normalised * (1.0 + scale.astype(jnp.float32))).astype(inputs.dtype)
        # Rounded before the scale, as the reference does.
        if self.wide_gradients:
            return _wide_scale(normalised.astype(inputs.dtype), self.scale[...])
        return normalised.astype(inputs.dtype) * scale


class LayerNorm(nnx.Module):
    """Normalisation by mean and standard deviation, all of it in float32, and rounded once."""

    def __init__(self, width: int, eps: float) -> None:
        """Begin with a scale of 1 and a bias of 0."""
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalise over the last axis."""
        scale, bias = (
            # In the type of the computation first: there, a sampler's weights are those of the learner.
            param[...].astype(inputs.dtype).astype(jnp.float32)
            for param in (self.scale, self.bias)
        )
        # The deviation from the mean itself: the difference of two large means would lose digits.
        inputs32 = inputs.astype(jnp.float32)
        centered = inputs32 - jnp.mean(inputs32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
        normalised = centered * jax.lax.rsqrt(variance + self.eps)
        return (normalised * scale + bias).astype(inputs.dtype)


def activate(activation: str, inputs: jax.Array) -> jax.Array:
    """Apply "silu", "gelu_tanh" (the tanh form of GELU) or "gelu" (the exact one)."""
    if activation == "silu":
        return jax.nn.silu(inputs)
    # Said each time: the default of JAX is the tanh form, that of torch the exact one.
    return jax.nn.gelu(inputs, approximate={"gelu_tanh": True, "gelu": False}[activation])


class MLP(nnx.Module):
    """Gated: down(activation(gate x) * up x); SwiGLU by default."""

    def __init__(
        self,
        width: int,
        inner_width: int,
        *,
        bias: bool,
        rngs: nnx.Rngs | None,
        out_scale: float = 1.0,
        activation: str = "silu",
    ) -> None:
        """Draw fresh kernels; out_scale: of the last one, which is small in deep models."""
        self.activation = activation
        self.gate = Linear(width, inner_width, bias=bias, rngs=rngs)
        self.up = Linear(width, inner_width, bias=bias, rngs=rngs)
        self.down = Linear(inner_width, width, bias=bias, rngs=rngs, scale=out_scale)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Compute [..., size] -> [..., size]."""
        return self.down(activate(self.activation, self.gate(inputs)) * self.up(inputs))


class PlainMLP(nnx.Module):
    """Two layers with biases: fc2(gelu_tanh(fc1 x))."""

    def __init__(
        self, width: int, inner_width: int, *, rngs: nnx.Rngs | None, out_scale: float = 1.0
    ) -> None:
        """Draw fresh kernels; out_scale: of the last one, which is small in deep models."""
        self.fc1 = Linear(width, inner_width, bias=True, rngs=rngs)
        self.fc2 = Linear(inner_width, width, bias=True, rngs=rngs, scale=out_scale)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Compute [..., size] -> [..., size]."""
        return self.fc2(activate("gelu_tanh", self.fc1(inputs)))


class FusedMLP(nnx.Module):
    """MLP without biases whose gate and up kernels lie side by side (see `decoder_layers.fuse`)."""

    def __init__(
        self, width: int, inner_width: int, *, rngs: nnx.Rngs | None, activation: str = "silu"
    ) -> None:
        """Draw fresh kernels, only for their shapes."""
        self.activation = activation
        self.gate_up = Linear(width, 2 * inner_width, bias=False, rngs=rngs)
        self.down = Linear(inner_width, width, bias=False, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Compute [..., size] -> [..., size]."""
        # One product in place of two; halves in the order in which `decoder_layers.fuse` put them.
        gate_up = self.gate_up(inputs)
        gate, up = cut_columns(gate_up, [gate_up.shape[-1] // 2] * 2)
        return self.down(activate(self.activation, gate) * up)


# ---- Kernels side by side ----------------------------------------------------------------------------------


def _column_shares(widths: Sequence[int]) -> int:
    """Count the devices that divide columns, 1 where they do not divide some of these."""
    shares = head_shards()
    return 1 if any(width % shares for width in widths) else shares


def join_columns(kernels: Sequence[jax.Array]) -> jax.Array:
    """Put arrays [.., w] side by side; on a mesh that divides columns, the parts of each device are.

    So every device has its columns of all of them, and no product of the joined kernel has to move.
    """
    shares = _column_shares([kernel.shape[-1] for kernel in kernels])
    # One device: whole kernels, in their order.
    if shares == 1:
        return jnp.concatenate(kernels, -1)
    # The axis of shares is the one that the mesh divides; all else happens within it.
    by_share = [kernel.reshape(*kernel.shape[:-1], shares, -1) for kernel in kernels]
    return jnp.concatenate(by_share, -1).reshape(*kernels[0].shape[:-1], -1)


def cut_columns(outputs: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """Cut the outputs [.., sum of widths] of a kernel of `join_columns` into those of its parts."""
    shares = _column_shares(widths)
    ends = list(itertools.accumulate(width // shares for width in widths))[:-1]
    # As they were joined.
    if shares == 1:
        return jnp.split(outputs, ends, -1)
    by_share = outputs.reshape(*outputs.shape[:-1], shares, -1)
    parts = jnp.split(by_share, ends, -1)
    return [part.reshape(*outputs.shape[:-1], -1) for part in parts]


# ---- Modules as functions of a nested dict -----------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def graph(module_class: Callable[..., nnx.Module], *arguments: Any) -> nnx.GraphDef:
    """Describe the static structure of module `cls(*args, rngs=...)`; no array is made."""
    # `eval_shape`: the structure follows from the arguments, so no array has to be drawn.
    module = nnx.eval_shape(lambda: module_class(*arguments, rngs=None))
    # A field of the config that all parts of the module are made by.
    if any(getattr(argument, "wide_gradients", False) for argument in arguments):
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Linear | RMSNorm):
                part.wide_gradients = True
    return nnx.split(module)[0]


def apply(graphdef: nnx.GraphDef, params: Tree, *arguments: Any, method: str = "__call__") -> Any:
    """Run a module on a plain nested dict of arrays."""
    # NNX knows the module without adapters; they are set on this one copy.
    params, adapters = split_adapters(params)
    module = nnx.merge(graphdef, nnx.State(params))
    for module_path, adapter in adapters:
        linear = functools.reduce(getattr, module_path, module)
        linear.lora_a, linear.lora_b = (adapter.get(half) for half in LORA)
    return getattr(module, method)(*arguments)


def init(module_class: Callable[..., nnx.Module], *arguments: Any, key: jax.Array | None) -> Tree:
    """Draw fresh parameters of `cls(*args)` as a plain nested dict; without a key, their shapes in zeros and ones."""
    rngs = None if key is None else nnx.Rngs(key)
    return nnx.to_pure_dict(nnx.state(module_class(*arguments, rngs=rngs), nnx.Param))


def init_embedding(key: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """Draw a table of standard deviation 0.02, as transformers does; without a key zeros."""
    if key is None:
        return jnp.zeros(shape, jnp.float32)
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """Split a key; None, with which nothing is drawn, stays None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def fold_key(key: jax.Array | None, number: int) -> jax.Array | None:
    """Fold a number into a key; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def init_stacked(
    module_class: Callable[..., nnx.Module], *arguments: Any, key: jax.Array | None, count: int
) -> Tree:
    """Draw parameters of `count` such modules, stacked along axis 0."""
    if key is None:
        one = init(module_class, *arguments, key=None)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), one)
    # One vmapped init makes the stack in one program.
    keys = jax.random.split(key, count)
    return jax.vmap(lambda one_key: init(module_class, *arguments, key=one_key))(keys)


# ---- Adapters beside kernels -------------------------------------------------------------------------------

LORA = ("lora_a", "lora_b")


def split_adapters(
    params: Tree, module_path: tuple[str, ...] = ()
) -> tuple[Tree, list[tuple[tuple[str, ...], Tree]]]:
    """Part a tree into (params without the LORA leaves, [(path of their module, {name: leaf})])."""
    without_adapters: Tree = {}
    adapters = []
    for name, value in params.items():
        if isinstance(value, dict):
            without_adapters[name], inner_adapters = split_adapters(value, (*module_path, name))
            adapters += inner_adapters
        elif name not in LORA:
            without_adapters[name] = value
    # What is missing now are the two leaves of an adapted module.
    if len(without_adapters) < len(params):
        halves = {name: params[name] for name in LORA if name in params}
        adapters.append((module_path, halves))
    return without_adapters, adapters


def merge_adapters(linear: Tree) -> Tree:
    """Add the adapters of a Linear's parameters, maybe stacked, to its kernel, if there are any.

    The sum is formed in float32 and rounded once to the kernel's type; stacks go layer by layer, so that memory
    holds one float32 kernel.
    """
    if "lora_a" not in linear:
        return linear
    without_adapters, [(_, adapters)] = split_adapters(linear)

    def add(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
        # In float32 to the last bit: a small update must not be lost in a bfloat16 product.
        delta = jnp.matmul(
            lora_a.astype(jnp.float32), lora_b.astype(jnp.float32), precision="highest"
        )
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

    kernel_and_halves = (without_adapters["kernel"], *(adapters[name] for name in LORA))
    # Layers of a model are stacked on axis 0, in front of the two of a matrix.
    is_stacked = without_adapters["kernel"].ndim > 2
    if is_stacked:
        kernel = jax.lax.map(lambda layer: add(*layer), kernel_and_halves)
    else:
        kernel = add(*kernel_and_halves)
    return {**without_adapters, "kernel": kernel}


# ---- Stacks of layers --------------------------------------------------------------------------------------

UNROLL_UP_TO = 8
"""Stacks of at most this many layers are unrolled: a scan costs small CPU models more than it saves."""


def is_shallow(count: int) -> bool:
    """Say whether a stack of so many layers is unrolled."""
    return count <= UNROLL_UP_TO


def unstack(tree: Any, count: int) -> list:
    """Part a stacked tree into its layers.

    One `lax.split` a leaf: its gradient is one concatenation, where `count` slices would each pad a full-size array.
    """
    # Layers are unstacked leaf by leaf and put together again.
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(leaf, (1,) * count, 0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [part[index][0] for part in parts]) for index in range(count)
    ]


def checkpointed(function: Callable, remat: str) -> Callable:
    """Wrap a layer for rematerialisation: "none" keeps all activations, "full" none, "dots" the products.

    Raises:
        ValueError: if `remat` is none of these.
    """
    if remat == "none":
        return function
    if remat == "full":
        return jax.checkpoint(function)
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=policy)
    raise ValueError(f"remat must be 'none', 'full' or 'dots', got {remat!r}")


def run_layers(
    layer: Callable,
    stacked: Any,
    hidden: Any,
    count: int,
    remat: str = "none",
    unroll_up_to: int | None = None,
) -> tuple[Any, Any]:
    """Run (hidden, aux) = layer(params_i, hidden) for i in 0..count-1; unrolled when shallow.

    Args:
        stacked: trees stacked on axis 0, or a list of `count` trees, which is unrolled, too.
        unroll_up_to: layers; None: UNROLL_UP_TO.

    Returns:
        The last hidden and the aux outputs stacked on axis 0 (None if layers give None).
    """
    layer = checkpointed(layer, remat)  # what its backward pass computes again

    def step(hidden: Any, params: Any) -> tuple[Any, Any]:
        # Said at every layer, or the compiler divides activations by features on a mesh.
        return layer(params, divide_rows(hidden))

    is_list = isinstance(stacked, list)
    # One trace for all layers, or a trace each.
    if count > (UNROLL_UP_TO if unroll_up_to is None else unroll_up_to) and not is_list:
        return jax.lax.scan(step, hidden, stacked)
    # Unrolled: the compiler sees every layer, and fuses what follows one with what begins the next.
    outputs = []
    for params in stacked if is_list else unstack(stacked, count):
        hidden, aux = step(hidden, params)
        outputs.append(aux)
    return hidden, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)
