"""Weights to and from Hugging Face folders, through the table of the model's family, without torch.

Reads single-file and sharded safetensors, in the key layout of the published weights and
in all others in circulation (the family's `canonical_key`). The mapping is a bijection or an error: a missing,
unexpected or mis-shaped tensor is never passed over. Writes the published layout, which transformers and vLLM load.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from cxr_jax.errors import UserError, shown
from cxr_jax.models import registry
from cxr_jax.models.family import TensorRule
from cxr_jax.models.network.config import Config
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime.trees import Tree, flatten
from cxr_jax.runtime.whole_files import atomic_folder, copy_files, write_json
from cxr_jax.weights import quantization
from cxr_jax.weights.safetensors_file import NAMES, Tensors, TensorToWrite, parse_json, write_folder

# What models are trained and published in; quantized and integer tensors need arithmetic that is
# not here.
WEIGHT_TYPES = tuple(np.dtype(dtype) for dtype in (np.float32, ml_dtypes.bfloat16, np.float16))
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# It may be one array with the embedding, by the config (tied).
HEAD = "lm_head.weight"

# What trainers save although it follows from config.json: tables of the rotary positions, no weights.
_BUFFERS = tuple(
    f".{module}.{buffer}"
    for module in ("rotary_emb", "rotary_pos_emb")
    for buffer in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
)
# PEFT's names of what stands beside a weight until it is merged.
_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|modules_to_save|original_module)\.")

# Whatever a writer of any version put beside the weights: it is carried over as bytes, so that
# nothing is lost on the way.
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
)


# ---- Reading a folder ----


def read_json(file_path: Path) -> dict:
    """Read the JSON object in a file. Raises UserError for anything else."""
    return parse_json(file_path.read_bytes(), file_path)


def read_config(folder: str | os.PathLike) -> Config:
    """Read the config of a model folder.

    Raises:
        UserError: when it is absent, damaged or of an unknown architecture.
    """
    file_path = Path(folder) / "config.json"
    if not file_path.is_file():
        raise UserError(f"{folder}: no config.json; not a Hugging Face model folder")
    settings = read_json(file_path)
    # Before anything else is made of it: what follows would call its tensors missing.
    quantization.refuse(Path(folder), settings)
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        # The stop ids that generation uses live here in the published folders (config.json names only one).
        ids = read_json(generation)
        for name in ("eos_token_id", "pad_token_id"):
            if ids.get(name) is not None:
                settings[name] = ids[name]
    try:
        model_config = registry.read_config(settings)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file_path}: a value is not of its type: {shown(error)}") from error
    # A config may name any size, and arrays are made before weights are read.
    _check_sizes(file_path, model_config)
    return model_config


def _check_sizes(file_path: Path, model_config: Config) -> None:
    """Refuse sizes that no model has, before anything is allocated for them."""
    # More layers than any published model has; all other numbers have the limit below, 2^24.
    limits = {"depth": 1000, "num_hidden_layers": 1000}
    for section in (model_config.vision, model_config.text):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if type(value) is not int or value == field.default:  # a bool is an int, too
                continue
            if not 1 <= value <= limits.get(field.name, 2**24):
                raise UserError(f"{file_path}: {field.name} is {value}")


@dataclass(frozen=True)
class OpenFolder:
    """A model folder whose headers fit its config exactly; no weight is read yet."""

    model_config: Config
    rules: list[TensorRule]
    tensors: Tensors

    @property
    def embedding_key(self) -> str:
        """The tensor that a tied head is."""
        return embedding_key(self.rules)

    @property
    def tied_head_is_stored(self) -> bool:
        """Whether a head that is tied to the embedding has a tensor of its own, beside the embedding or alone."""
        return self.model_config.tie_word_embeddings and HEAD in self.tensors.stored

    @functools.cached_property
    def leaf_types(self) -> dict[tuple[str, ...], np.dtype]:
        """Our path -> the type that holds all its layers exactly: theirs, or float32 where layers differ."""
        # An array of ours stacks one tensor of each layer, and every tensor has a type of its own.
        types_of_layers: dict[tuple[str, ...], set[np.dtype]] = {}
        for tensor_rule in self.rules:
            types_of_layers.setdefault(tensor_rule.path, set()).add(
                self.tensors.dtype(tensor_rule.key)
            )
        return {
            leaf_path: layer_types.pop() if len(layer_types) == 1 else np.dtype(np.float32)
            for leaf_path, layer_types in types_of_layers.items()
        }


def embedding_key(rules: list[TensorRule]) -> str:
    """Find the key of the token embedding."""
    return next(rule.key for rule in rules if rule.path == ("text", "embed", "embedding"))


def open_folder(folder: str | os.PathLike) -> OpenFolder:
    """Open a model folder.

    Raises:
        UserError: that names what is missing, unexpected or of another shape or type.
    """
    model_config = read_config(folder)
    # Names, shapes and their place in our tree all come from the family; here is only the
    # comparison.
    family = registry.family_of(model_config)
    rules = family.tensor_rules(model_config)
    tensors = Tensors(folder, family.canonical_key)
    # Of two names for one array a writer may drop either: the head is then the embedding.
    opened = OpenFolder(model_config, rules, tensors)
    if opened.tied_head_is_stored:
        tensors.stored.setdefault(opened.embedding_key, tensors.stored[HEAD])
    if problems := list(_misfits(opened)):
        raise UserError(f"{folder}: weights do not fit config.json; " + "; ".join(problems))
    # Equal values may be one array; others would leave two heads, of which one would be lost in
    # silence.
    if opened.tied_head_is_stored and not _heads_are_equal(opened):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it"
        )
    return opened


def _misfits(opened: OpenFolder) -> Iterator[str]:
    """What is missing, unexpected or of another shape or type, by the headers."""
    # By names and shapes alone: no weight is read for a folder that does not fit.
    tensors = opened.tensors
    wanted = {tensor_rule.key: tensor_rule.shape for tensor_rule in opened.rules}
    stored_names = {name for name in tensors.stored if not name.endswith(_BUFFERS)}
    if packed := quantization.packed_tensor(stored_names - wanted.keys()):
        yield (
            f"{shown(packed)} is of quantized weights, which are not read, and config.json has no "
            "quantization_config"
        )
        return
    if adapter := next((name for name in sorted(stored_names) if _ADAPTER.search(name)), None):
        yield (
            f"{shown(adapter)} is of an adapter that is not merged into the weights; merge it, or take the base model "
            "and the adapter's own folder (convert --adapter)"
        )
        return
    # The tied head is compared with the embedding by the caller, so here it is neither wanted nor
    # wrong.
    if opened.model_config.tie_word_embeddings:
        stored_names.discard(HEAD)
    # Names first: each tensor of ours is there, and each of theirs has a place.
    for title, tensor_names in (
        ("missing", sorted(wanted.keys() - stored_names)),
        ("unexpected", sorted(stored_names - wanted.keys())),
    ):
        if tensor_names:
            yield f"{title}: {first_names(tensor_names)}"
    # Then shapes and types, of the names that both sides have; one example a kind keeps the message
    # short.
    common_names = sorted(wanted.keys() & stored_names)
    if misshapen := [
        tensor_name
        for tensor_name in common_names
        if tensors.shape(tensor_name) != wanted[tensor_name]
    ]:
        tensor_name = misshapen[0]
        count = f" ({len(misshapen)} such)" if len(misshapen) > 1 else ""
        found, expected = list(tensors.shape(tensor_name)), list(wanted[tensor_name])
        yield f"wrong shape: {tensor_name} is {found}, config.json says {expected}{count}"
    if mistyped := [
        tensor_name
        for tensor_name in common_names
        if tensors.dtype(tensor_name) not in WEIGHT_TYPES
    ]:
        name = NAMES[tensors.dtype(mistyped[0])]
        yield f"{mistyped[0]} is {name}; weights are F32, BF16 or F16"


def first_names(tensor_names: list[str]) -> str:
    """List names for a message: the first four, and how many more there are."""
    more = f" and {len(tensor_names) - 4} more" if len(tensor_names) > 4 else ""
    return ", ".join(map(shown, tensor_names[:4])) + more


def _heads_are_equal(opened: OpenFolder) -> bool:
    tensors, embedding_name = opened.tensors, opened.embedding_key
    if tensors.stored[HEAD] == tensors.stored[embedding_name]:
        return True
    head, embedding = tensors[HEAD], tensors[embedding_name]
    if head.dtype != embedding.dtype or head.shape != embedding.shape:
        return False
    # Bytes and not numbers, so that NaN equals itself; a piece at a time, since they are copied.
    pieces = [slice(start, start + 4096) for start in range(0, len(head), 4096)]
    return all(head[piece].tobytes() == embedding[piece].tobytes() for piece in pieces)


def load(folder: str | os.PathLike, dtype: DTypeLike | None = None) -> tuple[Config, Tree]:
    """Load (config, parameters as nested dict of numpy arrays) of a model folder.

    Shards are read one after the other, front to back; beside the arrays, memory holds one tensor.

    Args:
        dtype: what the arrays are converted to; None keeps the file's.

    Raises:
        UserError: naming the tensors, unless files and config fit exactly, or if a weight is NaN or infinite.
    """
    opened = open_folder(folder)
    return opened.model_config, read_params(opened, dtype)


def read_params(opened: OpenFolder, dtype: DTypeLike | None = None) -> Tree:
    """Read the arrays of a folder; see `load`."""
    # Front to back through each file, since a disk, and a network disk more so, reads on from where it is.
    tensors = opened.tensors
    shapes = registry.family_of(opened.model_config).parameter_shapes(opened.model_config)
    params: Tree = {}
    for tensor_rule in sorted(opened.rules, key=lambda tensor_rule: tensors.place(tensor_rule.key)):
        # The dict of each module is made when the first of its weights comes along.
        *parents, name = tensor_rule.path
        subtree = params
        for parent in parents:
            subtree = subtree.setdefault(parent, {})
        tensor = tensors[tensor_rule.key]
        # Here, where its pages are in memory anyway, and the file and the tensor can be named.
        if not is_finite(tensor):
            raise UserError(
                f"{tensors.stored[tensor_rule.key].path}: {tensor_rule.key} holds NaN or infinity"
            )
        # Likewise the stacked array of all layers is made by whichever of its layers lies first in
        # the files.
        if name not in subtree:
            subtree[name] = np.empty(
                shapes[tensor_rule.path], dtype or opened.leaf_types[tensor_rule.path]
            )
        subtree[name][... if tensor_rule.layer is None else tensor_rule.layer] = (
            tensor_rule.to_ours(tensor)
        )
    return params


def is_finite(array: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity: by the exponent's bits, a piece at a time, since weights are large."""
    # An exponent of ones is an infinity or a NaN, in each of the three types.
    unsigned, exponent = {4: (np.uint32, 0x7F800000), 2: (np.uint16, 0x7C00)}[array.itemsize]
    if array.dtype == ml_dtypes.bfloat16:
        exponent = 0x7F80
    bits = array.reshape(-1).view(unsigned)
    for start in range(0, bits.size, 2**22):
        if ((bits[start : start + 2**22] & exponent) == exponent).any():
            return False
    return True


