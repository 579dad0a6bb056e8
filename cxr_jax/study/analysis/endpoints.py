"""Each endpoint of the protocol, out of the table of readings: time, confidence, error auditing, AUC, label F1."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.study.analysis.rows import Row
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics import audit_rates, crossed, mixed_time, ordinal, orh, paired

Result = dict[str, Any]
# Pairs of arms that the protocol asks about: second less first.
TIME_PAIRS = (("manual", "full"), ("manual", "labels"), ("manual", "report"), ("report", "full"))
OTHER_PAIRS = (("labels", "full"), ("manual", "full"), ("report", "full"), ("manual", "labels"))


def _pairs(protocol: Protocol, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair in wanted if set(pair) <= set(protocol.arms)]


def _table(rows: Sequence[Row], arms: Sequence[str], name: str) -> np.ndarray:
    """One column as [arms, readers, cases]; NaN where there is no reading."""
    # Whoever has any reading has a row; empty cells are NaN.
    readers = sorted({reading["reader"] for reading in rows})
    cases = sorted({reading["case"] for reading in rows})
    table = np.full((len(arms), len(readers), len(cases)), np.nan)
    for reading in rows:
        if reading[name] is not None:
            place = (
                arms.index(reading["arm"]),
                readers.index(reading["reader"]),
                cases.index(reading["case"]),
            )
            table[place] = reading[name]
    return table


def _column(rows: Sequence[Row], name: str) -> Any:
    return [reading[name] for reading in rows]


def _contrast_of(
    protocol: Protocol, table: np.ndarray, first_arm: str, second_arm: str
) -> paired.PairedContrast:
    """The mean difference of two arms: of pairs in a crossed study, of readers' means in a split one."""
    arms = protocol.arms
    # Second less first, in all contrasts.
    before, after = table[arms.index(first_arm)], table[arms.index(second_arm)]
    if protocol.design == "crossed":
        difference = after - before
        # A case that no reader has in both arms says nothing of their difference.
        kept = ~np.isnan(difference).all(0)
        return paired.contrast(difference[:, kept])
    return paired.contrast_of_readers(np.nanmean(after, 1) - np.nanmean(before, 1))


def _as_json(outcome: paired.PairedContrast) -> Result:
    return {
        "estimate": outcome.estimate,
        "standard_error": outcome.standard_error,
        "degrees": outcome.degrees,
        "low": outcome.low,
        "high": outcome.high,
        "p_value": outcome.p_value,
    }


# ---- Time ------------------------------------------------------------------------------------------


