"""One row for each reading of a study: what was allocated, what the reader did, and what was so."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.store import Store
from cxr_jax.study import timing
from cxr_jax.study.allocate import Place
from cxr_jax.study.analysis.natural import NaturalErrors, errors_of_cases
from cxr_jax.study.folder import SealedCase, StudyFolder
from cxr_jax.study.ledger import Ledger, TaskRecord, unlike_sealed
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
    "corrected",  # it says what is so; neither of the two: another error
    "no_side",  # it states a finding whose side was swapped and no side: it counts in none of these
    "true_items",  # sentences and chips that were shown and are true
    "natural_errors",  # labels that the AI has wrong by itself
    "natural_carried",  # of these, in the signed report
    "state",  # signed, skipped, open, waiting
    "practice",  # 1: counts nowhere
    "block",  # of the cases; 0 is practice
    "idle_s",  # of the active seconds, without input
    "paused_s",  # pauses, hidden tabs, gaps
    "clock_ok",  # client's seconds fit the server's
    "untold_s",  # of the server's seconds, those that no tab told of
    "reopened",  # after a reload, a crash, in another tab
    "true_positive",  # labels of the signed report, this one and the two below
    "false_positive",
    "false_negative",
    "skip_reason",  # in the reader's words
)


def make_rows(
    folder: StudyFolder, store: Store, ledger: Ledger, sealed: Sequence[SealedCase]
) -> list[Row]:
    """Make the table of a study, practice included, in the order of the allocation.

    Raises:
        UserError: if files or chain are not those that the study was sealed and read with.
    """
    # For the tasks' ids, which are HMACs of the store's own.
    sitting = Sitting(folder, store)
    _check_record(folder, store, ledger, sitting)
    errors = errors_of_cases(
        sealed, folder.shown, is_phantom=folder.protocol.cases.startswith("phantom:")
    )
    return [
        _row(
            folder,
            place,
            ledger.task(sitting.task_id(place)),
            sealed[place.case_no],
            errors[place.case_no],
        )
        for place in folder.places
    ]


def _check_record(folder: StudyFolder, store: Store, ledger: Ledger, sitting: Sitting) -> None:
    """Refuse a record that was changed since, whichever command asks: numbers of it would look like any others."""
    problems = [str(problem) for problem in store.verify()]
    problems += record_problems(folder, ledger, sitting)
    if problems:
        raise UserError(f"{folder.path}: {problems[0]}")


def record_problems(folder: StudyFolder, ledger: Ledger, sitting: Sitting) -> Iterator[str]:
    """Yield what is not as it was sealed and read, a line each; the chain is walked elsewhere."""
    bindings = {sitting.task_id(place): sitting.shown_sha256(place) for place in folder.places}
    yield from unlike_sealed(folder, ledger, bindings, has_truth=True)
    for task_id, shown_sha256 in bindings.items():
        signature = ledger.task(task_id).signature
        # Files may have been exchanged while readers sat, and put back since.
        if signature is not None and signature["shown_sha256"] != shown_sha256:
            yield f"task {task_id}: what was signed is not what was sealed"


def _row(
    folder: StudyFolder,
    place: Place,
    task_record: TaskRecord,
    sealed_case: SealedCase,
    natural: NaturalErrors,
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
    values |= times_of(folder, task_record)
    # What was not signed is no answer, however complete.
    is_signed = task_record.state == "signed" and task_record.answer is not None
    signed_answer = task_record.answer if is_signed else None
    values["confidence"] = (task_record.signature or {}).get("confidence") if is_signed else None
    values |= _audit(place, sealed_case, natural, signed_answer)
    values |= _natural(natural, signed_answer)
    values["true_items"] = _true_items(folder, place, sealed_case, natural)
    values |= _agreement(sealed_case, signed_answer)
    # Suspicion and ratings of the AI stand beside it.
    answer = signed_answer or {}
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


def any_truth(truths: Sequence[int | None]) -> int | None:
    """Tell whether any of several labels is so; None where none is known to be, and one is not known."""
    # One that is so is enough, whatever nobody knows of the others.
    if 1 in truths:
        return 1
    return None if None in truths else 0


def times_of(folder: StudyFolder, task_record: TaskRecord) -> Row:
    """Give active and wall seconds of a task, and whether the two clocks agree."""
    speed = folder.protocol.clock_speed
    # The client's time, held against the server's below.
    measured = timing.measure(task_record.pages, _held(task_record, speed))
    wall = is_sound = untold = None
    if task_record.opened and task_record.signed_at:
        wall = (moment(task_record.signed_at) - moment(task_record.opened[0])).total_seconds()
        is_sound = int(timing.agrees_with_server(measured, wall, speed))
        # A program's clock runs faster than its requests, so it leaves much untold.
        if speed == 1:
            untold = round(max(0.0, wall - measured.active - measured.paused), 3)
    return {
        "active_s": round(measured.active, 3) if measured.is_shown else None,
        "wall_s": None if wall is None else round(wall, 3),
        "idle_s": round(measured.idle, 3) if measured.is_shown else None,
        "paused_s": round(measured.paused, 3) if measured.is_shown else None,
        "clock_ok": is_sound,
        "untold_s": untold,
    }


def _held(task_record: TaskRecord, speed: float) -> dict[str, float]:
    """Seconds for which each tab had the task, but for the last one, which had it to the end."""
    held: dict[str, float] = {}
    moments = list(map(moment, task_record.opened))
    for page, began, ended in zip(task_record.openers, moments, moments[1:], strict=False):
        held[page] = held.get(page, 0.0) + (ended - began).total_seconds() * speed
    if task_record.openers:
        held.pop(task_record.openers[-1], None)
    return held


def moment(text: str) -> datetime:
    """Read a time of the chain."""
    return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)


def _audit(
    place: Place, sealed_case: SealedCase, natural: NaturalErrors, answer: Mapping[str, Any] | None
) -> Row:
    """What became of the planted error, and flags on what was true."""
    names = ("carried", "corrected", "no_side", "detected_label", "detected_flag", "false_flags")
    empty: Row = dict.fromkeys(names)
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
        # The AI's own errors are errors, too.
        wrong_sentences = sentences | natural.sentences
        wrong_labels = natural.labels | ({planted.label} if planted else set())
        false_flags = sum(
            flag["sentence"] is not None and flag["sentence"] not in wrong_sentences
            for flag in flags
        )
        # What nobody knows is neither right nor wrong.
        false_flags += sum(
            label_name not in wrong_labels and _truth_of(sealed_case, label_name) is not None
            for label_name in rejected
        )
    values = empty | {"false_flags": false_flags}
    if planted is None:
        return values
    # Read from the signed states, not from free text.
    said = answer["labels"].get(planted.label, {})
    stated = said.get("state"), said.get("side")
    carried, lacks_side = planted.is_carried(*stated), planted.lacks_side(*stated)
    values["no_side"] = int(lacks_side)
    # Whoever uses no sides at all would find every swapped one.
    if not lacks_side:
        values |= {"carried": int(carried), "corrected": int(planted.is_corrected(*stated))}
    if shows:
        is_flagged = planted.label in rejected or any(
            flag["sentence"] in sentences or (flag["sentence"] is None and planted.kind == "drop")
            for flag in flags
        )
        values["detected_flag"] = int(is_flagged)
        values["detected_label"] = None if lacks_side else int(not carried)
    return values


def _natural(natural: NaturalErrors, answer: Mapping[str, Any] | None) -> Row:
    """The AI's own errors, and how many of them a signed report carries; asked of the manual arm, too."""
    if answer is None:
        return {"natural_errors": None, "natural_carried": None}
    said = {
        name: (label.get("state"), label.get("side")) for name, label in answer["labels"].items()
    }
    # As with planted ones: a side that is not given is neither the right one nor the wrong one.
    asked = [
        (error, stated)
        for error in natural.errors
        if not error.lacks_side(*(stated := said.get(error.label, (None, None))))
    ]
    carried = sum(error.is_carried(*stated) for error, stated in asked)
    return {"natural_errors": len(asked), "natural_carried": carried}


