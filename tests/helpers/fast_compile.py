"""Settings of XLA for programs that run once or twice: code that is slower to run and several times sooner there.

What XLA itself does with a program stays (where devices meet, what is fused); each piece of it is left as it comes.
Without the fusion emitters a piece goes to LLVM by the way it went before them, in half the time: where there still is
that way.
"""

import importlib.metadata
import os

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# XLA ends the process at a flag that it does not know, and this one is gone by jaxlib 0.12.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
# The same for the environment variable XLA_FLAGS, which must stand before JAX is imported.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())


def environment(**more: str) -> dict[str, str]:
    """The variables of this process and the flags, for programs that a test starts."""
    return {**os.environ, "XLA_FLAGS": FLAGS, **more}
