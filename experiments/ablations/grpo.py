"""RL on phantoms with one thing changed: what helps out of distribution, and what does not?

    for s in 0 1 2; do for a in base published answers kl replay g4 g16 sites from_scratch dr_grpo gspo cispo; do
        bash launch/local.sh --config=experiments/ablations/grpo.py:$a --workdir=runs/grpo/${a}_s$s \\
            --config.seed=$s --config.data.seed=$((s + 1)) --config.eval.n_final=1000; done; done
    python -m experiments.analysis.ablations runs/grpo       # writes docs/ablations.md and docs/ablations.svg

Every arm is experiments/rl.py (40 steps, from the embedded SFT model, 256 completions sampled a step) but for what ARMS
says. g4 and g16 sample and learn from as many completions as base. from_scratch is RL without SFT. sites: the prompts
come from 64 random sites around hospital A (cxr_jax/phantom/sites.py); the test sets are those of the other arms.
published: the reference run's sum. answers: the default's terms but for those of the trace. Results: docs/ablations.md.
"""

from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.errors import UserError
from experiments import rl

# The checked reward without what reads the trace.
ANSWERS = {
    term: weight for term, weight in rewards.CHECKED.items() if not term.startswith("trace_")
}


def _reward(weights: dict[str, float]) -> dict[str, float]:
    """Config keys of a reward: every term that `weights` does not name gets 0, so that it replaces the preset's."""
    all_weights = rewards.weights(weights)
    return {f"rl.reward_weights.{term}": weight for term, weight in all_weights.items()}


ARMS = {  # arm -> what it sets; "preset": that of experiments/rl.py
    "base": {},
    "published": _reward(rewards.PUBLISHED),
    "answers": _reward(ANSWERS),
    "kl": {"rl.beta": 0.04, "rl.kl": "k3"},
    "replay": {"rl.replay_weight": 0.2},
    "g4": {"rl.group_size": 4, "rl.prompts_per_step": 32},
    "g16": {"rl.group_size": 16, "rl.prompts_per_step": 8},
    "sites": {"data.sites": 64},
    "from_scratch": {"model": "random:phantom"},
    "dr_grpo": {"preset": "phantom,dr_grpo"},
    "gspo": {"preset": "phantom,gspo"},
    "cispo": {"preset": "phantom,cispo"},
}


def get_config(arm: str = "base") -> ConfigDict:
    """Build the config of experiments/rl.py with an arm's changes.

    Raises:
        UserError: for an arm that there is not.
    """
    if arm not in ARMS:
        raise UserError(
            f"experiments/ablations/grpo.py has no preset {arm!r}; it has: {', '.join(ARMS)}"
        )
    changes = dict(ARMS[arm])
    config = rl.get_config(changes.pop("preset", "phantom"))
    config.update_from_flattened_dict(changes)
    return config
