"""What an RL config must not be: knobs that contradict each other, unknown rewards, a replay without targets."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.config import reward_names, schema
from cxr_jax.config.sections import PolicyLossConfig, RolloutConfig, RunConfig
from cxr_jax.errors import UserError
from cxr_jax.rl import own_rewards
from cxr_jax.rl.stop_texts import check_stop_texts, check_stop_texts_are_written
from cxr_jax.training import checks
from cxr_jax.weights import pretrained


def check(config: ConfigDict) -> None:
    """Refuse settings that cannot work, before anything is written.

    Nothing is compiled but, where phantoms are to be replayed, the program that draws their scenes.

    Raises:
        UserError: naming the key that is wrong, its value and why.
    """
    schema.check_values(config)
    check_stop_texts(config.rl.get("stop", ()))
    settings = RunConfig.from_config(config)
    check_contradictions(settings.rollout.group_size, settings.loss)
    check_turns(settings.rollout)
    check_reward_weights(settings.rollout.reward_weights, settings.rollout.rewards)
    train = checks.check_common(config)
    own_rewards.check(settings, train)
    checks.check_trains(
        settings.model, settings.lora, settings.optim.frozen, settings.dtype, settings.param_dtype
    )
    if settings.rollout.stop:
        check_stop_texts_are_written(
            settings.rollout.stop, pretrained.load_tokenizer(settings.model)
        )
    if checks.imitates(settings):
        schema.Values(config).require_divides("rl.replay_batch", "rl.micro_batches")
        checks.check_targets_fit(settings, train)


def check_turns(rollout: RolloutConfig) -> None:
    """Refuse turns into which the prompts of a step do not divide.

    Raises:
        UserError: naming the key to change.
    """
    prompts, turns = rollout.prompts_per_step * rollout.oversample, rollout.sample_micro_batches
    if turns and prompts % turns:
        raise UserError(
            f"config.rl.sample_micro_batches={turns}: the {prompts} prompts of a step (prompts_per_step x oversample) "
            "do not divide into so many turns"
        )


def check_contradictions(group_size: int, loss: PolicyLossConfig) -> None:
    """Refuse knobs that are each in range and make no sense together.

    Raises:
        UserError: naming the key to change.
    """
    if group_size < 2:
        raise UserError(
            f"config.rl.group_size={group_size!r} must be at least 2: an advantage is the distance from "
            "the mean of the group, which is 0 for one completion"
        )
    above = 1 + (loss.epsilon_high if loss.clip == "ppo" else 0)
    if loss.delta and loss.delta <= above:
        raise UserError(
            f"config.rl.delta={loss.delta!r} must be 0 (no bound) or above 1, with config.rl.clip='ppo' "
            "above 1 + config.rl.epsilon_high"
        )
    if loss.sampler_correction == "icepop" and loss.sampler_cap <= 1:
        raise UserError(
            f"config.rl.sampler_cap={loss.sampler_cap!r} must be above 1 with 'icepop', or it drops every token"
        )


def check_reward_weights(weights: Mapping[str, float], own: Sequence[str] = ()) -> None:
    """Refuse weights of terms that do not exist, that are no finite numbers, or that are all 0.

    Args:
        weights: of terms and of rewards of the user's.
        own: `config.rl.rewards`.

    Raises:
        UserError: naming the term, or listing those there are.
    """
    names = [*rewards.TERMS, *(reward.function for reward in reward_names.parse(own))]
    known = f"known terms: {', '.join(names)}"
    if unknown := sorted(set(weights) - set(names)):
        raise UserError(f"config.rl.reward_weights names {unknown[0]!r}; {known}")
    for term, weight in weights.items():
        if not schema.is_number(weight):
            raise UserError(f"config.rl.reward_weights.{term}={weight!r} is not a finite number")
    if not any(weights.values()):
        raise UserError(f"config.rl.reward_weights weighs nothing; {known}")
