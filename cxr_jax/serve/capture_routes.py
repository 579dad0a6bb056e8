"""The routes of thought capture: consent, pieces of a recording, what was heard, the corrected text, erasure.

A reader sees his own thoughts alone; another's is not there. Every piece of a recording is on the disk before its
request is answered, and may be sent again. Nothing is heard, and no side, negation, number or doubted word is saved,
that nobody has looked at.
"""

import asyncio
import concurrent.futures
import json
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from cxr_jax.capture import audio, chips, consent, correct
from cxr_jax.capture import transcribe as dictation
from cxr_jax.capture.records import HEARD, OPEN, Capture, Captures, StaleError
from cxr_jax.errors import UserError
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.serve import auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room.access import check_disk, film_of
from cxr_jax.serve.room.pages import page
from cxr_jax.store.records.actors import Actor

if TYPE_CHECKING:
    from cxr_jax.serve.state import ServerState

MOST_JSON = 2**20  # bytes of a text with its labels
MOST_OPEN = 100  # thoughts of a reader that were begun and neither saved nor erased
READ_SECONDS = 60  # the engine answers at its next boundary
_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MIME = re.compile(r"audio/[a-z0-9.+-]{1,30}(;\s?codecs=\"?[a-z0-9.,]{1,40}\"?)?")

Answer = TypeVar("Answer")


class CaptureDesk:
    """What the routes share: the store's thoughts, the engine that hears, recordings that are being heard.

    Args:
        state: of the server.
        hearing: turns samples into words; None: thoughts are typed.
    """

    def __init__(self, state: "ServerState", hearing: dictation.Engine | None) -> None:
        self.state, self.hearing = state, hearing
        # One at a time: a speech model takes a whole core.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hearing")
        self._jobs: dict[str, concurrent.futures.Future[None]] = {}
        self._lock = threading.Lock()

    @property
    def captures(self) -> Captures:
        """The thoughts of the store. Raises RefusedError on a server without one."""
        if self.state.store is None:
            raise RefusedError(409, "this server has no store, so nothing is kept")
        with self._lock:
            if not hasattr(self, "_captures"):
                self._captures = Captures(self.state.store)
        return self._captures

    def own(self, capture_id: str, visitor: Any) -> Capture:
        """Return a thought of this reader. Raises RefusedError for any other id."""
        found = self.captures.get(capture_id, visitor.id) if _ID.fullmatch(capture_id) else None
        if found is None or found.erased_at is not None:
            raise RefusedError(404, "there is no such thought of yours")
        return found

    def read(self, text: str) -> chips.Read:
        """Read a text by the labeler, on the thread that owns JAX."""
        # A server that is tried without a model has no such thread; then the caller's will do.
        engine = self.state.engine
        if engine is None:
            with self._lock:
                return chips.read_text(text)
        return engine.call(lambda: chips.read_text(text)).result(READ_SECONDS)

    # ---- Hearing --------------------------------------------------------------------------------

    def start_hearing(self, author: Actor, capture: Capture, pieces: int, mime: str) -> None:
        """Begin to hear a recording, unless that is under way; asking again is no harm."""
        with self._lock:
            hearing_job = self._jobs.get(capture.id)
            if hearing_job is not None and not hearing_job.done():
                return
            self._jobs[capture.id] = self._pool.submit(self._hear, author, capture, pieces, mime)

    def _hear(self, author: Actor, capture: Capture, pieces: int, mime: str) -> None:
        engine = self.hearing
        if engine is None:
            raise UserError("this server hears nothing; thoughts are typed")
        # From the disk: what was acknowledged is all that counts, also after a restart.
        recording = audio.assemble(self.captures.folder(capture.id), pieces)
        samples = audio.decode(recording.file_bytes)
        words = dictation.transcribe(engine, samples)
        asr = {
            "engine": engine.name,
            "prompt": dictation.PROMPT,
            "words": [list(word) for word in words],
            "loudness_db": round(audio.loudness(samples), 1),
        }
        self.captures.keep_heard(
            author,
            capture.id,
            recording,
            mime=mime,
            seconds=round(samples.size / audio.SAMPLE_RATE, 3),
            asr=asr,
            model_sha256=engine.model_sha256,
        )

    def hearing_state(self, capture_id: str) -> dict[str, Any]:
        """Say whether a recording is being heard, and why hearing it failed."""
        with self._lock:
            hearing_job = self._jobs.get(capture_id)
        # Jobs are of this process: one that a restart ended is asked for again by the page.
        if hearing_job is None:
            return {"hearing": False, "failure": None}
        if not hearing_job.done():
            return {"hearing": True, "failure": None}
        error = hearing_job.exception()
        # What is nobody's input could name anything.
        known = isinstance(error, (UserError, StaleError))
        reason = str(error) if known else "the recording could not be heard"
        return {"hearing": False, "failure": reason if error else None}

    def forget(self, capture_id: str) -> None:
        """Wait for a hearing to end, and forget it."""
        with self._lock:
            # One that waits is never begun; one that runs ends first, or it would write behind the erasure.
            hearing_job = self._jobs.pop(capture_id, None)
        if hearing_job is not None and not hearing_job.cancel():
            concurrent.futures.wait([hearing_job])


