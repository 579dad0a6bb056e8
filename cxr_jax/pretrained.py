"""Where a run starts: random weights of a named size, the embedded model, an HF folder, or another run's export."""

import dataclasses
import os

import jax

from cxr_jax.errors import UserError

PHANTOM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "phantom")


class Start:
    """cfg, params (float32) and tokenizer that a run begins with."""

    def __init__(self, cfg, params, tokenizer):
        self.cfg, self.params, self.tokenizer = cfg, params, tokenizer


def start(config) -> Start:
    """`config.model`: "random:phantom" (fresh weights, the embedded tokenizer), "phantom", or a folder."""
    import cxr_jax
    from cxr_jax.data import tokenizer as tokenizers

    check(config)
    if config.model.startswith("random:"):
        tok = tokenizer(config)
        cfg = dataclasses.replace(_random_sizes()[config.model], **tokenizers.config_ids(tok))
        return Start(cfg, fresh(cfg, config.seed), tok)
    # float32 on every device: steps of a small learning rate vanish in bfloat16 parameters.
    model = cxr_jax.load(config.model, dtype="float32")
    return Start(model.cfg, model.params, model.tokenizer)


def check(config) -> None:
    """Refuses a `config.model` that names nothing, before anything is loaded. Raises UserError."""
    name = config.model
    if not name:
        raise UserError("config.model is empty; give it with --config.model=FOLDER")
    if not name.startswith("random:"):
        _folder(config)
    elif name not in _random_sizes():
        raise UserError(f"config.model={name!r}: no such size; known: {', '.join(_random_sizes())}")


def tokenizer(config):
    """The tokenizer that `config.model` brings. Raises UserError if it has none."""
    from cxr_jax.data import tokenizer as tokenizers

    return tokenizers.load(PHANTOM if config.model.startswith("random:") else str(_folder(config)))


def _folder(config):
    from cxr_jax.models import loaded

    try:
        return loaded.find_folder(config.model)
    except UserError as e:
        raise UserError(f"config.model={config.model!r}: {e}") from None


def _random_sizes() -> dict:
    from cxr_jax.models import config as sizes

    return {"random:phantom": sizes.PHANTOM}


def fresh(cfg, seed: int):
    """Untrained weights of the same size: the "base" row of a phantom table."""
    from cxr_jax.models import qwen2_5_vl as qwen

    return qwen.init_params(cfg, jax.random.key(seed))
