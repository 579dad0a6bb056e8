"""Names of rewards that the user brings along, as `config.rl.rewards` has them: MODULE:FUNCTION, or with *WEIGHT."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cxr_jax.errors import UserError, shown

# A module as it is imported, or a file; then the function, and how much it weighs.
_NAME = re.compile(r"(?P<module>[^:*\s][^:*]*):(?P<function>[^\W\d]\w*)(?:\*(?P<weight>[^*]+))?")


@dataclass(frozen=True)
class RewardName:
    """One reward of `config.rl.rewards`.

    Attributes:
        module: as in `import MODULE`, or the path of a file that ends in .py.
        function: its name there, which is the reward's in metrics and weights.
        weight: in the sum; None: 1, or what `config.rl.reward_weights` says.
    """

    module: str
    function: str
    weight: float | None

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"


def parse(names: Sequence[str]) -> tuple[RewardName, ...]:
    """Read `config.rl.rewards`.

    Raises:
        UserError: naming the first that is no name of a reward, or that comes twice.
    """
    # A text is a sequence of letters.
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"config.rl.rewards={shown(names)} must be a tuple of texts, as in ('my.module:reward',)"
        )
    # By function: that is the name in metrics, whatever the module.
    found: dict[str, RewardName] = {}
    for name in names:
        reward = _parse(name)
        if reward.function in found:
            raise UserError(
                f"config.rl.rewards names {reward.function!r} twice: rename one of them"
            )
        found[reward.function] = reward
    return tuple(found.values())


def _parse(name: str) -> RewardName:
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"config.rl.rewards: {shown(name)} is not MODULE:FUNCTION, as in my.module:reward, or "
            "MODULE:FUNCTION*WEIGHT"
        )
    # Said in the name, or nowhere yet.
    weight = None
    if match["weight"] is not None:
        try:
            weight = float(match["weight"])
        except ValueError:
            raise UserError(
                f"config.rl.rewards: {shown(name)} has a weight that is no number"
            ) from None
    return RewardName(match["module"], match["function"], weight)


def weights_with(
    names: Sequence[str], weights: dict[str, float], *, alone: bool
) -> dict[str, float]:
    """Give the weight of every term of the reward's sum.

    Args:
        names: `config.rl.rewards`.
        weights: `config.rl.reward_weights`, which may hold rewards of the user, too.
        alone: leave out the terms of this library.

    Raises:
        UserError: as `parse`, and for a reward that has two weights.
    """
    rewards = parse(names)
    for reward in rewards:
        if reward.weight is not None and reward.function in weights:
            raise UserError(
                f"config.rl.rewards: {reward.function} has two weights, *{reward.weight:g} and "
                f"config.rl.reward_weights.{reward.function}"
            )
    # A reward that nobody weighs counts once.
    own = {
        reward.function: weights.get(reward.function, 1.0)
        if reward.weight is None
        else reward.weight
        for reward in rewards
    }
    return own if alone else {**weights, **own}
