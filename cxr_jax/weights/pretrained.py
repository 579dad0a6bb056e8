"""Where a run starts: random weights of a named size, the embedded model, an HF folder, or another run's export."""

import dataclasses

import jax
import jax.numpy as jnp

from cxr_jax import asset
from cxr_jax.errors import UserError
from cxr_jax.weights import hf_folder, native_folder

PHANTOM = str(asset("phantom"))


class Start:
    """config, params and tokenizer that a run begins with. params of a folder lie on the host, in the type in which
    they are stored: `trainable` decides what goes to the device in which type."""

    def __init__(self, model_config, params, tokenizer):
        self.config, self.params, self.tokenizer = model_config, params, tokenizer


def start(config) -> Start:
    """`config.model`: "random:SIZE" (fresh weights, the embedded tokenizer), "phantom", or a folder."""
    check(config)
    tokenizer = load_tokenizer(config)
    if config.model.startswith("random:"):
        model_config = random_config(config.model, tokenizer)
        return Start(model_config, fresh(model_config, config.seed), tokenizer)
    folder = _folder(config)
    model_config, params = (
        native_folder.load(folder) if native_folder.is_native(folder) else hf_folder.load_hf(folder)
    )
    return Start(model_config, params, tokenizer)


def on_device(config, params: dict | None = None) -> dict:
    """The parameters that `start` gives (or gave), on the device, in the type of the computation."""

    dtype = DTYPES[config.dtype]
    return jax.tree.map(
        lambda x: jax.numpy.asarray(x, dtype), start(config).params if params is None else params
    )


def is_name(model: str) -> bool:
    """Whether `config.model` is a name of ours and no folder."""
    return model == "phantom" or model.startswith("random:")


def fingerprint(config) -> dict:
    """The weights that a run starts from, if they are a folder's: a resumed run takes what is frozen from there."""
    return (
        {}
        if is_name(config.model)
        else {"weights_sha256": hf_folder.weights_sha256(_folder(config))}
    )


def random_config(name: str, tokenizer):
    """The Config of "random:SIZE" with the token ids of a tokenizer."""
    from cxr_jax.models import tokenizer as tokenizers

    return dataclasses.replace(_random_sizes()[name], **tokenizers.config_ids(tokenizer))


def check(config) -> None:
    """Refuses a `config.model` that names nothing, before anything is loaded. Raises UserError."""
    name = config.model
    if not name:
        raise UserError("config.model is empty; give it with --config.model=FOLDER")
    if not name.startswith("random:"):
        _folder(config)
    elif name not in _random_sizes():
        raise UserError(f"config.model={name!r}: no such size; known: {', '.join(_random_sizes())}")


def load_tokenizer(config):
    """The tokenizer that `config.model` brings. Raises UserError if it has none."""
    from cxr_jax.models import tokenizer as tokenizers

    return tokenizers.load(PHANTOM if config.model.startswith("random:") else str(_folder(config)))


def _folder(config):
    from cxr_jax.weights import locate

    try:
        return locate.find_folder(config.model)
    except UserError as e:
        raise UserError(f"config.model={config.model!r}: {e}") from None


def _random_sizes() -> dict:
    from cxr_jax.models import registry

    return registry.sizes()


def fresh(model_config, seed: int):
    """Untrained weights of the same size: the "base" row of a phantom table."""
    from cxr_jax.models import qwen2_5_vl as qwen

    return qwen.init_params(model_config, jax.random.key(seed))


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
