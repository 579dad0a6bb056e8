"""How arrays lie on devices: the mesh of a run, and what is divided over it."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from cxr_jax.errors import UserError
from cxr_jax.runtime import processes
from cxr_jax.runtime.batch_rows import BATCH_AXES, HEAD_AXES
from cxr_jax.runtime.sharding import batch_shardings, shardings
from cxr_jax.runtime.trees import Tree

AXES = ("data", "fsdp", "tensor")


Watch = Callable[[], contextlib.AbstractContextManager]


class Heads(NamedTuple):
    """Attention heads of a model: of queries, and of keys and values."""

    queries: int
    keys: int


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    slices: int = 1,
    heads: Heads | None = None,
) -> Mesh:
    """Make a mesh of data x fsdp x tensor devices; one of the three may be -1: what remains of all devices.

    Of fewer key heads than `tensor`, several devices need the same one: the mesh then has two axes in its place,
    "tensor", which divides key heads, too, and "key_copies", the devices that share one.

    Args:
        slices: groups of devices that only the slow network between hosts connects (DCN; a TPU slice each). They
            divide `data` as far as it goes, and then `fsdp`; what `tensor` moves stays within a slice.
        heads: of the model, if it is known.

    Raises:
        UserError: if they are not there, or do not divide the heads or the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape, device_count = [data, fsdp, tensor], len(devices)
    asked = " x ".join(map(str, shape))
    # What is -1 takes what the two others leave; what does not divide is found below.
    given = [axis_size for axis_size in shape if axis_size != -1]
    if len(given) == 2 and min(given) > 0:
        shape[shape.index(-1)] = device_count // int(np.prod(given))
    if min(shape) < 1 or int(np.prod(shape)) != device_count:
        raise UserError(
            f"config.mesh: {asked} (data x fsdp x tensor; -1: what remains) is not {device_count} device(s)"
        )
    axes, shape = _with_key_copies(shape, heads)
    between, within = _divide_by_slices(shape, slices)
    try:  # TPUs: an axis may take part of a side of their torus
        parts = [
            mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=True)
            for part in _devices_by_slice(devices, slices)
        ]
    except (NotImplementedError, ValueError) as error:
        reason = "does not fit how the devices are wired"
        raise UserError(f"config.mesh: {asked} (data x fsdp x tensor) {reason}: {error}") from error
    # Slices are the outer part of each axis: neighbours along it are in one slice, but for the last of a slice.
    placed = np.block(_nested(parts, between))
    # Auto: the compiler divides the work by how its inputs lie, and the program says so where that is not enough.
    return Mesh(placed, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def _divide_by_slices(shape: list[int], slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide the axes of a mesh: (how many slices along each, how many devices of a slice along each)."""
    data, fsdp, *heads = shape
    # As much as `data` takes: there only gradients cross.
    of_data = math.gcd(data, slices)
    of_fsdp = slices // of_data
    # What is left must be taken by the weights' axis.
    if fsdp % of_fsdp:
        raise UserError(
            f"config.mesh.slices={slices} does not divide data x fsdp = {data} x {fsdp}, and tensor stays in a slice"
        )
    return (of_data, of_fsdp, *[1] * len(heads)), (data // of_data, fsdp // of_fsdp, *heads)


def _devices_by_slice(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice, by their own number; those that are in none, as CPUs, in their order."""
    numbers: list[Any] = [getattr(device, "slice_index", None) for device in devices]
    is_tpu = any(getattr(device, "platform", "") == "tpu" for device in devices)
    # A TPU says in which slice it is, and no order of ours can change that.
    there = len(set(numbers))
    # Hosts with GPUs may count as slices each, and be asked for as one.
    if None in numbers or (slices == 1 and not is_tpu):
        return [list(part) for part in np.array_split(np.array(devices, object), slices)]
    if there != slices:
        raise UserError(f"config.mesh.slices={slices}: the devices are {there} slice(s)")
    # Within a slice the order stays: JAX knows how its devices are wired.
    by_slice: dict[Any, list] = {number: [] for number in sorted(set(numbers))}
    for device, number in zip(devices, numbers, strict=True):
        by_slice[number].append(device)
    return list(by_slice.values())


def _nested(parts: list[np.ndarray], between: tuple[int, ...]) -> list:
    """Parts in row-major order as lists in lists, as np.block takes them."""
    # From the innermost axis outwards; what is left is the list of the outermost.
    nested: list[Any] = list(parts)
    for count in reversed(between[1:]):
        nested = [nested[first : first + count] for first in range(0, len(nested), count)]
    return nested


def _with_key_copies(shape: list[int], heads: Heads | None) -> tuple[tuple[str, ...], list[int]]:
    """Names and sizes of the axes of a mesh of data x fsdp x tensor."""
    *rows, tensor = shape
    # As many key heads as devices, or a multiple: whole heads on each.
    if heads is None or heads.keys % tensor == 0:
        return AXES, shape
    if heads.queries % tensor:
        raise UserError(
            f"config.mesh.tensor={tensor} does not divide the {heads.queries} heads of the model"
        )
    # Each device has whole query heads, and the key heads that these ask.
    key_parts = math.gcd(tensor, heads.keys)
    return (*BATCH_AXES, *HEAD_AXES), [*rows, key_parts, tensor // key_parts]


def product_precision(chosen: str, dtype: str) -> contextlib.AbstractContextManager:
    """Make a context in which float32 products are computed as `config.matmul_precision` says.

    That the sampler is the learner to 1e-5, and that logits are those of the published model, holds of float32
    products. JAX's default is TF32 on GPUs and one pass of bfloat16 on TPUs: 10 and 7 bits of 23 (docs.jax.dev,
    `jax_default_matmul_precision`). Products of bfloat16 are exact under any name, and CPUs know only float32.

    Args:
        chosen: a value of `config.matmul_precision`.
        dtype: of the computation.
    """
    precision = {"auto": "highest" if dtype == "float32" else "default"}.get(chosen, chosen)
    # JAX's default unsaid: programs stay as they are, and so do their names in caches.
    if precision == "default":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)


def device_memory() -> int | None:
    """Tell how many bytes an accelerator has for arrays, the same on every process; None where it does not say."""
    # Of a CPU it would be the memory of the host, if anything.
    device = jax.local_devices()[0]
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    # In MiB, which are the same where hosts differ by a page, and which fit what is sent.
    mebibytes = processes.from_main(stats.get("bytes_limit", 0) >> 20)
    return mebibytes << 20 or None


class Layout:
    """Where the arrays of a run lie: on its one device, or on the mesh of `config.mesh` over all devices.

    A step's rows are divided over data x fsdp. Each process makes those that lie on its devices, and no others.

    Args:
        mesh: None for one device.

    Attributes:
        shards: parts into which the rows of a batch are divided.
    """

    def __init__(self, mesh: Mesh | None) -> None:
        self.mesh = mesh
        self.shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    @classmethod
    def from_config(
        cls,
        sizes: Mapping[str, Any],
        devices: Sequence[jax.Device] | None = None,
        heads: Heads | None = None,
    ) -> "Layout":
        """Make the layout of `config.mesh` on devices, or on all there are.

        Raises:
            UserError: for a mesh that is not as many, or that does not divide the heads of the model.
        """
        mesh = make_mesh(**sizes, devices=devices, heads=heads)
        # A mesh of one device divides nothing, and would only make other programs of the same
        # steps.
        return cls(mesh if mesh.size > 1 else None)

    def __str__(self) -> str:
        if self.mesh is None:
            return "one device"
        sizes = dict(self.mesh.shape)
        # Said as it was asked for.
        copies = sizes.pop("key_copies", 1)
        sizes["tensor"] *= copies
        described = " x ".join(f"{name} {axis_size}" for name, axis_size in sizes.items())
        return described if copies == 1 else f"{described} (a key head on {copies} devices)"

    def on_host(self) -> contextlib.AbstractContextManager:
        """Enter a context in which whole trees are made beside the accelerators, for `state` to divide.

        One accelerator may be too small for them.
        """
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.default_device(processes.cpu_device())

    def state(self, array_tree: Tree) -> Tree:
        """Put a train state, parameters or what is frozen at its place, the same values on every process."""
        if self.mesh is None:
            return jax.tree.map(_as_jax_array, array_tree)
        return jax.tree.map(_place, array_tree, shardings(array_tree, self.mesh))

    def like(self, array_tree: Tree) -> Tree:
        """Describe what `state` would give, as jax.ShapeDtypeStructs."""
        if self.mesh is None:
            return jax.tree.map(
                lambda tree_leaf: jax.ShapeDtypeStruct(np.shape(tree_leaf), tree_leaf.dtype),
                array_tree,
            )

        def describe(tree_leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(np.shape(tree_leaf), tree_leaf.dtype, sharding=sharding)

        return jax.tree.map(describe, array_tree, shardings(array_tree, self.mesh))

    def rows_of(self, count: int) -> np.ndarray:
        """List which of `count` rows this process makes: int, in order."""
        row_indices = np.arange(count)
        if self.mesh is None:
            return row_indices
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        # Devices along `tensor` hold the same rows, hence `unique`.
        slices = sharding.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([row_indices[row_slice] for row_slice in slices]))

    def batch(self, array_tree: Tree) -> Tree:
        """Join the rows that every process has made (`rows_of`) to arrays over all devices."""
        if self.mesh is None:
            return array_tree
        # JAX is told the shape of the whole array, of which only this process's rows are here.
        share = len(self.rows_of(self.shards)) / self.shards  # of the rows, made by this process

        def put(tree_leaf: Any, sharding: NamedSharding) -> jax.Array:
            # The axis that is divided, if any: only there this process holds a part of the whole.
            divided = next(
                (leaf_axis for leaf_axis, name in enumerate(sharding.spec) if name), None
            )
            shape = tuple(
                round(axis_size / share) if leaf_axis == divided else axis_size
                for leaf_axis, axis_size in enumerate(np.shape(tree_leaf))
            )
            return jax.make_array_from_process_local_data(sharding, np.asarray(tree_leaf), shape)

        return jax.tree.map(put, array_tree, batch_shardings(array_tree, self.mesh))

    def on_mesh(self, program: Callable, unwatched: Watch | None = None) -> Callable:
        """Wrap a jitted program, so that it is called and compiled for the mesh.

        Args:
            unwatched: makes a context in which the program is compiled, at its first call and before it runs: so
                nobody takes a long compilation for a step that hangs.
        """
        if unwatched is not None:
            program = _compiled_apart(program, unwatched)
        if self.mesh is None:
            return program

        @functools.wraps(program)
        def call(*arguments: Any) -> Any:
            # What a program asks about the mesh (`sharding`, `batch_rows`) is answered by this.
            with jax.set_mesh(self.mesh):
                return program(*arguments)

        return call


def _compiled_apart(program: Callable, unwatched: Watch) -> Callable:
    """Compile a jitted program within `unwatched` at its first call; JAX then has what the call itself needs."""
    is_compiled = False

    @functools.wraps(program)
    def call(*arguments: Any) -> Any:
        nonlocal is_compiled
        # Shapes never change in a run, so what is compiled once is compiled.
        if not is_compiled:
            with unwatched():
                program.lower(*arguments).compile()  # type: ignore[attr-defined]
            is_compiled = True
        return program(*arguments)

    return call


def _as_jax_array(tree_leaf: Any) -> jax.Array:
    return tree_leaf if isinstance(tree_leaf, jax.Array) else jax.numpy.asarray(tree_leaf)


def _place(tree_leaf: Any, sharding: Sharding) -> jax.Array:
    # An array that lies here already moves between devices, without a way over the host.
    if isinstance(tree_leaf, jax.Array) and (
        tree_leaf.sharding == sharding or tree_leaf.is_fully_addressable and processes.count() == 1
    ):
        return jax.device_put(tree_leaf, sharding)
    host = np.asarray(tree_leaf)
    # Copied: JAX would share its memory, and a step takes over its state.
    return jax.make_array_from_callback(
        host.shape, sharding, lambda row_slice: np.array(host[row_slice])
    )


ONE_DEVICE = Layout(None)
