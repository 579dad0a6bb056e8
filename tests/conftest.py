"""Settings that must stand before JAX is imported, and those shared by all tests."""

import ctypes
import gc
import getpass
import os
import sys
import tempfile

import fast_compile

# The environment, not jax.config, so that programs which tests start inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"cxr_jax_test_cache_{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Most programs of tests run once or twice. XLA_FLAGS= (empty) compiles them as a run does.
os.environ.setdefault("XLA_FLAGS", fast_compile.FLAGS)

import jax
import pytest
from absl import flags
from hypothesis import settings

flags.FLAGS.mark_as_parsed()  # code under test may read flags that no command line has set

# The same examples on every run, and no limit by the clock: test machines are slow and shared.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# What the garbage collector waits for. By its own numbers it walks all that JAX has traced every few seconds.
NEW_OBJECTS = 300_000

# Of a process of tests, where those of the next file may be any: its share of two thirds of the machine.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
MOST_MEMORY = 2 / 3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / PROCESSES


def pytest_collection_finish():
    """Libraries and collected tests stay to the end: the collector does not walk them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def memory_is_given_back():
    """Programs of a whole suite, compiled in one process, would hold many gigabytes."""
    yield
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MOST_MEMORY:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()  # what was traced stays for the next file
