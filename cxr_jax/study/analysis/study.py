"""The analysis of one study: rows, endpoints, the three hypotheses with Holm, as one JSON document."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

import cxr_jax
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.store import Store
from cxr_jax.study import allocate
from cxr_jax.study.analysis import endpoints
from cxr_jax.study.analysis.auditing import auditing
from cxr_jax.study.analysis.contrasts import finite
from cxr_jax.study.analysis.rows import Row, flow, make_rows, moment
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.ledger import Ledger, washout_days
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.sitting import Sitting
from cxr_jax.study.statistics.audit_rates import holm

FORMAT = "cxr_study_analysis"


@dataclass(frozen=True)
class Analysis:
    """The table and what was computed from it."""

    rows: list[Row]
    document: dict[str, Any]


def analyse(folder: StudyFolder, store: Store, ledger: Ledger) -> Analysis:
    """Analyse an unblinded study.

    Raises:
        UserError: if its files or its chain are not those that it was sealed and read with.
    """
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
        "shortest_washout_days": shortest_washout(folder, store, ledger),
        "refused_too_early": len(ledger.refused_early),
        # By number and not by name: who it was stays in the chain.
        "released": [
            {
                "reader": place["reader_no"] + 1,
                "signed": place["signed"],
                "reason": place["reason"],
                "at": place["at"],
            }
            for place in ledger.released
        ],
        "flow": flow(rows, protocol.arms),
        "skip_reasons": sorted(
            {reading["skip_reason"] for reading in rows if reading["skip_reason"]}
        ),
        "balance": _balance(protocol, folder, rows),
        "time": endpoints.time_to_sign(protocol, counted),
        "confidence": endpoints.confidence(protocol, counted),
        "auditing": auditing(protocol, counted),
        "auc": endpoints.areas(protocol, counted),
        "label_f1": endpoints.label_f1(protocol, counted),
        "opinions": endpoints.opinions(protocol, counted),
        "workload": _workload(protocol, ledger),
    }
    document["hypotheses"], document["hypotheses_refused"] = hypotheses(document, protocol)
    return Analysis(rows, finite(document))


def first_line(protocol: Protocol, days: float) -> str:
    """Say the design before any result: the same films three times are remembered, if the washout is short."""
    if protocol.design == "split":
        return "split: each case once for each reader, arms rotate over readers; no washout needed"
    return f"crossed: each case once in each arm for each reader, washout {days:g} days between sessions"


def shortest_washout(folder: StudyFolder, store: Store, ledger: Ledger) -> float | None:
    """Give the shortest time between two sessions of a reader, in days; None if nobody came to a second one.

    From last signature to first film, by the server's clock: one that was set wrong keeps no washout, and shows here.
    """
    sitting = Sitting(folder, store)
    kept: list[float] = []
    for reader_no in range(folder.protocol.readers):
        opened: dict[int, list[datetime]] = {}
        done: dict[int, list[datetime]] = {}
        for task_id, place in sitting.tasks_of(reader_no).items():
            record = ledger.task(task_id)
            opened.setdefault(place.session_no, []).extend(map(moment, record.opened[:1]))
            if record.signed_at:
                done.setdefault(place.session_no, []).append(moment(record.signed_at))
        # The session before is over when the next one begins, so its last film is known.
        kept += [
            (min(opened[session_no]) - max(done[session_no - 1])).total_seconds() / 86_400
            for session_no in range(1, folder.protocol.sessions)
            if opened.get(session_no) and done.get(session_no - 1)
        ]
    return min(kept, default=None)


def _balance(protocol: Protocol, folder: StudyFolder, rows: Sequence[Row]) -> dict[str, Any]:
    outcome = allocate.balance(protocol, folder.places)
    # Places that nobody took, and sessions that nobody came to, are in no order.
    read_places = [
        place
        for place, reading in zip(folder.places, rows, strict=True)
        if reading["state"] in ("signed", "skipped")
    ]
    as_read = allocate.balance(protocol, read_places)
    return {
        "is_balanced": outcome.is_balanced,
        "is_balanced_as_read": as_read.is_balanced and len(read_places) == len(folder.places),
        "counts": as_read.counts,
    }


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


# What each asks, and the arms without which a study does not ask it.
_QUESTIONS = {
    "H1": ("Full reasoning shortens the time to a signed report", {"manual", "full"}),
    "H2": ("Full reasoning raises confidence over labels alone", {"labels", "full"}),
    "H3": (
        "More planted errors are detected with full reasoning than with labels, and no more of them stand in signed "
        "reports than without AI",
        {"manual", "labels", "full"},
    ),
}


def hypotheses(
    document: dict[str, Any], protocol: Protocol
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Put the three hypotheses side by side: estimate, p value, p value after Holm, and the direction.

    Returns:
        those with an answer, and those that the study asked and cannot answer, with the reason.
    """
    found = {"H1": _of_time(document), "H2": _of_confidence(document), "H3": _of_auditing(document)}
    asked = [name for name, (_, arms) in _QUESTIONS.items() if arms <= set(protocol.arms)]
    # Without planted errors nobody asks who finds them.
    asked = [name for name in asked if name != "H3" or protocol.plant_share]
    # One that has no answer was asked all the same: the others do not get its share of the error.
    adjusted = holm({name: _p_value(found[name]) for name in asked})
    answered, refused = [], []
    for name in asked:
        hypothesis = {"name": name, "question": _QUESTIONS[name][0]} | found[name]
        if "refused" in hypothesis:
            refused.append(hypothesis)
            continue
        hypothesis["p_holm"] = adjusted[name]
        hypothesis["supported"] = bool(
            hypothesis["p_holm"] <= protocol.alpha and hypothesis["as_hoped"]
        )
        answered.append(hypothesis)
    return answered, refused


def _p_value(hypothesis: dict[str, Any]) -> float:
    return float(hypothesis.get("p_value", 1.0))


def _of_time(document: dict[str, Any]) -> dict[str, Any]:
    time = document["time"]
    contrast = time["contrasts"].get("full/manual")
    if contrast is None:
        reasons = time["refused"]
        return {"refused": reasons.get("full/manual") or reasons.get("model", "time: no pairs")}
    return {
        "measure": "ratio of active time, full / manual",
        "estimate": contrast["ratio"],
        "low": contrast["ratio_low"],
        "high": contrast["ratio_high"],
        "null": 1.0,
        "p_value": contrast["p_value"],
        "as_hoped": contrast["ratio"] < 1,
    }


def _of_confidence(document: dict[str, Any]) -> dict[str, Any]:
    confidence = document["confidence"]
    contrast = confidence.get("contrasts", {}).get("full-labels")
    if contrast is None:
        return {"refused": confidence.get("refused", "confidence: an arm has no readings")}
    return {
        "measure": "cumulative log-odds, full - labels",
        "estimate": contrast["estimate"],
        "low": contrast["low"],
        "high": contrast["high"],
        "null": 0.0,
        "p_value": contrast["p_value"],
        "p_model": contrast["p_model"],
        "p_of_readers": contrast["p_of_readers"],
        "as_hoped": contrast["estimate"] > 0 and contrast["mean_points"]["estimate"] > 0,
    }


def _of_auditing(document: dict[str, Any]) -> dict[str, Any]:
    auditing_found = document["auditing"]
    contrast = auditing_found["contrasts"].get("detected_label: full-labels", {})
    reliance = auditing_found.get("over_reliance", {})
    if "model" not in contrast or "p_value" not in reliance:
        return {"refused": contrast.get("refused") or reliance.get("refused")}
    # Both parts have to hold, so the larger p value is the test's (intersection-union).
    return {
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
