"""One row for each reading of a study: what was allocated, what the reader did, and what was so."""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.store import Store
from cxr_jax.study import timing
from cxr_jax.study.allocate import Place
from cxr_jax.study.folder import SealedCase, StudyFolder
from cxr_jax.study.ledger import Ledger, TaskRecord
from cxr_jax.study.protocol import SHOWN
from cxr_jax.study.shown import PRESENT
from cxr_jax.study.sitting import Sitting

Row = dict[str, Any]
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
# What every study's table has, in this order; ratings of labels and of the AI stand behind.
COLUMNS = (
    "reader",  # from 1, as all numbers of this table
    "arm",  # what was shown
    "session",  # from 1
    "position",  # in the session, practice counted
    "case",  # the same number in all arms
    "truth",  # 1: any finding but a device
    "planted",  # 1: an error was planted
    "kind",  # add, drop, side, hedge
    "active_s",  # first paint to signature, without pauses
    "wall_s",  # opening to signature, by the server
    "confidence",  # 1..7; empty: cannot say
    "detected_label",  # the signed report does not carry the error
    "detected_flag",  # a flag on it, or its chip rejected
    "false_flags",  # on what was true
    "carried",  # the signed report carries the error
    "state",  # signed, skipped, open, waiting
    "practice",  # 1: counts nowhere
    "block",  # of the cases; 0 is practice
    "idle_s",  # of the active seconds, without input
    "paused_s",  # pauses, hidden tabs, gaps
    "clock_ok",  # client's seconds fit the server's
    "reopened",  # after a reload, a crash, in another tab
    "true_positive",  # labels of the signed report, this one and the two below
    "false_positive",
    "false_negative",
    "skip_reason",  # in the reader's words
)


def make_rows(
    folder: StudyFolder, store: Store, ledger: Ledger, sealed: Sequence[SealedCase]
) -> list[Row]:
    """Make the table of a study, practice included, in the order of the allocation."""
    # For the tasks' ids, which are HMACs of the store's own.
    sitting = Sitting(folder, store)
    return [
        _row(folder, place, ledger.task(sitting.task_id(place)), sealed[place.case_no])
        for place in folder.places
    ]


def _row(
    folder: StudyFolder, place: Place, task_record: TaskRecord, sealed_case: SealedCase
) -> Row:
    values: Row = {
        "reader": place.reader_no + 1,
        "arm": place.arm,
        "session": place.session_no + 1,
        "position": place.position + 1,
        "case": place.case_no + 1,
        "truth": int(sealed_case.abnormal),
        "planted": int(sealed_case.plant is not None),
        "kind": sealed_case.plant.kind if sealed_case.plant else None,
        "state": task_record.state,
        "practice": int(place.practice),
        "block": place.block + 1,
        "reopened": max(0, len(task_record.opened) - 1),
        "skip_reason": task_record.skip_reason,
    }
    values |= _times(folder, task_record)
    # What was not signed is no answer, however complete.
    is_signed = task_record.state == "signed" and task_record.answer is not None
    values["confidence"] = (task_record.signature or {}).get("confidence") if is_signed else None
    values |= _audit(place, sealed_case, task_record.answer if is_signed else None)
    values |= _agreement(sealed_case, task_record.answer if is_signed else None)
    # Suspicion and ratings of the AI stand beside it.
    answer = (task_record.answer or {}) if is_signed else {}
    for label_name in folder.protocol.suspicion_labels:
        values[f"rating_{label_name}"] = answer.get("suspicion", {}).get(label_name)
        values[f"truth_{label_name}"] = _truth_of(sealed_case, label_name)
    for item in folder.protocol.ratings:
        values[f"ai_{item.name}"] = (task_record.ratings or {}).get(item.name)
    return values


def _truth_of(sealed_case: SealedCase, label_name: str) -> int | None:
    """Whether a label is so: 1, 0, or None where nobody knows or it is open."""
    state = sealed_case.truth.get(label_name)
    if state is None or state == "uncertain":
        return None
    return int(state == PRESENT)


