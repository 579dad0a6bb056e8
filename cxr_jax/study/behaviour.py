"""Readers made of random numbers, with known effects: what a study must find again, and what `power` counts.

Suspicion follows Roe and Metz (1997), with the variances of their four structures; time and confidence have readers,
cases and reader-by-arm at random; planted errors are caught with a probability that depends on arm and kind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr_jax.errors import UserError


class RoeMetz(NamedTuple):
    """Variances of the latent suspicion; what is not the reader's adds up to 1."""

    reader: float
    reader_arm: float
    case: float
    case_arm: float
    reader_case: float
    error: float


# First letter: how much cases share between readers, second: how much readers differ (AUC near .855).
ROE_METZ = {
    "HL": RoeMetz(0.0055, 0.0055, 0.3, 0.3, 0.2, 0.2),
    "LL": RoeMetz(0.0055, 0.0055, 0.1, 0.1, 0.2, 0.6),
    "HH": RoeMetz(0.030, 0.030, 0.3, 0.3, 0.2, 0.2),
    "LH": RoeMetz(0.030, 0.030, 0.1, 0.1, 0.2, 0.6),
}
# Cumulative logits of the seven confidence categories with nothing else at work.
_CUTS = np.array([-4.0, -3.0, -2.0, -0.9, 0.4, 1.8])


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What simulated readers are like. Arms that a table does not name behave as `manual`.

    Attributes:
        time: log seconds of an arm less those of `manual`.
        confidence: cumulative log-odds of an arm less those of `manual`.
        separation: latent distance between abnormal and normal cases, by arm; "" is every other arm.
        catch: probability that a planted error is caught, by arm.
        own_error: probability that a reader without AI makes the planted error by himself.
        session: log seconds, each further session.
        structure: of the suspicion (`ROE_METZ`).
        lost_connection, double_post, pause, skip: shares of the tasks; `simulate` alone uses them.
    """

    time: Mapping[str, float] = field(
        default_factory=lambda: {"labels": -0.10, "report": -0.18, "full": -0.25}
    )
    confidence: Mapping[str, float] = field(
        default_factory=lambda: {"labels": 0.0, "report": 0.2, "full": 0.9}
    )
    separation: Mapping[str, float] = field(default_factory=lambda: {"": 1.5, "full": 1.7})
    catch: Mapping[str, float] = field(
        default_factory=lambda: {"labels": 0.35, "report": 0.40, "full": 0.70}
    )
    own_error: float = 0.12  # a reader's own, on the label that was planted
    false_flag: float = 0.03  # of each true sentence
    session: float = -0.04
    structure: str = "LL"
    log_seconds: float = 3.9  # 49 s, between free text and a prefilled form of arXiv 2510.16070
    time_reader: float = 0.25  # standard deviations of log seconds, this one and the three below
    time_case: float = 0.30
    time_reader_arm: float = 0.05
    time_error: float = 0.36
    abnormal_time: float = 0.30  # log seconds more for an abnormal film
    confidence_reader: float = 0.8  # standard deviations on the scale of log-odds
    confidence_case: float = 0.8
    lost_connection: float = 0.05
    double_post: float = 0.10
    pause: float = 0.05
    # A film that cannot be judged: rare, but a flow table that never shows one is not tested.
    skip: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a structure that is in no table."""
        if self.structure not in ROE_METZ:
            raise UserError(f"effects: structure is one of {', '.join(ROE_METZ)}")


def no_effects() -> Effects:
    """Give readers to whom all arms with AI are alike, and manual the same: what a null study is made of."""
    caught = {"labels": 0.5, "report": 0.5, "full": 0.5}
    return Effects(time={}, confidence={}, separation={"": 1.5}, catch=caught, own_error=0.5)


# How often something happens; all others are effects and spreads.
_SHARES = ("catch", "own_error", "false_flag", "lost_connection", "double_post", "pause", "skip")


