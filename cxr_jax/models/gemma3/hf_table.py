"""The Hugging Face keys of Gemma 3 as a table, and our names for them."""

from cxr_jax.models import tensor_table
from cxr_jax.models.family import TensorRule
from cxr_jax.models.network.config import Config

_TOWER = "vision_tower.vision_model."
_BLOCK = f"{_TOWER}encoder.layers.{{}}."
_DECODER = "language_model.model."
_LAYER = f"{_DECODER}layers.{{}}."

# The rows of `tensor_table`.
_VISION = (
    ("patch_embed/proj/kernel", f"{_TOWER}embeddings.patch_embedding.weight", "conv 2d"),
    ("patch_embed/proj/bias", f"{_TOWER}embeddings.patch_embedding.bias", "as is"),
    ("pos_embed/embedding", f"{_TOWER}embeddings.position_embedding.weight", "as is"),
    ("blocks/norm1/scale", f"{_BLOCK}layer_norm1.weight", "as is"),
    ("blocks/norm1/bias", f"{_BLOCK}layer_norm1.bias", "as is"),
    ("blocks/norm2/scale", f"{_BLOCK}layer_norm2.weight", "as is"),
    ("blocks/norm2/bias", f"{_BLOCK}layer_norm2.bias", "as is"),
    ("blocks/attn/q/kernel", f"{_BLOCK}self_attn.q_proj.weight", "t"),
    ("blocks/attn/q/bias", f"{_BLOCK}self_attn.q_proj.bias", "as is"),
    ("blocks/attn/k/kernel", f"{_BLOCK}self_attn.k_proj.weight", "t"),
    ("blocks/attn/k/bias", f"{_BLOCK}self_attn.k_proj.bias", "as is"),
    ("blocks/attn/v/kernel", f"{_BLOCK}self_attn.v_proj.weight", "t"),
    ("blocks/attn/v/bias", f"{_BLOCK}self_attn.v_proj.bias", "as is"),
    ("blocks/attn/proj/kernel", f"{_BLOCK}self_attn.out_proj.weight", "t"),
    ("blocks/attn/proj/bias", f"{_BLOCK}self_attn.out_proj.bias", "as is"),
    ("blocks/mlp/fc1/kernel", f"{_BLOCK}mlp.fc1.weight", "t"),
    ("blocks/mlp/fc1/bias", f"{_BLOCK}mlp.fc1.bias", "as is"),
    ("blocks/mlp/fc2/kernel", f"{_BLOCK}mlp.fc2.weight", "t"),
    ("blocks/mlp/fc2/bias", f"{_BLOCK}mlp.fc2.bias", "as is"),
    ("final/norm/scale", f"{_TOWER}post_layernorm.weight", "as is"),
    ("final/norm/bias", f"{_TOWER}post_layernorm.bias", "as is"),
    ("merger/norm/scale", "multi_modal_projector.mm_soft_emb_norm.weight", "as is"),
    # Unlike all other matrices it is stored as [in, out], as ours are.
    ("merger/proj/kernel", "multi_modal_projector.mm_input_projection_weight", "as is"),
)
_TEXT = (
    ("embed/embedding", f"{_DECODER}embed_tokens.weight", "as is"),
    ("layers/norm1/scale", f"{_LAYER}input_layernorm.weight", "as is"),
    ("layers/post_norm1/scale", f"{_LAYER}post_attention_layernorm.weight", "as is"),
    ("layers/norm2/scale", f"{_LAYER}pre_feedforward_layernorm.weight", "as is"),
    ("layers/post_norm2/scale", f"{_LAYER}post_feedforward_layernorm.weight", "as is"),
    ("layers/attn/q/kernel", f"{_LAYER}self_attn.q_proj.weight", "t"),
    ("layers/attn/k/kernel", f"{_LAYER}self_attn.k_proj.weight", "t"),
    ("layers/attn/v/kernel", f"{_LAYER}self_attn.v_proj.weight", "t"),
    ("layers/attn/o/kernel", f"{_LAYER}self_attn.o_proj.weight", "t"),
    ("layers/attn/q_norm/scale", f"{_LAYER}self_attn.q_norm.weight", "as is"),
    ("layers/attn/k_norm/scale", f"{_LAYER}self_attn.k_norm.weight", "as is"),
    ("layers/mlp/gate/kernel", f"{_LAYER}mlp.gate_proj.weight", "t"),
    ("layers/mlp/up/kernel", f"{_LAYER}mlp.up_proj.weight", "t"),
    ("layers/mlp/down/kernel", f"{_LAYER}mlp.down_proj.weight", "t"),
    ("final/norm/scale", f"{_DECODER}norm.weight", "as is"),
    ("head/kernel", "lm_head.weight", "t"),
)


def rules(model_config: Config) -> list[TensorRule]:
    """List every tensor of a model folder, in file order. Raises KeyError if the table and the model disagree."""
    # A tied head is the embedding, and no parameter of its own.
    tied = frozenset({"text/head/kernel"} if model_config.tie_word_embeddings else ())
    return tensor_table.rules(model_config, {"vision": _VISION, "text": _TEXT}, tied)


# Of a key: what versions of transformers, PEFT, DDP or a compiler put the model into.
_AROUND = frozenset(("base_model", "model", "module"))
_DECODER_PARTS = frozenset(("embed_tokens", "layers", "norm", "rotary_emb"))
_TOWER_PARTS = frozenset(("embeddings", "encoder", "post_layernorm", "head"))


def canonical_key(key: str) -> str:
    """Turn a key of any layout in circulation into that of the published layout; others stay as they are.

    In circulation are `language_model.model.*` and `vision_tower.vision_model.*` (published),
    `model.language_model.*` and `model.vision_tower.vision_model.*` (transformers 4.52 to 4.57),
    `vision_tower.*` without `vision_model` (transformers 5), each also as `base_model.model.*` and the like.
    """
    parts = [part for part in key.split(".") if part not in tensor_table.AMID]
    while len(parts) > 1 and parts[0] in _AROUND:
        del parts[0]
    part, *rest = parts
    # The decoder is wrapped once or twice, and its head lies inside or beside it.
    if part == "language_model":
        rest = rest[1:] if rest[:1] == ["model"] else rest
        if rest[:1] == ["lm_head"]:
            return ".".join(rest)
        return _DECODER + ".".join(rest) if rest and rest[0] in _DECODER_PARTS else key
    if part == "vision_tower":
        rest = rest[1:] if rest[:1] == ["vision_model"] else rest
        return _TOWER + ".".join(rest) if rest and rest[0] in _TOWER_PARTS else key
    return ".".join(parts) if part in ("multi_modal_projector", "lm_head") else key


def module_key(key: str) -> str:
    """Turn a key of the published layout into its name in the model that transformers 5 builds."""
    if key.startswith(_DECODER):
        return f"model.language_model.{key.removeprefix(_DECODER)}"
    if key.startswith(_TOWER):
        return f"model.vision_tower.{key.removeprefix(_TOWER)}"
    return key if key.startswith("lm_head") else f"model.{key}"
