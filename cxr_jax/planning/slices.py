"""TPU slices that need not be there: their devices, which libtpu compiles for, and the memory that a program may take.

libtpu holds the compiler of a TPU and runs on any Linux machine. Nothing is asked of a device or of a network.
"""

import importlib.util
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from cxr_jax.errors import UserError

if TYPE_CHECKING:
    import jax

# What keeps libtpu from looking for a machine that it runs on, from telling so, and from taking it for itself alone.
_QUIET_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Kind(NamedTuple):
    """What a chip of a kind has.

    Attributes:
        hbm_gib: memory of a chip.
        sides: shapes that its slices come in (Google's tables of TPU versions); () stands for `_is_3d`.
    """

    hbm_gib: float
    sides: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
KINDS = {"v5e": Kind(16, _FLAT), "v5p": Kind(95, ()), "v6e": Kind(32, _FLAT)}
# Shares of a chip's memory that no program of a run may count on. libtpu itself leaves out up to 1/43 (a program gets
# 15.75 of the 16 GiB of a v5e, 31.25 of the 32 of a v6e); beside a program lie the batch that is fed meanwhile, what
# looks and saves copy, and holes between the arrays of earlier programs.
RESERVE = 1 / 16
# The smallest slices of a v5p; all larger ones are made of cubes of 4 x 4 x 4, up to a pod.
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_V5P_POD = 8960


class Slice(NamedTuple):
    """A slice.

    Attributes:
        name: as asked for, `v5p:2x2x2`.
        kind: of its chips, a key of KINDS.
        devices: one a chip, of all slices; programs can be compiled for them, and not run.
    """

    name: str
    kind: str
    devices: "list[jax.Device]"

    @property
    def program_gib(self) -> float:
        """Memory of a device that the programs of a run may take."""
        return KINDS[self.kind].hbm_gib * (1 - RESERVE)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Read KIND:SIDExSIDE[xSIDE] of a slice that can be had.

    Returns:
        (a key of KINDS, the sides of the slice in chips).

    Raises:
        UserError: for any other text.
    """
    kind, colon, shape = name.partition(":")
    if kind not in KINDS or not colon:
        raise UserError(
            f"--topology={name}: write KIND:SIDES with a kind of {', '.join(KINDS)}, as in v5p:2x2x2"
        )
    # Written as it is named: no signs, no leading zeros.
    numbers = re.fullmatch(r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}", shape)
    sides = tuple(map(int, shape.split("x"))) if numbers else ()
    flat = KINDS[kind].sides
    if flat and shape not in flat:
        raise UserError(f"--topology={name}: slices of a {kind} are {', '.join(flat)}")
    if not flat and not _is_3d(sides):
        raise UserError(
            f"--topology={name}: slices of a {kind} are 2x2x1, 2x2x2, 2x2x4, 2x4x4 or AxBxC with A <= B <= C, "
            f"multiples of 4, up to {_V5P_POD:,} chips"
        )
    return kind, sides


def _is_3d(sides: tuple[int, ...]) -> bool:
    """Say whether a v5p comes in these sides."""
    if sides in _PARTS_OF_A_CUBE:
        return True
    is_of_cubes = all(side % 4 == 0 for side in sides) and tuple(sorted(sides)) == sides
    return len(sides) == 3 and is_of_cubes and sides[0] * sides[1] * sides[2] <= _V5P_POD


def open_slice(name: str, slices: int = 1) -> Slice:
    """Describe the slice of a name, or several of it that a slow network connects.

    Raises:
        UserError: if there is no such slice, or no libtpu.
    """
    kind, sides = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the compiler of TPUs (Linux on x86): pip install 'jax[tpu]' (200 MB), the extra tpu of "
            "this package"
        )
    # Before it is loaded; what a user has set stays.
    for variable, value in _QUIET_COMPILER.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # A host has four chips, except that of a slice of one.
    options: dict = {"chips_per_host_bounds": (1, 1, 1)} if sides == (1, 1) else {}
    # An option only where it is needed: of one slice libtpu is asked as before.
    if slices > 1:
        options["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu raises several kinds
        reason = " ".join(str(error).split())
        raise UserError(f"--topology={name}: libtpu knows no such slice: {reason}") from error
    return Slice(name, kind, list(topology.devices))
