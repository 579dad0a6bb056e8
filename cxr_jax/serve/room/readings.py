"""Readings: asked for, streamed sentence by sentence, resumed, stopped, asked on.

    POST   /room/readings {image, prompt?, seed?, read_anyway?}  -> 202 {id}
    GET    /room/readings/{id}/events     server-sent events with numbers; Last-Event-ID resumes
    GET    /room/readings/{id}            the finished cxr_reading document
    DELETE /room/readings/{id}            stops it, at the engine
    POST   /room/readings/{id}/ask {text} -> {text}; 409 where the model was not trained for it

Events: gate, sentence (one each, numbered, with its claims), answer, contradictions, probabilities, done; or error.
"""

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.inference.requests import Completion, GenerationSettings
from cxr_jax.outputs.trace_sentences import find_words
from cxr_jax.serve import asks, auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room.access import check_reading, film_of
from cxr_jax.serve.room.images import shelf_of
from cxr_jax.serve.room.reading_runs import Order, RoomEvent, Run, Runs, events_of
from cxr_jax.serve.state import ServerState
from cxr_jax.store.chain import sha256_of
from cxr_jax.store.records.readings import reading_name
from cxr_jax.store.records.users import User

_READER = Depends(auth.reader)
_HASH = r"^[0-9a-f]{64}$"
_KEEP_ALIVE_SECONDS = 15.0  # proxies close what is silent for a minute
_ANSWER_SECONDS = 120.0  # for a follow-up, from the first token to the last
_QUESTIONS = 8  # at a time: each holds a thread of those that all other requests need


class NewReading(BaseModel):
    """What is to be read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str = Field(pattern=_HASH)
    prompt: str = Field(default=FIND_PROMPT, min_length=1, max_length=32_000)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    read_anyway: bool = False


class Question(BaseModel):
    """What is asked after a reading."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = Field(min_length=1, max_length=4_000)


def router(state: ServerState) -> APIRouter:
    """Make the routes of readings; none of a server without a store."""
    routes = APIRouter()
    if state.store is None:
        return routes
    # They live with the server; what they end in lives in the store.
    runs = Runs(state)
    _add_routes(routes, state, runs)
    _add_question_route(routes, state)
    _add_stream(routes, state, runs)
    return routes


# ---- Asking for one --------------------------------------------------------------------------------------------------


def make_order(state: ServerState, wanted: NewReading, film: dict[str, Any]) -> Order:
    """Say what the engine is asked for a reading; the same is wanted by the same name."""
    # Whatever changes the text goes into the name, and nothing else.
    limits, capabilities = state.settings.limits, state.capabilities
    if len(wanted.prompt) > limits.prompt_characters or not wanted.prompt.strip():
        raise RefusedError(400, "a question of 1 to 32,000 characters, not blank", "prompt")
    # Greedy: a reading that is asked for twice is the same reading.
    settings = GenerationSettings(max_new_tokens=limits.new_tokens, seed=wanted.seed)
    kept_settings = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "probabilities": capabilities.probabilities,
    }
    name = reading_name(
        image=film["sha256"],
        weights_sha256=state.weights_sha256,
        renderer=film["renderer"],
        prompt=wanted.prompt,
        settings=kept_settings,
        seed=wanted.seed,
    )
    # The film as the model sees it, from the same bytes as the pixels that the reader sees.
    ask = asks.Ask(
        images=(shelf_of(state).picture(film["sha256"]),),
        messages=[{"role": "user", "content": wanted.prompt}],
        settings=settings,
        probabilities=capabilities.probabilities,
    )
    return Order(
        name=name,
        film=film,
        prompt=wanted.prompt,
        seed=wanted.seed,
        words=_words(state),
        settings=kept_settings,
        ask=ask,
    )


def _words(state: ServerState) -> str:
    # A model without a folder was made in memory, of films for all that is known.
    return find_words(state.model.folder) if state.model.folder is not None else "films"


