"""Hugging Face folder to our checkpoint and back, shard by shard."""

import math
import os
import shutil
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.models import registry
from cxr_jax.models.family import TensorRule
from cxr_jax.runtime import whole_files
from cxr_jax.weights import hf_folder, model_card, native_folder, peft_folder
from cxr_jax.weights.safetensors_file import DTYPES, NAMES, write_folder

# Named chat templates of transformers 5, beside chat_template.jinja.
_TEMPLATES = "additional_chat_templates"


def from_hf(source: Path, destination: Path, adapter: str | os.PathLike | None = None) -> None:
    """Fill the empty folder `destination` with our checkpoint of the Hugging Face folder `source`.

    Args:
        adapter: a PEFT folder, merged on the way.
    """
    # Headers are read and compared with config.json here; weights come last.
    opened = hf_folder.open_folder(source)
    tensor_rules, tensors = opened.rules, opened.tensors
    # Refused now, and not by whoever opens the checkpoint.
    processor = registry.processor_of(opened.model_config)
    processor.pixel_limits(*hf_folder.image_settings(source))
    types = opened.leaf_types
    _require_space(
        destination,
        sum(
            math.prod(tensor_rule.shape) * types[tensor_rule.path].itemsize
            for tensor_rule in tensor_rules
        ),
    )
    # What the way back cannot see in the arrays.
    facts = {
        "tied_head_is_stored": opened.tied_head_is_stored,
        # Layers of one stacked array that are stored in another type than the array has.
        "tensor_types": {
            tensor_rule.key: NAMES[tensors.dtype(tensor_rule.key)]
            for tensor_rule in tensor_rules
            if tensors.dtype(tensor_rule.key) != types[tensor_rule.path]
        },
    }
    # The adapter is read first: a bad one is refused before the weights take their time.
    loaded_adapter = None
    if adapter is not None:
        loaded_adapter = peft_folder.load(adapter, opened.model_config)
    params = hf_folder.read_params(opened)
    if loaded_adapter:
        peft_folder.merge(params, *loaded_adapter)
    native_folder.save(destination, params, facts)
    # All that headers and settings can tell is checked by now: only the weights are left to read.
    _copy_side_files(source, destination)


def to_hf(source: Path, destination: Path, max_shard_gb: float = 5.0) -> None:
    # The settings of the source go along byte for byte, so the way back gives the same folder.
    """Fill the empty folder `destination` with the Hugging Face form of our checkpoint `source`."""
    arrays = native_folder.Arrays(source)
    family = registry.family_of(arrays.config)
    # One tensor of theirs is a layer of an array of ours, made when the writer asks for it.
    held_arrays: dict[tuple[str, ...], np.ndarray] = {}

    def read_leaf(leaf_path: tuple[str, ...]) -> np.ndarray:
        # The rules go array by array, so each is read once, and one is held.
        if leaf_path not in held_arrays:
            held_arrays.clear()
            held_arrays[leaf_path] = arrays[leaf_path]
        return held_arrays[leaf_path]

    # The type of the array, unless the manifest says that this layer had another one.
    def stored_type(tensor_rule: TensorRule) -> np.dtype:
        if tensor_rule.key in arrays.tensor_types:
            return np.dtype(DTYPES[arrays.tensor_types[tensor_rule.key]])
        return arrays.dtype(tensor_rule.path)

    tensor_rules = family.tensor_rules(arrays.config)
    tensors = [
        hf_folder.tensor_to_write(tensor_rule, read_leaf, stored_type(tensor_rule))
        for tensor_rule in tensor_rules
    ]
    # One array of ours, two tensors of theirs.
    if arrays.tied_head_is_stored:
        embedding_key = hf_folder.embedding_key(tensor_rules)
        embedding = next(tensor for tensor in tensors if tensor.key == embedding_key)
        tensors.append(embedding._replace(key=hf_folder.HEAD))
    # The size is known from the manifest alone, so a full disk is told before anything is written.
    _require_space(destination, sum(tensor.nbytes for tensor in tensors))
    _copy_side_files(source, destination)
    # Readers older than transformers 5 do not know image settings in processor_config.json: they get a file of theirs.
    processor = registry.processor_of(arrays.config)
    limits = processor.pixel_limits(*hf_folder.image_settings(source))
    for file_name, settings in (
        ("generation_config.json", hf_folder.generation_config(arrays.config)),
        ("preprocessor_config.json", processor.settings(*limits)),
        ("processor_config.json", processor.processor_settings()),
    ):
        # Files of the source win: what was published with the weights is not replaced by our
        # version of it.
        if settings is not None and not (destination / file_name).exists():
            whole_files.write_json(destination / file_name, settings)
    write_folder(destination, tensors, max_shard_gb)


def _copy_side_files(source: Path, destination: Path) -> None:
    """Copy what lies beside the weights: settings, tokenizer, chat templates, card and licence."""
    names = hf_folder.SETTINGS_FILES + hf_folder.TOKENIZER_FILES
    whole_files.copy_files(source, destination, (*names, *model_card.licence_files(source)))
    templates = sorted(path.name for path in (source / _TEMPLATES).glob("*.jinja"))
    if templates:
        (destination / _TEMPLATES).mkdir()
        whole_files.copy_files(source / _TEMPLATES, destination / _TEMPLATES, tuple(templates))


def _require_space(folder: Path, size: int) -> None:
    """Raise UserError unless the disk has `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder.parent}: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )
