"""The life of a study: new, seal, open, close, unblind, verify. Each step is an event of the chain."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.store import Store, parse_head
from cxr_jax.store.records.actors import OPERATOR
from cxr_jax.study import allocate
from cxr_jax.study.analysis.rows import record_problems
from cxr_jax.study.folder import SEALED, StudyFolder
from cxr_jax.study.ledger import Ledger
from cxr_jax.study.protocol import Protocol
from cxr_jax.study.sitting import Sitting


@dataclass
class OpenStudy:
    """A study's folder, its store and what has happened."""

    folder: StudyFolder
    store: Store
    ledger: Ledger

    @property
    def protocol(self) -> Protocol:
        """The protocol."""
        return self.folder.protocol

    def append(self, kind: str, event_body: dict[str, Any]) -> None:
        """Add an event of the whole study."""
        # By the operator: whoever runs commands may read the files anyhow.
        event = self.store.append(
            kind, event_body, study=self.protocol.name, **OPERATOR.as_arguments()
        )
        self.ledger.apply(event)

    def need_state(self, *states: str) -> None:
        """Refuse a step that is not this state's. Raises UserError."""
        if self.ledger.state not in states:
            # A step out of turn would break the seal or the blinding.
            raise UserError(
                f"{self.protocol.name}: the study is {self.ledger.state}; this needs {' or '.join(states)}"
            )


@contextlib.contextmanager
def open_study(place: str | Path) -> Iterator[OpenStudy]:
    """Open a study's folder and store, and fold what has happened.

    Args:
        place: the folder, or the URL of the database.

    Raises:
        UserError: if there is no study.
    """
    folder = StudyFolder.at(place)
    # The protocol first: a store would be made in a folder that is none.
    ledger = Ledger(folder.protocol.name)
    # A study whose store another program serves can still be opened and closed: transactions take turns.
    store = folder.open_store()
    try:
        # From the chain, whatever another process has done since.
        ledger.refresh(store)
        yield OpenStudy(folder, store, ledger)
    finally:
        store.close()


# ---- The steps -------------------------------------------------------------------------------------


def new(place: str | Path, protocol: Protocol) -> list[str]:
    """Make a study and say what it is.

    Raises:
        UserError: if the folder holds a study, or the cases cannot be made.
    """
    # Draws and reads films with JAX, which no other step needs.
    from cxr_jax.study import cases

    folder = StudyFolder.at(place)
    # Everything that can be refused is refused before a file is written.
    folder.check_is_free()
    gathered = cases.gather(protocol, allocate.practice_count(protocol))
    with contextlib.closing(folder.open_store()) as store:
        # A database may have been given to another folder before.
        if store.events("study.created", study=protocol.name):
            raise UserError(f"{store.place}: has a study {protocol.name} already")
    folder.create(protocol, gathered)
    with open_study(place) as open_one:
        open_one.append(
            "study.created", {"protocol_sha256": protocol.sha256, "simulated": protocol.simulated}
        )
    # Said at once: another number of readers is cheap now and not later.
    outcome = allocate.balance(protocol, folder.places)
    planted = sum(case.plant is not None for case in gathered.cases)
    readings = sum(not reading.practice for reading in folder.places)
    lines = [
        f"{folder.path}: {protocol.design}, arms {', '.join(protocol.arms)}; {protocol.readers} readers, "
        f"{len(gathered.cases)} cases, {planted} of them with a planted error; {readings} readings in "
        f"{protocol.sessions} sessions, washout {protocol.washout_days:g} days"
    ]
    if outcome.is_balanced:
        lines.append("order: balanced over readers, sessions, blocks and carry-over")
    else:
        lines.append(
            f"order: UNBALANCED with {protocol.readers} readers; whole multiples of "
            f"{outcome.readers_of_a_round} are balanced"
        )
    return lines


