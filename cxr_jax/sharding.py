"""Where each array of a run lies on a mesh: one ordered table, paths to logical axes; one map, those to mesh axes.

The rules name the last axes of an array; those before (stacked layers) are never divided. Optimizer moments, masters
and what is fixed have the paths of their parameters in their own, so they follow. FSDP: every large matrix is divided
over `fsdp` along the model's width, and gathered where it is used; `tensor` divides heads, hidden units and the
vocabulary. The vision tower, a fifth of the 3B model, is divided over `fsdp` only: its 3,420 units do not divide.
"""

import contextlib
import functools
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from cxr_jax import processes
from cxr_jax.errors import UserError
from cxr_jax.optim import path_string
from cxr_jax.rows import BATCH_AXES, row_axes

AXES = ("data", "fsdp", "tensor")

LOGICAL_TO_MESH = {"width": "fsdp", "heads": "tensor", "hidden": "tensor", "vocab": "tensor"}

# (pattern of a path, logical axes of the last dimensions); the first that matches holds.
RULES = (
    (r"/lora/|^lora/|/locate/|^locate/", ()),  # small: everywhere
    (r"/(norm\d?|bias|pool_scale|pool_bias)(/|$)", ()),
    (r"text/embed/embedding$", ("vocab", "width")),
    (r"text/head/kernel$", ("width", "vocab")),
    (r"text/layers/attn/[qkv]/kernel$", ("width", "heads")),
    (r"text/layers/attn/o/kernel$", ("heads", "width")),
    (r"text/layers/mlp/(gate|up)/kernel$", ("width", "hidden")),
    (r"text/layers/mlp/down/kernel$", ("hidden", "width")),
    (r"vision/(patch_embed/proj|blocks/mlp/down)/kernel$", (None, "width")),
    (r"vision/(blocks|merger)/.*kernel$", ("width", None)),
    (r"(^|/)\.?(step|skipped|count)$", ()),
)


