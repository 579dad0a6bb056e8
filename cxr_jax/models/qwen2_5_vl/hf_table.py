"""The Hugging Face keys of Qwen2.5-VL as a table, and our names for them."""

import functools

from cxr_jax.models.family import TensorRule
from cxr_jax.models.network.config import Config
from cxr_jax.runtime.trees import Tree, flatten

# (our path, HF key, transform of `TensorRule`). "{}" in a key is a layer number: such parameters are stacked on axis 0.
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


def our_shapes(model_config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Compute path -> shape of every parameter of a config, from an abstract init: no array is made."""
    return dict(_traced_shapes(model_config))


@functools.lru_cache(maxsize=32)  # loading asks twice, and a trace takes a good part of a second
def _traced_shapes(model_config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    import jax

    from cxr_jax.models import network

    def init(key: jax.Array) -> Tree:
        return network.init_params(model_config, key)

    # Abstract: shapes of a 7B model cost no memory.
    tree = jax.eval_shape(init, jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree)}


def rules(model_config: Config) -> list[TensorRule]:
    """List every tensor of a model folder, in file order.

    Raises:
        KeyError: if the table and the model disagree.
    """
    shapes = our_shapes(model_config)
    tensors, known = [], set()
    for tree_part, table in (("vision", _VISION), ("text", _TEXT)):
        for name, hf_key, transform in table:
            our_path = (tree_part, *name.split("/"))
            # A tied head is the embedding, and no parameter of its own.
            if (
                our_path not in shapes
                and our_path[1] == "head"
                and model_config.tie_word_embeddings
            ):
                continue
            known.add(our_path)
            tensors += _tensors_of(model_config, our_path, shapes[our_path], hf_key, transform)
    # A parameter without a row would be left out of every file.
    if known != set(shapes):
        raise KeyError(f"no rule for {sorted(set(shapes) - known)}")
    return tensors


def _tensors_of(
    model_config: Config,
    our_path: tuple[str, ...],
    shape: tuple[int, ...],
    hf_key: str,
    transform: str,
) -> list[TensorRule]:
    """The tensors of one row of the table: one, or one a layer."""
    if "{}" not in hf_key:
        return [
            TensorRule(hf_key, our_path, None, transform, _hf_shape(model_config, shape, transform))
        ]
    # The first axis of ours are the layers, of which each is a tensor of theirs.
    layer_shape = _hf_shape(model_config, shape[1:], transform)
    return [
        TensorRule(hf_key.format(layer), our_path, layer, transform, layer_shape)
        for layer in range(shape[0])
    ]


def _hf_shape(model_config: Config, shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    vision = model_config.vision
    # A 3-D convolution over channels, frames, rows and columns, kept as one matrix here.
    if transform == "conv":
        return (
            vision.hidden_size,
            vision.in_channels,
            vision.temporal_patch_size,
            vision.patch_size,
            vision.patch_size,
        )
    return shape[::-1] if transform == "t" else shape


# What a version of transformers, PEFT, DDP or a compiler puts the model into: no part of a weight's name.
_AROUND = frozenset(("base_model", "model", "language_model", "module"))
# What wrappers put amid it: FSDP, activation checkpoints, a compiler, a LoRA module around its merged layer.
_AMID = frozenset(("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "base_layer"))
_DECODER = frozenset(("embed_tokens", "layers", "norm", "rotary_emb"))


def canonical_key(key: str) -> str:
    """Turn a key of any layout in circulation into that of the published layout; others stay as they are.

    In circulation are `model.layers.*` and `visual.*` (published), `model.language_model.layers.*` and
    `model.visual.*` (transformers 4.52 and later), `language_model.model.layers.*`, the bare `language_model.layers.*`,
    each of them also as `base_model.model.*` and the like.
    """
    parts = [part for part in key.split(".") if part not in _AMID]
    while len(parts) > 1 and parts[0] in _AROUND:
        del parts[0]
    # The published layout has the decoder in `model`, and the tower and the head beside it.
    if parts[0] in _DECODER:
        return ".".join(["model", *parts])
    return ".".join(parts) if parts[0] in ("visual", "lm_head") else key
