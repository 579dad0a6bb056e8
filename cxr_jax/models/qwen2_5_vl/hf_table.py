"""The Hugging Face keys of Qwen2.5-VL as a table, and our names for them."""

import re

from cxr_jax.models import tensor_table
from cxr_jax.models.family import TensorRule
from cxr_jax.models.network.config import Config

# The rows of `tensor_table`.
_VISION = (
    ("patch_embed/proj/kernel", "visual.patch_embed.proj.weight", "conv"),
    ("blocks/norm1/scale", "visual.blocks.{}.norm1.weight", "as is"),
    ("blocks/norm2/scale", "visual.blocks.{}.norm2.weight", "as is"),
    ("blocks/attn/qkv/kernel", "visual.blocks.{}.attn.qkv.weight", "t"),
    ("blocks/attn/qkv/bias", "visual.blocks.{}.attn.qkv.bias", "as is"),
    ("blocks/attn/proj/kernel", "visual.blocks.{}.attn.proj.weight", "t"),
    ("blocks/attn/proj/bias", "visual.blocks.{}.attn.proj.bias", "as is"),
    ("blocks/mlp/gate/kernel", "visual.blocks.{}.mlp.gate_proj.weight", "t"),
    ("blocks/mlp/gate/bias", "visual.blocks.{}.mlp.gate_proj.bias", "as is"),
    ("blocks/mlp/up/kernel", "visual.blocks.{}.mlp.up_proj.weight", "t"),
    ("blocks/mlp/up/bias", "visual.blocks.{}.mlp.up_proj.bias", "as is"),
    ("blocks/mlp/down/kernel", "visual.blocks.{}.mlp.down_proj.weight", "t"),
    ("blocks/mlp/down/bias", "visual.blocks.{}.mlp.down_proj.bias", "as is"),
    ("merger/norm/scale", "visual.merger.ln_q.weight", "as is"),
    ("merger/fc1/kernel", "visual.merger.mlp.0.weight", "t"),
    ("merger/fc1/bias", "visual.merger.mlp.0.bias", "as is"),
    ("merger/fc2/kernel", "visual.merger.mlp.2.weight", "t"),
    ("merger/fc2/bias", "visual.merger.mlp.2.bias", "as is"),
)
# No bias at o, gate, up and down: the decoder has them at q, k and v alone.
_TEXT = (
    ("embed/embedding", "model.embed_tokens.weight", "as is"),
    ("layers/norm1/scale", "model.layers.{}.input_layernorm.weight", "as is"),
    ("layers/norm2/scale", "model.layers.{}.post_attention_layernorm.weight", "as is"),
    ("layers/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "t"),
    ("layers/attn/q/bias", "model.layers.{}.self_attn.q_proj.bias", "as is"),
    ("layers/attn/k/kernel", "model.layers.{}.self_attn.k_proj.weight", "t"),
    ("layers/attn/k/bias", "model.layers.{}.self_attn.k_proj.bias", "as is"),
    ("layers/attn/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "t"),
    ("layers/attn/v/bias", "model.layers.{}.self_attn.v_proj.bias", "as is"),
    ("layers/attn/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "t"),
    ("layers/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "t"),
    ("layers/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "t"),
    ("layers/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "t"),
    ("final/norm/scale", "model.norm.weight", "as is"),
    ("head/kernel", "lm_head.weight", "t"),
)


# A tied head is the embedding, and no parameter of its own.
_OPTIONAL = frozenset(("text/head/kernel",))


def rules(model_config: Config) -> list[TensorRule]:
    """List every tensor of a model folder, in file order.

    Raises:
        KeyError: if the table and the model disagree.
    """
    return tensor_table.rules(model_config, {"vision": _VISION, "text": _TEXT}, _OPTIONAL)


# What a version of transformers, PEFT, DDP or a compiler puts the model into: no part of a weight's name.
_AROUND = frozenset(("base_model", "model", "language_model", "module"))
_DECODER = frozenset(("embed_tokens", "layers", "norm", "rotary_emb"))


def canonical_key(key: str) -> str:
    """Turn a key of any layout in circulation into that of the published layout; others stay as they are.

    In circulation are `model.layers.*` and `visual.*` (published), `model.language_model.layers.*` and
    `model.visual.*` (transformers 4.52 and later), `language_model.model.layers.*`, the bare `language_model.layers.*`,
    each of them also as `base_model.model.*` and the like.
    """
    parts = [part for part in key.split(".") if part not in tensor_table.AMID]
    while len(parts) > 1 and parts[0] in _AROUND:
        del parts[0]
    # The published layout has the decoder in `model`, and the tower and the head beside it.
    if parts[0] in _DECODER:
        return ".".join(["model", *parts])
    return ".".join(parts) if parts[0] in ("visual", "lm_head") else key


def module_key(key: str) -> str:
    """Turn a key of the published layout into its name in the model that transformers 4.52 and later build."""
    # There the tower and the decoder lie side by side under `model`.
    if key.startswith("visual."):
        return f"model.{key}"
    return re.sub(r"^model\.", "model.language_model.", key)
