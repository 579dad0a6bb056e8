"""RL on phantoms under two sets of reward terms, from the embedded SFT model: what does checking the trace buy?"""

from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.errors import UserError
from experiments import rl

SETS = {"published": rewards.PUBLISHED, "checked": rewards.CHECKED}


def get_config(preset: str = "checked") -> ConfigDict:
    """Presets: published (accuracy_hard + overshort), checked (the default of experiments/rl.py)."""
    if preset not in SETS:
        raise UserError(f"experiments/ablations/rewards.py has no preset {preset!r}; it has: {', '.join(SETS)}")
    c = rl.get_config("phantom")
    c.rl.reward_weights = ConfigDict(SETS[preset])
    return c
