"""Reports: begun from a reading, edited in versions, flagged, signed with a meaning, added to, exported.

    POST /room/reports {image, reading?, read_anyway?}  -> 201 {id, version, state, fields, draft, ..}
    GET  /room/reports                                  -> {reports: [..]}, the reader's own
    GET  /room/reports/{id}
    PUT  /room/reports/{id} {fields, shown}             If-Match: VERSION; 409 if another has been saved since
    POST /room/reports/{id}/flags {sentence?, kind, note?, shown}                           -> 201
    POST /room/reports/{id}/sign {meaning, password?, confidence?, shown}                   If-Match: VERSION
    POST /room/reports/{id}/addendum {text, shown}                                          If-Match: VERSION
    GET  /room/reports/{id}/history                     -> versions and what each changed, flags
    GET  /room/reports/{id}.json, .txt, .sr.dcm, .sc.dcm, .fhir.json

`shown` is `{image, reading}`: the film and the reading that the reader's page has before the reader's eyes, as the page
knows them. A report of another film or reading is refused with 409, and the refusal is an event: text of one patient
under the film of another is the worst that a page could do. `shown_sha256`, the sha256 of `IMAGE:READING`, says the
same. An `Idempotency-Key` header names a change, so that one which is sent twice is made once.
"""

import re
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from cxr_jax.errors import UserError
from cxr_jax.outputs.sections import FIELDS, LONGEST_FIELD
from cxr_jax.serve import auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room import exports
from cxr_jax.serve.room.access import check_reading, film_of, report_of
from cxr_jax.serve.state import ServerState
from cxr_jax.store.records.reports import (
    Change,
    OtherRequestError,
    StaleError,
    StateError,
    changes_between,
    shown_sha256,
)
from cxr_jax.store.records.users import User

# Names of films and readings: nothing else becomes part of a query.
_HASH = r"^[0-9a-f]{64}$"
# A name that a client makes up, such as a UUID.
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,100}")
_READER = Depends(auth.reader)
_LISTED = 100  # reports at most in a list: nobody reads on

# ---- What clients send -----------------------------------------------------------------------------------------------


class _Body(BaseModel):
    # A field that is misspelt is refused: "reding" would begin a report without its reading.
    model_config = ConfigDict(extra="forbid", strict=True)


# What a page believes, and not what it was told of the report: only so can the two differ.
class Shown(_Body):
    """What the reader's page shows: the film, and the reading beside it."""

    image: str = Field(pattern=_HASH)
    reading: str | None = Field(default=None, pattern=_HASH)


class NewReport(_Body):
    """What a report is of."""

    image: str = Field(pattern=_HASH)
    reading: str | None = Field(default=None, pattern=_HASH)
    read_anyway: bool = False


class _Bound(_Body):
    # One of the two; pages on plain HTTP beyond loopback cannot hash.
    shown: Shown | None = None
    shown_sha256: str | None = Field(default=None, pattern=_HASH)


class Edit(_Bound):
    """Fields as they are now; those that are not named stay."""

    fields: dict[str, str]


class Flag(_Bound):
    """What is wrong with a sentence of the reading."""

    kind: str = Field(pattern="^(wrong|side|missing|overconfident)$")
    # None of them where something is missing from all.
    sentence: int | None = Field(default=None, ge=1, le=100_000)
    note: str | None = Field(default=None, max_length=2000)


class Signature(_Bound):
    """What the signature means, in words."""

    meaning: str = Field(min_length=1, max_length=200)
    # None on a server that asks nobody.
    password: str | None = Field(default=None, max_length=1000)
    # 1 not at all .. 7 completely; None where it was not asked.
    confidence: int | None = Field(default=None, ge=1, le=7)


class Addendum(_Bound):
    """What is added to a signed report."""

    text: str = Field(min_length=1, max_length=LONGEST_FIELD)


# ---- Checks ----------------------------------------------------------------------------------------------------------


