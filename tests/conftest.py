"""Settings that must stand before JAX is imported, and those shared by all tests."""

import getpass
import os
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

from absl import flags
from hypothesis import settings

flags.FLAGS.mark_as_parsed()  # code under test may read flags that no command line has set

# The same examples on every run, and no limit by the clock: test machines are slow and shared.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
