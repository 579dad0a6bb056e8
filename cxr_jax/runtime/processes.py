"""Several processes, one program: how a process finds its place, and what they must decide together.

Every process is started with the same command; `jax.distributed` is the engine. A process learns its place from

    CXR_DISTRIBUTED=1           from what started it: TPU VM, Slurm, Open MPI; port JAX_COORDINATOR_PORT, or 8476
    CXR_COORDINATOR=HOST:PORT, CXR_NUM_PROCESSES=N, CXR_PROCESS_ID=K        anywhere else, all three

and is one process of its own without any of them. CXR_START_TIMEOUT (300) is how many seconds it waits for the others
to start, CXR_HEARTBEAT_TIMEOUT (100) how many for a sign of life of one that has. `whole`, `agree` and what is built on
them are collective: every process must call them, in the same order.
"""

import functools
import os
import socket
import sys
import time
import zlib

import numpy as np

from cxr_jax.errors import RunFailedError, UserError

_joined = _leaving_together = False
PORT = "8476"  # pinned: JAX's own default has moved between releases, past firewall rules (jax issue 35905)
_PLACE = ("CXR_COORDINATOR", "CXR_NUM_PROCESSES", "CXR_PROCESS_ID")


def start() -> None:
    """Joins the other processes, if the environment speaks of any, before JAX looks for devices.

    From then on only process 0 prints to stdout. Raises UserError for variables that make no place, RunFailed when
    the others do not come.
    """
    found = [name for name in _PLACE if os.environ.get(name)]
    if not found and os.environ.get("CXR_DISTRIBUTED", "0") in ("", "0"):
        return
    global _joined
    seconds = _number("CXR_START_TIMEOUT", 300), _number("CXR_HEARTBEAT_TIMEOUT", 100)
    place = _place(found) if found else {}
    os.environ.setdefault("JAX_COORDINATOR_PORT", PORT)
    import jax
    from jax._src import distributed  # the coordinator's address has no public name

    _joined = True
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if place.get("process_id"):  # JAX aborts where nothing answers; ask first, to say why
            _reach(place["coordinator_address"], seconds[0])
        jax.distributed.initialize(
            **place, initialization_timeout=seconds[0], heartbeat_timeout_seconds=seconds[1]
        )
    except (RuntimeError, ValueError, OSError) as e:
        where = (
            place.get("coordinator_address")
            or distributed.global_state.coordinator_address
            or "unknown"
        )
        who = f"process {place.get('process_id', '?')} of {place.get('num_processes', '?')}"
        raise RunFailedError(
            f"{who}: not all processes met at the coordinator {where} within {seconds[0]} s. Was every one started, "
            f"with the same variables? Can all reach that port (firewall)? Is it free there? ({_first_line(e)})"
        ) from e
    print(
        f"process {index()} of {count()}, coordinator {distributed.global_state.coordinator_address}",
        flush=True,
    )
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def _place(found) -> dict:
    if missing := [name for name in _PLACE if name not in found]:
        raise UserError(
            f"{missing[0]} is not set, but {found[0]} is: set {', '.join(_PLACE)}, all three"
        )
    n, k = _number("CXR_NUM_PROCESSES"), _number("CXR_PROCESS_ID", least=0)
    if k >= n:
        raise UserError(f"CXR_PROCESS_ID={k} is not below CXR_NUM_PROCESSES={n}")
    address = os.environ["CXR_COORDINATOR"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"CXR_COORDINATOR={address} is not HOST:PORT")
    return {"coordinator_address": address, "num_processes": n, "process_id": k}


def _number(name, default=None, least=1) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text} is not a whole number >= {least}")
    return int(text)


def _reach(address, seconds):
    """Waits until something listens at the address. OSError if nothing does within so many seconds."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _first_line(e) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def count() -> int:
    if not _joined:
        return 1
    import jax

    return jax.process_count()


def index() -> int:
    if not _joined:
        return 0
    import jax

    return jax.process_index()


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if count() == 1:
        return bool(flag)
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


def of_main(number: int) -> int:
    """Process 0's number."""
    if count() == 1:
        return int(number)
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def same(text: str) -> bool:
    """Whether all processes have the same text."""
    global _leaving_together
    mine = zlib.crc32(text.encode()) >> 1
    _leaving_together = agree(mine != of_main(mine))
    return not _leaving_together


def together(action):
    """What `action()` returns, if no process raised a UserError in it; else all raise one."""
    global _leaving_together
    result, error = None, None
    try:
        result = action()
    except UserError as e:
        error = e
    if agree(error is not None):
        _leaving_together = True
        raise error or UserError("another process has refused its input: see its line")
    return result


def gather_to_host(tree):
    """The tree as NumPy arrays, on every process."""
    import jax
    from jax.experimental import multihost_utils

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def leave(code: int) -> int:
    """Ends this process's part of the program; returns its exit code.

    All leave together when they are done. One that fails alone ends at once: the others, which wait for it in a
    collective, learn of it by a connection that closes or a heartbeat that stays out, and end, too.
    """
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        if code and not _leaving_together:
            os._exit(code)
        import jax

        jax.distributed.shutdown()
    return code


@functools.cache
def cpu_device():
    """A CPU device beside the accelerator; None (the default device) where JAX has only one platform."""
    import jax

    if jax.default_backend() == "cpu":
        return None
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return None
