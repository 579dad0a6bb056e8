"""How arrays lie on devices: the mesh of a run, and what is divided over it."""

import contextlib
import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from cxr_jax.errors import UserError
from cxr_jax.runtime import processes
from cxr_jax.runtime.batch_rows import BATCH_AXES
from cxr_jax.runtime.sharding import batch_shardings, shardings

AXES = ("data", "fsdp", "tensor")


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


class Layout:
    """Where the arrays of a run lie: on its one device, or on the mesh of `config.mesh` over all devices.

    A step's rows are divided over data x fsdp. Each process makes those that lie on its devices, and no others.
    """

    def __init__(self, on: jax.sharding.Mesh | None):
        self.mesh = on
        self.shards = 1 if on is None else on.shape["data"] * on.shape["fsdp"]

    @classmethod
    def of(cls, axes: Mapping[str, int]) -> "Layout":
        """Lay out over all devices.

        Args:
            axes: "data", "fsdp" and "tensor" -> devices, as in `config.mesh`.

        Raises:
            UserError: for a mesh that is not as many devices as there are.
        """
        on = mesh(**axes)
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