@functools.cache
def weights_sha256(folder: str | os.PathLike | None) -> str | None:
    """Hash the folder's *.safetensors files in the order of their names, by SHA-256; None if there are none.

    Of a converted checkpoint: its manifest, which holds the SHA-256 of every array.
    """
    if folder is None:
        return None
    folder = Path(folder)
    # Of a converted checkpoint the manifest is enough: it pins every array.
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("cxr_jax.json"))
    if not files:
        return None
    # In blocks of 4 MiB: a shard may be larger than memory.
    digest = hashlib.sha256()
    for file_path in files:
        with open(file_path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def image_settings(folder: str | os.PathLike) -> tuple[dict, Path | None]:
    """Read (settings of the image processor without those that are null, their file), or ({}, None).

    As transformers 5 finds them: "image_processor" of processor_config.json, or else preprocessor_config.json.

    Raises:
        UserError: for a file that is no JSON object.
    """
    for file_name, section in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
    ):
        # A file without the section, or a section that is null, counts as absent, and the next file
        # is asked.
        file_path = Path(folder) / file_name
        if not file_path.is_file():
            continue
        settings: Any = read_json(file_path)
        if section is not None:
            settings = settings.get(section)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise UserError(f"{file_path}: {section} is not a JSON object")
        return {name: value for name, value in settings.items() if value is not None}, file_path
    return {}, None


