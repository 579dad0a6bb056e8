"""The reader study over HTTP: the reader's next task, its film, answers, times, the signature; progress for others.

    GET  /study/next                                  the server decides; 423 with the date during a washout
    POST /study/tasks/{id}/{open,events,answer,sign,skip,ratings}     GET /study/tasks/{id}/pixels
    POST /study/questionnaire                         at the end of a session
    GET  /study/admin/progress                        coordinator and analyst: counts, no answers, no arms

What an arm does not show is in no answer of this file: the manual arm's traffic holds no byte of the AI. Answers are
padded to whole kilobytes, so that their sizes tell nothing either.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from cxr_jax.errors import UserError
from cxr_jax.serve import auth
from cxr_jax.serve.refusals import RefusedError, error_body
from cxr_jax.serve.room import pages
from cxr_jax.serve.state import ServerState
from cxr_jax.store.records.users import User
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.refusals import SittingRefusedError
from cxr_jax.study.sitting import Sitting

_STEP = 1024
_KEY_LENGTH = 64
Content = Annotated[dict[str, Any], Body()]
Reader = Annotated[User, Depends(auth.reader)]
Overseer = Annotated[User, Depends(auth.allowed("coordinator", "analyst", "admin"))]


def padded(content: Any, status: int = 200) -> Response:
    """Make an answer of JSON whose size is a whole number of kilobytes."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    # Blanks behind the object are JSON, too.
    return Response(
        text + b" " * (-len(text) % _STEP), status_code=status, media_type="application/json"
    )


def open_sitting(state: ServerState) -> Sitting | None:
    """Open the study that `--study` names, in the folder of the store; None without one.

    Raises:
        UserError: if the folder holds no study, another one, or one whose files were changed since it was sealed.
    """
    if state.settings.study is None or state.store is None:
        return None
    # The store's folder is the study's.
    folder = StudyFolder(Path(state.store.folder))
    name = Path(state.settings.study).name
    if folder.protocol.name != name:
        raise UserError(f"--study={name}: the store's study has another name")
    sitting = Sitting(folder, state.store)
    # Before anybody reads: what is shown from here on is what was sealed.
    sitting.check_record()
    return sitting


def router(state: ServerState) -> APIRouter:
    """Make the routes; on a server without a study all of them say so."""
    routes = APIRouter()
    sitting = open_sitting(state)

    def served() -> Sitting:
        if sitting is None:
            raise RefusedError(404, "this server has no study: it was started without --study")
        return sitting

    def answer(call: Callable[[], Any]) -> Response:
        """Run what a sitting does, and turn what it refuses into an answer."""
        try:
            return padded(call())
        except SittingRefusedError as error:
            # Facts beside the message: the page shows a date, not a sentence.
            body = error_body(RefusedError(error.status, str(error)), is_openai=False)
            body["error"] |= error.facts
            return padded(body, error.status)

    @routes.get("/study", include_in_schema=False)
    def page() -> Response:
        """Give the page; what it shows it asks for by the routes below."""
        served()
        return pages.page("study.html")

    _add_reader_routes(routes, served, answer)
    _add_answer_routes(routes, served, answer)

    @routes.get("/study/admin/progress")
    def progress(user: Overseer) -> Response:
        """Count what is done."""
        return answer(served().progress)

    return routes


def _add_reader_routes(
    routes: APIRouter, served: Callable[[], Sitting], answer: Callable[..., Response]
) -> None:
    """What readers ask for."""

    @routes.get("/study/next")
    def following(user: Reader) -> Response:
        """Say what comes next."""
        return answer(lambda: served().next(user.actor))

    @routes.get("/study/tasks/{task}/pixels")
    def pixels(task: str, user: Reader) -> Response:
        """Give the film of an open task, 16-bit levels."""
        try:
            # Raw bytes need no padding: every film has its own size in any case.
            levels = served().film(user.actor, task)
        except SittingRefusedError as error:
            raise RefusedError(error.status, str(error)) from None
        return Response(
            levels,
            media_type="application/octet-stream",
            headers={"Content-Encoding": "gzip", "Cache-Control": "no-store"},
        )

    @routes.post("/study/tasks/{task}/open")
    def open_task(task: str, request: Content, user: Reader) -> Response:
        """Open a task in a tab."""
        page = _name(request, "page")
        return answer(lambda: served().open(user.actor, task, page))

    @routes.post("/study/tasks/{task}/events")
    async def events(task: str, http: Request, user: Reader) -> Response:
        """Keep what a tab tells of its time."""
        # Beacons of a page that is being left come without a type of content.
        request = _parse(await http.body())
        page, key = _name(request, "page"), _name(request, "idem_key")

        def keep() -> Response:
            return answer(
                lambda: served().add_events(user.actor, task, page, key, request.get("events"))
            )

        # A commit waits for the disk, and the loop of all other readers must not wait with it.
        return await run_in_threadpool(keep)


def _add_answer_routes(
    routes: APIRouter, served: Callable[[], Sitting], answer: Callable[..., Response]
) -> None:
    """What readers send of a task, and of themselves."""

    @routes.post("/study/tasks/{task}/answer")
    def save(task: str, request: Content, user: Reader) -> Response:
        """Save an answer."""
        _name(request, "idem_key")
        return answer(lambda: served().save(user.actor, task, request))

    @routes.post("/study/tasks/{task}/sign")
    def sign(task: str, request: Content, user: Reader) -> Response:
        """Sign a report."""
        _name(request, "idem_key")
        _name(request, "page")
        _name(request, "shown_sha256")
        return answer(lambda: served().sign(user.actor, task, request))

    @routes.post("/study/tasks/{task}/skip")
    def skip(task: str, request: Content, user: Reader) -> Response:
        """Pass over a film, with a reason."""
        _name(request, "idem_key")
        _name(request, "page")
        return answer(lambda: served().skip(user.actor, task, request))

    @routes.post("/study/tasks/{task}/ratings")
    def rate(task: str, request: Content, user: Reader) -> Response:
        """Keep the ratings of what the AI said."""
        _name(request, "idem_key")
        return answer(lambda: served().rate(user.actor, task, request))

    @routes.post("/study/questionnaire")
    def questionnaire(request: Content, user: Reader) -> Response:
        """Keep the questions at the end of a session."""
        return answer(lambda: served().answer_questionnaire(user.actor, request))


def _name(request: dict[str, Any], name: str) -> str:
    """A name that the client gives: of a tab, a request, or what it shows."""
    # Letters and digits: it goes into the chain.
    value = request.get(name)
    if not isinstance(value, str) or not 8 <= len(value) <= _KEY_LENGTH or not value.isalnum():
        raise RefusedError(400, f"{name}: 8 to {_KEY_LENGTH} letters and digits", name)
    return value


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON") from None
    if not isinstance(request, dict):
        raise RefusedError(400, "the body is no object")
    return request
