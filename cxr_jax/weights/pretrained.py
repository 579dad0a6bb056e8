"""Where a run starts: random weights of a named size, the embedded model, an HF folder, or another run's export."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cxr_jax import asset
from cxr_jax.errors import UserError
from cxr_jax.models import network, registry
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.tokenizer import Tokenizer
from cxr_jax.runtime.trees import Tree
from cxr_jax.weights import hf_folder, locate, model_card, native_folder
from cxr_jax.weights.safetensors_file import find_shards

PHANTOM = str(asset("phantom"))

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Names of types in a run's config -> the types."""

# What stands before the name of a size, and tells it from a folder.
_RANDOM = "random:"


@dataclass(frozen=True)
class StartingModel:
    """The model that a run begins with.

    params of a folder lie on the host, in the type in which they are stored: `Trainable` decides what goes to the
    device in which type.
    """

    config: Any
    params: Tree
    tokenizer: Tokenizer


def load_starting_model(model: str, seed: int) -> StartingModel:
    """Load what `config.model` names.

    Args:
        model: "random:SIZE" (fresh weights, the embedded tokenizer), "phantom", or a folder.
        seed: of fresh weights.

    Raises:
        UserError: if it names nothing, or what it names is damaged.
    """
    # Before the tokenizer, so that a bad name is refused for what it is.
    check_model(model)
    tokenizer = load_tokenizer(model)
    if model.startswith(_RANDOM):
        model_config = random_config(model, tokenizer)
        return StartingModel(model_config, untrained_params(model_config, seed), tokenizer)
    # Our checkpoints and Hugging Face folders are told apart by what lies in them.
    folder = _find_folder(model)
    load = native_folder.load if native_folder.is_native(folder) else hf_folder.load
    model_config, params = load(folder)
    return StartingModel(model_config, params, tokenizer)


def to_device(params: Tree, dtype: str) -> Tree:
    """Put parameters on the device, in the type of the computation (`config.dtype`)."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, DTYPES[dtype]), params)


def is_built_in(model: str) -> bool:
    """Whether `config.model` is a name of ours and no folder."""
    return model == "phantom" or model.startswith(_RANDOM)


def fingerprint(model: str) -> dict[str, str | None]:
    """Hash the weights of a folder that a run starts from: a resumed run takes what is frozen from there."""
    # What we bring or draw ourselves is known by its name, the code and the seed.
    if is_built_in(model):
        return {}
    return {"weights_sha256": hf_folder.weights_sha256(_find_folder(model))}


def origin(model: str) -> model_card.Origin:
    """Tell where a run starts, as the card of its export says it."""
    if model.startswith(_RANDOM):
        return model_card.Origin(
            name=model, weights_sha256=None, licence=model_card.licence_of(None)
        )
    folder = _find_folder(model)
    return model_card.Origin(
        name=model if is_built_in(model) else model_card.name_of(folder),
        weights_sha256=fingerprint(model).get("weights_sha256"),
        licence=model_card.licence_of(folder),
    )


def random_config(name: str, tokenizer: Tokenizer) -> Any:
    """Build the model's config of "random:SIZE" with the token ids of a tokenizer."""
    # The sizes carry the ids of the published tokenizer, and the embedded one has others.
    return dataclasses.replace(registry.sizes()[name], **tokenizers.config_ids(tokenizer))


def check_model(model: str) -> None:
    """Refuse a `config.model` that names nothing or nothing that can be read, before anything is loaded.

    Raises:
        UserError: if it is empty, an unknown size, or no folder of a model whose config.json can be used.
    """
    # Cheapest first: an empty value, then a folder, then the list of sizes.
    if not model:
        raise UserError("config.model is empty; give it with --config.model=FOLDER")
    if not model.startswith(_RANDOM):
        # A few lines of JSON, which tell another family and quantized weights from ours.
        hf_folder.read_config(_find_folder(model))
    elif model not in registry.sizes():
        known = ", ".join(registry.sizes())
        raise UserError(f"config.model={model!r}: no such size; known: {known}")


def check_weights(model: str) -> None:
    """Refuse a folder that lacks files of its weights; none is opened.

    Raises:
        UserError: naming the file.
    """
    if not model.startswith(_RANDOM) and not native_folder.is_native(_find_folder(model)):
        find_shards(_find_folder(model))


def load_tokenizer(model: str) -> Tokenizer:
    """Load the tokenizer that `config.model` brings.

    Raises:
        UserError: if it has none.
    """
    # A model with random weights has no tokenizer of its own, and borrows the embedded one.
    return tokenizers.load(PHANTOM if model.startswith(_RANDOM) else str(_find_folder(model)))


def _find_folder(model: str) -> Path:
    # The message names the key that the user has set, and not only the path.
    try:
        return locate.find_folder(model)
    except UserError as error:
        raise UserError(f"config.model={model!r}: {error}") from None


def untrained_params(model_config: Any, seed: int) -> Tree:
    """Draw untrained weights of the same size: the "base" row of a phantom table."""
    return network.init_params(model_config, jax.random.key(seed))
