"""Each endpoint of the protocol but error auditing, out of the table of readings: time, confidence, AUC, label F1."""

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
from cxr_jax.study.analysis.rows import Row, any_truth
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics import crossed, mixed_time, ordinal, orh

# Pairs of arms that the protocol asks about: second less first.
TIME_PAIRS = (("manual", "full"), ("manual", "labels"), ("manual", "report"), ("report", "full"))
OTHER_PAIRS = (("labels", "full"), ("manual", "full"), ("report", "full"), ("manual", "labels"))


# ---- Time ------------------------------------------------------------------------------------------


def time_to_sign(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Analyse log active seconds: the mixed model, and the paired contrast that decides H1."""
    used_rows = [
        reading
        for reading in rows
        if reading["state"] == "signed" and reading["active_s"] and reading["clock_ok"]
    ]
    result: Result = {
        "rows": len(used_rows),
        "model": None,
        "contrasts": {},
        "refused": {},
        "seconds": _seconds(protocol, used_rows),
    }
    try:
        result["model"], order = _time_models(protocol, used_rows)
    except UserError as error:
        # A study that was closed after a few films has no model, and is analysed for what it has.
        return result | {"refused": {"model": str(error)}}
    tables = _log_tables(protocol, used_rows, order)
    unplanted = [not reading["planted"] for reading in used_rows]
    plain_rows = [reading for reading in used_rows if not reading["planted"]]
    tables["unplanted"] = _log_tables(protocol, plain_rows, order[unplanted])["adjusted"]
    for first_arm, second_arm in pairs_of(protocol, TIME_PAIRS):
        key = f"{second_arm}/{first_arm}"
        try:
            outcome = contrast_of(protocol, tables["adjusted"], first_arm, second_arm)
        except UserError as error:
            result["refused"][key] = str(error)
            continue
        ratios: dict[str, float | None] = {
            "ratio": float(np.exp(outcome.estimate)),
            "ratio_low": float(np.exp(outcome.low)),
            "ratio_high": float(np.exp(outcome.high)),
        }
        # Sensitivity: idle seconds off, and films off whose AI was made to err.
        for name in ("idle_trimmed", "unplanted"):
            ratios[f"ratio_{name}"] = _ratio(protocol, tables[name], first_arm, second_arm)
        result["contrasts"][key] = as_json(outcome) | ratios
    return result


def _ratio(protocol: Protocol, table: np.ndarray, first_arm: str, second_arm: str) -> float | None:
    """The ratio alone; None where a part of the study has no pairs."""
    try:
        return float(np.exp(contrast_of(protocol, table, first_arm, second_arm).estimate))
    except UserError:
        return None


def _time_models(protocol: Protocol, used_rows: Sequence[Row]) -> tuple[Result, np.ndarray]:
    """Fit the mixed model with and without reader by arm; also what order adds to each row."""
    arms = column(used_rows, "arm")
    # The first of the protocol's arms that anything was signed in.
    reference = next((arm_name for arm_name in protocol.arms if arm_name in arms), "")
    if not reference:
        raise UserError("time: no reading was timed")
    fixed, names = mixed_time.design_matrix(
        arms,
        reference,
        abnormal=column(used_rows, "truth"),
        sessions=column(used_rows, "session"),
        positions=column(used_rows, "position"),
    )
    fits = {
        error_kind: mixed_time.fit_mixed(
            np.log(np.array(column(used_rows, "active_s"), float)),
            fixed,
            names,
            readers=column(used_rows, "reader"),
            cases=column(used_rows, "case"),
            arms=term,
        )
        for error_kind, term in (("model", arms), ("without_reader_by_arm", None))
    }
    models = {
        error_kind: {
            "effects": {
                name: {"estimate": fit.effect(name)[0], "standard_error": fit.effect(name)[1]}
                for name in fit.names
            },
            "variances": dict(fit.variances),
        }
        for error_kind, fit in fits.items()
    }
    return models, _order_effects(fits["model"], fixed)


def _order_effects(model: mixed_time.MixedFit, fixed: np.ndarray) -> np.ndarray:
    """What session and position add to each row, to be taken out before arms are compared pair by pair."""
    order = np.zeros(len(fixed))
    for name in ("session", "position"):
        # A study of one session has no such effect.
        if name in model.names:
            order += fixed[:, model.names.index(name)] * model.effect(name)[0]
    return order


def _log_tables(
    protocol: Protocol, used_rows: Sequence[Row], order: np.ndarray
) -> dict[str, np.ndarray]:
    """Log seconds without order effects; as a sensitivity analysis also without idle time."""
    adjusted, trimmed = [], []
    for reading, added in zip(used_rows, order, strict=True):
        seconds = reading["active_s"]
        adjusted.append(reading | {"_log": float(np.log(seconds) - added)})
        # Never nothing: whoever was idle all the time has half a second.
        busy = max(seconds - reading["idle_s"], 0.5)
        trimmed.append(reading | {"_log": float(np.log(busy) - added)})
    return {
        "adjusted": make_table(adjusted, protocol.arms, "_log"),
        "idle_trimmed": make_table(trimmed, protocol.arms, "_log"),
    }


def _seconds(protocol: Protocol, used_rows: Sequence[Row]) -> Result:
    """Geometric means of each arm, of each reader in it, and of each session: what the figures show."""
    logarithms: dict[tuple[object, ...], list[float]] = {}
    for reading in used_rows:
        arm_name, log_seconds = reading["arm"], float(np.log(reading["active_s"]))
        for key in (("arm",), ("reader", reading["reader"]), ("session", reading["session"])):
            logarithms.setdefault((*key, arm_name), []).append(log_seconds)
    means = {key: float(np.exp(np.mean(values))) for key, values in logarithms.items()}
    by_session: dict[str, dict[str, float]] = {}
    for session in sorted(set(column(used_rows, "session"))):
        by_session[str(session)] = {
            arm_name: means["session", session, arm_name]
            for arm_name in protocol.arms
            if ("session", session, arm_name) in means
        }
    return {
        "arms": {arm_name: means.get(("arm", arm_name)) for arm_name in protocol.arms},
        # One place for each reader of the protocol, so that a number is always the same person; a reader who left
        # has no mean in the arms that he did not come to.
        "readers": {
            arm_name: [
                means.get(("reader", reader + 1, arm_name)) for reader in range(protocol.readers)
            ]
            for arm_name in protocol.arms
        },
        "sessions": by_session,
    }


# ---- Confidence ------------------------------------------------------------------------------------


def confidence(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Fit the ordinal mixed model of the seven points, all arms against the first that has readings."""
    used_rows = [
        reading
        for reading in rows
        if reading["state"] == "signed" and reading["confidence"] is not None
    ]
    present = [
        arm_name
        for arm_name in protocol.arms
        if any(reading["arm"] == arm_name for reading in used_rows)
    ]
    others = present[1:]
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
    if not others:
        return result | {"refused": "confidence: fewer than two arms have readings"}
    fixed = np.array(
        [[reading["arm"] == arm_name for arm_name in others] for reading in used_rows], float
    )
    try:
        fit = ordinal.fit_ordinal(column(used_rows, "confidence"), fixed, at_random(used_rows))
        if not fit.converged:
            raise UserError("confidence: the model has no finite effect")
    except UserError as error:
        return result | {"refused": str(error)}
    result |= {
        "reference": present[0],
        "cuts": fit.cuts.tolist(),
        "spreads": dict(zip(("reader", "case", "reader_arm"), fit.spreads.tolist(), strict=True)),
        "log_likelihood": fit.log_likelihood,
        "converged": fit.converged,
        "effects": {
            arm_name: {
                "estimate": float(fit.effects[place]),
                "standard_error": float(fit.effect_errors[place]),
            }
            for place, arm_name in enumerate(others)
        },
    }
    contrasts, reasons = _confidence_contrasts(protocol, used_rows, fit, present)
    result["contrasts"] = contrasts
    return result | ({"refused": reasons[0]} if reasons else {})


def _confidence_contrasts(
    protocol: Protocol, used_rows: Sequence[Row], fit: ordinal.OrdinalFit, present: Sequence[str]
) -> tuple[Result, list[str]]:
    """Compare pairs of arms by the model and by readers; also the reasons why some cannot be."""
    found: Result = {}
    reasons = []
    table = make_table(used_rows, protocol.arms, "confidence")
    for first_arm, second_arm in pairs_of(protocol, OTHER_PAIRS):
        # An arm without readings is not the reference in disguise.
        if not {first_arm, second_arm} <= set(present):
            continue
        weights = np.array(
            [
                float(arm_name == second_arm) - float(arm_name == first_arm)
                for arm_name in present[1:]
            ]
        )
        try:
            points = contrast_of(protocol, table, first_arm, second_arm)
            outcome = with_readers_at_random(wald(*fit.contrast(weights)), points)
        except UserError as error:
            reasons.append(str(error))
            continue
        # Points are no metric: they test beside the model, and measure nothing.
        outcome["mean_points"] = as_json(points)
        found[f"{second_arm}-{first_arm}"] = outcome
    return found, reasons


# ---- AUC and label F1 ------------------------------------------------------------------------------


def areas(protocol: Protocol, rows: Sequence[Row]) -> Result:
    """Compare AUC of the pre-specified labels, and of the largest suspicion for any of them."""
    signed = [reading for reading in rows if reading["state"] == "signed"]
    labels = protocol.suspicion_labels
    for reading in signed:
        ratings = [reading[f"rating_{label_name}"] for label_name in labels]
        truths = [reading[f"truth_{label_name}"] for label_name in labels]
        reading["rating_any"] = None if None in ratings else max(ratings)
        reading["truth_any"] = any_truth(truths)
    result: Result = {}
    for name in (*labels, "any", "any, no plants"):
        label_name = name.partition(",")[0]
        # Planted films are worse by design; without them it is the AI's own doing.
        used_rows = [
            reading
            for reading in signed
            if reading[f"truth_{label_name}"] is not None
            and not (name != label_name and reading["planted"])
        ]
        # A label that is uncertain in the reference counts for no AUC.
        truth_of = {reading["case"]: bool(reading[f"truth_{label_name}"]) for reading in used_rows}
        truth = np.array([truth_of[case] for case in sorted(truth_of)])
        label_result: Result = {"positives": int(truth.sum()), "negatives": int((~truth).sum())}
        try:
            if protocol.design != "crossed":
                raise UserError("AUC: a split study has no case in all arms of a reader")
            # As many cases as have all cells: the method knows no others.
            scores = make_table(used_rows, protocol.arms, f"rating_{label_name}")
            readers, kept = _complete(scores)
            label_result["readers_left_out"] = scores.shape[1] - len(readers)
            label_result["cases_left_out"] = int((~kept).sum())
            scores, of_kept = scores[:, readers][:, :, kept], truth[kept]
            outcome = orh.compare_arms(scores, of_kept)
            # All readers right on every case: nothing to hold a difference against.
            if not np.isfinite(outcome.f_value):
                raise UserError("AUC: neither readers nor cases differ")
            label_result |= _comparison(protocol, outcome)
            label_result["delong_f"] = orh.compare_arms(scores, of_kept, method="delong").f_value
        except UserError as error:
            label_result["refused"] = str(error)
        result[name] = label_result
    return result


def _complete(scores: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Choose readers, and the cases that all of these scored in all arms: the method knows no empty cells.

    A reader is left out if more readings are kept without him than with him: one who left the study after a session
    would take nearly every case along. Scores and truth play no part in it.
    """
    is_whole = ~np.isnan(scores).any(0)
    readers = [int(reader) for reader in np.flatnonzero(is_whole.any(1))]
    while len(readers) > 2:
        fewest = min(readers, key=lambda reader: int(is_whole[reader].sum()))
        others = [reader for reader in readers if reader != fewest]
        kept_with, kept_without = (
            len(chosen) * int(is_whole[chosen].all(0).sum()) for chosen in (readers, others)
        )
        if kept_without <= kept_with:
            break
        readers = others
    return readers, is_whole[readers].all(0)


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
    tables = np.stack([make_table(signed, protocol.arms, name) for name in names])
    is_there, counts = ~np.isnan(tables[0]), np.nan_to_num(tables)

    def micro(weights: np.ndarray) -> np.ndarray:
        true, false, missed = (counts * weights).sum((2, 3))
        return 2 * true / np.maximum(2 * true + false + missed, 1e-12)

    def difference(first_arm: int, second_arm: int) -> crossed.Statistic:
        # Of the same films, where a reader has them in both arms: a skipped one may be a hard one.
        both = is_there[first_arm] & is_there[second_arm]
        common = both if protocol.design == "crossed" else np.ones_like(both)
        return lambda _, weights: float(
            micro(weights * common)[second_arm] - micro(weights * common)[first_arm]
        )

    pairs = pairs_of(protocol, OTHER_PAIRS)
    statistics = [difference(protocol.arms.index(a), protocol.arms.index(b)) for a, b in pairs]
    intervals = crossed.crossed_bootstrap(
        counts[0], statistics, resamples=min(protocol.resamples, 1000), seed=protocol.seed + 2
    )
    # Planted errors make reports worse by design; without them it is the AI's own doing.
    planted = {reading["case"]: bool(reading["planted"]) for reading in signed}
    unplanted = np.array([not planted[case] for case in sorted(planted)], float)[None, :]
    return {
        "arms": dict(zip(protocol.arms, map(float, micro(np.ones(counts.shape[2:]))), strict=True)),
        "unplanted": dict(zip(protocol.arms, map(float, micro(unplanted)), strict=True)),
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