def _true_items(
    folder: StudyFolder, place: Place, sealed_case: SealedCase, natural: NaturalErrors
) -> int | None:
    """How many chips and sentences an arm shows that could be flagged falsely; None where it shows none."""
    shows, planted = SHOWN[place.arm], sealed_case.plant
    if not shows:
        return None
    wrong_labels = natural.labels | ({planted.label} if planted else set())
    wrong_sentences = natural.sentences | set(planted.sentences if planted else ())
    sentences = len(folder.shown[place.case_no].sentences) if "sentences" in shows else 0
    chips = sum(
        label_name not in wrong_labels and _truth_of(sealed_case, label_name) is not None
        for label_name in CHEXPERT_14
    )
    return chips + max(0, sentences - len(wrong_sentences))


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
                "a minute untold": sum(map(_is_untold, signed)),
                "in the time analysis": len(timed),
                "cannot say": sum(reading["confidence"] is None for reading in signed),
                "planted, signed": sum(reading["planted"] for reading in signed),
                "of them without a side": sum(reading["no_side"] or 0 for reading in signed),
                "reopened": sum(reading["reopened"] > 0 for reading in of_arm),
            }
        )
    return table


def _is_untold(reading: Row) -> bool:
    """Whether a tab kept a minute to itself; one that was opened again has lost what lay between."""
    return not reading["reopened"] and (reading["untold_s"] or 0.0) > 60


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
