"""Exports of a report: its document as JSON, text, DICOM SR, DICOM secondary capture and FHIR; each is an event."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from cxr_jax.errors import UserError
from cxr_jax.outputs import document as documents
from cxr_jax.outputs import export, sections
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.serve import asks, auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room.images import shelf_of
from cxr_jax.serve.state import ServerState
from cxr_jax.store import Head
from cxr_jax.store.records.users import User

_READER = Depends(auth.reader)
# The longest endings first: `.sr.dcm` is no `.dcm`.
MEDIA_TYPES = {
    "sr.dcm": "application/dicom",
    "text.dcm": "application/dicom",
    "sc.dcm": "application/dicom",
    "fhir.json": "application/fhir+json",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
}
_SECONDS = (
    60.0  # for a document's text to be read by the engine's thread, between two steps of others
)


def report_document(state: ServerState, report: str) -> dict[str, Any]:
    """Make the cxr_reading document of a report as it stands: draft, signed, or with addenda.

    Raises:
        RefusedError: 409 for a report without a reading: there is no model whose document it could be.
    """
    # The first has the reading, the last what the reader made of it.
    versions = state.store.reports.versions(report)
    first, newest = versions[0], versions[-1]
    if first["reading"] is None:
        raise RefusedError(409, "a report without a reading has a text alone: .txt")
    # As the model gave it; its hash is in the chain.
    draft = state.store.readings.get(first["reading"])["document"]
    signed = next((version for version in versions if version["state"] == "signed"), None)
    if signed is None:
        if newest["fields"] == first["fields"]:
            return draft
        # Edited, and nobody stands for it yet: a document whose findings and text disagree would mislead.
        revise = functools.partial(documents.revise, draft, newest["fields"])
        return _on_engine(state, revise)
    current_user = state.store.users.by_id(signed["user"])
    sign = functools.partial(
        documents.sign,
        draft,
        by=signed["user"] if current_user is None else current_user.handle,
        at=_whole_seconds(signed["signed_at"]),
        meaning=signed["meaning"],
        report=signed["fields"],
    )
    # The parser reads the signed text with JAX, which one thread owns.
    document = _on_engine(state, sign)
    for version in versions:
        if version["state"] == "addendum":
            document = documents.add_addendum(
                document,
                by=document["signed"]["by"],
                at=_whole_seconds(version["signed_at"]),
                text=version["body"],
            )
    return document


def _on_engine(state: ServerState, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # A server that stops, or is busy for a minute, is no fault of the report.
    try:
        return state.engine.call(make).result(_SECONDS)
    except (asks.StoppedError, TimeoutError):
        raise RefusedError(503, "the model is busy", headers={"Retry-After": "5"}) from None


def check_unchanged(state: ServerState, newest_row: dict[str, Any]) -> None:
    """Refuse to hand over an export of a report that was changed while it was made: 409."""
    # Another tab may save at any time, and an export is put down as that of one version.
    if state.store.reports.get(newest_row["id"])["version"] != newest_row["version"]:
        raise RefusedError(409, "the report was changed while it was exported: export it again")


def _whole_seconds(at_utc: str) -> str:
    # As the schema of documents has times.
    return at_utc[:19] + "Z"


def make_export(state: ServerState, report: str, ending: str, head: Head) -> bytes:
    """Make the bytes of an export.

    Args:
        state: of the server.
        report: its id; checked already.
        ending: of MEDIA_TYPES.
        head: of the chain, which texts name.

    Raises:
        RefusedError: 409 for what cannot be made of this report.
    """
    if ending == "txt":
        return _text(state, report, head)
    versions = state.store.reports.versions(report)
    document = report_document(state, report)
    # Other systems would hold the model for the author of what a reader has changed, or the other way round.
    is_edited = versions[0]["fields"] != versions[-1]["fields"]
    if document["signed"] is None and is_edited and ending != "json":
        raise RefusedError(
            409, "the report was edited and is not signed: sign it, or take .txt or .json"
        )
    facts = (document["image"], *document["other_images"])
    films = [
        export.FilmFile("the film", shelf_of(state).original(film["sha256"])) for film in facts
    ]
    # When it was saved: the same version is the same file, whenever it is asked for.
    settings = export.ExportSettings(at=_whole_seconds(versions[-1]["created"]))
    try:
        return export.export(ending, document, films, settings)
    except UserError as error:
        raise RefusedError(409, str(error)) from None


def _text(state: ServerState, report: str, head: Head) -> bytes:
    """Write the report for people: fields, signature, addenda, the notice, and the head of the chain."""
    versions = state.store.reports.versions(report)
    # For people: the words of the form, in its order.
    newest = versions[-1]
    lines = [sections.as_text(newest["fields"]) or "(nothing is written)", ""]
    for version in versions:
        if version["state"] == "signed":
            current_user = state.store.users.by_id(version["user"])
            name = version["user"] if current_user is None else current_user.handle
            lines.append(f"Signed by {name} at {version['signed_at']}: {version['meaning']}")
        elif version["state"] == "addendum":
            lines.append(f"Addendum of {version['signed_at']}: {version['body']}")
    # Whoever finds the file must not take it for a report.
    if newest["state"] == "draft":
        lines.append("DRAFT, not signed.")
    lines += [f"Film {newest['image']}", f"Version {newest['version']}, store head {head}"]
    return "\n".join([*lines, NOT_FOR_DIAGNOSIS, ""]).encode(errors="backslashreplace")


def add_routes(
    routes: APIRouter,
    state: ServerState,
    own: Callable[[Request, User, str], dict[str, Any]],
    as_json: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Add the route of a report and of its exports.

    Args:
        routes: of reports.
        state: of the server.
        own: gives a reader's own report, or refuses.
        as_json: makes of it what the page takes.
    """

    # One segment that may hold dots: exports have the report's path and an ending.
    @routes.get("/room/reports/{name}")
    def report_or_export(request: Request, name: str, current_user: User = _READER) -> Any:
        """Show a report, or hand over an export of it."""
        report, _, ending = name.partition(".")
        newest_row = own(request, current_user, report)
        if not ending:
            return as_json(newest_row)
        if ending not in MEDIA_TYPES:
            raise RefusedError(404, f"exports are {', '.join(MEDIA_TYPES)}")
        # The head of before: the export itself is the event that comes next.
        head = state.store.head()
        content = make_export(state, report, ending, head)
        check_unchanged(state, newest_row)
        params = {"report": report, "version": newest_row["version"]}
        state.store.exports.add(
            ending,
            hashlib.sha256(content).hexdigest(),
            head=head,
            actor=current_user.actor,
            params=params,
        )
        # A name of ours: nothing of a patient is in it.
        headers = {
            "Content-Disposition": f'attachment; filename="{report}.{ending}"',
            "X-Store-Head": str(head),
        }
        return Response(content, media_type=MEDIA_TYPES[ending], headers=headers)