def time_to_sign(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Analyse log active seconds: the mixed model, and the paired contrast that decides H1."""
    used_rows = [
        reading
        for reading in rows
        if reading["state"] == "signed" and reading["active_s"] and reading["clock_ok"]
    ]
    reference = protocol.arms[0]
    arms, sessions = _column(used_rows, "arm"), _column(used_rows, "session")
    fixed, names = mixed_time.design_matrix(
        arms,
        reference,
        abnormal=_column(used_rows, "truth"),
        sessions=sessions,
        positions=_column(used_rows, "position"),
    )
    logarithms = np.log(np.array(_column(used_rows, "active_s"), float))
    fits = {
        error_kind: mixed_time.fit_mixed(
            logarithms,
            fixed,
            names,
            readers=_column(used_rows, "reader"),
            cases=_column(used_rows, "case"),
            arms=term,
        )
        for error_kind, term in (("model", arms), ("without_reader_by_arm", None))
    }
    tables = _log_tables(protocol, used_rows, logarithms, _order_effects(fits["model"], fixed))
    result: Result = {
        "rows": len(used_rows),
        "model": {
            error_kind: {
                "effects": {
                    name: {"estimate": fit.effect(name)[0], "standard_error": fit.effect(name)[1]}
                    for name in fit.names
                },
                "variances": dict(fit.variances),
            }
            for error_kind, fit in fits.items()
        },
        "contrasts": {},
        "seconds": _seconds(protocol, used_rows),
    }
    for first_arm, second_arm in _pairs(protocol, TIME_PAIRS):
        outcome = _contrast_of(protocol, tables["adjusted"], first_arm, second_arm)
        trimmed_found = _contrast_of(protocol, tables["idle_trimmed"], first_arm, second_arm)
        ratios = {
            "ratio": float(np.exp(outcome.estimate)),
            "ratio_low": float(np.exp(outcome.low)),
            "ratio_high": float(np.exp(outcome.high)),
            "ratio_idle_trimmed": float(np.exp(trimmed_found.estimate)),
        }
        result["contrasts"][f"{second_arm}/{first_arm}"] = _as_json(outcome) | ratios
    return result


def _order_effects(model: mixed_time.MixedFit, fixed: np.ndarray) -> np.ndarray:
    """What session and position add to each row, to be taken out before arms are compared pair by pair."""
    order = np.zeros(len(fixed))
    for name in ("session", "position"):
        # A study of one session has no such effect.
        if name in model.names:
            order += fixed[:, model.names.index(name)] * model.effect(name)[0]
    return order


def _log_tables(
    protocol: Protocol, used_rows: Sequence[Row], logarithms: np.ndarray, order: np.ndarray
) -> dict[str, np.ndarray]:
    """Log seconds without order effects, and, as a sensitivity analysis, without idle time."""
    adjusted = [
        reading | {"_log": log_seconds}
        for reading, log_seconds in zip(used_rows, logarithms - order, strict=True)
    ]
    # Never nothing: whoever was idle all the time has half a second.
    trimmed = [
        reading | {"_log": float(np.log(max(reading["active_s"] - reading["idle_s"], 0.5)))}
        for reading in used_rows
    ]
    return {
        "adjusted": _table(adjusted, protocol.arms, "_log"),
        "idle_trimmed": _table(trimmed, protocol.arms, "_log"),
    }


def _seconds(protocol: Protocol, used_rows: Sequence[Row]) -> Result:
    """Geometric means of each arm, of each reader in it, and of each session: what the figures show."""
    table = _table(used_rows, protocol.arms, "active_s")
    logarithms = np.log(table)
    by_session: dict[str, dict[str, float]] = {}
    for session in sorted(set(_column(used_rows, "session"))):
        for arm_name in protocol.arms:
            values = [
                reading["active_s"]
                for reading in used_rows
                if reading["session"] == session and reading["arm"] == arm_name
            ]
            if values:
                by_session.setdefault(str(session), {})[arm_name] = float(
                    np.exp(np.mean(np.log(values)))
                )
    return {
        "arms": {
            arm_name: float(np.exp(np.nanmean(logarithms[place])))
            for place, arm_name in enumerate(protocol.arms)
        },
        "readers": {
            arm_name: np.exp(np.nanmean(logarithms[place], axis=1)).tolist()
            for place, arm_name in enumerate(protocol.arms)
        },
        "sessions": by_session,
    }


# ---- Confidence ------------------------------------------------------------------------------------


def confidence(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Fit the ordinal mixed model of the seven points, all arms against the first."""
    used_rows = [
        reading
        for reading in rows
        if reading["state"] == "signed" and reading["confidence"] is not None
    ]
    others = [
        arm_name
        for arm_name in protocol.arms[1:]
        if any(reading["arm"] == arm_name for reading in used_rows)
    ]
    result: Result = {
        "rows": len(used_rows),
        "counts": {
            arm_name: [
                sum(
                    reading["arm"] == arm_name and reading["confidence"] == point
                    for reading in used_rows
                )
                for point in range(1, 8)
            ]
            for arm_name in protocol.arms
        },
    }
    fixed = np.array(
        [[reading["arm"] == arm_name for arm_name in others] for reading in used_rows], float
    )
    random = [_column(used_rows, "reader"), _column(used_rows, "case")]
    try:
        fit = ordinal.fit_ordinal(_column(used_rows, "confidence"), fixed, random)
    except UserError as error:
        return result | {"refused": str(error)}
    result |= {
        "cuts": fit.cuts.tolist(),
        "spreads": {"reader": float(fit.spreads[0]), "case": float(fit.spreads[1])},
        "log_likelihood": fit.log_likelihood,
        "converged": fit.converged,
        "effects": {
            arm_name: {
                "estimate": float(fit.effects[place]),
                "standard_error": float(fit.effect_errors[place]),
            }
            for place, arm_name in enumerate(others)
        },
        "contrasts": {},
    }
    table = _table(used_rows, protocol.arms, "confidence")
    for first_arm, second_arm in _pairs(protocol, OTHER_PAIRS):
        weights = np.array(
            [float(arm_name == second_arm) - float(arm_name == first_arm) for arm_name in others]
        )
        estimate, standard_error = fit.contrast(weights)
        outcome = _wald(estimate, standard_error)
        # Points are no metric: beside the model, for a reader who wants to see them all the same.
        outcome["mean_points"] = _as_json(_contrast_of(protocol, table, first_arm, second_arm))
        result["contrasts"][f"{second_arm}-{first_arm}"] = outcome
    return result


def _wald(estimate: float, error: float) -> Result:
    """Interval and two-sided test by the normal distribution, as R's packages give them."""
    from scipy import stats

    # Large samples: hundreds of readings stand behind one effect.
    reach = float(stats.norm.ppf(0.975)) * error
    p_value = float(2 * stats.norm.sf(abs(estimate) / error)) if error > 0 else 1.0
    return {
        "estimate": estimate,
        "standard_error": error,
        "low": estimate - reach,
        "high": estimate + reach,
        "p_value": p_value,
    }


# ---- Error auditing --------------------------------------------------------------------------------


def auditing(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Analyse planted errors: detected, flagged, carried into the signed report; flags on what was true."""
    # Natural errors of the AI are never counted among the planted ones.
    signed = [reading for reading in rows if reading["state"] == "signed"]
    planted = [reading for reading in signed if reading["planted"]]
    with_ai = [arm_name for arm_name in protocol.arms if arm_name != "manual"]
    result: Result = {"rows": len(planted), "arms": {}, "kinds": {}, "contrasts": {}}
    for arm_name in protocol.arms:
        of_arm = [reading for reading in planted if reading["arm"] == arm_name]
        flags = [reading["false_flags"] for reading in signed if reading["arm"] == arm_name]
        # Arms without AI have none to count.
        known_flags = [flag for flag in flags if flag is not None]
        result["arms"][arm_name] = {
            "carried": _rate(of_arm, "carried"),
            "detected_label": _rate(of_arm, "detected_label"),
            "detected_flag": _rate(of_arm, "detected_flag"),
            "false_flags_a_report": float(np.mean(known_flags)) if known_flags else None,
        }
        for error_kind in protocol.plant_kinds:
            # By kind: a side that was swapped is another mistake than a finding that was left out.
            of_kind = [reading for reading in of_arm if reading["kind"] == error_kind]
            result["kinds"].setdefault(error_kind, {})[arm_name] = {
                "carried": _rate(of_kind, "carried"),
                "detected_label": _rate(of_kind, "detected_label"),
                "detected_flag": _rate(of_kind, "detected_flag"),
            }
    for name in ("detected_label", "detected_flag"):
        for first_arm, second_arm in _pairs(protocol, (("labels", "full"), ("report", "full"))):
            if {first_arm, second_arm} <= set(with_ai):
                key = f"{name}: {second_arm}-{first_arm}"
                result["contrasts"][key] = _detection(
                    protocol, planted, name, first_arm, second_arm
                )
    if {"manual", "full"} <= set(protocol.arms):
        result["over_reliance"] = _over_reliance(protocol, planted)
    return result


def _rate(rows: Sequence[Row], name: str) -> Result:
    flags = [reading[name] for reading in rows if reading[name] is not None]
    outcome = audit_rates.rate(np.array(flags, bool))
    return {
        "events": outcome.events,
        "total": outcome.total,
        "share": outcome.share,
        "low": outcome.low,
        "high": outcome.high,
    }


def _detection(
    protocol: Protocol, planted: Sequence[Row], name: str, first_arm: str, second_arm: str
) -> Result:
    """Hold two arms' detection against each other: logit model, gap with crossed bootstrap, McNemar by reader."""
    used_rows = [
        reading
        for reading in planted
        if reading["arm"] in (first_arm, second_arm) and reading[name] is not None
    ]
    result: Result = {"rows": len(used_rows)}
    if not used_rows:
        return result | {"refused": "no planted case was signed in both arms"}
    table = _table(used_rows, protocol.arms, name)
    # The gap is in shares, for people; the model is in odds.
    places = protocol.arms.index(first_arm), protocol.arms.index(second_arm)
    [gap] = crossed.crossed_bootstrap(
        table,
        [crossed.mean_difference(places[1], places[0])],
        resamples=protocol.resamples,
        seed=protocol.seed,
    )
    result["gap"] = {"estimate": gap.estimate, "low": gap.low, "high": gap.high}
    result["readers"] = []
    for reader in range(table.shape[1]):
        both = ~np.isnan(table[places[0], reader]) & ~np.isnan(table[places[1], reader])
        # For each reader: whom does it mislead?
        test = audit_rates.mcnemar(
            table[places[1], reader][both] > 0, table[places[0], reader][both] > 0
        )
        result["readers"].append(
            {
                "only_second": test.first_only,
                "only_first": test.second_only,
                "p_value": test.p_value,
            }
        )
    try:
        fit = ordinal.fit_ordinal(
            _column(used_rows, name),
            np.array([[reading["arm"] == second_arm] for reading in used_rows], float),
            [_column(used_rows, "reader"), _column(used_rows, "case")],
        )
    except UserError as error:
        return result | {"refused": str(error)}
    model = _wald(float(fit.effects[0]), float(fit.effect_errors[0]))
    model |= {"spreads": fit.spreads.tolist(), "converged": fit.converged}
    # All caught, or none, in one arm: the logit runs away, and the exact test of the pairs is what is left.
    if not fit.converged:
        before, after = table[places[0]], table[places[1]]
        both = ~np.isnan(before) & ~np.isnan(after)
        model["p_value"] = audit_rates.mcnemar(after[both] > 0, before[both] > 0).p_value
        model["refused"] = "no finite effect; the p value is that of the exact McNemar test"
    return result | {"model": model}


def _over_reliance(protocol: Protocol, planted: Sequence[Row]) -> Result:
    """Test whether planted errors stand in more signed reports with the full AI than without any."""
    used_rows = [reading for reading in planted if reading["carried"] is not None]
    if not used_rows:
        return {"refused": "no planted case was signed"}
    table = _table(used_rows, protocol.arms, "carried")
    places = protocol.arms.index("manual"), protocol.arms.index("full")
    [gap] = crossed.crossed_bootstrap(
        table,
        [crossed.mean_difference(places[1], places[0])],
        resamples=protocol.resamples,
        seed=protocol.seed + 1,
    )
    result: Result = {
        "margin": protocol.over_reliance_margin,
        "gap": {"estimate": gap.estimate, "low": gap.low, "high": gap.high},
    }
    try:
        # Readers and cases at random, as for time.
        outcome = _contrast_of(protocol, table, "manual", "full")
    except UserError as error:
        return result | {"refused": str(error)}
    # "Not higher" by more than the margin, one-sided.
    p_value = outcome.one_sided(protocol.over_reliance_margin, -1)
    return result | {"contrast": _as_json(outcome), "p_value": p_value}


# ---- AUC and label F1 ------------------------------------------------------------------------------


def areas(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Compare AUC of the pre-specified labels, and of the largest suspicion for any of them."""
    signed = [reading for reading in rows if reading["state"] == "signed"]
    labels = protocol.suspicion_labels
    for reading in signed:
        ratings = [reading[f"rating_{label_name}"] for label_name in labels]
        truths = [reading[f"truth_{label_name}"] for label_name in labels]
        reading["rating_any"] = None if None in ratings else max(ratings)
        reading["truth_any"] = None if None in truths else max(truths)
    result: Result = {}
    for label_name in (*labels, "any"):
        used_rows = [reading for reading in signed if reading[f"truth_{label_name}"] is not None]
        # A label that is uncertain in the reference counts for no AUC.
        truth_of = {reading["case"]: bool(reading[f"truth_{label_name}"]) for reading in used_rows}
        truth = np.array([truth_of[case] for case in sorted(truth_of)])
        label_result: Result = {"positives": int(truth.sum()), "negatives": int((~truth).sum())}
        try:
            if protocol.design != "crossed":
                raise UserError("AUC: a split study has no case in all arms of a reader")
            # As many cases as have all cells: the method knows no others.
            scores = _table(used_rows, protocol.arms, f"rating_{label_name}")
            # A case that anybody skipped is out for all: the design is crossed, or it is none.
            kept = ~np.isnan(scores).any((0, 1))
            label_result["cases_left_out"] = int((~kept).sum())
            outcome = orh.compare_arms(scores[:, :, kept], truth[kept])
            label_result |= _comparison(protocol, outcome)
            label_result["delong_f"] = orh.compare_arms(
                scores[:, :, kept], truth[kept], method="delong"
            ).f_value
        except UserError as error:
            label_result["refused"] = str(error)
        result[label_name] = label_result
    return result


def _comparison(protocol: Protocol, outcome: orh.Comparison) -> Result:
    return {
        "auc": {
            arm_name: outcome.auc[place].tolist() for place, arm_name in enumerate(protocol.arms)
        },
        "f_value": outcome.f_value,
        "degrees": list(outcome.degrees),
        "p_value": outcome.p_value,
        "contrasts": {
            # Second less first, as everywhere else here.
            f"{protocol.arms[interval.second]}-{protocol.arms[interval.first]}": {
                "estimate": -interval.estimate,
                "standard_error": interval.standard_error,
                "low": -interval.high,
                "high": -interval.low,
                "p_value": interval.p_value,
            }
            for interval in outcome.contrasts
        },
    }


def label_f1(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Compute micro F1 of the labels in signed reports, with crossed intervals of the differences."""
    signed = [reading for reading in rows if reading["state"] == "signed"]
    names = ("true_positive", "false_positive", "false_negative")
    # Counts first, so that a resample is a weighted sum.
    counts = np.stack([_table(signed, protocol.arms, name) for name in names])
    counts = np.nan_to_num(counts)

    def micro(weights: np.ndarray) -> np.ndarray:
        true, false, missed = (counts * weights).sum((2, 3))
        return 2 * true / np.maximum(2 * true + false + missed, 1e-12)

    def difference(first_arm: int, second_arm: int) -> crossed.Statistic:
        return lambda _, weights: float(micro(weights)[second_arm] - micro(weights)[first_arm])

    ones = np.ones(counts.shape[2:])
    pairs = _pairs(protocol, OTHER_PAIRS)
    statistics = [difference(protocol.arms.index(a), protocol.arms.index(b)) for a, b in pairs]
    intervals = crossed.crossed_bootstrap(
        counts[0], statistics, resamples=min(protocol.resamples, 1000), seed=protocol.seed + 2
    )
    return {
        "arms": dict(zip(protocol.arms, map(float, micro(ones)), strict=True)),
        "contrasts": {
            f"{second_arm}-{first_arm}": {
                "estimate": interval.estimate,
                "low": interval.low,
                "high": interval.high,
            }
            for (first_arm, second_arm), interval in zip(pairs, intervals, strict=True)
        },
    }


def opinions(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Count what readers said of the AI, point by point: no means of points that are no metric."""
    result: Result = {}
    for item in protocol.ratings:
        result[item.name] = {}
        for arm_name in item.arms:
            given = [reading[f"ai_{item.name}"] for reading in rows if reading["arm"] == arm_name]
            counted = [
                sum(row_value == point for row_value in given)
                for point in range(1, len(item.points) + 1)
            ]
            if sum(counted):
                result[item.name][arm_name] = counted
    return result


__all__ = [
    "RunFailedError",
    "areas",
    "auditing",
    "confidence",
    "label_f1",
    "opinions",
    "time_to_sign",
]
