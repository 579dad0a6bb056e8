"""Qwen2.5-VL as an entry of the registry."""

from cxr_jax.models import tensor_table
from cxr_jax.models import tokenizer as tokenizers
from cxr_jax.models.family import Family, Markers
from cxr_jax.models.network.sharding_rules import SHARDING_RULES
from cxr_jax.models.qwen2_5_vl import config, hf_table
from cxr_jax.models.qwen2_5_vl.config import PHANTOM, QWEN2_5_VL_3B, QWEN2_5_VL_7B
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR

FAMILY = Family(
    model_type=config.MODEL_TYPE,
    read_config=config.read_config,
    write_config=config.write_config,
    # Named "random:", because they come without weights.
    sizes={
        "random:phantom": PHANTOM,
        "random:qwen2.5-vl-3b": QWEN2_5_VL_3B,
        "random:qwen2.5-vl-7b": QWEN2_5_VL_7B,
    },
    tensor_rules=hf_table.rules,
    parameter_shapes=tensor_table.parameter_shapes,
    canonical_key=hf_table.canonical_key,
    module_key=hf_table.module_key,
    processor=PROCESSOR,
    # The texts of Qwen's special tokens; their ids are the tokenizer's to say.
    markers=Markers(
        image=tokenizers.IMAGE_PAD,
        video="<|video_pad|>",
        before_media="<|vision_start|>",
        after_media="<|vision_end|>",
        end_of_turn="<|im_end|>",
        end_of_text="<|endoftext|>",
    ),
    sharding_rules=SHARDING_RULES,
)