def seal(place: str | Path) -> list[str]:
    """Write the hashes of truth, plants, protocol, readings, films and order into the chain."""
    with open_study(place) as open_one:
        open_one.need_state("draft")
        event_body = {
            "seal_sha256": open_one.folder.sealed_sha256(),
            "files": open_one.folder.hashes(),
        }
        open_one.append("study.sealed", event_body)
        return [
            f"{open_one.folder.path}: sealed; {SEALED} is sha256 {event_body['seal_sha256']}",
            f"store head {open_one.store.head()}",
        ]


def start(place: str | Path) -> list[str]:
    """Let readers in."""
    with open_study(place) as open_one:
        open_one.need_state("sealed", "closed")
        # Files that changed since the sealing are no sealed study.
        _check_files(open_one)
        open_one.append("study.opened", {})
        return [f"{open_one.folder.path}: open"]


def close(place: str | Path) -> list[str]:
    """Let no reader in any more."""
    with open_study(place) as open_one:
        open_one.need_state("open")
        open_one.append("study.closed", {})
        return [f"{open_one.folder.path}: closed"]


def unblind(place: str | Path) -> list[str]:
    """Open the sealed file, if it is the one that was sealed.

    Raises:
        UserError: if the chain, the sealed file or another file of the study is not as it was.
    """
    with open_study(place) as open_one:
        open_one.need_state("closed")
        # The chain first: a seal in a broken chain proves nothing.
        problems = open_one.store.verify()
        if problems:
            raise UserError(f"{open_one.folder.path}: not unblinded: {problems[0]}")
        _check_files(open_one)
        open_one.append("study.unblinded", {"seal_sha256": open_one.ledger.sealed["seal_sha256"]})
        return [f"{open_one.folder.path}: unblinded", f"store head {open_one.store.head()}"]


def set_washout(place: str | Path, days: float, reason: str) -> list[str]:
    """Change the washout of a study that runs; the report says so.

    Raises:
        UserError: without a reason.
    """
    if len(reason.strip()) < 3:
        raise UserError("--reason: a washout is changed for a reason, which the report prints")
    with open_study(place) as open_one:
        open_one.need_state("sealed", "open")
        open_one.append("study.washout_changed", {"days": days, "reason": reason.strip()})
        return [f"{open_one.folder.path}: washout {days:g} days from now on"]


def verify(place: str | Path, heads: Sequence[str] = ()) -> list[str]:
    """List what does not agree in a study: the chain, its folds, the files; [] if all does.

    Args:
        heads: printed or exported at some time, `NUMBER:HASH`.
    """
    # Bad flags are told before the store is opened.
    known_heads = [parse_head(text) for text in heads]
    with open_study(place) as open_one:
        problems = [str(problem) for problem in open_one.store.verify(known_heads)]
        return [*problems, *_changed_record(open_one), *_changed_results(open_one)]


def head_of(place: str | Path) -> str:
    """Give the chain's head, to keep somewhere else."""
    with open_study(place) as open_one:
        return str(open_one.store.head())


# ---- Files -----------------------------------------------------------------------------------------


def _changed_record(open_one: OpenStudy) -> Iterator[str]:
    """What differs from the sealing and from what was signed: all that an analysis would refuse."""
    try:
        sitting = Sitting(open_one.folder, open_one.store)
        yield from record_problems(open_one.folder, open_one.ledger, sitting)
    except UserError as error:
        yield str(error)


def _changed_results(open_one: OpenStudy) -> Iterator[str]:
    """Files of the last analysis that are not what it wrote."""
    for name, digest in open_one.ledger.analysed.items():
        path = open_one.folder.path / name
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            yield f"{name}: cannot be read ({error.strerror}); `analyse` writes it again"
            continue
        # A report that somebody has edited looks like any other.
        if found != digest:
            yield f"{name}: is not the one that `analyse` wrote"


def _check_files(open_one: OpenStudy) -> None:
    """Refuse a step on files that were changed. Raises UserError."""
    for problem in _changed_record(open_one):
        raise UserError(f"{open_one.folder.path}: {problem}")
