"""Several processes, one program: how a process finds its place, and what they must decide together.

Every process is started with the same command; `jax.distributed` is the engine. A process learns its place from

    CXR_DISTRIBUTED=1           from what started it: TPU VM, Slurm, Open MPI; port JAX_COORDINATOR_PORT, or 8476
    CXR_COORDINATOR=HOST:PORT, CXR_NUM_PROCESSES=N, CXR_PROCESS_ID=K        anywhere else, all three

and is one process of its own without any of them. CXR_START_TIMEOUT (300) is how many seconds it waits for the others
to start, CXR_HEARTBEAT_TIMEOUT (100) how many for a sign of life of one that has. `gather_to_host`, `agree` and what is
built on them are collective: every process must call them, in the same order.
"""

import functools
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cxr_jax.errors import RunFailedError, UserError

Result = TypeVar("Result")

_joined = _leaving_together = False
PORT = "8476"  # pinned: JAX's own default has moved between releases, past firewall rules (jax issue 35905)
_PLACE = ("CXR_COORDINATOR", "CXR_NUM_PROCESSES", "CXR_PROCESS_ID")


# ---- Meeting the others ----


class _Timeouts(NamedTuple):
    """Seconds to wait for the others to start, and for a sign of life of one that has."""

    start: int
    heartbeat: int


def start() -> None:
    """Join the other processes, if the environment speaks of any, before JAX looks for devices; once is enough.

    From then on only process 0 prints to stdout.

    Raises:
        UserError: for variables that make no place.
        RunFailedError: when the others do not come.
    """
    # Either variables by hand, or a launcher that JAX knows: with neither, this is one process.
    set_variables = [name for name in _PLACE if os.environ.get(name)]
    if not set_variables and os.environ.get("CXR_DISTRIBUTED", "0") in ("", "0"):
        return
    global _joined
    if _joined:
        return
    timeouts = _Timeouts(
        _whole_number("CXR_START_TIMEOUT", 300), _whole_number("CXR_HEARTBEAT_TIMEOUT", 100)
    )
    # Read before JAX is touched, so that a mistake is told at once and by its name.
    place = _read_place(set_variables) if set_variables else {}
    # For what starts processes without naming a port.
    os.environ.setdefault("JAX_COORDINATOR_PORT", PORT)
    import jax
    from jax._src import distributed  # the coordinator's address has no public name

    _joined = True
    # For processes on CPUs; accelerators bring collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if place.get("process_id"):  # JAX aborts where nothing answers; ask first, to say why
            _reach(place["coordinator_address"], timeouts.start)
        jax.distributed.initialize(
            **place,
            initialization_timeout=timeouts.start,
            heartbeat_timeout_seconds=timeouts.heartbeat,
        )
    except (RuntimeError, ValueError, OSError) as error:
        # Where they were to meet, from whoever knows it: the message needs it most.
        address = (
            place.get("coordinator_address")
            or distributed.global_state.coordinator_address
            or "unknown"
        )
        process = f"process {place.get('process_id', '?')} of {place.get('num_processes', '?')}"
        raise RunFailedError(
            f"{process}: not all processes met at the coordinator {address} within {timeouts.start} s. Was every one "
            "started, with the same variables? Can all reach that port (firewall)? Is it free there? "
            f"({_first_line(error)})"
        ) from error
    address = distributed.global_state.coordinator_address
    print(f"process {index()} of {count()}, coordinator {address}", flush=True)
    if not is_main():
        # One voice: the others' lines would come between, many times over.
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def _read_place(set_variables: list[str]) -> dict[str, Any]:
    """What `jax.distributed.initialize` takes, from the variables of `_PLACE`."""
    # All three or none: with one missing, JAX would wait for processes that never come.
    for name in _PLACE:
        if name not in set_variables:
            raise UserError(
                f"{name} is not set, but {set_variables[0]} is: set {', '.join(_PLACE)}, all three"
            )
    process_count = _whole_number("CXR_NUM_PROCESSES")
    process_id = _whole_number("CXR_PROCESS_ID", least=0)
    if process_id >= process_count:
        raise UserError(
            f"CXR_PROCESS_ID={process_id} is not below CXR_NUM_PROCESSES={process_count}"
        )
    address = os.environ["CXR_COORDINATOR"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"CXR_COORDINATOR={address} is not HOST:PORT")
    return {
        "coordinator_address": address,
        "num_processes": process_count,
        "process_id": process_id,
    }


