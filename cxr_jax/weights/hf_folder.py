"""Qwen2.5-VL weights to and from Hugging Face folders, through one table, without torch.

Reads single-file and sharded safetensors, in the key layout of the published weights (`visual.*`,
`model.layers.*`) and in the nested one (`model.visual.*`, `model.language_model.*`). The mapping is a
bijection or an error: a missing, unexpected or mis-shaped tensor is never passed over. Writes the published
layout, which transformers and vLLM load.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from cxr_jax.errors import UserError, shown
from cxr_jax.models import registry
from cxr_jax.models.family import TensorRule
from cxr_jax.models.qwen2_5_vl.config import Config
from cxr_jax.models.qwen2_5_vl.image_settings import PIXEL_LIMITS
from cxr_jax.runtime.trees import flatten
from cxr_jax.runtime.whole_files import atomic_folder, copy_files, write_json
from cxr_jax.weights.safetensors_file import (
    NAMES,
    Tensors,
    parse_json,
    write_folder,
    write_safetensors,
)

__all__ = ["load_hf", "read_config", "save_hf", "write_safetensors"]

WEIGHT_TYPES = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16))
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


# --- reading a folder ----------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError for anything else."""
    return parse_json(path.read_bytes(), path)


def read_config(folder: str | os.PathLike) -> Config:
    """The Config of a model folder. Raises UserError when it is absent, damaged or another architecture."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; not a Hugging Face model folder")
    d = read_json(path)
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        # The stop ids that generation uses live here in the published folders (config.json names only one).
        extra = read_json(generation)
        d = {
            **d,
            **{k: extra[k] for k in ("eos_token_id", "pad_token_id") if extra.get(k) is not None},
        }
    try:
        model_config = registry.read_config(d)
    except UserError as e:
        raise UserError(f"{folder}: {e}") from e
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{path}: a value is not of its type: {shown(e)}") from e
    _check_sizes(path, model_config)
    return model_config


def _check_sizes(path: Path, model_config: Config) -> None:
    """Refuses sizes that no model has, before anything is allocated for them."""
    limits = {"depth": 1000, "num_hidden_layers": 1000}
    for part in (model_config.vision, model_config.text):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, int) and not 1 <= value <= limits.get(field.name, 2**24):
                raise UserError(f"{path}: {field.name} is {value}")


def open_hf(folder: str | os.PathLike) -> tuple[Config, list[TensorRule], Tensors]:
    """(config, rules, tensors) of a model folder whose headers fit its config exactly; no weight is read yet.

    Raises UserError that names what is missing, unexpected or of another shape or type.
    """
    model_config = read_config(folder)
    family = registry.family_of(model_config)
    table, tensors = family.tensor_rules(model_config), Tensors(folder, family.canonical_key)
    want = {r.key: r.shape for r in table}
    have = set(tensors.where)
    if model_config.tie_word_embeddings:
        have.discard("lm_head.weight")  # some writers store the tied head once more
    have = {
        k for k in have if not k.endswith("rotary_emb.inv_freq")
    }  # a buffer of old files, not a weight
    problems = []
    for title, keys in (
        ("missing", sorted(set(want) - have)),
        ("unexpected", sorted(have - set(want))),
    ):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{title}: {', '.join(map(shown, keys[:4]))}{more}")
    both = sorted(set(want) & have)
    if wrong := [k for k in both if tensors.shape(k) != want[k]]:
        k = wrong[0]
        problems.append(
            f"wrong shape: {k} is {list(tensors.shape(k))}, config.json says {list(want[k])}"
            + (f" ({len(wrong)} such)" if len(wrong) > 1 else "")
        )
    if odd := [k for k in both if tensors.dtype(k) not in WEIGHT_TYPES]:
        problems.append(f"{odd[0]} is {NAMES[tensors.dtype(odd[0])]}; weights are F32, BF16 or F16")
    if problems:
        raise UserError(f"{folder}: weights do not fit config.json; " + "; ".join(problems))
    _check_tied_head(folder, model_config, tensors)
    return model_config, table, tensors


def head_is_stored_twice(model_config: Config, tensors: Tensors) -> bool:
    return model_config.tie_word_embeddings and "lm_head.weight" in tensors.where


def _check_tied_head(folder, model_config: Config, tensors: Tensors) -> None:
    if not head_is_stored_twice(model_config, tensors):
        return
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    same = (
        head.dtype == embedding.dtype
        and head.shape == embedding.shape
        and all(
            head[i : i + 4096].tobytes() == embedding[i : i + 4096].tobytes()
            for i in range(0, len(head), 4096)
        )
    )
    if not same:
        raise UserError(
            f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it"
        )


def leaf_types(table: list[TensorRule], tensors: Tensors) -> dict[tuple[str, ...], np.dtype]:
    """Our path -> the type that holds all its layers exactly: theirs, or float32 where layers differ."""
    found: dict[tuple[str, ...], set] = {}
    for r in table:
        found.setdefault(r.path, set()).add(tensors.dtype(r.key))
    return {
        path: kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        for path, kinds in found.items()
    }


def load_hf(folder: str | os.PathLike, dtype=None) -> tuple[Config, dict]:
    """(config, parameters as nested dict of numpy arrays) of a model folder.

    dtype: what the arrays are converted to; None keeps the file's. Shards are read one after the other, front
    to back; beside the arrays, memory holds one tensor. Raises UserError, naming the tensors, unless files and
    config fit exactly, or if a weight is NaN or infinite.
    """
    model_config, table, tensors = open_hf(folder)
    return model_config, read_params(model_config, table, tensors, dtype)


def read_params(
    model_config: Config, table: list[TensorRule], tensors: Tensors, dtype=None
) -> dict:
    """The arrays of a folder that `open_hf` has checked."""
    shapes = registry.family_of(model_config).parameter_shapes(model_config)
    types = leaf_types(table, tensors)
    params: dict = {}
    for r in sorted(table, key=lambda r: tensors.place(r.key)):
        node = params
        for name in r.path[:-1]:
            node = node.setdefault(name, {})
        raw = tensors[r.key]
        if not is_finite(raw):
            raise UserError(f"{tensors.where[r.key][0]}: {r.key} holds NaN or infinity")
        if r.path[-1] not in node:
            node[r.path[-1]] = np.empty(shapes[r.path], dtype or types[r.path])
        node[r.path[-1]][... if r.layer is None else r.layer] = r.to_ours(raw)
    return params


def is_finite(x: np.ndarray) -> bool:
    """No NaN and no infinity, by the exponent's bits, a piece at a time: weights are large."""
    kind, exponent = {4: (np.uint32, 0x7F800000), 2: (np.uint16, 0x7C00)}[x.itemsize]
    if x.dtype == ml_dtypes.bfloat16:
        exponent = 0x7F80
    bits = x.reshape(-1).view(kind)
    return not any(
        ((bits[i : i + 2**22] & exponent) == exponent).any() for i in range(0, bits.size, 2**22)
    )