def read_effects(effects_path: Path) -> Effects:
    """Read effects from a JSON file; keys that it does not name keep their default.

    Raises:
        UserError: if it is no JSON object, or names what is no effect.
    """
    # A mistyped name would silently leave its default at work.
    try:
        values = json.loads(effects_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{effects_path}: no JSON of effects ({type(error).__name__})") from None
    known = {each.name for each in fields(Effects)}
    if not isinstance(values, dict) or set(values) - known:
        raise UserError(f"{effects_path}: an object with some of {', '.join(sorted(known))}")
    for name, given in values.items():
        # As the default is: a number, a word, or a number for each of some arms.
        default = getattr(Effects(), name)
        numbers = given.values() if isinstance(given, dict) else [given]
        low, high = (0, 1) if name in _SHARES else (-1e6, 1e6)
        is_sound = (
            isinstance(given, str)
            if isinstance(default, str)
            else isinstance(given, dict) == isinstance(default, Mapping)
            and all(_is_number(number, low, high) for number in numbers)
        )
        if not is_sound:
            raise UserError(f"{effects_path}: {name}: not of its kind, or no number in its range")
    return Effects(**values)


def _is_number(given: object, low: float, high: float) -> bool:
    # A bool is an int to Python; what is no number lies between no two.
    return isinstance(given, int | float) and not isinstance(given, bool) and low <= given <= high


def as_json(effects: Effects) -> dict:
    """Give effects as JSON has them."""
    return {
        name: dict(field_value) if isinstance(field_value, Mapping) else field_value
        for name, field_value in asdict(effects).items()
    }


# ---- A whole study at once -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """What every reader would do with every case in every arm, arrays [arms, readers, cases].

    Attributes:
        log_seconds: active time; the session's effect is not in it.
        confidence: int, 1..7.
        suspicion: latent, higher is more suspicious.
        caught: bool; in `manual`: did not make the planted error.
        false_flags: int.
    """

    arms: tuple[str, ...]
    log_seconds: np.ndarray
    confidence: np.ndarray
    suspicion: np.ndarray
    caught: np.ndarray
    false_flags: np.ndarray


class _Draws:
    """One study's random numbers, by which of its axes they vary."""

    def __init__(
        self,
        arms: Sequence[str],
        reader_count: int,
        abnormal: np.ndarray,
        seed: int | Sequence[int],
    ) -> None:
        self.arms = arms
        self.abnormal = abnormal
        self.shape = (len(arms), reader_count, len(abnormal))
        self.generator = np.random.default_rng(seed)

    def spread(self, deviation: float, *axes: int) -> np.ndarray:
        """Draw normal numbers that vary along some of (arm, reader, case) only."""
        # An axis that does not vary has one number, which broadcasts.
        size = tuple(length if axis in axes else 1 for axis, length in enumerate(self.shape))
        return deviation * self.generator.standard_normal(size)

    def of_arms(self, table: Mapping[str, float], otherwise: float = 0.0) -> np.ndarray:
        """Lay out a table of arms along the first axis."""
        return np.array([table.get(arm_name, otherwise) for arm_name in self.arms])[:, None, None]


def draw_conduct(
    effects: Effects,
    arms: Sequence[str],
    reader_count: int,
    abnormal: Sequence[bool] | np.ndarray,
    seed: int | Sequence[int],
) -> Conduct:
    """Draw a study from a seed.

    Args:
        abnormal: bool [cases].
    """
    draws = _Draws(arms, reader_count, np.asarray(abnormal, bool), seed)
    # Every part draws from one generator.
    # In this order, for a seed to mean the same study in every release.
    log_seconds = _log_seconds(effects, draws)
    confidence = _confidence(effects, draws)
    suspicion = _suspicion(effects, draws)
    # Who sees no AI makes the planted error only if it is his own.
    chances = draws.of_arms(effects.catch, 1.0 - effects.own_error)
    caught = draws.generator.random(draws.shape) < chances
    # Of a dozen sentences, and there are none to flag without AI.
    flags = draws.generator.binomial(12, effects.false_flag, draws.shape)
    flags[[place for place, arm_name in enumerate(arms) if arm_name == "manual"]] = 0
    return Conduct(
        arms=tuple(arms),
        log_seconds=log_seconds,
        confidence=confidence,
        suspicion=suspicion,
        caught=caught,
        false_flags=flags,
    )


def _log_seconds(effects: Effects, draws: _Draws) -> np.ndarray:
    """Log active seconds: arm, kind of case, and what is each reader's, case's and reader-in-arm's own."""
    return (
        effects.log_seconds
        + draws.of_arms(effects.time)
        + effects.abnormal_time * draws.abnormal
        + draws.spread(effects.time_reader, 1)
        + draws.spread(effects.time_case, 2)
        + draws.spread(effects.time_reader_arm, 0, 1)
        + draws.spread(effects.time_error, 0, 1, 2)
    )


def _confidence(effects: Effects, draws: _Draws) -> np.ndarray:
    """Cut a latent number with a logistic error into the seven points of the scale."""
    latent = (
        draws.of_arms(effects.confidence)
        + draws.spread(effects.confidence_reader, 1)
        + draws.spread(effects.confidence_case, 2)
        + draws.generator.logistic(size=draws.shape)
    )
    return 1 + (latent[..., None] > _CUTS).sum(-1)


def _suspicion(effects: Effects, draws: _Draws) -> np.ndarray:
    """Roe and Metz's latent decision variable."""
    variance = ROE_METZ[effects.structure]
    separation = draws.of_arms(effects.separation, effects.separation.get("", 1.5))
    suspicion = separation * draws.abnormal
    # Readers and their arms differ apart for the two kinds of case, as in the paper.
    for case_kind in (True, False):
        shift = draws.spread(variance.reader**0.5, 1) + draws.spread(variance.reader_arm**0.5, 0, 1)
        suspicion = suspicion + shift * (draws.abnormal == case_kind)
    return suspicion + (
        draws.spread(variance.case**0.5, 2)
        + draws.spread(variance.case_arm**0.5, 0, 2)
        + draws.spread(variance.reader_case**0.5, 1, 2)
        + draws.spread(variance.error**0.5, 0, 1, 2)
    )
