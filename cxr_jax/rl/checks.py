"""What an RL config must not be: knobs that contradict each other, unknown rewards, a replay without targets."""

import jax

from cxr_jax import rewards
from cxr_jax.config import schema
from cxr_jax.errors import UserError
from cxr_jax.models import qwen2_5_vl as qwen
from cxr_jax.training import checks
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import pretrained

TOGETHER = (
    (
        "group_size",
        lambda r: r.group_size < 2,
        "must be at least 2: an advantage is the distance from the mean of the group, which is 0 for one completion",
    ),
    (
        "delta",
        lambda r: r.get("delta") and r.delta <= 1 + (r.epsilon_high if r.clip == "ppo" else 0),
        "must be 0 (no bound) or above 1, with config.rl.clip='ppo' above 1 + config.rl.epsilon_high",
    ),
    (
        "sampler_cap",
        lambda r: r.get("sampler_correction") == "icepop" and r.sampler_cap <= 1,
        "must be above 1 with 'icepop', or it drops every token",
    ),
)
"""(key of config.rl, what makes it wrong, why)."""


def check(config) -> None:
    """Refuses settings that cannot work, before anything is written or, but for phantoms whose targets are to be
    replayed, compiled. Raises UserError."""
    schema.check_values(config)
    for name, wrong, why in TOGETHER:
        if wrong(config.rl):
            raise UserError(f"config.rl.{name}={config.rl[name]!r} {why}")
    reward_weights(config.rl.reward_weights)
    train = checks.common(config)
    trains(config)
    if config.rl.get("replay_weight"):
        schema.require_divides(config, "rl.replay_batch", "rl.micro_batches")
        checks.targets_fit(config, train)


def reward_weights(weights) -> None:
    """Refuses weights of terms that do not exist, that are no finite numbers, or that are all 0. Raises UserError."""
    known = f"known terms: {', '.join(rewards.TERMS)}"
    if unknown := sorted(set(weights) - set(rewards.TERMS)):
        raise UserError(f"config.rl.reward_weights names {unknown[0]!r}; {known}")
    for term, weight in weights.items():
        if not schema.is_number(weight):
            raise UserError(f"config.rl.reward_weights.{term}={weight!r} is not a finite number")
    if not any(weights.values()):
        raise UserError(f"config.rl.reward_weights weighs nothing; {known}")


def trains(config) -> None:
    """Refuses frozen patterns that match nothing or everything, and adapters that the model's kernels cannot have: by
    shapes alone. Raises UserError."""
    model_config = checks.read_model_config(config, pretrained.load_tokenizer(config.model))
    trainable = Trainable.from_config(config)

    def split():
        key = jax.random.key(0)
        return trainable.split({"model": qwen.init_params(model_config, key)}, key)

    jax.eval_shape(split)