def mesh(data: int, fsdp: int, tensor: int, devices=None) -> jax.sharding.Mesh:
    """A mesh of data x fsdp x tensor devices; one of the three may be -1: what remains of all devices.

    Raises UserError if they are not there.
    """
    devices = jax.devices() if devices is None else devices
    shape, n = [data, fsdp, tensor], len(devices)
    asked = " x ".join(map(str, shape))
    if shape.count(-1) == 1 and min(s for s in shape if s != -1) > 0:
        shape[shape.index(-1)] = n // int(np.prod([s for s in shape if s != -1]))
    if min(shape) < 1 or int(np.prod(shape)) != n:
        raise UserError(
            f"config.mesh: {asked} (data x fsdp x tensor; -1: what remains) is not {n} device(s)"
        )
    try:  # TPUs: an axis may take part of a side of their torus
        placed = mesh_utils.create_device_mesh(
            tuple(shape), devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as e:
        why = "does not fit how the devices are wired"
        raise UserError(f"config.mesh: {asked} (data x fsdp x tensor) {why}: {e}") from e
    return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def spec(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The partition of the array at `path`. sizes: devices along each mesh axis.

    Raises UserError for a path that no rule covers, and for a dimension that does not divide.
    """
    logical = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if logical is None:
        raise UserError(f"sharding: no rule covers the parameter {path}")
    logical = (None,) * (len(shape) - len(logical)) + logical
    mesh_axes = [LOGICAL_TO_MESH.get(a) for a in logical]
    used = [a for a in mesh_axes if a]
    if len(used) != len(set(used)):
        raise UserError(
            f"sharding: {path} would be divided over the same mesh axis twice: {mesh_axes}"
        )
    for size, axis in zip(shape, mesh_axes, strict=True):
        if axis and size % sizes[axis]:
            raise UserError(
                f"sharding: {path} {list(shape)}: {size} does not divide by {axis}={sizes[axis]}"
            )
    return PartitionSpec(*mesh_axes)


def gathered(params: dict, dtype) -> dict:
    """Parameters of the model in the type of the computation, whole on every device but for `tensor`; as they are where
    `fsdp` divides none.

    For loops that use them at every turn. Left to itself, the compiler divides the products of a decode loop by the
    weights' features and adds up all rows' parts on every device, for every token.
    """
    on = jax.sharding.get_abstract_mesh()
    if "fsdp" not in row_axes(on) or on.shape["fsdp"] == 1:
        return params

    def whole(path, x):
        path = path_string(path)
        axes = (
            ()
            if "/lora_" in path
            else [a if a == "tensor" else None for a in spec(path, x.shape, dict(on.shape))]
        )
        return jax.lax.with_sharding_constraint(x.astype(dtype), PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(whole, params)


def shardings(tree, on: jax.sharding.Mesh):
    """NamedSharding of every leaf of a train state, of parameters, or of what is fixed."""
    sizes = dict(on.shape)
    return jax.tree_util.tree_map_with_path(
        lambda p, x: NamedSharding(on, spec(path_string(p), np.shape(x), sizes)), tree
    )


def batch_shardings(batch, on: jax.sharding.Mesh):
    """NamedSharding of every leaf of a batch: rows (axis 0; axis 1 of the prompts' positions) over data and fsdp."""

    def one(path, x):
        rows_on = 1 if path_string(path).endswith("prompts/positions") else 0
        return NamedSharding(
            on, PartitionSpec(*[None] * rows_on, BATCH_AXES) if x.ndim else PartitionSpec()
        )

    return jax.tree_util.tree_map_with_path(one, batch)


def laid_out(tree):
    """A train state, or gradients, where RULES say, on the mesh that `jax.set_mesh` has set, if any.

    Said of what a step gives out, so that it goes into the next one as it came.
    """
    on = jax.sharding.get_abstract_mesh()
    if on.empty:
        return tree
    place = lambda p, x: jax.lax.with_sharding_constraint(
        x, spec(path_string(p), x.shape, dict(on.shape))
    )
    return jax.tree_util.tree_map_with_path(place, tree)


class Layout:
    """Where the arrays of a run lie: on its one device, or on the mesh of `config.mesh` over all devices.

    A step's rows are divided over data x fsdp. Each process makes those that lie on its devices, and no others.
    """

    def __init__(self, on: jax.sharding.Mesh | None):
        self.mesh = on
        self.shards = 1 if on is None else on.shape["data"] * on.shape["fsdp"]

    @classmethod
    def of(cls, config) -> "Layout":
        """Raises UserError for a mesh that is not as many devices as there are."""
        on = mesh(**config.mesh)
        return cls(on if on.size > 1 else None)

    def __str__(self):
        if self.mesh is None:
            return "one device"
        return " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())

    def on_host(self):
        """A context in which whole trees are made beside the accelerators, for `state` to divide: one may not fit."""
        return (
            contextlib.nullcontext()
            if self.mesh is None
            else jax.default_device(processes.cpu_device())
        )

    def state(self, tree):
        """A train state, parameters or what is fixed, every array at its place; the same values on every process."""
        if self.mesh is None:
            return jax.tree.map(
                lambda x: x if isinstance(x, jax.Array) else jax.numpy.asarray(x), tree
            )

        def put(x, where):
            if isinstance(x, jax.Array) and (
                x.sharding == where or x.is_fully_addressable and processes.count() == 1
            ):
                return jax.device_put(x, where)
            host = np.asarray(
                x
            )  # copied: JAX would share its memory, and a step takes over its state
            return jax.make_array_from_callback(host.shape, where, lambda at: np.array(host[at]))

        return jax.tree.map(put, tree, shardings(tree, self.mesh))

    def like(self, tree):
        """The jax.ShapeDtypeStructs of what `state` would give."""
        if self.mesh is None:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)
        of = lambda x, where: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where)
        return jax.tree.map(of, tree, shardings(tree, self.mesh))

    def rows_of(self, n: int) -> np.ndarray:
        """int: which of n rows this process makes, in order."""
        if self.mesh is None:
            return np.arange(n)
        where = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map(
            (n,)
        )
        return np.unique(np.concatenate([np.arange(n)[at] for at in where.values()]))

    def batch(self, tree):
        """The rows that every process has made (`rows_of`), as arrays over all devices."""
        if self.mesh is None:
            return tree
        share = len(self.rows_of(self.shards)) / self.shards

        def put(path, x, where):
            axis = next((i for i, a in enumerate(where.spec) if a), None)
            shape = tuple(round(s / share) if i == axis else s for i, s in enumerate(np.shape(x)))
            return jax.make_array_from_process_local_data(where, np.asarray(x), shape)

        return jax.tree_util.tree_map_with_path(put, tree, batch_shardings(tree, self.mesh))

    def on(self, program):
        """The jitted program, called and compiled for the mesh."""
        if self.mesh is None:
            return program

        @functools.wraps(program)
        def call(*arguments):
            with jax.set_mesh(self.mesh):
                return program(*arguments)

        return call


ONE_DEVICE = Layout(None)
