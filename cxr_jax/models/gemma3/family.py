"""Gemma 3 as an entry of the registry."""

from cxr_jax.models import tensor_table
from cxr_jax.models.family import Family
from cxr_jax.models.gemma3 import config, hf_table
from cxr_jax.models.gemma3.config import GEMMA_PHANTOM, MEDGEMMA_4B
from cxr_jax.models.gemma3.processor import PROCESSOR
from cxr_jax.models.markers import GEMMA
from cxr_jax.models.network.sharding_rules import SHARDING_RULES

FAMILY = Family(
    model_type=config.MODEL_TYPE,
    read_config=config.read_config,
    write_config=config.write_config,
    # Named "random:", because they come without weights: MedGemma's own are under terms of their own.
    sizes={"random:gemma3-phantom": GEMMA_PHANTOM, "random:medgemma-4b": MEDGEMMA_4B},
    tensor_rules=hf_table.rules,
    parameter_shapes=tensor_table.parameter_shapes,
    canonical_key=hf_table.canonical_key,
    module_key=hf_table.module_key,
    processor=PROCESSOR,
    markers=GEMMA,
    sharding_rules=SHARDING_RULES,
)
