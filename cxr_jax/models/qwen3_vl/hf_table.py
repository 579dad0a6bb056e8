"""The Hugging Face keys of Qwen3-VL as a table, and our names for them."""

from cxr_jax.models import tensor_table
from cxr_jax.models.family import TensorRule
from cxr_jax.models.network.config import Config

# The rows of `tensor_table`.
_VISION = (
    ("patch_embed/proj/kernel", "model.visual.patch_embed.proj.weight", "conv"),
    ("patch_embed/proj/bias", "model.visual.patch_embed.proj.bias", "as is"),
    ("pos_embed/embedding", "model.visual.pos_embed.weight", "as is"),
    ("blocks/norm1/scale", "model.visual.blocks.{}.norm1.weight", "as is"),
    ("blocks/norm1/bias", "model.visual.blocks.{}.norm1.bias", "as is"),
    ("blocks/norm2/scale", "model.visual.blocks.{}.norm2.weight", "as is"),
    ("blocks/norm2/bias", "model.visual.blocks.{}.norm2.bias", "as is"),
    ("blocks/attn/qkv/kernel", "model.visual.blocks.{}.attn.qkv.weight", "t"),
    ("blocks/attn/qkv/bias", "model.visual.blocks.{}.attn.qkv.bias", "as is"),
    ("blocks/attn/proj/kernel", "model.visual.blocks.{}.attn.proj.weight", "t"),
    ("blocks/attn/proj/bias", "model.visual.blocks.{}.attn.proj.bias", "as is"),
    ("blocks/mlp/fc1/kernel", "model.visual.blocks.{}.mlp.linear_fc1.weight", "t"),
    ("blocks/mlp/fc1/bias", "model.visual.blocks.{}.mlp.linear_fc1.bias", "as is"),
    ("blocks/mlp/fc2/kernel", "model.visual.blocks.{}.mlp.linear_fc2.weight", "t"),
    ("blocks/mlp/fc2/bias", "model.visual.blocks.{}.mlp.linear_fc2.bias", "as is"),
    ("merger/norm/scale", "model.visual.merger.norm.weight", "as is"),
    ("merger/norm/bias", "model.visual.merger.norm.bias", "as is"),
    ("merger/fc1/kernel", "model.visual.merger.linear_fc1.weight", "t"),
    ("merger/fc1/bias", "model.visual.merger.linear_fc1.bias", "as is"),
    ("merger/fc2/kernel", "model.visual.merger.linear_fc2.weight", "t"),
    ("merger/fc2/bias", "model.visual.merger.linear_fc2.bias", "as is"),
    # One a tapped block, in the order of the config's list.
    ("taps/norm/scale", "model.visual.deepstack_merger_list.{}.norm.weight", "as is"),
    ("taps/norm/bias", "model.visual.deepstack_merger_list.{}.norm.bias", "as is"),
    ("taps/fc1/kernel", "model.visual.deepstack_merger_list.{}.linear_fc1.weight", "t"),
    ("taps/fc1/bias", "model.visual.deepstack_merger_list.{}.linear_fc1.bias", "as is"),
    ("taps/fc2/kernel", "model.visual.deepstack_merger_list.{}.linear_fc2.weight", "t"),
    ("taps/fc2/bias", "model.visual.deepstack_merger_list.{}.linear_fc2.bias", "as is"),
)
_LAYER = "model.language_model.layers.{}."
_TEXT = (
    ("embed/embedding", "model.language_model.embed_tokens.weight", "as is"),
    ("layers/norm1/scale", f"{_LAYER}input_layernorm.weight", "as is"),
    ("layers/norm2/scale", f"{_LAYER}post_attention_layernorm.weight", "as is"),
    ("layers/attn/q/kernel", f"{_LAYER}self_attn.q_proj.weight", "t"),
    ("layers/attn/q/bias", f"{_LAYER}self_attn.q_proj.bias", "as is"),
    ("layers/attn/k/kernel", f"{_LAYER}self_attn.k_proj.weight", "t"),
    ("layers/attn/k/bias", f"{_LAYER}self_attn.k_proj.bias", "as is"),
    ("layers/attn/v/kernel", f"{_LAYER}self_attn.v_proj.weight", "t"),
    ("layers/attn/v/bias", f"{_LAYER}self_attn.v_proj.bias", "as is"),
    ("layers/attn/o/kernel", f"{_LAYER}self_attn.o_proj.weight", "t"),
    ("layers/attn/o/bias", f"{_LAYER}self_attn.o_proj.bias", "as is"),
    ("layers/attn/q_norm/scale", f"{_LAYER}self_attn.q_norm.weight", "as is"),
    ("layers/attn/k_norm/scale", f"{_LAYER}self_attn.k_norm.weight", "as is"),
    ("layers/mlp/gate/kernel", f"{_LAYER}mlp.gate_proj.weight", "t"),
    ("layers/mlp/up/kernel", f"{_LAYER}mlp.up_proj.weight", "t"),
    ("layers/mlp/down/kernel", f"{_LAYER}mlp.down_proj.weight", "t"),
    ("final/norm/scale", "model.language_model.norm.weight", "as is"),
    ("head/kernel", "lm_head.weight", "t"),
)
# A tied head is the embedding; a tower may have no tap; biases of attention are an option of the config.
_OPTIONAL = frozenset(
    f"{part}/{name}"
    for part, table in (("vision", _VISION), ("text", _TEXT))
    for name, _, _ in table
    if name.startswith(("head/", "taps/"))
    or (name.startswith("layers/attn/") and name.endswith("/bias"))
)


def rules(model_config: Config) -> list[TensorRule]:
    """List every tensor of a model folder, in file order.

    Raises:
        KeyError: if the table and the model disagree.
    """
    return tensor_table.rules(model_config, {"vision": _VISION, "text": _TEXT}, _OPTIONAL)


# What a wrapper puts the model into: no part of a weight's name.
_AROUND = frozenset(("base_model", "model", "module"))


def canonical_key(key: str) -> str:
    """Turn a key under any wrapper (PEFT, DDP, FSDP, a compiler) into that of the published layout.

    There is one layout, and transformers loads no other: a key without its `model.` stays as it is.
    """
    parts = [part for part in key.split(".") if part not in tensor_table.AMID]
    around = 0
    while around < len(parts) - 1 and parts[around] in _AROUND:
        around += 1
    inner = parts[around:]
    if inner[0] == "lm_head":
        return ".".join(inner)
    # The model's own `model` is the innermost of those around.
    if around and parts[around - 1] == "model" and inner[0] in ("visual", "language_model"):
        return ".".join(["model", *inner])
    return key


def module_key(key: str) -> str:
    """Turn a key of the published layout into its name in the model that transformers builds: the same."""
    return key
