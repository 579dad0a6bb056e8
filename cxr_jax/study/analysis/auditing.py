"""Error auditing: planted errors detected, flagged and carried into signed reports; the AI's own errors beside them."""

from collections.abc import Sequence

import numpy as np

from cxr_jax.errors import UserError
from cxr_jax.study.analysis.contrasts import (
    Result,
    as_json,
    at_random,
    column,
    contrast_of,
    make_table,
    pairs_of,
    wald,
    with_readers_at_random,
)
from cxr_jax.study.analysis.rows import Row
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics import audit_rates, crossed, ordinal


def auditing(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Analyse planted errors: detected, flagged, carried into the signed report; flags on what was true."""
    # Natural errors of the AI are never counted among the planted ones.
    signed = [reading for reading in rows if reading["state"] == "signed"]
    planted = [reading for reading in signed if reading["planted"]]
    result: Result = {"rows": len(planted), "arms": {}, "kinds": {}, "contrasts": {}}
    for arm_name in protocol.arms:
        of_arm = [reading for reading in planted if reading["arm"] == arm_name]
        result["arms"][arm_name] = {
            "carried": _rate(of_arm, "carried"),
            "corrected": _rate(of_arm, "corrected"),
            "detected_label": _rate(of_arm, "detected_label"),
            "detected_flag": _rate(of_arm, "detected_flag"),
        }
        every = [reading for reading in signed if reading["arm"] == arm_name]
        result["arms"][arm_name] |= _false_flags(every) | {"natural_carried": _natural(every)}
        for error_kind in protocol.plant_kinds:
            # By kind: a side that was swapped is another mistake than a finding that was left out.
            of_kind = [reading for reading in of_arm if reading["kind"] == error_kind]
            result["kinds"].setdefault(error_kind, {})[arm_name] = {
                "carried": _rate(of_kind, "carried"),
                "corrected": _rate(of_kind, "corrected"),
                "detected_label": _rate(of_kind, "detected_label"),
                "detected_flag": _rate(of_kind, "detected_flag"),
            }
    for name in ("detected_label", "detected_flag"):
        for pair in pairs_of(protocol, (("labels", "full"), ("report", "full"))):
            key = f"{name}: {pair[1]}-{pair[0]}"
            result["contrasts"][key] = _detection(protocol, planted, name, pair)
    if {"manual", "full"} <= set(protocol.arms):
        result["over_reliance"] = _over_reliance(protocol, planted)
    return result


# ---- Rates -----------------------------------------------------------------------------------------


def _rate(rows: Sequence[Row], name: str) -> Result:
    flags = [reading[name] for reading in rows if reading[name] is not None]
    return _rate_of(flags)


def _rate_of(flags: Sequence[object]) -> Result:
    outcome = audit_rates.rate(np.array(flags, bool))
    return {
        "events": outcome.events,
        "total": outcome.total,
        "share": outcome.share,
        "low": outcome.low,
        "high": outcome.high,
    }


def _false_flags(rows: Sequence[Row]) -> Result:
    """Flags on what was true: a report, and of all that could be flagged falsely."""
    # Arms without AI have none to count.
    counted = [
        (reading["false_flags"], reading["true_items"])
        for reading in rows
        if reading["false_flags"] is not None and reading["true_items"]
    ]
    flags, items = sum(flag for flag, _ in counted), sum(item for _, item in counted)
    return {
        "false_flags_a_report": flags / len(counted) if counted else None,
        "false_flag_share": flags / items if items else None,
    }


def _natural(rows: Sequence[Row]) -> Result:
    """Share of the AI's own errors that signed reports carry; what `manual` has are the readers' own."""
    flags: list[bool] = []
    for reading in rows:
        if reading["natural_errors"]:
            carried = reading["natural_carried"]
            flags += [True] * carried + [False] * (reading["natural_errors"] - carried)
    return _rate_of(flags)


# ---- Detection -------------------------------------------------------------------------------------


def _detection(
    protocol: Protocol, planted: Sequence[Row], name: str, pair: tuple[str, str]
) -> Result:
    """Hold two arms' detection against each other: logit model, gap with crossed bootstrap, McNemar by reader."""
    used_rows = [
        reading for reading in planted if reading["arm"] in pair and reading[name] is not None
    ]
    result: Result = {"rows": len(used_rows)}
    table = make_table(used_rows, protocol.arms, name)
    before, after = (table[protocol.arms.index(arm_name)] for arm_name in pair)
    try:
        of_readers = contrast_of(protocol, table, *pair)
    except UserError as error:
        return result | {"refused": f"too few planted cases were signed in both arms ({error})"}
    # The gap is in shares, for people; the model is in odds.
    result["gap"] = _gap(protocol, table, pair, protocol.seed)
    result["of_readers"] = as_json(of_readers)
    if protocol.design == "crossed":
        result["readers"] = _by_reader(used_rows, before, after)
    try:
        result["model"] = with_readers_at_random(_model(used_rows, name, pair[1]), of_readers)
    except UserError as error:
        # All caught, or none, in one arm: the logit runs away, and the contrast of the shares is what is left.
        both = ~np.isnan(before) & ~np.isnan(after)
        exact = audit_rates.mcnemar(after[both] > 0, before[both] > 0).p_value
        result["model"] = {
            "estimate": None,
            # Where no pair differs from the others the contrast knows no error; the exact test does.
            "p_value": max(of_readers.p_value, exact if both.any() else 0.0),
            "refused": f"{error}; the p value is that of the difference of the shares",
        }
    return result


def _gap(protocol: Protocol, table: np.ndarray, pair: tuple[str, str], seed: int) -> Result:
    """Difference of two arms' shares, second less first, with its crossed interval."""
    first, second = (protocol.arms.index(arm_name) for arm_name in pair)
    # A split study shows no case to one reader twice, so there are no pairs to take.
    statistic = crossed.mean_difference(second, first, is_paired=protocol.design == "crossed")
    [gap] = crossed.crossed_bootstrap(table, [statistic], resamples=protocol.resamples, seed=seed)
    return {"estimate": gap.estimate, "low": gap.low, "high": gap.high}


def _by_reader(used_rows: Sequence[Row], before: np.ndarray, after: np.ndarray) -> list[Result]:
    """Exact McNemar of each reader: whom does it mislead?"""
    results = []
    for place, reader in enumerate(sorted({reading["reader"] for reading in used_rows})):
        both = ~np.isnan(before[place]) & ~np.isnan(after[place])
        test = audit_rates.mcnemar(after[place][both] > 0, before[place][both] > 0)
        results.append(
            {
                "reader": reader,  # by number: one who signed nothing has no line
                "only_second": test.first_only,
                "only_first": test.second_only,
                "p_value": test.p_value,
            }
        )
    return results


def _model(used_rows: Sequence[Row], name: str, second_arm: str) -> Result:
    """Logit of detection, reader, case and reader by arm at random. Raises UserError where it has no finite effect."""
    fit = ordinal.fit_ordinal(
        column(used_rows, name),
        np.array([[reading["arm"] == second_arm] for reading in used_rows], float),
        at_random(used_rows),
    )
    if not fit.converged:
        raise UserError("the model has no finite effect")
    model = wald(float(fit.effects[0]), float(fit.effect_errors[0]))
    return model | {"spreads": fit.spreads.tolist(), "converged": fit.converged}


# ---- Over-reliance ---------------------------------------------------------------------------------


def _over_reliance(protocol: Protocol, planted: Sequence[Row]) -> Result:
    """Test whether planted errors stand in more signed reports with the full AI than without any."""
    pair = ("manual", "full")
    used_rows = [
        reading for reading in planted if reading["arm"] in pair and reading["carried"] is not None
    ]
    table = make_table(used_rows, protocol.arms, "carried")
    margin = protocol.over_reliance_margin
    try:
        # Readers and cases at random, as for time.
        outcome = contrast_of(protocol, table, *pair)
    except UserError as error:
        return {"refused": f"too few planted cases were signed in both arms ({error})"}
    one_sided = outcome.one_sided(margin, -1)
    if outcome.standard_error <= 0 and outcome.estimate < margin:
        # No reader differs on any case: not certainty, but so many cases without one that a margin would show.
        one_sided = (1.0 - margin) ** table.shape[2]
    return {
        "margin": margin,
        "gap": _gap(protocol, table, pair, protocol.seed + 1),
        "contrast": as_json(outcome),
        "p_one_sided": one_sided,
        # Doubled, so that it says what the 95 % interval says, and stands on one footing with the other hypotheses.
        "p_value": min(1.0, 2.0 * one_sided),
    }
