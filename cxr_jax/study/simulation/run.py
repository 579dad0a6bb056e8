"""A whole study by simulated readers, on a server that is started and stopped here, on loopback.

Its clock runs `clock_speed` times faster for them: a reading of 50 s takes 50 ms. What the server acknowledged is
written down and looked for in the store at the end, and so are the seconds that readers have spent.
"""

import contextlib
import functools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.store import Store
from cxr_jax.store.records.actors import OPERATOR
from cxr_jax.study.analysis.rows import times_of
from cxr_jax.study.behaviour import Effects, as_json, read_effects
from cxr_jax.study.commands import manage
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.ledger import Ledger
from cxr_jax.study.simulation.reader import Reader, make_world
from cxr_jax.study.simulation.server import Kills, Server, running

# Answers of 2xx to each task at least, as `Reader` asks: next, open, pixels, times, answers; not all of them, so that
# the last kill comes before the last film.
_ANSWERS_A_TASK = 7
_CLOSE_S = 0.01  # times go through JSON


def simulate(
    place: str | Path, effects_file: Path | None = None, threads: int = 6, kills: int = 0
) -> list[str]:
    """Let simulated readers do a whole study.

    Args:
        place: the study's folder, or the URL of its database.
        effects_file: what they are like; None: the defaults.
        threads: readers at work at once.
        kills: how often the server is killed on the way, and started again.

    Raises:
        UserError: for a study that is not open or not a simulated one.
        RunFailedError: if an answer that was acknowledged is not there at the end, or is there twice, or if the time
            of a reading is not the one that its reader has spent.
    """
    # Refused before any reader is made.
    effects = read_effects(effects_file) if effects_file else Effects()
    if threads < 1 or kills < 0:
        raise UserError("--threads: 1 or more; --kills: 0 or more")
    with manage.open_study(place) as study:
        study.need_state("open")
        folder = study.folder
        if not study.protocol.simulated:
            raise UserError(f"{folder.path}: not made with --simulated; its readers are people")
        logins = _make_readers(study.store, folder, study.ledger.reader_of_user)
        study.append("study.simulated", {"effects": as_json(effects)})
    world = make_world(folder, effects)
    server = Server(folder.store_place)
    killer = Kills(
        server, kills, _ANSWERS_A_TASK * len(folder.places), f"{folder.protocol.seed} kills"
    )
    readers = [Reader(world, server, number, killer.answered) for number in range(len(logins))]
    began = time.monotonic()
    with running(server), ThreadPoolExecutor(threads) as pool:
        # All of them first: a log-in takes as long as many answers, and kills are counted in answers.
        _wait_for_all(
            pool,
            (
                functools.partial(reader.client.log_in, *login)
                for reader, login in zip(readers, logins, strict=True)
            ),
        )
        with killer.during():
            _wait_for_all(pool, (reader.work for reader in readers))
    seconds = time.monotonic() - began
    with contextlib.closing(folder.open_store()) as store:
        _check_acknowledged(store, readers)
        _check_seconds(store, folder, readers)
    return _told(folder, readers, seconds, killer.done)


def _wait_for_all(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], None]]) -> None:
    """Run jobs side by side and raise what the first of them raises."""
    for job in [pool.submit(each) for each in jobs]:
        job.result()


def _told(folder: StudyFolder, readers: list[Reader], seconds: float, kills: int) -> list[str]:
    """What happened, in lines for a terminal; what went wrong on the way is part of it."""
    counts = sum((reader.client.counts for reader in readers), Counter())
    signed = sum(len(reader.signed) for reader in readers)
    saved = sum(len(reader.acknowledged) for reader in readers)
    told = ", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "nothing went wrong"
    return [
        f"{folder.path}: SIMULATED readers: {signed} reports signed in {seconds:.0f} s; {kills} kills, {told}",
        f"{folder.path}: all {saved} acknowledged answers are in the store, each once; the times of all {signed} "
        "reports are those that were spent",
    ]


def _make_readers(
    store: Store, folder: StudyFolder, reader_of_user: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Users of the store that are programs, each with a place in the study; fresh ones at each call."""
    if reader_of_user:
        raise UserError(f"{folder.path}: this study has readers already")
    logins = []
    for number in range(folder.protocol.readers):
        handle, password = f"simulated-{number + 1}", secrets.token_urlsafe(16)
        user = store.users.add(handle, "reader", password)
        request_body = {"user": user.id, "reader_no": number}
        store.append(
            "study.reader_assigned",
            request_body,
            study=folder.protocol.name,
            **OPERATOR.as_arguments(),
        )
        logins.append((handle, password))
    return logins


# ---- What is left in the store ---------------------------------------------------------------------


def _check_acknowledged(store: Store, readers: list[Reader]) -> None:
    """See that each acknowledged answer is in the store as that version, and none twice. Raises RunFailedError."""
    for reader in readers:
        versions: dict[str, dict[int, str]] = {}
        for task, version, digest in reader.acknowledged:
            if task not in versions:
                # Read from the store itself, not from the server.
                rows = store.answers.versions(task)
                versions[task] = {stored["version"]: stored["sha256"] for stored in rows}
                if len({stored["idem_key"] for stored in rows}) != len(rows):
                    raise RunFailedError("simulate: an answer is in the store twice")
            if versions[task].get(version) != digest:
                raise RunFailedError("simulate: an acknowledged answer is not in the store")


def _check_seconds(store: Store, folder: StudyFolder, readers: list[Reader]) -> None:
    """See that each report was signed once, with the seconds that its reader has spent. Raises RunFailedError."""
    signed = Counter(
        event.task for event in store.events("task.signed", study=folder.protocol.name)
    )
    ledger = Ledger(folder.protocol.name)
    ledger.refresh(store)
    for reader in readers:
        for task, seconds in reader.seconds.items():
            if signed[task] != 1:
                raise RunFailedError(f"simulate: a report was signed {signed[task]} times")
            # As the analysis does, over all tabs that had the task: a page that is loaded again goes on with the time.
            measured = times_of(folder, ledger.task(task))["active_s"] or 0.0
            if abs(measured - seconds) > _CLOSE_S:
                raise RunFailedError(
                    f"simulate: a reading took {seconds:.2f} s, and {measured:.2f} s were counted"
                )