# ---- Writing a folder ----


def save(
    folder: str | os.PathLike,
    model_config: Config,
    params: Tree,
    *,
    dtype: DTypeLike | None = None,
    pixel_limits: tuple[int, int] | None = None,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    max_shard_gb: float = 5.0,
) -> None:
    """Write a model folder that transformers and vLLM load.

    It holds config, generation and preprocessor settings, safetensors (shards and an index above `max_shard_gb`), and
    the tokenizer, if given. The folder appears whole or not at all; an existing one is replaced only after the new one
    is complete.

    Args:
        dtype: stored type; None: that of the arrays.
        pixel_limits: (min_pixels, max_pixels) of images; None: those of the family's published folders.
        tokenizer: an object, or a folder whose files are copied.
    """
    family, processor = registry.family_of(model_config), registry.processor_of(model_config)
    settings = family.write_config(model_config)
    limits = pixel_limits or processor.published_limits
    stored_type = np.dtype(dtype or params["text"]["embed"]["embedding"].dtype)
    # Loaders that are not told a type take the one that stands here.
    settings["torch_dtype"] = _TORCH_NAMES[NAMES[stored_type]]
    # Settings before weights: a mistake in them is found before gigabytes are written.
    with atomic_folder(Path(folder)) as temporary:
        write_json(temporary / "config.json", settings)
        write_json(temporary / "generation_config.json", generation_config(model_config))
        write_json(temporary / "preprocessor_config.json", processor.settings(*limits))
        if (more := processor.processor_settings()) is not None:
            write_json(temporary / "processor_config.json", more)
        if tokenizer is not None:
            _add_tokenizer(tokenizer, temporary)
        write_folder(temporary, _tensors_to_write(model_config, params, dtype), max_shard_gb)


