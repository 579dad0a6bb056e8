"""cxr_jax: chest-X-ray reasoning models in JAX. Importing it is light: submodules load on first use."""

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from ml_collections import ConfigDict

    from cxr_jax.inference.model import Model
    from cxr_jax.run import RunResult

__version__ = "0.1.0"  # the package's metadata take it from here
__all__ = ["asset", "load", "train"]

_SUBMODULES = (
    "data",
    "inference",
    "labels",
    "metrics",
    "models",
    "phantom",
    "rewards",
    "rl",
    "run",
    "sft",
)
# Old names, kept for one release.
_MOVED = {"losses": "cxr_jax.rl.losses", "sampling": "cxr_jax.inference.sampling"}


def load(
    name_or_dir: str | pathlib.Path,
    dtype: Any = None,
    grids: str = "exact",
    adapter: str | pathlib.Path | None = None,
    max_pixels: int | None = None,
    image_gate: str = "refuse",
) -> "Model":
    """Load a model to read with: `cxr_jax.inference.model.Model`, with `.logits(...)` and `.generate(...)`.

    Args:
        name_or_dir: "phantom" (the embedded one), a Hugging Face folder, or a run's workdir.
        dtype: compute and weight type; None is float32 on a CPU, whatever the file stores, and bfloat16 on
            accelerators.
        grids: shapes of images, "exact" (the processor's) or "bucket" (few), see `Model`.
        adapter: a folder in PEFT's format, whose LoRA adapters are merged.
        max_pixels: most pixels of an image (docs/inputs.md, section 6), where that is less than the model's own limit.
        image_gate: what becomes of image files that are no chest films by their pixels (docs/inputs.md, section 5):
            "refuse", "warn" or "off".

    Raises:
        UserError: if there is no such model, its weights do not fit its config, or max_pixels is below 28 x 28.
    """
    from cxr_jax.inference import model

    return model.load(name_or_dir, dtype, grids, adapter, max_pixels, image_gate)


def train(
    config: "ConfigDict | Mapping[str, Any] | str",
    workdir: "str | os.PathLike[str]",
    overrides: "Mapping[str, Any] | None" = None,
    rewards: "Sequence[Callable | tuple[Callable, float]]" = (),
    may_change: "Sequence[str]" = (),
) -> "RunResult":
    """Train, or evaluate: the run that the command line makes of the same config, in this process.

    A run resumes by itself from `workdir`, and a complete one is not run again. In the main thread SIGTERM and SIGINT
    save the run, and the call returns; in any other thread signals are the caller's.

    Args:
        config: a ConfigDict; what `--config` takes, as "rl:files" or "experiments/rl.py:phantom"; or a dict of the keys
            that are not at their defaults, nested or dotted, with "task": "rl", "sft" or "evaluate".
        workdir: the folder of the run.
        overrides: further keys, nested or dotted: {"rl.group_size": 4}.
        rewards: functions of your own (docs/own_rewards.md), or pairs of a function and its weight, beside those that
            `config.rl.rewards` names. A run that is resumed needs them again.
        may_change: what the run may be continued with another of, as `--may_change`.

    Returns:
        How it ended: `cxr_jax.run.RunResult`, with its last metrics, table of scores and paths.

    Raises:
        UserError: for bad input (exit code 2 of the command line); a new run leaves nothing behind.
        RunFailedError: for a run that failed (exit code 1); what was saved before stays.
    """
    from cxr_jax import run

    return run.train(config, workdir, overrides, rewards, may_change)


def asset(name: str) -> pathlib.Path:
    """Return the path of a file or folder that ships inside the package, e.g. asset("phantom")."""
    return pathlib.Path(__file__).parent / "assets" / name


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES or name in _MOVED:
        return importlib.import_module(_MOVED.get(name, f"cxr_jax.{name}"))
    raise AttributeError(f"module 'cxr_jax' has no attribute {name!r}")
