"""Named settings of the RL algorithm: ALGORITHMS, name -> values of config.rl. docs/rl.md explains every knob.

Each differs from `corrected`, the default, in what its source differs in, and nowhere else; rewards, group size,
batch and learning rate are no part of an algorithm here. A published value that only acts off-policy (clipping) comes
with the minibatches that make it act.
"""

from typing import Any

from cxr_jax.config import schema

# What an algorithm sets, of config.rl.
_KNOBS = (
    "num_iterations",
    "minibatches",
    "advantage",
    "scale_rewards",
    "aggregation",
    "denominator",
    "mask_truncated",
    "ratio_level",
    "clip",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "kl",
    "sampler_correction",
    "sampler_cap",
)

# On-policy GRPO as this library has it by default. Token aggregation and the divisor of trained tokens only: TRL 0.22
# let truncated tokens, which do not train, make the rest of the batch count less (huggingface/trl issue 6369).
_CORRECTED: dict[str, Any] = {name: schema.keys()[f"rl.{name}"].default["rl"] for name in _KNOBS}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "corrected": _CORRECTED,
    # The defaults of trl.GRPOConfig 0.22.2: loss_type "dapo", scale_rewards "group" (ddof 1, eps 1e-4), beta 0, epsilon
    # 0.2 on both sides, no delta, num_iterations 1, mask_truncated_completions False, and no correction for the sampler
    # (it came with 0.23). With mask_truncated=True it divides as 0.22.2 does, by the truncated tokens too.
    "trl_0_22": _CORRECTED | {"denominator": "all", "mask_truncated": False},
    # arXiv 2503.20783: no division by the group's standard deviation, none by the completion's length; section 3.2.
    # Nothing of its loss depends on what was truncated: truncated completions train.
    "dr_grpo": _CORRECTED
    | {"aggregation": "constant", "scale_rewards": "none", "mask_truncated": False},
    # arXiv 2503.14476: clip-higher 0.2 / 0.28, token-level loss, overlong filtering, no KL term; 512 prompts x 16 in
    # 16 updates a rollout (section 4.1): here 4, as a rollout is smaller. Its dynamic sampling is config.rl.oversample,
    # its soft overlong punishment the reward term `overlong`.
    "dapo": _CORRECTED | {"epsilon_high": 0.28, "minibatches": 4},
    # arXiv 2507.18071v2, section 5.1: clipping ranges 3e-4 and 4e-4 of the sequence ratio, a rollout in 4 minibatches;
    # mean over sequences; the KL term left out.
    "gspo": _CORRECTED
    | {
        "aggregation": "sequence",
        "ratio_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "minibatches": 4,
    },
    # arXiv 2506.13585 (MiniMax-M1), section 3.1: the weight is clipped from above only, no token is dropped, mean over
    # tokens, no KL term. It does not print its bound; 5 is that of ScaleRL (arXiv 2510.13786), which TRL recommends
    # as epsilon_high=5.0. Ours is 1 + epsilon_high.
    "cispo": _CORRECTED | {"clip": "cispo", "epsilon_high": 4.0, "minibatches": 4},
}
