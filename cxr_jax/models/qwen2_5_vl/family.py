"""Qwen2.5-VL as an entry of the registry."""

from cxr_jax.models import tensor_table
from cxr_jax.models.family import Family
from cxr_jax.models.markers import CHATML
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
    markers=CHATML,
    sharding_rules=SHARDING_RULES,
)
