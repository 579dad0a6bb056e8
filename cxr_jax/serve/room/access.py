"""Who may see what in the room, and how much each may bring: the one rule of all its routes.

    a film      whoever has brought it: uploaded it, or pulled it from an archive
    a reading   whoever has asked for it, running or finished
    a report    whoever has begun it; its exports and its history are the report's

No role sees another's: what coordinators, analysts and admins do is not done here. Names are hashes that others may
know, so what is not the reader's own is answered like what is not there (404), and the attempt is an event.
"""

import re
import shutil
from typing import Any

from fastapi import Request

from cxr_jax.serve import auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room.films import find_film, shelf_of
from cxr_jax.serve.state import ServerState
from cxr_jax.store.records.access import FILM, READING
from cxr_jax.store.records.users import LOCAL, User

_HASH = re.compile(r"[0-9a-f]{64}")
_REPORT = re.compile(r"[0-9a-f]{16}")

# ---- What is there -------------------------------------------------------------------------------


def film_of(state: ServerState, request: Request, user: User | None, digest: str) -> dict[str, Any]:
    """Describe a film that a reader may see, as `Films.info` does.

    Args:
        state: of the server.
        request: for the event of a refusal.
        user: who asks; None on a server without a store, where whoever uses the machine is the one reader.
        digest: as the client sent it.

    Raises:
        RefusedError: 404 where there is none, or none of this reader's.
    """
    if user is not None:
        _check(state, request, user, FILM, digest, "no image of that SHA-256 was uploaded")
    return find_film(shelf_of(state), digest)


def check_reading(state: ServerState, request: Request, user: User, name: str) -> None:
    """Refuse what is no reading that this reader has asked for: 404."""
    _check(state, request, user, READING, name, "no such reading")


def report_of(state: ServerState, request: Request, user: User, report: str) -> dict[str, Any]:
    """Return the newest version of a reader's own report. Raises RefusedError (404) for any other."""
    newest_row = state.store.reports.get(report) if _REPORT.fullmatch(report) else None
    if newest_row is None:
        raise RefusedError(404, "no such report")
    if newest_row["user"] != user.id:
        raise _refused(state, request, user, "no such report", report=report)
    return newest_row


def _check(
    state: ServerState, request: Request, user: User, kind: str, name: str, message: str
) -> None:
    # What is no hash is in no event: a client may send anything.
    if not _HASH.fullmatch(name):
        raise RefusedError(404, message)
    if not state.store.access.has(user.id, kind, name):
        raise _refused(state, request, user, message, **{kind: name})


def _refused(
    state: ServerState, request: Request, user: User, message: str, **facts: str
) -> RefusedError:
    refusal: RefusedError = state.auth.refused(
        request, 404, message, reason="owner", user=user, **facts
    )
    return refusal


# ---- What comes ----------------------------------------------------------------------------------


def keep_film(state: ServerState, user: User | None, content: bytes) -> dict[str, Any]:
    """Put a film that a reader brings on the shelf and, where there is a store, into its chain, and describe it.

    Raises:
        UserError: for bytes that are no film that can be read.
        RefusedError: 413 for more than a reader may bring, 503 where the disk is nearly full.
    """
    check_disk(state, len(content))
    _check_quota(state, user, len(content))
    described = shelf_of(state).add(content)
    if user is not None:
        stored_row = {
            "sha256": described["sha256"],
            "kind": described["kind"],
            "rows": described["rows"],
            "cols": described["columns"],
            "bits": described["bits"],
            "voi": described["windows"],
            "meta": {name: described[name] for name in ("view", "renderer", "inverted")},
            "gate": described["gate"],
        }
        state.store.images.add(stored_row, actor=user.actor)
    return described


def check_disk(state: ServerState, byte_count: int) -> None:
    """Refuse what would fill the disk that the chain needs: 503. Reports and signatures are always kept."""
    # The levels beside a film take about as much again.
    free = shutil.disk_usage(shelf_of(state).folder).free - 2 * byte_count
    if free < state.settings.limits.free_bytes:
        raise RefusedError(
            503, "the disk of this server is nearly full", headers={"Retry-After": "600"}
        )


def _check_quota(state: ServerState, user: User | None, byte_count: int) -> None:
    # On a server that asks nobody the disk is the one reader's own.
    if user is None or user.id == LOCAL:
        return
    most, taken = state.settings.limits.films_bytes, state.store.access.film_bytes(user.id)
    if taken + byte_count > most:
        raise RefusedError(
            413,
            f"your films take {taken / 2**30:.1f} of {most / 2**30:.1f} GiB: ask the operator to erase some",
            "file",
        )


def check_private(state: ServerState, request: Request) -> None:
    """Refuse others on a server without a store, where nobody can log in: 401."""
    # Keys of a file are for /v1 alone: whoever comes from elsewhere has nothing to show here.
    if not auth.is_from_here(state.settings, request):
        raise RefusedError(401, "this server has no store, so nobody can log in")
