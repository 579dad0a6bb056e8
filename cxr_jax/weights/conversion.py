"""Hugging Face folder to our checkpoint and back, shard by shard."""

import math
import shutil
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models import registry
from cxr_jax.runtime import whole_files
from cxr_jax.weights import hf_folder, native_folder, peft_folder
from cxr_jax.weights.safetensors_file import DTYPES, NAMES, nbytes, write_folder

_FILES = hf_folder.SETTINGS_FILES + hf_folder.TOKENIZER_FILES


def from_hf(source: Path, temp: Path, adapter: str | None = None) -> None:
    """Fill the empty folder `temp` with our checkpoint of the Hugging Face folder `source`; adapter: a PEFT folder,
    merged on the way."""
    model_config, table, tensors = hf_folder.open_hf(source)
    # Refused now, and not by whoever opens the checkpoint.
    registry.family_of(model_config).processor.pixel_limits(*hf_folder.image_settings(source))
    types = hf_folder.leaf_types(table, tensors)
    _need_space(temp, sum(math.prod(r.shape) * types[r.path].itemsize for r in table))
    extra = {
        "tied_head_is_stored": hf_folder.head_is_stored_twice(model_config, tensors),
        # Layers of one stacked array that are stored in another type than the array has.
        "tensor_types": {
            r.key: NAMES[tensors.dtype(r.key)]
            for r in table
            if tensors.dtype(r.key) != types[r.path]
        },
    }
    found = None if adapter is None else peft_folder.load(adapter, model_config)
    params = hf_folder.read_params(model_config, table, tensors)
    if found:
        peft_folder.merge(params, *found)
    native_folder.save(temp, params, extra)
    whole_files.copy_files(source, temp, _FILES)


def to_hf(source: Path, temp: Path, max_shard_gb: float = 5.0) -> None:
    """Fill the empty folder `temp` with the Hugging Face form of our checkpoint `source`."""
    arrays = native_folder.Arrays(source)
    family = registry.family_of(arrays.config)
    held: dict = {}

    def leaf(path):  # `rules` goes array by array, so each is read once, and one is held
        if path not in held:
            held.clear()
            held[path] = arrays[path]
        return held[path]

    entries = [
        hf_folder.entry(
            r,
            leaf,
            np.dtype(DTYPES[arrays.tensor_types[r.key]])
            if r.key in arrays.tensor_types
            else arrays.dtype(r.path),
        )
        for r in family.tensor_rules(arrays.config)
    ]
    if arrays.tied_head_is_stored:
        embedding = next(e for e in entries if e[0] == "model.embed_tokens.weight")
        entries.append(("lm_head.weight", *embedding[1:]))
    _need_space(temp, sum(map(nbytes, entries)))
    whole_files.copy_files(source, temp, _FILES)
    # Readers older than transformers 5 do not know image settings in processor_config.json: they get a file of theirs.
    limits = family.processor.pixel_limits(*hf_folder.image_settings(source))
    for name, settings in (
        ("generation_config.json", hf_folder.generation_config(arrays.config)),
        ("preprocessor_config.json", family.processor.settings(arrays.config, *limits)),
    ):
        if not (temp / name).exists():
            whole_files.write_json(temp / name, settings)
    write_folder(temp, entries, max_shard_gb)


def _need_space(temp: Path, size: int) -> None:
    free = shutil.disk_usage(temp).free
    if size > free:
        raise UserError(
            f"{temp.parent}: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )
