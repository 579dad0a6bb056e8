"""cxr_jax: chest-X-ray reasoning models in JAX. Importing it is light: submodules load on first use."""

import importlib
import pathlib

__all__ = ["asset", "load"]

_SUBMODULES = (
    "data",
    "inference",
    "labels",
    "metrics",
    "models",
    "phantom",
    "rewards",
    "rl",
    "sft",
)
_MOVED = {
    "losses": "cxr_jax.rl.losses",
    "sampling": "cxr_jax.inference.sampling",
}  # kept for one release


def load(name_or_dir, dtype=None, grids="exact", adapter=None):
    """A model to read with: `cxr_jax.inference.model.Model`, with `.logits(...)` and `.generate(...)`.

    name_or_dir: "phantom" (the embedded one), a Hugging Face folder, or a run's workdir. dtype: compute and
    weight type; None is float32 on a CPU, whatever the file stores, and bfloat16 on accelerators. grids: shapes
    of images, "exact" (the processor's) or "bucket" (at most 9), see `Model`. adapter: a folder in PEFT's format, whose
    LoRA adapters are merged. Raises UserError when there is no such model, or its weights do not fit its config.
    """
    from cxr_jax.inference import model

    return model.load(name_or_dir, dtype, grids, adapter)


def asset(name: str):
    """Path of a file or folder that ships inside the package, e.g. asset("phantom")."""
    return pathlib.Path(__file__).parent / "assets" / name


def __getattr__(name: str):
    if name in _SUBMODULES or name in _MOVED:
        return importlib.import_module(_MOVED.get(name, f"cxr_jax.{name}"))
    raise AttributeError(f"module 'cxr_jax' has no attribute {name!r}")
