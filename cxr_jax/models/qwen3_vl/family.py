"""Qwen3-VL as an entry of the registry."""

from cxr_jax.models import tensor_table
from cxr_jax.models.family import Family
from cxr_jax.models.markers import CHATML
from cxr_jax.models.network.sharding_rules import SHARDING_RULES
from cxr_jax.models.qwen3_vl import config, hf_table
from cxr_jax.models.qwen3_vl.config import PHANTOM, QWEN3_VL_2B, QWEN3_VL_4B, QWEN3_VL_8B
from cxr_jax.models.qwen3_vl.processor import PROCESSOR

FAMILY = Family(
    model_type=config.MODEL_TYPE,
    read_config=config.read_config,
    write_config=config.write_config,
    # Named "random:", because they come without weights.
    sizes={
        "random:qwen3-vl-phantom": PHANTOM,
        "random:qwen3-vl-2b": QWEN3_VL_2B,
        "random:qwen3-vl-4b": QWEN3_VL_4B,
        "random:qwen3-vl-8b": QWEN3_VL_8B,
    },
    tensor_rules=hf_table.rules,
    parameter_shapes=tensor_table.parameter_shapes,
    canonical_key=hf_table.canonical_key,
    module_key=hf_table.module_key,
    processor=PROCESSOR,
    markers=CHATML,
    sharding_rules=SHARDING_RULES,
)