class _Desk:
    """What all routes of reports do: find it, see whose it is and what the reader sees, refuse with an event."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.reports = state, state.store.reports

    def refused(
        self,
        request: Request,
        current_user: User,
        status: int,
        message: str,
        reason: str,
        **facts: Any,
    ) -> RefusedError:
        """Put a refusal down and return it."""
        return self.state.auth.refused(
            request, status, message, reason=reason, user=current_user, **facts
        )

    def own(self, request: Request, current_user: User, report: str) -> dict[str, Any]:
        """Return a report's newest version, if it is the reader's."""
        return report_of(self.state, request, current_user, report)

    def change(
        self,
        request: Request,
        current_user: User,
        report: dict[str, Any],
        body: _Bound,
        *,
        versioned: bool,
    ) -> Change:
        """Return who changes which version seeing what; 409 if the reader sees something else."""
        # Before the version: a page that shows another patient has other worries than a stale text.
        self._check_shown(request, current_user, report, body)
        return Change(
            report=report["id"],
            actor=current_user.actor,
            version=self._version(request) if versioned else None,
            shown_sha256=shown_sha256(report["image"], report["reading"]),
            idem_key=_idempotency_key(request),
        )

    def _check_shown(
        self, request: Request, current_user: User, report: dict[str, Any], body: _Bound
    ) -> None:
        if body.shown is not None:
            seen_sha256 = shown_sha256(body.shown.image, body.shown.reading)
        elif body.shown_sha256 is not None:
            seen_sha256 = body.shown_sha256
        else:
            raise RefusedError(400, "say what the page shows: {image, reading}", "shown")
        expected = shown_sha256(report["image"], report["reading"])
        if seen_sha256 != expected:
            raise self.refused(
                request,
                current_user,
                409,
                "the page shows another film or reading than the report is of",
                "shown",
                param="shown",
                report=report["id"],
                seen=seen_sha256,
                expected=expected,
            )

    def _version(self, request: Request) -> int:
        # As HTTP writes versions, `"3"`, or plain.
        given = request.headers.get("If-Match", "").strip().removeprefix("W/").strip('"')
        if not re.fullmatch(r"\d{1,9}", given):
            raise RefusedError(
                428, "say which version this is made from: If-Match: VERSION", "If-Match"
            )
        return int(given)

    def conflict(
        self, request: Request, current_user: User, report: str, error: Exception
    ) -> RefusedError:
        """Turn what the store refuses into a 409 and an event."""
        # One word each, by which events are found.
        reasons = {StaleError: "stale", StateError: "state", OtherRequestError: "key"}
        message = str(error)
        if isinstance(error, StaleError):
            message = f"saved elsewhere meanwhile: the report is at version {error.version}"
        return self.refused(
            request, current_user, 409, message, reasons[type(error)], report=report
        )

    def as_json(self, newest_row: dict[str, Any]) -> dict[str, Any]:
        """Return a report as the page takes it."""
        # All of it in one answer: a page that opens a report shows its whole state.
        versions = self.reports.versions(newest_row["id"])
        signed = next((version for version in versions if version["state"] == "signed"), None)
        return {
            "id": newest_row["id"],
            "version": newest_row["version"],
            "state": newest_row["state"],
            "image": newest_row["image"],
            "reading": newest_row["reading"],
            "fields": newest_row["fields"],
            # What the model gave, which every edit stands against.
            "draft": versions[0]["fields"],
            "signed": None if signed is None else _signature(signed, self._handle(signed["user"])),
            "addenda": [
                {"at": version["signed_at"], "text": version["body"]}
                for version in versions
                if version["state"] == "addendum"
            ],
            "flags": [_flag(flag) for flag in self.reports.flags(newest_row["id"])],
            "shown_sha256": shown_sha256(newest_row["image"], newest_row["reading"]),
            "saved_at": newest_row["created"],
        }

    def _handle(self, user_id: str) -> str:
        current_user = self.state.store.users.by_id(user_id)
        return "a former user" if current_user is None else current_user.handle


def _signature(newest_row: dict[str, Any], handle: str) -> dict[str, Any]:
    return {
        "by": handle,
        "at": newest_row["signed_at"],
        "meaning": newest_row["meaning"],
        "confidence": newest_row["confidence"],
    }


def _flag(newest_row: dict[str, Any]) -> dict[str, Any]:
    return {name: newest_row[name] for name in ("flag_no", "sentence", "kind", "note", "created")}


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise RefusedError(400, "at most 100 printable characters of ASCII", "Idempotency-Key")
    return key


def _check_fields(fields: dict[str, str]) -> None:
    # A field that the form does not have would be in no export.
    unknown = fields.keys() - FIELDS.keys()
    if unknown or not fields:
        raise RefusedError(400, f"a report has the fields {', '.join(FIELDS)}", "fields")
    if any(len(text) > LONGEST_FIELD for text in fields.values()):
        raise RefusedError(400, f"a field has at most {LONGEST_FIELD} characters", "fields")


# ---- Routes ----------------------------------------------------------------------------------------------------------


def router(state: ServerState) -> APIRouter:
    """Make the routes of reports; none of a server without a store."""
    routes = APIRouter()
    if state.store is None:
        return routes
    # One for all routes: it holds no state of its own.
    desk = _Desk(state)
    _add_reading_routes(routes, desk)
    _add_changing_routes(routes, desk)
    exports.add_routes(routes, state, desk.own, desk.as_json)
    return routes


def _add_reading_routes(routes: APIRouter, desk: _Desk) -> None:
    """Add what begins a report and what shows it."""

    @routes.post("/room/reports", status_code=201)
    def begin(request: Request, body: NewReport, current_user: User = _READER) -> dict[str, Any]:
        """Begin a report with the draft of its reading, or empty."""
        film = film_of(desk.state, request, current_user, body.image)
        fields, is_read_anyway = dict.fromkeys(FIELDS, ""), body.read_anyway
        if body.reading is not None:
            check_reading(desk.state, request, current_user, body.reading)
            # Only a finished one: a draft of half a trace would lack findings without a word.
            reading = desk.state.store.readings.get(body.reading)
            if reading is None:
                raise RefusedError(404, "no such reading, or not finished", "reading")
            if reading["image"] != body.image:
                raise desk.refused(
                    request,
                    current_user,
                    409,
                    "the reading is of another film",
                    "shown",
                    param="reading",
                )
            fields |= reading["document"]["report"]
            # Whoever had it read knows what the gate said.
            is_read_anyway = True
        if film["gate"]["state"] == "refused" and not is_read_anyway:
            reasons = "; ".join(film["gate"]["reasons"])
            raise desk.refused(request, current_user, 400, f"not reported: {reasons}", "gate")
        try:
            newest_row = desk.reports.begin(
                body.image,
                body.reading,
                fields,
                actor=current_user.actor,
                idem_key=_idempotency_key(request),
            )
        except OtherRequestError as error:
            raise desk.conflict(request, current_user, "", error) from None
        return desk.as_json(newest_row)

    @routes.get("/room/reports")
    def listed(current_user: User = _READER) -> dict[str, Any]:
        """List the reader's own reports, newest first."""
        # Without their texts: a list is looked at over shoulders.
        names = ("id", "version", "state", "image", "reading", "created")
        rows = desk.reports.of_user(current_user.id)[:_LISTED]
        return {"reports": [{name: newest_row[name] for name in names} for newest_row in rows]}

    @routes.get("/room/reports/{report}/history")
    def history(request: Request, report: str, current_user: User = _READER) -> dict[str, Any]:
        """Show every version, and what each one changed."""
        desk.own(request, current_user, report)
        # Computed from the versions, which the chain vouches for.
        versions = changes_between(desk.reports.versions(report))
        flags = [_flag(flag) for flag in desk.reports.flags(report)]
        return {"id": report, "versions": versions, "flags": flags}


