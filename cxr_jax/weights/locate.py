"""Finds the folder of a model by its name or path."""

import os
from pathlib import Path

from cxr_jax import asset
from cxr_jax.errors import UserError
from cxr_jax.weights import native_folder
from cxr_jax.weights.safetensors_file import pickled_weights


def find_folder(name: str | os.PathLike) -> Path:
    """Find the model folder behind a name.

    Args:
        name: "phantom", a Hugging Face folder, a checkpoint of `cxr_jax.convert`, or a run's workdir (its `hf/`).

    Raises:
        UserError: when there is none.
    """
    # The name of the model inside the package wins over a folder of that name in the working
    # directory.
    if str(name) == "phantom":
        folder = asset("phantom")
        if not (folder / "config.json").is_file():
            raise UserError("the embedded model 'phantom' is missing from this installation")
        return folder
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{name}: no model there: not a folder")
    # A run's workdir stands for the model that it has exported.
    for folder in (path, path / "hf"):
        if _is_model(folder):
            return folder
    # A folder of pickles would load elsewhere, so it is told why it does not here.
    if pickled_weights(path):
        raise UserError(
            f"{name}: its weights are pickle files, which can run code when they are read; "
            "only safetensors are read"
        )
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{name}: an adapter and no model there: merge it into its base model (cxr-jax convert from-hf --adapter)"
        )
    raise UserError(f"{name}: no model there (config.json and *.safetensors, or a run with hf/)")


def _is_model(folder: Path) -> bool:
    # config.json alone is no model: its weights may be missing, or in another format.
    if not (folder / "config.json").is_file():
        return False
    # The star at the end takes in an index whose shards are missing: the loader then names them.
    return native_folder.is_native(folder) or any(folder.glob("*.safetensors*"))
