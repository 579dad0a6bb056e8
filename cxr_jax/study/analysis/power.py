"""What a study of so many readers and cases would see: simulated studies, counted before the real one is made.

Time is tested as `analyse` tests it. Confidence and detection are tested by the same paired contrast of their means,
which takes milliseconds where the mixed models take seconds, and comes out a little more careful. H3 needs its second
part, too: no more planted errors in signed reports than without AI.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.study.behaviour import Effects, draw_conduct, read_effects
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics import audit_rates, paired

_ABNORMAL = 0.6  # of the cases
# What has to be seen for each hypothesis, and in which direction it is hoped for.
_HOPED = {"time": -1, "confidence": 1, "detection": 1}


def power_lines(
    protocol: Protocol, effects_file: Path | None = None, study_count: int = 200
) -> list[str]:
    """Simulate studies and say how often each part of the hypotheses would be seen, and all of them after Holm.

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
    p_values = [_p_values(protocol, study) for study in outcomes]
    for name in p_values[0]:
        seen = [found[name] < protocol.alpha for found in p_values]
        lines.append(f"{name}: seen in {np.mean(seen):.0%}, unadjusted")
    # As `analyse` decides; a study without an arm or without plants asks fewer.
    hypotheses = [_hypotheses(found) for found in p_values]
    for name in hypotheses[0]:
        supported = [audit_rates.holm(found)[name] <= protocol.alpha for found in hypotheses]
        lines.append(f"{name} supported, after Holm: in {np.mean(supported):.0%}")
    widths = [study["time"].high - study["time"].low for study in outcomes]
    lines.append(
        f"time: mean ratio {np.mean(ratio):.3f}; intervals reach a factor of {np.exp(np.mean(widths) / 2):.3f} "
        "to either side"
    )
    return lines


def _planted(protocol: Protocol, case_count: int) -> int:
    """How many cases have a planted error; a contrast needs two, if there are any."""
    return max(2, round(protocol.plant_share * case_count)) if protocol.plant_share else 0


def _p_values(protocol: Protocol, study: dict[str, paired.PairedContrast]) -> dict[str, float]:
    """Two-sided p values, 1 where the difference is not the one that is hoped for."""
    found = {
        name: study[name].p_value if study[name].estimate * direction > 0 else 1.0
        for name, direction in _HOPED.items()
        if name in study
    }
    if "carried" in study:
        # Against the margin, doubled, as in the analysis.
        one_sided = study["carried"].one_sided(protocol.over_reliance_margin, -1)
        found["no over-reliance"] = min(1.0, 2 * one_sided)
    return found


def _hypotheses(found: dict[str, float]) -> dict[str, float]:
    """P values of H1 to H3; the third is as large as the larger of its parts."""
    named = {"H1": found.get("time"), "H2": found.get("confidence")}
    if "detection" in found and "no over-reliance" in found:
        named["H3"] = max(found["detection"], found["no over-reliance"])
    return {name: p_value for name, p_value in named.items() if p_value is not None}


def _one_study(
    protocol: Protocol, effects: Effects, case_count: int, study_no: int
) -> dict[str, paired.PairedContrast]:
    """The contrasts of one simulated study, where its arms have them."""
    abnormal = np.arange(case_count) < round(_ABNORMAL * case_count)
    conduct = draw_conduct(effects, protocol.arms, protocol.readers, abnormal, [77, study_no])
    outcomes = {}
    pairs: Sequence[tuple[str, str, str, np.ndarray]] = (
        ("time", "manual", "full", conduct.log_seconds),
        ("confidence", "labels", "full", conduct.confidence.astype(float)),
        ("detection", "labels", "full", conduct.caught.astype(float)),
        ("carried", "manual", "full", 1.0 - conduct.caught),
    )
    for name, before, after, table in pairs:
        if not {before, after} <= set(protocol.arms):
            continue
        difference = table[protocol.arms.index(after)] - table[protocol.arms.index(before)]
        # Planted errors are in a share of the cases only.
        if name in ("detection", "carried"):
            # A study without plants does not ask who finds them.
            if not protocol.plant_share:
                continue
            difference = difference[:, : _planted(protocol, case_count)]
        outcomes[name] = paired.contrast(difference)
    if "time" not in outcomes:
        raise UserError("power: the arms manual and full are needed")
    return outcomes
