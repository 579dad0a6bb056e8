"""Where a run starts: random weights of a named size, the embedded model, an HF folder, or another run's export."""

import dataclasses
import os

import jax

from cxr_jax.errors import UserError

PHANTOM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "phantom")


class Start:
    """cfg, params (float32 on CPU) and tokenizer that a run begins with."""

    def __init__(self, cfg, params, tokenizer):
        self.cfg, self.params, self.tokenizer = cfg, params, tokenizer


def start(config) -> Start:
    """`config.model`: "random:phantom" (fresh weights, the embedded tokenizer), "phantom", or a folder."""
    import cxr_jax
    from cxr_jax.data import tokenizer
    from cxr_jax.models import config as sizes
    from cxr_jax.models import qwen2_5_vl as qwen

    name = config.model
    if name.startswith("random:"):
        size = name.split(":", 1)[1]
        known = {"phantom": sizes.PHANTOM}
        if size not in known:
            raise UserError(f"config.model={name!r}: no such size; known: {', '.join(known)}")
        cfg = known[size]
        tok = tokenizer.load(PHANTOM)
        cfg = dataclasses.replace(cfg, **tokenizer.config_ids(tok))
        return Start(cfg, qwen.init_params(cfg, jax.random.key(config.seed)), tok)
    model = cxr_jax.load(name)
    if model.tokenizer is None:
        raise UserError(f"config.model={name!r}: the folder has no tokenizer")
    return Start(model.cfg, model.params, model.tokenizer)