def _tensors_to_write(
    model_config: Config, params: Tree, dtype: DTypeLike | None
) -> list[TensorToWrite]:
    leaves = dict(flatten(params))
    return [
        tensor_to_write(
            tensor_rule, leaves.__getitem__, np.dtype(dtype or leaves[tensor_rule.path].dtype)
        )
        for tensor_rule in registry.family_of(model_config).tensor_rules(model_config)
    ]


def tensor_to_write(
    tensor_rule: TensorRule, read_leaf: Callable[[tuple[str, ...]], Any], dtype: np.dtype
) -> TensorToWrite:
    """Build what `write_folder` takes, for one rule.

    Args:
        read_leaf: function from our path to the array, called when the tensor is written.
        dtype: stored type.
    """

    def make() -> np.ndarray:
        # Here and not earlier: an array of a checkpoint is read from disk only when its tensor is
        # written.
        array = read_leaf(tensor_rule.path)
        if tensor_rule.layer is not None:
            array = array[tensor_rule.layer]
        return tensor_rule.to_hf(np.asarray(array).astype(dtype, copy=False))

    return TensorToWrite(tensor_rule.key, tensor_rule.shape, dtype, make)


def generation_config(model_config: Config) -> dict:
    """Build the content of generation_config.json."""
    return {
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": list(model_config.eos_token_id),
        "pad_token_id": model_config.pad_token_id,
        # Greedy unless asked otherwise: a reading can then be repeated.
        "do_sample": False,
    }


def _add_tokenizer(tokenizer: Tokenizer | str | os.PathLike, folder: Path) -> None:
    """Copy the tokenizer files of a folder, or let a tokenizer object write its own."""
    # A folder's files are copied as they are: no object would write all of them back byte for byte.
    if isinstance(tokenizer, (str, os.PathLike)):
        copy_files(Path(tokenizer), folder, TOKENIZER_FILES)
    else:
        tokenizer.save_pretrained(str(folder))
        _name_tokenizer_class(folder / "tokenizer_config.json")


def _name_tokenizer_class(file_path: Path) -> None:
    """Name a class for the one that transformers 5 writes: transformers 4 and vLLM do not know that one."""
    settings = json.loads(file_path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # Only for the new class; whatever else the tokenizer says is right for the older versions,
        # too.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # These keys came with the new class, and mean nothing to the old one.
        for name in ("backend", "is_local", "local_files_only"):
            settings.pop(name, None)
        write_json(file_path, settings)