# ---- What is sent ----------------------------------------------------------------------------------


async def _body(request: Request, most: int) -> bytes:
    """Read a body of at most so many bytes. Raises RefusedError."""
    too_large = RefusedError(413, f"the body is larger than {most:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    # Counted as it comes: a length need not be said, or true.
    received_parts, received_bytes = [], 0
    async for part in request.stream():
        received_bytes += len(part)
        if received_bytes > most:
            raise too_large
        received_parts.append(part)
    return b"".join(received_parts)


async def _json(request: Request) -> dict[str, Any]:
    """Read a JSON object. Raises RefusedError."""
    try:
        value = json.loads(await _body(request, MOST_JSON))
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise RefusedError(400, "the body is no JSON object")
    return value


async def _working(work: Callable[[], Answer]) -> Answer:
    """Do what waits for disk, database or engine beside the event loop, and name what was refused."""
    try:
        return await run_in_threadpool(work)
    except UserError as error:
        raise RefusedError(400, str(error)) from None
    except (audio.PieceConflictError, StaleError) as error:
        raise RefusedError(409, str(error)) from None
    except audio.TooMuchError as error:
        raise RefusedError(413, str(error)) from None
    except (concurrent.futures.TimeoutError, TimeoutError):
        raise RefusedError(503, "the engine is busy", headers={"Retry-After": "5"}) from None


# ---- What is answered ------------------------------------------------------------------------------


def _document(capture_desk: CaptureDesk, capture: Capture) -> dict[str, Any]:
    """A thought as its page has it: the newest text, or what was heard."""
    # Before the first version the text is what was heard.
    newest = capture.versions[-1] if capture.versions else None
    heard = dictation.join_words(capture.words)
    return {
        "id": capture.id,
        "image": capture.image,
        "state": capture.state,
        "version": newest.version if newest else 0,
        "text": newest.text if newest else heard,
        "labels": (newest.labels or {}).get("gold") if newest else None,
        "words": [word._asdict() for word in capture.words],
        "seconds": capture.seconds,
        "pieces": audio.count_pieces(capture_desk.captures.folder(capture.id)),
        "engine": (capture.asr or {}).get("engine"),
        "notice": NOT_FOR_DIAGNOSIS,
        **capture_desk.hearing_state(capture.id),
    }


def _checked(
    capture_desk: CaptureDesk, capture: Capture, sent_json: dict[str, Any]
) -> tuple[str, chips.Chips, chips.Read]:
    """The text of a body, the reader's chips (those of the text where he set none) and what the labeler reads."""
    text = correct.check_text(sent_json.get("text"))
    read = capture_desk.read(text)
    # The text's labels hold until the reader has set one.
    gold = dict(read.chips)
    if sent_json.get("labels") is not None:
        gold = chips.parse_chips(sent_json["labels"])
    return text, gold, read


def _check(
    capture_desk: CaptureDesk, capture: Capture, sent_json: dict[str, Any]
) -> dict[str, Any]:
    text, gold, read = _checked(capture_desk, capture, sent_json)
    return {
        "marks": [mark._asdict() for mark in correct.find_marks(text, capture.words)],
        "proposals": [
            proposal._asdict() for proposal in correct.find_proposals(text, capture.words)
        ],
        "read": read.as_json(),
        "contradictions": chips.find_contradictions(gold, read.chips),
        "problems": list(chips.check_answer(gold)),
    }


def _save(
    capture_desk: CaptureDesk,
    visitor: Any,
    capture: Capture,
    sent_json: dict[str, Any],
    after_version: int,
) -> Response:
    text, gold, read = _checked(capture_desk, capture, sent_json)
    # Numbers of words of this very text; JSON's true is no number.
    looked = sent_json.get("looked")
    is_list = isinstance(looked, list) and all(
        isinstance(number, int) and not isinstance(number, bool) for number in looked
    )
    if not is_list:
        raise RefusedError(400, "looked is not a list of numbers of words", "looked")
    if not text.strip():
        raise RefusedError(400, "the text is empty", "text")
    # The guard stands here and not on the page: a client that skips it saves nothing.
    unseen = correct.unseen(correct.find_marks(text, capture.words), frozenset(looked or ()))
    if unseen:
        error = {"message": f"{len(unseen)} marked words were not looked at", "param": "looked"}
        content = {"error": error, "unseen": [mark._asdict() for mark in unseen]}
        return JSONResponse(content, status_code=409)
    if problems := chips.check_answer(gold):
        raise RefusedError(400, problems[0], "labels")
    # What was heard is the zeroth version; of a typed thought it is empty.
    before = dictation.join_words(capture.words)
    if capture.versions:
        before = capture.versions[-1].text or ""
    differences = chips.find_contradictions(gold, read.chips)
    version = capture_desk.captures.save(
        visitor.actor,
        capture.id,
        after_version=after_version,
        text=text,
        labels={
            "gold": {label: chip.as_json() for label, chip in gold.items()},
            "read": {label: chip.as_json() for label, chip in read.chips.items()},
            "contradictions": differences,
        },
        operations=correct.find_operations(before, text),
    )
    saved: dict[str, Any] = {"version": version, "contradictions": differences}
    return JSONResponse(saved, headers={"ETag": f'"{version}"'})


def _if_match(request: Request) -> int:
    """The version that a client has corrected. Raises RefusedError."""
    # As an entity tag, in quotes, or bare.
    value = request.headers.get("if-match", "").strip().strip('"')
    # By the digits that int() reads: to str.isdigit() a superscript two is one, too.
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise RefusedError(428, "If-Match is not the number of a version", "If-Match")
    return int(value)


# ---- Routes ----------------------------------------------------------------------------------------


def make_hearing(state: "ServerState") -> dictation.Engine | None:
    """Make the engine that the server's flag --dictate names. Raises UserError."""
    return dictation.make_engine(getattr(state.settings, "dictate", None) or dictation.NONE)


def router(state: "ServerState") -> APIRouter:
    """Make the routes."""
    routes = APIRouter()
    capture_desk = CaptureDesk(state, make_hearing(state))
    reader = Depends(auth.reader)
    _add_pages(routes, capture_desk, reader)
    _add_beginning(routes, capture_desk, reader)
    _add_recording(routes, capture_desk, reader)
    _add_text(routes, capture_desk, reader)
    return routes


def _add_pages(routes: APIRouter, capture_desk: CaptureDesk, reader: Any) -> None:
    @routes.get("/capture", include_in_schema=False)
    def capture_page() -> Response:
        return page("capture.html")

    @routes.get("/capture/about")
    def about(visitor: Any = reader) -> dict[str, Any]:
        return {
            "consent": {"text": consent.TEXT, "sha256": consent.SHA256},
            "engine": capture_desk.hearing.name if capture_desk.hearing else None,
            "most_bytes": audio.MAX_BYTES,
            "most_pieces": audio.MAX_PIECES,
            "least_confidence": correct.LEAST_CONFIDENCE,
            "notice": NOT_FOR_DIAGNOSIS,
        }

    @routes.get("/capture/mine")
    async def mine(image: str | None = None, visitor: Any = reader) -> dict[str, Any]:
        thoughts = await _working(lambda: capture_desk.captures.of_user(visitor.id, image))
        names = ("id", "image", "state", "created")
        return {
            "captures": [
                {
                    **{name: getattr(thought, name) for name in names},
                    "version": len(thought.versions),
                }
                for thought in thoughts
            ]
        }


def _add_beginning(routes: APIRouter, capture_desk: CaptureDesk, reader: Any) -> None:
    def begin_for(request: Request, visitor: Any, image: str | None, agreed: str) -> str:
        unsaved = [
            thought
            for thought in capture_desk.captures.of_user(visitor.id)
            if thought.state in (OPEN, HEARD)
        ]
        # Recordings fill a disk: who begins and never ends has to tidy up first.
        if len(unsaved) >= MOST_OPEN:
            raise RefusedError(429, f"{MOST_OPEN} thoughts wait to be saved or erased")
        # Of a film that the reader may see, like everything else of it.
        if image is not None:
            film_of(capture_desk.state, request, visitor, image)
        return capture_desk.captures.begin(visitor.actor, image, agreed)

    @routes.post("/capture", status_code=201)
    async def begin(request: Request, visitor: Any = reader) -> dict[str, Any]:
        sent_json = await _json(request)
        image, agreed = sent_json.get("image"), sent_json.get("consent_sha256")
        # Before anything else is looked at: without it nothing is stored, not even that somebody asked.
        if agreed != consent.SHA256:
            reason = "without consent to the text of /capture/about nothing is kept"
            raise RefusedError(403, reason, "consent_sha256")
        if image is not None and not (isinstance(image, str) and _SHA256.fullmatch(image)):
            raise RefusedError(400, "image is no sha256", "image")
        return {"id": await _working(lambda: begin_for(request, visitor, image, agreed))}


def _add_recording(routes: APIRouter, capture_desk: CaptureDesk, reader: Any) -> None:
    @routes.put("/capture/{capture_id}/audio/{number}")
    async def put_piece(
        capture_id: str, number: int, request: Request, visitor: Any = reader
    ) -> JSONResponse:
        if capture_desk.hearing is None:
            raise RefusedError(409, "this server hears nothing; thoughts are typed")
        key = request.headers.get("idempotency-key", "")
        await _working(lambda: capture_desk.own(capture_id, visitor))
        piece = await _body(request, audio.MAX_PIECE)
        check_disk(capture_desk.state, len(piece))
        # Answered only when it is on the disk.
        is_new = await _working(
            lambda: capture_desk.captures.put_piece(capture_id, number, key, piece)
        )
        return JSONResponse({"number": number}, status_code=201 if is_new else 200)

    @routes.post("/capture/{capture_id}/finish", status_code=202)
    async def finish(capture_id: str, request: Request, visitor: Any = reader) -> Response:
        sent_json = await _json(request)
        pieces, mime = sent_json.get("pieces"), sent_json.get("mime")
        if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1:
            raise RefusedError(400, "pieces is not the number of pieces", "pieces")
        if not isinstance(mime, str) or not _MIME.fullmatch(mime):
            raise RefusedError(400, "mime is no type of a recording", "mime")
        if capture_desk.hearing is None:
            raise RefusedError(409, "this server hears nothing; thoughts are typed")
        capture = await _working(lambda: capture_desk.own(capture_id, visitor))
        missing = await _working(
            lambda: audio.missing_pieces(capture_desk.captures.folder(capture_id), pieces)
        )
        # Named, so that the page sends those and no others.
        if missing:
            error = {"message": f"{len(missing)} pieces are missing", "param": "pieces"}
            return JSONResponse({"error": error, "missing": missing}, status_code=409)
        capture_desk.start_hearing(visitor.actor, capture, pieces, mime)
        return JSONResponse({"id": capture_id, "hearing": True}, status_code=202)

    @routes.get("/capture/{capture_id}")
    async def get(capture_id: str, visitor: Any = reader) -> dict[str, Any]:
        return await _working(
            lambda: _document(capture_desk, capture_desk.own(capture_id, visitor))
        )


def _add_text(routes: APIRouter, capture_desk: CaptureDesk, reader: Any) -> None:
    @routes.post("/capture/{capture_id}/check")
    async def check(capture_id: str, request: Request, visitor: Any = reader) -> dict[str, Any]:
        sent_json = await _json(request)
        return await _working(
            lambda: _check(capture_desk, capture_desk.own(capture_id, visitor), sent_json)
        )

    @routes.put("/capture/{capture_id}/text")
    async def save(capture_id: str, request: Request, visitor: Any = reader) -> Response:
        sent_json, after_version = await _json(request), _if_match(request)

        def work() -> Response:
            capture = capture_desk.own(capture_id, visitor)
            # What the page shows, where it says so: a thought about another film would be learnt as this one's.
            if sent_json.get("image", capture.image) != capture.image:
                raise capture_desk.state.auth.refused(
                    request,
                    409,
                    "the page shows another film than the thought is about",
                    reason="shown",
                    user=visitor,
                    param="image",
                    capture=capture_id,
                )
            return _save(capture_desk, visitor, capture, sent_json, after_version)

        return await _working(work)

    @routes.delete("/capture/{capture_id}")
    async def erase(capture_id: str, visitor: Any = reader) -> dict[str, Any]:
        # In this order: a hearing that ends after the erasure would write what was just erased.
        def work() -> None:
            capture_desk.own(capture_id, visitor)
            capture_desk.forget(capture_id)
            capture_desk.captures.erase(visitor.actor, capture_id)

        # A client that leaves does not stop what it has begun.
        await asyncio.shield(_working(work))
        return {"erased": capture_id}
