"""What a study of so many readers and cases would see: simulated studies, counted before the real one is made.

Time is tested as `analyse` tests it. Confidence and detection are tested by the same paired contrast of their means,
which takes milliseconds where the mixed models take seconds, and comes out a little more careful.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.study.behaviour import Effects, draw_conduct, read_effects
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics import paired

_ABNORMAL = 0.6  # of the cases


def power_lines(
    protocol: Protocol, effects_file: Path | None = None, study_count: int = 200
) -> list[str]:
    """Simulate studies and say how often each hypothesis would be seen, unadjusted, two-sided.

    Raises:
        UserError: for cases whose number is not known, or a split design.
    """
    source, _, number = protocol.cases.partition(":")
    # A manifest's rows are counted when the study is made; before that, a number is what is asked about.
    if source != "phantom" or not number.isdecimal() or not 2 <= int(number[:6]) <= 2000:
        raise UserError("power: --cases=phantom:N says how many cases, 2 to 2000")
    if protocol.design != "crossed":
        raise UserError("power: of crossed studies only")
    if study_count < 10:
        raise UserError("--studies: 10 or more")
    effects = read_effects(effects_file) if effects_file else Effects()
    outcomes = [
        _one_study(protocol, effects, int(number), study_no) for study_no in range(study_count)
    ]
    ratio = np.exp([study["time"].estimate for study in outcomes])
    lines = [
        f"{protocol.readers} readers, {number} cases, {_planted(protocol, int(number))} of them with a planted "
        f"error, {study_count} simulated studies, alpha {protocol.alpha}"
    ]
    for name, direction in (("time", -1), ("confidence", 1), ("detection", 1)):
        seen = [_is_seen(study.get(name), direction, protocol.alpha) for study in outcomes]
        lines.append(f"{name}: seen in {np.mean(seen):.0%}")
    widths = [study["time"].high - study["time"].low for study in outcomes]
    lines.append(
        f"time: mean ratio {np.mean(ratio):.3f}; intervals reach a factor of {np.exp(np.mean(widths) / 2):.3f} "
        "to either side"
    )
    return lines


def _planted(protocol: Protocol, case_count: int) -> int:
    """How many cases have a planted error; a contrast needs two."""
    return max(2, round(protocol.plant_share * case_count))


def _is_seen(found: paired.PairedContrast | None, direction: int, alpha: float) -> bool:
    return found is not None and found.p_value < alpha and found.estimate * direction > 0


def _one_study(
    protocol: Protocol, effects: Effects, case_count: int, study_no: int
) -> dict[str, paired.PairedContrast]:
    """The three contrasts of one simulated study, where its arms have them."""
    abnormal = np.arange(case_count) < round(_ABNORMAL * case_count)
    conduct = draw_conduct(effects, protocol.arms, protocol.readers, abnormal, [77, study_no])
    outcomes = {}
    pairs: Sequence[tuple[str, str, str, np.ndarray]] = (
        ("time", "manual", "full", conduct.log_seconds),
        ("confidence", "labels", "full", conduct.confidence.astype(float)),
        ("detection", "labels", "full", conduct.caught.astype(float)),
    )
    for name, before, after, table in pairs:
        if not {before, after} <= set(protocol.arms):
            continue
        difference = table[protocol.arms.index(after)] - table[protocol.arms.index(before)]
        # Planted errors are in a share of the cases only.
        if name == "detection":
            difference = difference[:, : _planted(protocol, case_count)]
        outcomes[name] = paired.contrast(difference)
    if "time" not in outcomes:
        raise UserError("power: the arms manual and full are needed")
    return outcomes