def _add_changing_routes(routes: APIRouter, desk: _Desk) -> None:
    """Add what changes a report."""

    @routes.put("/room/reports/{report}")
    def save(
        request: Request, response: Response, report: str, body: Edit, current_user: User = _READER
    ) -> dict[str, Any]:
        """Keep fields as the next version."""
        newest_row = desk.own(request, current_user, report)
        _check_fields(body.fields)
        change = desk.change(request, current_user, newest_row, body, versioned=True)
        try:
            newest_row = desk.reports.save(change, body.fields)
        except (StaleError, StateError, OtherRequestError) as error:
            raise desk.conflict(request, current_user, report, error) from None
        response.headers["ETag"] = f'"{newest_row["version"]}"'
        return {name: newest_row[name] for name in ("id", "version", "state", "created")}

    @routes.post("/room/reports/{report}/flags", status_code=201)
    def flag(
        request: Request, report: str, body: Flag, current_user: User = _READER
    ) -> dict[str, Any]:
        """Flag a sentence of the reading."""
        newest_row = desk.own(request, current_user, report)
        change = desk.change(request, current_user, newest_row, body, versioned=False)
        # Only what is missing has no sentence.
        if body.sentence is None and body.kind != "missing":
            raise RefusedError(400, "say which sentence is flagged", "sentence")
        try:
            return _flag(desk.reports.flag(change, body.kind, body.sentence, body.note))
        except (StateError, OtherRequestError) as error:
            raise desk.conflict(request, current_user, report, error) from None

    @routes.post("/room/reports/{report}/sign")
    def sign(
        request: Request, report: str, body: Signature, current_user: User = _READER
    ) -> dict[str, Any]:
        """Sign the version that the reader has before the eyes."""
        newest_row = desk.own(request, current_user, report)
        change = desk.change(request, current_user, newest_row, body, versioned=True)
        # Only the person who logged in can sign, not whoever finds the screen unlocked.
        desk.state.auth.check_again(request, current_user, body.password)
        try:
            return desk.as_json(desk.reports.sign(change, body.meaning, body.confidence))
        except (StaleError, StateError, OtherRequestError) as error:
            raise desk.conflict(request, current_user, report, error) from None

    @routes.post("/room/reports/{report}/addendum")
    def add(
        request: Request, report: str, body: Addendum, current_user: User = _READER
    ) -> dict[str, Any]:
        """Add to a signed report."""
        newest_row = desk.own(request, current_user, report)
        change = desk.change(request, current_user, newest_row, body, versioned=True)
        try:
            return desk.as_json(desk.reports.add(change, body.text))
        except (StaleError, StateError, OtherRequestError, UserError) as error:
            raise desk.conflict(request, current_user, report, error) from None