def _whole_number(name: str, default: int | None = None, least: int = 1) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text} is not a whole number >= {least}")
    return int(text)


def _reach(address: str, seconds: int) -> None:
    """Waits until something listens at the address. OSError if nothing does within so many seconds."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            # Others may still be starting: a refused connection is no failure before the time is
            # up.
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- This process ----
# JAX is imported inside the functions: one process alone never needs it here, and `start` must come before.


def count() -> int:
    """Count the processes of the program."""
    if not _joined:
        return 1
    import jax

    return jax.process_count()


def index() -> int:
    """Return the number of this process, from 0."""
    if not _joined:
        return 0
    import jax

    return jax.process_index()


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return index() == 0


# ---- What all must call ----


def barrier(name: str) -> None:
    """Wait for all processes."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if count() == 1:
        return bool(flag)
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


def from_main(number: int) -> int:
    """Return process 0's number."""
    if count() == 1:
        return int(number)
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def array_from_main(values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return process 0's float32 values in this shape; the others need not have them."""
    if count() == 1:
        return np.asarray(values, np.float32).reshape(shape)
    from jax.experimental import multihost_utils

    # The others bring an array of the same shape, of which nothing is read.
    here = np.zeros(shape, np.float32) if values is None else values.reshape(shape)
    return np.asarray(multihost_utils.broadcast_one_to_all(here))


def have_same(text: str) -> bool:
    """Whether all processes have the same text."""
    global _leaving_together
    checksum = zlib.crc32(text.encode()) >> 1  # an int32 that is not negative, for `from_main`
    _leaving_together = agree(checksum != from_main(checksum))
    return not _leaving_together


def together(action: Callable[[], Result]) -> Result:
    """Return what `action()` returns, if no process raised a UserError in it; else all raise one."""
    global _leaving_together
    result: Any = None
    refusal: UserError | None = None
    try:
        result = action()
    except UserError as error:
        refusal = error
    # Each checks for itself, and all go on or none: one that stopped alone would leave the others waiting.
    if agree(refusal is not None):
        _leaving_together = True
        raise refusal or UserError("another process has refused its input: see its line")
    return result


def gather_to_host(tree: Any) -> Any:
    """Copy a tree into NumPy arrays, on every process."""
    import jax
    from jax.experimental import multihost_utils

    def gather(leaf: Any) -> np.ndarray:
        # What lies here whole needs no other process, and plain numbers never do.
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        # Every device holds the same: the first copy that is here is enough.
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def leave(code: int) -> int:
    """End this process's part of the program; return its exit code.

    All leave together when they are done. One that fails alone ends at once: the others, which wait for it in a
    collective, learn of it by a connection that closes or a heartbeat that stays out, and end, too.
    """
    if _joined:
        # `os._exit` below would drop what is still in the buffers.
        sys.stdout.flush()
        sys.stderr.flush()
        # A shutdown would wait for the others, which wait for this one.
        if code and not _leaving_together:
            os._exit(code)
        import jax

        jax.distributed.shutdown()
    return code


@functools.cache
def cpu_device() -> Any:
    """Find a CPU device beside the accelerator; None (the default device) where JAX has only one platform."""
    import jax

    if jax.default_backend() == "cpu":
        return None
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return None


def use_compilation_cache(least_seconds: float = 1.0) -> None:
    """Keep compiled programs between runs, where the user's variables do not say otherwise.

    Args:
        least_seconds: programs that compile faster are not kept.
    """
    import jax  # takes a second, which commands spend after they have looked at their flags

    cache_folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "cxr_jax", "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache_folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
