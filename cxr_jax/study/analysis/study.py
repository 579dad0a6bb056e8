"""The analysis of one study: rows, endpoints, the three hypotheses with Holm, as one JSON document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import cxr_jax
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.store import Store
from cxr_jax.study import allocate
from cxr_jax.study.analysis import endpoints
from cxr_jax.study.analysis.rows import Row, flow, make_rows
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.ledger import Ledger, washout_days
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.statistics.audit_rates import holm

FORMAT = "cxr_study_analysis"


@dataclass(frozen=True)
class Analysis:
    """The table and what was computed from it."""

    rows: list[Row]
    document: dict[str, Any]


def analyse(folder: StudyFolder, store: Store, ledger: Ledger) -> Analysis:
    """Analyse an unblinded study."""
    protocol = folder.protocol
    # The first time that anything reads it.
    sealed = folder.read_sealed()
    rows = make_rows(folder, store, ledger, sealed)
    # Practice counts nowhere but in the flow of the sessions.
    counted = [reading for reading in rows if not reading["practice"]]
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "study": protocol.name,
        "simulated": protocol.simulated,
        "notice": NOT_FOR_DIAGNOSIS,
        "app_version": cxr_jax.__version__,
        "design": protocol.design,
        "first_line": first_line(protocol, washout_days(ledger, protocol.washout_days)),
        "protocol_sha256": protocol.sha256,
        "seal_sha256": ledger.sealed["seal_sha256"],
        "store_head": str(store.head()),
        "washout_changes": ledger.washouts,
        "refused_too_early": ledger.refused_early,
        "flow": flow(rows, protocol.arms),
        "skip_reasons": sorted(
            {reading["skip_reason"] for reading in rows if reading["skip_reason"]}
        ),
        "balance": _balance(protocol, folder),
        "time": endpoints.time_to_sign(protocol, counted),
        "confidence": endpoints.confidence(protocol, counted),
        "auditing": endpoints.auditing(protocol, counted),
        "auc": endpoints.areas(protocol, counted),
        "label_f1": endpoints.label_f1(protocol, counted),
        "opinions": endpoints.opinions(protocol, counted),
        "workload": _workload(protocol, ledger),
    }
    document["hypotheses"] = hypotheses(document, protocol.alpha)
    return Analysis(rows, document)


def first_line(protocol: Protocol, days: float) -> str:
    """Say the design before any result: the same films three times are remembered, if the washout is short."""
    if protocol.design == "split":
        return "split: each case once for each reader, arms rotate over readers; no washout needed"
    return f"crossed: each case once in each arm for each reader, washout {days:g} days between sessions"


def _balance(protocol: Protocol, folder: StudyFolder) -> dict[str, Any]:
    # Of what was allocated; the flow says what was read.
    outcome = allocate.balance(protocol, folder.places)
    return {"is_balanced": outcome.is_balanced, "counts": outcome.counts}


def _workload(protocol: Protocol, ledger: Ledger) -> dict[str, Any]:
    """NASA-TLX by session, and SUS scores (0..100) of the last one."""
    loads: dict[str, list[list[float]]] = {}
    usability = []
    for (_, session_no), answers in sorted(ledger.questionnaires.items()):
        loads.setdefault(str(session_no + 1), []).append(answers["tlx"])
        if answers["sus"]:
            # Odd items are praise, even ones are not; the sum of 0..4 each is taken to 100.
            points = [
                value - 1 if number % 2 == 0 else 5 - value
                for number, value in enumerate(answers["sus"])
            ]
            usability.append(2.5 * sum(points))
    # Means of scales of 0 to 100, as the raw form is used.
    means = {
        session: dict(zip(protocol.tlx, np.mean(values, 0).tolist(), strict=True))
        for session, values in loads.items()
    }
    return {"tlx": means, "sus": usability}


# ---- Hypotheses ------------------------------------------------------------------------------------


def hypotheses(document: dict[str, Any], alpha: float) -> list[dict[str, Any]]:
    """Put the three hypotheses side by side: estimate, p value, p value after Holm, and the direction."""
    outcome = [
        hypothesis
        for hypothesis in (_of_time(document), _of_confidence(document), _of_auditing(document))
        if hypothesis is not None
    ]
    # All three together, whatever came out of each.
    adjusted = holm({hypothesis["name"]: hypothesis["p_value"] for hypothesis in outcome})
    for hypothesis in outcome:
        hypothesis["p_holm"] = adjusted[hypothesis["name"]]
        hypothesis["supported"] = bool(hypothesis["p_holm"] <= alpha and hypothesis["as_hoped"])
    return outcome


def _of_time(document: dict[str, Any]) -> dict[str, Any] | None:
    contrast = document["time"]["contrasts"].get("full/manual")
    # A study without these arms has no such hypothesis.
    if contrast is None:
        return None
    return {
        "name": "H1",
        "question": "Full reasoning shortens the time to a signed report",
        "measure": "ratio of active time, full / manual",
        "estimate": contrast["ratio"],
        "low": contrast["ratio_low"],
        "high": contrast["ratio_high"],
        "null": 1.0,
        "p_value": contrast["p_value"],
        "as_hoped": contrast["ratio"] < 1,
    }


def _of_confidence(document: dict[str, Any]) -> dict[str, Any] | None:
    contrast = document["confidence"].get("contrasts", {}).get("full-labels")
    if contrast is None:
        return None
    return {
        "name": "H2",
        "question": "Full reasoning raises confidence over labels alone",
        "measure": "cumulative log-odds, full - labels",
        "estimate": contrast["estimate"],
        "low": contrast["low"],
        "high": contrast["high"],
        "null": 0.0,
        "p_value": contrast["p_value"],
        "as_hoped": contrast["estimate"] > 0,
    }


def _of_auditing(document: dict[str, Any]) -> dict[str, Any] | None:
    auditing = document["auditing"]
    contrast = auditing["contrasts"].get("detected_label: full-labels", {})
    reliance = auditing.get("over_reliance", {})
    if "model" not in contrast or "p_value" not in reliance:
        return None
    # Both parts have to hold, so the larger p value is the test's (intersection-union).
    return {
        "name": "H3",
        "question": "More planted errors are detected with full reasoning than with labels, and no more of them "
        "stand in signed reports than without AI",
        "measure": "detection gap, full - labels",
        "estimate": contrast["gap"]["estimate"],
        "low": contrast["gap"]["low"],
        "high": contrast["gap"]["high"],
        "null": 0.0,
        "p_value": max(contrast["model"]["p_value"], reliance["p_value"]),
        "p_detection": contrast["model"]["p_value"],
        "p_over_reliance": reliance["p_value"],
        "over_reliance_gap": reliance["gap"],
        "as_hoped": contrast["gap"]["estimate"] > 0,
    }


def supported(document: dict[str, Any]) -> Sequence[str]:
    """Name the hypotheses that are supported after Holm."""
    return [hypothesis["name"] for hypothesis in document["hypotheses"] if hypothesis["supported"]]