def engine_refusal(error: Exception) -> RefusedError:
    """Turn what the engine raises for a whole server into an answer."""
    if isinstance(error, asks.QueueFullError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return RefusedError(429, "as many readings wait as may", headers=headers)
    return RefusedError(503, "the model is not ready", headers={"Retry-After": "5"})


_ENGINE_ERRORS = (asks.QueueFullError, asks.NotReadyError, asks.StoppedError)


def _add_routes(routes: APIRouter, state: ServerState, runs: Runs) -> None:
    @routes.post("/room/readings", status_code=202)
    def begin(request: Request, body: NewReading, current_user: User = _READER) -> dict[str, Any]:
        """Begin a reading, join the one that runs, or find the one that is there."""
        film = film_of(state, request, current_user, body.image)
        # A confident report on noise or on a hand is worse than none: it has to be asked for twice.
        if film["gate"]["state"] == "refused" and not body.read_anyway:
            reasons = "; ".join(film["gate"]["reasons"])
            raise state.auth.refused(
                request,
                400,
                f"not read: {reasons}",
                reason="gate",
                user=current_user,
                param="image",
            )
        # Decoded here, on a thread of the pool, and not by the engine.
        order = make_order(state, body, film)
        if state.store.readings.get(order.name) is None:
            try:
                runs.join_or_start(order, current_user)
            except _ENGINE_ERRORS as error:
                raise engine_refusal(error) from None
        # Also one that another has asked for: before its name is told, which opens nothing by itself.
        state.store.access.want_reading(order.name, body.image, actor=current_user.actor)
        return {"id": order.name}

    @routes.get("/room/readings/{name}")
    def document(request: Request, name: str, current_user: User = _READER) -> dict[str, Any]:
        """Give the finished document."""
        check_reading(state, request, current_user, name)
        # Finished ones first: they are the same for ever.
        stored_row = state.store.readings.get(name)
        if stored_row is not None:
            return stored_row["document"]
        running = runs.find(name)
        if running is not None and not running.has_ended:
            raise RefusedError(409, "the reading is not finished", headers={"Retry-After": "1"})
        raise RefusedError(404, "no such reading, or it was stopped")

    @routes.delete("/room/readings/{name}", status_code=204)
    def stop(request: Request, name: str, current_user: User = _READER) -> None:
        """Stop a reading; one that is finished stays."""
        check_reading(state, request, current_user, name)
        # Nobody stops what others are waiting for.
        if runs.stop(name, current_user) or state.store.readings.get(name) is not None:
            return
        raise RefusedError(404, "no such reading that you asked for")


def _add_question_route(routes: APIRouter, state: ServerState) -> None:
    places = threading.BoundedSemaphore(_QUESTIONS)

    @routes.post("/room/readings/{name}/ask")
    def ask(
        request: Request, name: str, body: Question, current_user: User = _READER
    ) -> dict[str, Any]:
        """Ask on after a reading."""
        check_reading(state, request, current_user, name)
        stored_row = state.store.readings.get(name)
        if stored_row is None:
            raise RefusedError(404, "no such reading, or not finished")
        if not state.capabilities.chat:
            why = state.capabilities.why_not.get("chat", "the model answers no questions")
            raise RefusedError(409, why)
        if not places.acquire(blocking=False):
            raise RefusedError(429, "as many questions wait as may", headers={"Retry-After": "2"})
        try:
            completion = _answer(state, stored_row, body.text)
        finally:
            places.release()
        # Their hashes: what was said is no part of the report, and may have to be forgotten.
        event = {
            "reading": name,
            "question_sha256": sha256_of(body.text),
            "answer_sha256": sha256_of(completion.text),
        }
        state.store.append("reading.asked", event, **current_user.actor.as_arguments())
        return {"text": completion.text, "finish_reason": completion.finish_reason}


def _answer(state: ServerState, stored_row: dict[str, Any], question: str) -> Completion:
    """Ask the model on, with the reading as its own turn before."""
    messages = [
        {"role": "user", "content": stored_row["prompt"]},
        {"role": "assistant", "content": stored_row["text"]},
        {"role": "user", "content": question},
    ]
    settings = GenerationSettings(
        max_new_tokens=state.settings.limits.new_tokens, seed=stored_row["seed"]
    )
    # The same film and prompt again, which the engine has computed already.
    picture = shelf_of(state).picture(stored_row["image"])
    said: queue.SimpleQueue[asks.Event] = queue.SimpleQueue()
    wanted = asks.Ask(images=(picture,), messages=messages, settings=settings)
    try:
        job = state.engine.submit(wanted, said.put)
    except _ENGINE_ERRORS as error:
        raise engine_refusal(error) from None
    completion = None
    while True:
        try:
            event = said.get(timeout=_ANSWER_SECONDS)
        except queue.Empty:
            job.cancel()
            raise RefusedError(503, "the answer took too long") from None
        if isinstance(event, asks.Finished):
            completion = event.completion
        elif isinstance(event, asks.Failed):
            raise RefusedError(503, event.message)
        elif isinstance(event, asks.Done) and completion is not None:
            return completion


# ---- Following one ---------------------------------------------------------------------------------------------------


def _add_stream(routes: APIRouter, state: ServerState, runs: Runs) -> None:
    @routes.get("/room/readings/{name}/events")
    def events(request: Request, name: str, current_user: User = _READER) -> StreamingResponse:
        """Stream the events after Last-Event-ID, to the last."""
        check_reading(state, request, current_user, name)
        # Whatever else stands there means "from the beginning".
        last_seen = request.headers.get("Last-Event-ID", "0")
        # At most 9 digits: Python refuses to read numbers of thousands, and no stream has as many events.
        seen = int(last_seen) if re.fullmatch(r"[0-9]{1,9}", last_seen) else 0
        running = runs.find(name)
        if running is not None:
            stream = _follow(running, seen)
        else:
            stored_row = state.store.readings.get(name)
            # What a killed server had begun is asked for again, by the same name.
            if stored_row is None:
                raise RefusedError(404, "no such reading")
            stream = _replay(events_of(stored_row["events"] or []), seen)
        return StreamingResponse(stream, media_type="text/event-stream")


async def _replay(events: list[RoomEvent], seen: int) -> AsyncIterator[bytes]:
    for event in events[seen:]:
        yield event.as_stream()


async def _follow(running: Run, seen: int) -> AsyncIterator[bytes]:
    """Yield events as they come, and a comment where none has come for a while."""
    loop, something_new = asyncio.get_running_loop(), asyncio.Event()

    def waker() -> None:
        # Events come on another thread; the loop is told, and never waits for a lock.
        loop.call_soon_threadsafe(something_new.set)

    running.wake_by(waker)
    try:
        while True:
            # Before looking, or what comes in between would be waited for.
            something_new.clear()
            has_ended = running.has_ended
            for event in running.events[seen:]:
                yield event.as_stream()
                seen += 1
            if has_ended:
                return
            try:
                await asyncio.wait_for(something_new.wait(), _KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield b": still reading\n\n"
    finally:
        # A page that has gone leaves the reading to those who come back for it.
        running.wake_no_more(waker)
