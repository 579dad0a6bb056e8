"""Check what readers send, field by field, before any of it reaches the chain. No message repeats what was sent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.outputs.sections import FIELDS
from cxr_jax.study import timing
from cxr_jax.study.protocol import CONFIDENCE_SCALE, Item
from cxr_jax.study.refusals import SittingRefusedError
from cxr_jax.study.shown import ABSENT, PRESENT, UNSURE

_STATES = (PRESENT, UNSURE, ABSENT)
_SIDES = ("right", "left", "bilateral", None)
_FLAGS = ("wrong", "side", "missing", "overconfident")
_LONGEST_FIELD, _MOST_FLAGS, _MOST_EVENTS = 4000, 100, 500


def _refuse(message: str) -> SittingRefusedError:
    return SittingRefusedError(400, message)


def _is_number(given_value: Any, low: float, high: float) -> bool:
    # A bool is an int to Python, and no answer.
    is_number = isinstance(given_value, int | float) and not isinstance(given_value, bool)
    return is_number and math.isfinite(given_value) and low <= given_value <= high


def check_answer(answer: Any, shows: Sequence[str]) -> dict[str, Any]:
    """Check an answer, which may still be half filled in; signing asks for the rest.

    Args:
        shows: what the arm shows; where it shows nothing there is nothing to flag.

    Raises:
        SittingRefusedError: 400.
    """
    if not isinstance(answer, Mapping):
        raise _refuse("answer: an object")
    # A misspelt part would be lost silently.
    known = {"fields", "labels", "suspicion", "flags", "rejected"}
    if set(answer) - known:
        raise _refuse(f"answer: only {', '.join(sorted(known))}")
    # All parts may be missing: a form is saved while it is filled in.
    fields, labels = answer.get("fields", {}), answer.get("labels", {})
    suspicion, flags = answer.get("suspicion", {}), answer.get("flags", [])
    rejected = answer.get("rejected", [])
    if not isinstance(fields, Mapping) or not set(fields) <= set(FIELDS):
        raise _refuse("answer.fields: names of the form")
    if not all(isinstance(text, str) and len(text) <= _LONGEST_FIELD for text in fields.values()):
        raise _refuse(f"answer.fields: texts of at most {_LONGEST_FIELD} characters")
    if not isinstance(labels, Mapping) or not all(map(_is_label, labels.items())):
        raise _refuse("answer.labels: names of the 14, each with state and side")
    if not isinstance(suspicion, Mapping) or not all(
        label_name in CHEXPERT_14 and _is_number(given_value, 0, 100)
        for label_name, given_value in suspicion.items()
    ):
        raise _refuse("answer.suspicion: numbers from 0 to 100 of the 14")
    if not isinstance(flags, list) or len(flags) > _MOST_FLAGS or not all(map(_is_flag, flags)):
        raise _refuse("answer.flags: a list of sentence and kind")
    if not isinstance(rejected, list) or not all(
        label_name in CHEXPERT_14 for label_name in rejected
    ):
        raise _refuse("answer.rejected: a list of the 14")
    # Without AI there is nothing to hold against it; such a request comes from another task.
    if (flags and "sentences" not in shows) or (rejected and not shows):
        raise _refuse("answer: this arm has nothing to flag")
    return {
        "fields": dict(fields),
        "labels": {label_name: dict(given_value) for label_name, given_value in labels.items()},
        "suspicion": dict(suspicion),
        "flags": [dict(flag) for flag in flags],
        "rejected": list(dict.fromkeys(rejected)),
    }


def _is_label(label_entry: tuple[Any, Any]) -> bool:
    label_name, given_value = label_entry
    if label_name not in CHEXPERT_14 or not isinstance(given_value, Mapping):
        return False
    return set(given_value) <= {"state", "side"} and (
        given_value.get("state") in _STATES and given_value.get("side") in _SIDES
    )


def _is_flag(flag: Any) -> bool:
    if not isinstance(flag, Mapping) or set(flag) - {"sentence", "kind", "note"}:
        return False
    # Free text stays short: it is for the coordinator's eyes.
    note = flag.get("note", "")
    sentence = flag.get("sentence")
    # What is missing from all sentences is in none.
    has_place = sentence is None or (
        isinstance(sentence, int) and not isinstance(sentence, bool) and 1 <= sentence <= 500
    )
    return flag.get("kind") in _FLAGS and has_place and isinstance(note, str) and len(note) <= 500


def check_signature(
    request: Mapping[str, Any], answer: Mapping[str, Any] | None, suspicion_labels: Sequence[str]
) -> dict[str, Any]:
    """Check that nothing is left unset: a default that nobody chose is no answer.

    Raises:
        SittingRefusedError: 400, naming what is missing.
    """
    if answer is None:
        raise _refuse("nothing was saved yet")
    # Unset and absent are two things.
    missing = [label_name for label_name in CHEXPERT_14 if label_name not in answer["labels"]]
    if missing:
        raise _refuse(f"labels: {len(missing)} are not set yet")
    missing = [
        label_name for label_name in suspicion_labels if label_name not in answer["suspicion"]
    ]
    if missing:
        raise _refuse(f"suspicion: {', '.join(missing)} not set yet")
    confidence, reason = request.get("confidence"), request.get("cannot_say")
    # Not a point of the scale: whoever cannot say gives a reason instead.
    if confidence is None:
        if not isinstance(reason, str) or not 3 <= len(reason.strip()) <= 500:
            raise _refuse("confidence: a point of the scale, or a reason why it cannot be said")
        return {"confidence": None, "cannot_say": reason.strip()}
    if not isinstance(confidence, int) or not _is_number(confidence, 1, len(CONFIDENCE_SCALE)):
        raise _refuse(f"confidence: 1 to {len(CONFIDENCE_SCALE)}")
    return {"confidence": confidence, "cannot_say": None}


def check_events(events: Any) -> list[dict[str, Any]]:
    """Check what a tab tells of its time.

    Raises:
        SittingRefusedError: 400.
    """
    if not isinstance(events, list) or not 1 <= len(events) <= _MOST_EVENTS:
        raise _refuse(f"events: a list of 1 to {_MOST_EVENTS}")
    kept = []
    for event in events:
        if not isinstance(event, Mapping) or event.get("kind") not in timing.KINDS:
            raise _refuse("events: each has a kind")
        if not _is_number(event.get("t"), 0, 1e9):
            raise _refuse("events: each has its time t, in seconds")
        # Built anew: nothing else that was sent is kept.
        kept_event = {"kind": event["kind"], "t": float(event["t"])}
        # Numbers of the viewer and of idleness; no texts.
        for name in ("seconds", "center", "width", "scale"):
            if _is_number(event.get(name), -1e9, 1e9):
                kept_event[name] = float(event[name])
        kept.append(kept_event)
    return kept


def check_ratings(ratings: Any, items: Sequence[Item]) -> dict[str, int]:
    """Check ratings: every item of the arm, each a point of its scale.

    Raises:
        SittingRefusedError: 400.
    """
    if not isinstance(ratings, Mapping) or set(ratings) != {item.name for item in items}:
        raise _refuse("ratings: one of each item")
    for item in items:
        given_value = ratings[item.name]
        if not isinstance(given_value, int) or not _is_number(given_value, 1, len(item.points)):
            raise _refuse(f"ratings.{item.name}: 1 to {len(item.points)}")
    return {item.name: ratings[item.name] for item in items}


def check_questionnaire(answers: Any, tlx: Sequence[str], sus: Sequence[str]) -> dict[str, Any]:
    """Check the questions at the end of a session.

    Raises:
        SittingRefusedError: 400.
    """
    if not isinstance(answers, Mapping):
        raise _refuse("answers: an object")
    loads: Any = answers.get("tlx")
    usability: Any = answers.get("sus", [])
    # In the order of the questions.
    if not _are_numbers(loads, len(tlx), 0, 100):
        raise _refuse(f"answers.tlx: {len(tlx)} numbers from 0 to 100")
    if not _are_numbers(usability, len(sus), 1, 5) or not all(
        isinstance(given_value, int) for given_value in usability
    ):
        raise _refuse(f"answers.sus: {len(sus)} numbers from 1 to 5")
    return {"tlx": [float(given_value) for given_value in loads], "sus": list(usability)}


def _are_numbers(values: Any, count: int, low: float, high: float) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(_is_number(given_value, low, high) for given_value in values)
