"""Which axes of a network's parameters a mesh divides.

The vision tower, a fifth of Qwen2.5-VL-3B, is divided over `fsdp` only: its 3,420 hidden units do not divide.
"""

from cxr_jax.models.family import ShardingRules

SHARDING_RULES: ShardingRules = (
    (r"/((\w+_)?norm\d?|bias|pool_scale|pool_bias)(/|$)", ()),  # small: everywhere
    (r"text/embed/embedding$", ("vocab", "width")),
    (r"text/head/kernel$", ("width", "vocab")),
    # By columns on the way in, by rows on the way out: `tensor` needs one sum a pair of products.
    (r"text/layers/attn/q/kernel$", ("width", "heads")),
    (r"text/layers/attn/[kv]/kernel$", ("width", "key_heads")),
    (r"text/layers/attn/o/kernel$", ("heads", "width")),
    (r"text/layers/mlp/(gate|up)/kernel$", ("width", "hidden")),
    (r"text/layers/mlp/down/kernel$", ("hidden", "width")),
    (r"vision/(patch_embed/proj|blocks/mlp/(down|fc2))/kernel$", (None, "width")),
    (r"vision/pos_embed/embedding$", (None, "width")),
    (r"vision/(blocks|merger|taps)/.*kernel$", ("width", None)),
)