def _times(folder: StudyFolder, task_record: TaskRecord) -> Row:
    """Active and wall seconds, and whether the two clocks agree."""
    # The client's time, held against the server's below.
    measured = timing.measure(task_record.pages)
    wall = None
    is_sound = None
    if task_record.opened and task_record.signed_at:
        wall = (_moment(task_record.signed_at) - _moment(task_record.opened[0])).total_seconds()
        is_sound = int(timing.agrees_with_server(measured, wall, folder.protocol.clock_speed))
    return {
        "active_s": round(measured.active, 3) if measured.is_shown else None,
        "wall_s": None if wall is None else round(wall, 3),
        "idle_s": round(measured.idle, 3) if measured.is_shown else None,
        "paused_s": round(measured.paused, 3) if measured.is_shown else None,
        "clock_ok": is_sound,
    }


def _moment(text: str) -> datetime:
    return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)


def _audit(place: Place, sealed_case: SealedCase, answer: Mapping[str, Any] | None) -> Row:
    """What became of the planted error, and flags on sentences that were true."""
    empty = dict.fromkeys(("carried", "detected_label", "detected_flag", "false_flags"))
    if answer is None:
        return empty
    # What the arm showed decides what could be flagged.
    shows = SHOWN[place.arm]
    planted = sealed_case.plant
    sentences = set(planted.sentences) if planted else set()
    flags, rejected = answer["flags"], answer["rejected"]
    # Without AI there is nothing to flag: no zero, but nothing.
    false_flags = None
    if shows:
        false_flags = sum(
            flag["sentence"] is not None and flag["sentence"] not in sentences for flag in flags
        )
        false_flags += sum(
            planted is None or label_name != planted.label for label_name in rejected
        )
    values = empty | {"false_flags": false_flags}
    if planted is None:
        return values
    # Read from the signed states, not from free text.
    said = answer["labels"].get(planted.label, {})
    carried = planted.is_carried(said.get("state"), said.get("side"))
    values["carried"] = int(carried)
    if shows:
        is_flagged = planted.label in rejected or any(
            flag["sentence"] in sentences or (flag["sentence"] is None and planted.kind == "drop")
            for flag in flags
        )
        values |= {"detected_label": int(not carried), "detected_flag": int(is_flagged)}
    return values


def _agreement(sealed_case: SealedCase, answer: Mapping[str, Any] | None) -> Row:
    """Labels that the signed report has right and wrong, over those that are known; devices and normal left out."""
    names = ("true_positive", "false_positive", "false_negative")
    if answer is None:
        return dict.fromkeys(names)
    # Uncertain is not present: a hedge is no hit.
    counts = dict.fromkeys(names, 0)
    for label_name in CHEXPERT_14:
        is_so = _truth_of(sealed_case, label_name)
        if is_so is None or label_name in ("No Finding", "Support Devices"):
            continue
        is_said = answer["labels"].get(label_name, {}).get("state") == PRESENT
        counts["true_positive"] += int(is_said and is_so == 1)
        counts["false_positive"] += int(is_said and is_so == 0)
        counts["false_negative"] += int(not is_said and is_so == 1)
    return counts


def flow(rows: Sequence[Row], arms: Sequence[str]) -> list[Row]:
    """Count readings from the allocation to the analyses, for each arm: nothing is left out silently."""
    table = []
    for arm_name in arms:
        of_arm = [
            reading for reading in rows if reading["arm"] == arm_name and not reading["practice"]
        ]
        signed = [reading for reading in of_arm if reading["state"] == "signed"]
        timed = [reading for reading in signed if reading["active_s"] and reading["clock_ok"]]
        table.append(
            {
                "arm": arm_name,
                "allocated": len(of_arm),
                "not reached": sum(reading["state"] in ("waiting", "open") for reading in of_arm),
                "skipped": sum(reading["state"] == "skipped" for reading in of_arm),
                "signed": len(signed),
                "clocks disagree": sum(reading["clock_ok"] == 0 for reading in signed),
                "in the time analysis": len(timed),
                "cannot say": sum(reading["confidence"] is None for reading in signed),
                "planted, signed": sum(reading["planted"] for reading in signed),
                "reopened": sum(reading["reopened"] > 0 for reading in of_arm),
            }
        )
    return table


def to_csv(rows: Sequence[Row]) -> str:
    """Write the table as CSV; what is not known is empty."""
    names = list(COLUMNS)
    # `rating_*` stand behind confidence in every reader's mind, but any order is read by name.
    names += [name for name in (rows[0] if rows else {}) if name not in names]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: "" if reading[name] is None else reading[name] for name in names} for reading in rows
    )
    return buffer.getvalue()
