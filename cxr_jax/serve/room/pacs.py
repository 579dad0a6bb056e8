"""Other systems: films from DICOMweb servers, and signed reports to them. Servers are those of the operator's file.

    GET  /room/pacs                                 -> {servers: [{name, may_store}]}
    GET  /room/pacs/{server}/studies?PatientID=..   -> {studies: [..]}            QIDO-RS
    GET  /room/pacs/{server}/studies/{uid}          -> {instances: [..]}          QIDO-RS
    POST /room/pacs/{server}/pull {study, series, instance}   -> 201, the film    WADO-RS
    POST /room/pacs/{server}/push {report, kinds}   -> {stored, refused}          STOW-RS

The file is `pacs.toml` in the store's folder, read at the start. A client names a server of it, never an address. What
a server sends is limited in size and time, and a film is read like any upload. Only what is signed is sent out.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.outputs import dicomweb
from cxr_jax.serve import auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room import access, exports
from cxr_jax.serve.state import ServerState
from cxr_jax.store.records.users import User

# In the store's folder, which only its owner can write: no request can change it.
FILE_NAME = "pacs.toml"
_READER = Depends(auth.reader)
_UID = r"^[0-9.]{1,64}$"
# What can be sent: everything that is a DICOM file.
_SENDABLE = ("sr.dcm", "text.dcm", "sc.dcm")
# As many as there are attributes to search by.
_MOST_FILTERS = 5


class Wanted(BaseModel):
    """Which instance is fetched."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # All three: a series or a study could be gigabytes.
    study: str = Field(pattern=_UID)
    series: str = Field(pattern=_UID)
    instance: str = Field(pattern=_UID)


class Sending(BaseModel):
    """Which report is sent, as what."""

    model_config = ConfigDict(extra="forbid", strict=True)

    report: str = Field(pattern="^[0-9a-f]{16}$")
    kinds: list[str] = Field(default=["sr.dcm", "sc.dcm"], min_length=1, max_length=3)


class _Peers:
    """The servers of the operator's file, by name."""

    def __init__(self, state: ServerState) -> None:
        # Read once: a server that changes under a running room would be a surprise.
        self._clients: dict[str, Any] = {}
        # Without the file there are none.
        if not has_archives(state):
            return
        for name, server in dicomweb.load_servers(state.store.folder / FILE_NAME).items():
            self._clients[name] = dicomweb.Client(server)

    def listed(self) -> list[dict[str, Any]]:
        """Return names, and whether anything may be sent there; no addresses."""
        return [
            {"name": name, "may_store": client.server.may_store}
            for name, client in self._clients.items()
        ]

    def ask(self, name: str, question: Callable[[Any], Any]) -> Any:
        """Put a question to a server's client; 404 for a name that is none, 503 for a server that fails."""
        # A name and nothing else reaches the operator's addresses.
        client = self._clients.get(name)
        if client is None:
            raise RefusedError(404, "no server of that name in the operator's file")
        try:
            return question(client)
        except UserError as error:
            raise RefusedError(400, str(error)) from None
        # The message names the server and what failed, and holds nothing that it sent.
        except RunFailedError as error:
            raise RefusedError(503, str(error)) from None


def has_archives(state: ServerState) -> bool:
    """Return whether the operator's file is there."""
    return state.store is not None and (state.store.folder / FILE_NAME).is_file()


def router(state: ServerState) -> APIRouter:
    """Make the routes of other systems; none of a server without a store.

    Raises:
        UserError: for an operator's file that cannot be used: a server that starts without it would surprise.
    """
    routes = APIRouter()
    if state.store is None:
        return routes
    peers = _Peers(state)
    _add_searches(routes, peers)
    _add_fetching(routes, state, peers)
    _add_sending(routes, state, peers)
    return routes


