"""Who has which place in a study: places are taken by who comes first, given by name, and taken back."""

from collections import Counter
from collections.abc import Sequence

from cxr_jax.errors import UserError, shown
from cxr_jax.store.records.users import User
from cxr_jax.study.commands.manage import OpenStudy, open_study
from cxr_jax.study.sitting import Sitting


def change(
    study_place: str, assigned: Sequence[str], released: Sequence[int], reason: str
) -> list[str]:
    """Take places back, give places to users, and list who has which.

    What was read at a place that is taken back is set aside, and whoever has it next begins anew: readings of two
    people are no one reader's. All of it stays in the chain, and the report says how many there were and why.

    Args:
        study_place: the study's folder, or the URL of its database.
        assigned: HANDLE=PLACE each, places from 1.
        released: places, from 1.
        reason: of the releases.

    Raises:
        UserError: for a place that is not there or not free, a user who is not there or has a place, no reason.
    """
    with open_study(study_place) as study:
        if not assigned and not released:
            return _listed(study)
        # After that numbers exist, and nobody may choose whose they are.
        study.need_state("sealed", "open")
        if released and len(reason.strip()) < 3:
            raise UserError("--reason: a place is taken back for a reason, which the report prints")
        # All is checked before anything is written.
        given_back = {_place(study, number): None for number in released}
        for reader_no in given_back:
            if reader_no not in study.ledger.reader_of_user.values():
                raise UserError(f"--release={reader_no + 1}: nobody has that place")
        new_readers = _assignments(study, assigned, list(given_back))
        for reader_no in given_back:
            _release(study, reader_no, reason.strip())
        for reader_no, user in new_readers.items():
            study.append("study.reader_assigned", {"user": user.id, "reader_no": reader_no})
        return _listed(study)


def _place(study: OpenStudy, number: int) -> int:
    """A place as files have it. Raises UserError for one that the study does not have."""
    if not 1 <= number <= study.protocol.readers:
        raise UserError(f"place {number}: the study has places 1 to {study.protocol.readers}")
    return number - 1


def _assignments(
    study: OpenStudy, assigned: Sequence[str], given_back: Sequence[int]
) -> dict[int, User]:
    """Read HANDLE=PLACE each; a place is free, and a user has none. Raises UserError."""
    holders = {
        user_id: reader_no
        for user_id, reader_no in study.ledger.reader_of_user.items()
        if reader_no not in given_back
    }
    new_readers: dict[int, User] = {}
    for text in assigned:
        handle, is_given, number = text.rpartition("=")
        if not is_given or not number.isdecimal() or len(number) > 6:
            raise UserError("--assign=HANDLE=PLACE: a user's handle and a number")
        reader_no, user = _place(study, int(number)), study.store.users.find(handle)
        if user is None or user.role != "reader":
            raise UserError(f"--assign: {shown(handle)} is no reader of this store")
        if reader_no in holders.values():
            raise UserError(f"--assign: place {number} is taken; --release={number} takes it back")
        if user.id in holders:
            raise UserError(f"--assign: {shown(handle)} has place {holders[user.id] + 1}")
        # Films that somebody has read are read from memory the second time.
        if any(place["user"] == user.id and place["signed"] for place in study.ledger.released):
            raise UserError(f"--assign: {shown(handle)} has read films of this study before")
        holders[user.id], new_readers[reader_no] = reader_no, user
    return new_readers


def _release(study: OpenStudy, reader_no: int, reason: str) -> None:
    """Write that a place is free again, and which of its tasks begin anew."""
    [user_id] = [
        user for user, number in study.ledger.reader_of_user.items() if number == reader_no
    ]
    own_tasks = Sitting(study.folder, study.store).tasks_of(reader_no)
    begun = [task_id for task_id in own_tasks if task_id in study.ledger.tasks]
    # Practice counts nowhere, here as little as in the analysis.
    signed = [
        task_id
        for task_id in begun
        if study.ledger.tasks[task_id].state == "signed" and not own_tasks[task_id].practice
    ]
    event_body = {"user": user_id, "reader_no": reader_no, "reason": reason, "tasks": begun}
    study.append("study.reader_released", event_body | {"signed": len(signed)})


def _listed(study: OpenStudy) -> list[str]:
    """One line a place: who has it, and how far that reader has come."""
    sitting = Sitting(study.folder, study.store)
    holders = {reader_no: user_id for user_id, reader_no in study.ledger.reader_of_user.items()}
    handles = {user["id"]: user["handle"] for user in study.store.users.rows()}
    lines = []
    for reader_no in range(study.protocol.readers):
        if reader_no not in holders:
            lines.append(f"place {reader_no + 1}: free")
            continue
        own_tasks = sitting.tasks_of(reader_no)
        # Counts alone, as the coordinator's page has them.
        states = Counter(study.ledger.task(task_id).state for task_id in own_tasks)
        handle = handles.get(holders[reader_no], "a user who is gone")
        lines.append(
            f"place {reader_no + 1}: {handle}, {states['signed']} of {len(own_tasks)} signed, "
            f"{states['skipped']} skipped"
        )
    return lines