@functools.cache
def weights_sha256(folder):
    """SHA-256 over the folder's *.safetensors files in the order of their names; None if there are none.

    Of a converted checkpoint: over its manifest, which holds the SHA-256 of every array.
    """
    folder = None if folder is None else Path(folder)
    files = (
        []
        if folder is None
        else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("cxr_jax.json"))
    )
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest() if files else None


# --- writing a folder ----------------------------------------------------------------------------------


def hf_tensors(model_config: Config, params: dict, dtype=None) -> list:
    """(key, shape, dtype, function returning the array) for every tensor, for `write_folder`."""
    flat = dict(flatten(params))
    return [
        entry(r, lambda path: flat[path], np.dtype(dtype or flat[r.path].dtype))
        for r in registry.family_of(model_config).tensor_rules(model_config)
    ]


def entry(r: TensorRule, leaf, kind: np.dtype):
    """What `write_folder` takes, for one rule. leaf: function from our path to the array."""

    def make():
        x = leaf(r.path)
        return r.to_hf(np.asarray(x if r.layer is None else x[r.layer]).astype(kind, copy=False))

    return r.key, r.shape, kind, make


def generation_config(model_config: Config) -> dict:
    return {
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": list(model_config.eos_token_id),
        "pad_token_id": model_config.pad_token_id,
        "do_sample": False,
    }


def image_settings(folder: str | os.PathLike) -> tuple[dict, Path | None]:
    """(settings of the image processor without those that are null, their file), or ({}, None).

    As transformers 5 finds them: "image_processor" of processor_config.json, or else preprocessor_config.json.
    Raises UserError for a file that is no JSON object.
    """
    for name, part in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
    ):
        path = Path(folder) / name
        found = read_json(path) if path.is_file() else None
        if found is not None and part is not None:
            found = found.get(part)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise UserError(f"{path}: {part} is not a JSON object")
        return {k: v for k, v in found.items() if v is not None}, path
    return {}, None


def save_hf(
    folder: str | os.PathLike,
    model_config: Config,
    params: dict,
    *,
    dtype=None,
    min_pixels: int = PIXEL_LIMITS[0],
    max_pixels: int = PIXEL_LIMITS[1],
    tokenizer=None,
    max_shard_gb: float = 5.0,
) -> None:
    """Write a model folder that transformers and vLLM load: config, generation and preprocessor settings,
    safetensors (shards and an index above `max_shard_gb`); and the tokenizer, if given as an object or a folder.

    dtype: stored type (None: that of the arrays). The folder appears whole or not at all; an existing one is
    replaced only after the new one is complete.
    """
    folder = Path(folder)
    family = registry.family_of(model_config)
    config = family.write_config(model_config)
    config["torch_dtype"] = _TORCH_NAMES[
        NAMES[np.dtype(dtype or params["text"]["embed"]["embedding"].dtype)]
    ]
    with atomic_folder(folder) as temp:
        write_json(temp / "config.json", config)
        write_json(temp / "generation_config.json", generation_config(model_config))
        write_json(
            temp / "preprocessor_config.json",
            family.processor.settings(model_config, min_pixels, max_pixels),
        )
        if tokenizer is not None:
            _add_tokenizer(tokenizer, temp)
        write_folder(temp, hf_tensors(model_config, params, dtype), max_shard_gb)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
)


def _add_tokenizer(source, dst: Path) -> None:
    """Copy the tokenizer files of a folder, or let a tokenizer object write its own."""
    if hasattr(source, "save_pretrained"):
        source.save_pretrained(str(dst))
        _name_tokenizer_class(dst / "tokenizer_config.json")
    else:
        copy_files(Path(source), dst, TOKENIZER_FILES)


def _name_tokenizer_class(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4 and vLLM do not know; both read this one."""
    d = json.loads(path.read_text())
    if d.get("tokenizer_class") == "TokenizersBackend":
        d["tokenizer_class"] = "PreTrainedTokenizerFast"
        d = {k: v for k, v in d.items() if k not in ("backend", "is_local", "local_files_only")}
        write_json(path, d)