def _add_searches(routes: APIRouter, peers: _Peers) -> None:
    @routes.get("/room/pacs")
    def names(current_user: User = _READER) -> dict[str, Any]:
        """List the servers."""
        return {"servers": peers.listed()}

    @routes.get("/room/pacs/{server}/studies")
    def studies(request: Request, server: str, current_user: User = _READER) -> dict[str, Any]:
        """Find studies; the client's filters are checked by name and by form."""
        # The client of the server checks names and values; here only how many there are.
        filters = dict(request.query_params)
        if len(filters) > _MOST_FILTERS or len(request.query_params.multi_items()) > len(filters):
            raise RefusedError(400, "each filter once")
        return {"studies": peers.ask(server, _search(filters))}

    @routes.get("/room/pacs/{server}/studies/{study}")
    def instances(server: str, study: str, current_user: User = _READER) -> dict[str, Any]:
        """List a study's instances."""

        def question(client: Any) -> Any:
            return client.search_instances(study)

        return {"instances": peers.ask(server, question)}


def _search(filters: dict[str, str]) -> Callable[[Any], Any]:
    def question(client: Any) -> Any:
        return client.search_studies(filters)

    return question


def _add_fetching(routes: APIRouter, state: ServerState, peers: _Peers) -> None:
    @routes.post("/room/pacs/{server}/pull", status_code=201)
    def pull(server: str, body: Wanted, current_user: User = _READER) -> dict[str, Any]:
        """Fetch a film and put it on the shelf, like an upload."""

        def question(client: Any) -> Any:
            return client.retrieve(body.study, body.series, body.instance)

        # Limited in size and time by the client.
        content = peers.ask(server, question)
        # The same guarded reader as of uploads: a server may be as hostile as a browser.
        try:
            film = access.keep_film(state, current_user, content)
        except UserError as error:
            raise RefusedError(400, str(error)) from None
        event = {"server": server, "image": film["sha256"]}
        state.store.append("pacs.pulled", event, **current_user.actor.as_arguments())
        return film


def _check_storing(client: Any) -> None:
    # Before anything is put down as sent.
    if not client.server.may_store:
        raise UserError("may_store is not set for this server: nothing is sent there")


def _add_sending(routes: APIRouter, state: ServerState, peers: _Peers) -> None:
    @routes.post("/room/pacs/{server}/push")
    def push(
        request: Request, server: str, body: Sending, current_user: User = _READER
    ) -> dict[str, Any]:
        """Send a signed report."""
        # One's own, like everywhere.
        newest_row = access.report_of(state, request, current_user, body.report)
        # What nobody stands for stays in the house.
        if newest_row["state"] == "draft":
            raise state.auth.refused(
                request, 409, "only a signed report is sent", reason="unsigned", user=current_user
            )
        if not set(body.kinds) <= set(_SENDABLE):
            raise RefusedError(400, f"kinds are {', '.join(_SENDABLE)}", "kinds")
        # One head for all files of one sending.
        head = state.store.head()
        contents = [
            exports.make_export(state, body.report, kind, head)
            for kind in dict.fromkeys(body.kinds)
        ]

        exports.check_unchanged(state, newest_row)
        peers.ask(server, _check_storing)

        # Each is an export of its own, as if somebody had carried it there; put down before it leaves, since a server
        # that fails, or a kill, does not bring back what was sent.
        for kind, content in zip(dict.fromkeys(body.kinds), contents, strict=True):
            state.store.exports.add(
                kind,
                hashlib.sha256(content).hexdigest(),
                head=head,
                actor=current_user.actor,
                params={"report": body.report, "version": newest_row["version"], "server": server},
            )

        def question(client: Any) -> Any:
            return client.store(contents)

        sent = peers.ask(server, question)
        # What became of it, where the server has said so.
        event = {"server": server, "report": body.report}
        counts = {"stored": len(sent.stored), "refused": len(sent.refused)}
        state.store.append("pacs.pushed", event | counts, **current_user.actor.as_arguments())
        return {"stored": sent.stored, "refused": list(sent.refused)}
