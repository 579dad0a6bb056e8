"""The routes of the API: models and chat completions under /v1, and what operators ask (/health, /ready, /version,
/metrics)."""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from cxr_jax import __version__
from cxr_jax.errors import UserError
from cxr_jax.inference.reading import Film
from cxr_jax.inference.requests import GenerationSettings
from cxr_jax.outputs import schema
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.serve.asks import Ask, Finished, Listener, NotReadyError, QueueFullError, StoppedError
from cxr_jax.serve.limits import CallerLimits
from cxr_jax.serve.openai import documents
from cxr_jax.serve.openai import films as request_films
from cxr_jax.serve.openai.answers import AnswerStyle, ChunkWriter, whole_answer
from cxr_jax.serve.openai.delivery import (
    Delivery,
    StreamedAnswer,
    WholeAnswer,
    ending,
    not_ready,
    stopping,
)
from cxr_jax.serve.openai.fields import ChatRequest, read_request
from cxr_jax.serve.openai.json_bodies import parse_object
from cxr_jax.serve.openai.keys import KeyRing
from cxr_jax.serve.openai.token_texts import TokenTexts
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.state import ServerState

_QUICKLY_PARSED = 64 * 1024  # bytes of JSON below which a thread would cost more than it saves


def router(state: ServerState) -> APIRouter:
    """Make the routes of one server. Raises UserError for a damaged file of keys."""
    routes = APIRouter()
    # One ring for all routes: keys are read once, at the start.
    keys = KeyRing(state)
    _add_operators_routes(routes, state, keys)
    _add_models(routes, state, keys)
    _add_schema(routes)
    chat = _ChatRoute(state, keys)
    routes.add_api_route("/v1/chat/completions", chat.answer, methods=["POST"], response_model=None)
    return routes


# ---- What operators ask ----------------------------------------------------------------------------


def _add_operators_routes(routes: APIRouter, state: ServerState, keys: KeyRing) -> None:
    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> Response:
        """Whether the model answers: 200 once every program is compiled, 503 before and while stopping."""
        # A balancer takes a server out before its last streams have ended.
        if state.is_stopping:
            return JSONResponse({"status": "stopping"}, status_code=503)
        if state.engine.failure is not None:
            return JSONResponse({"status": "failed"}, status_code=503)
        if not state.engine.is_ready:
            return JSONResponse(
                {"status": "warming up"}, status_code=503, headers={"Retry-After": "5"}
            )
        return JSONResponse({"status": "ready"})

    @routes.get("/version")
    async def version() -> dict[str, Any]:
        """Which code and which weights answer."""
        return {
            "version": __version__,
            "model": state.model_name,
            "weights_sha256": state.weights_sha256,
            "notice": NOT_FOR_DIAGNOSIS,
        }

    @routes.get("/metrics")
    def metrics(request: Request) -> Response:
        """Counts in Prometheus' text form: for programs of this machine, and with a key to read."""
        if not keys.may_see_metrics(request):
            raise RefusedError(
                401, "metrics are for this machine, or with a key to read", code="invalid_api_key"
            )
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# ---- Models ----------------------------------------------------------------------------------------


def _add_models(routes: APIRouter, state: ServerState, keys: KeyRing) -> None:
    @routes.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        """The list of one model."""
        keys.caller(request, "chat")
        return {"object": "list", "data": [_model_card(state)]}

    @routes.get("/v1/models/{name:path}")
    def model(request: Request, name: str) -> dict[str, Any]:
        """The one model, by its name."""
        keys.caller(request, "chat")
        _check_model(state, name)
        return _model_card(state)


def _add_schema(routes: APIRouter) -> None:
    @routes.get(f"/v1/schemas/{documents.SCHEMA_NAME}")
    def cxr_reading() -> dict[str, Any]:
        """The one schema that `response_format` may ask for; public, as the package is."""
        return schema.load()


def _model_card(state: ServerState) -> dict[str, Any]:
    abilities = state.capabilities
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "cxr_jax",
        "max_model_len": state.model.config.text.max_position_embeddings,
        "metadata": {
            "weights_sha256": state.weights_sha256,
            # OpenAI's default is 1: clients that say nothing would get another reading each time.
            "default_temperature": 0,
            "default_max_tokens": state.settings.limits.new_tokens,
            "chat": abilities.chat,
            "several_images": abilities.several_images,
            "probabilities": abilities.probabilities,
            "notice": NOT_FOR_DIAGNOSIS,
        },
    }


def _check_model(state: ServerState, name: str) -> None:
    if name != state.model_name:
        raise RefusedError(
            404,
            f"there is no such model here; there is {state.model_name}",
            "model",
            code="model_not_found",
        )


# ---- Chat completions ------------------------------------------------------------------------------


class _ChatRoute:
    """POST /v1/chat/completions, with what it keeps between requests."""

    def __init__(self, state: ServerState, keys: KeyRing) -> None:
        self.state, self.keys = state, keys
        self.limits = state.settings.limits
        self.callers = CallerLimits(self.limits)
        # Decoding a large film takes a core for a second; more at a time would starve the engine.
        self._decoders = asyncio.Semaphore(self.limits.decoders)
        self._tokens: TokenTexts | None = None
        code = f"{state.weights_sha256}/{__version__}"
        self._fingerprint = "fp_" + hashlib.sha256(code.encode()).hexdigest()[:12]

    async def answer(self, request: Request) -> Response:
        """Answer one request. Refusals are raised, and told by the application."""
        # In a thread: keys of the store are read from its database.
        caller = await run_in_threadpool(self.keys.caller, request, "chat")
        # What costs nothing to refuse is refused before the body is read.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != (
            "application/json"
        ):
            raise RefusedError(415, "Content-Type must be application/json", "Content-Type")
        self._check_ready()
        leave = self.callers.enter(caller.name)
        with ending(leave):
            try:
                return await self._answer(await request.body(), leave)
            except ClientDisconnect:
                # Nobody is there to read it.
                leave()
                return Response(status_code=400)

    def _check_ready(self) -> None:
        if self.state.is_stopping:
            raise stopping()
        if not self.state.engine.is_ready:
            raise not_ready()

    async def _answer(self, body: bytes, leave: Callable[[], None]) -> Response:
        # ---- What is asked ----
        if len(body) <= _QUICKLY_PARSED:
            parsed = parse_object(body, self.limits.elements)
        else:
            parsed = await run_in_threadpool(parse_object, body, self.limits.elements)
        request, ignored = read_request(parsed, self.limits)
        _check_model(self.state, request.model)
        is_document = documents.wants_document(request)
        abilities = self.state.capabilities
        conversation = request_films.conversation_of(
            request,
            self.limits,
            several=abilities.several_images,
            why_not_several=abilities.why_not.get("several_images", "the model takes one"),
        )
        # One at a time in the queue: bodies wait here as texts, not as pictures of many megabytes.
        async with self._decoders:
            films = await run_in_threadpool(
                request_films.read_films, conversation.films, request, self.limits
            )
        if is_document:
            documents.check_films(films)
        messages = request_films.question_about(films, conversation.messages)
        ask = self._ask(request, messages, films, is_document=is_document)
        # ---- Who is told; from here on the answer has the lease, and gives it back ----
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        headers = {"X-Request-Id": completion_id}
        if ignored:
            headers["X-Ignored-Fields"] = ", ".join(ignored)
        warnings = [warning for film in films for warning in film.image.meta["warnings"]]
        delivery = self._delivery(request, completion_id, headers, warnings, leave)
        listener = delivery.listener
        if is_document:
            listener = documents.DocumentListener(self.state, films, request, listener)
        delivery.job = await run_in_threadpool(self._submit, ask, listener)
        return delivery

    def _ask(
        self,
        request: ChatRequest,
        messages: list[dict[str, str]],
        films: list[Film],
        *,
        is_document: bool,
    ) -> Ask:
        # As vLLM has it, -1 is all tokens.
        top_k = None if request.top_k in (None, -1) else request.top_k
        try:
            settings = GenerationSettings(
                max_new_tokens=request.new_tokens(self.limits.new_tokens),
                temperature=request.temperature or 0.0,
                n=request.n or 1,
                seed=request.seed or 0,
                top_p=request.top_p,
                top_k=top_k,
            )
        except UserError as error:
            # Its message begins with the field, under the name that it has here, too.
            raise RefusedError(400, str(error), str(error).split(" ", 1)[0]) from None
        return Ask(
            images=tuple(film.image.pixels for film in films),
            messages=messages,
            settings=settings,
            stop=tuple(request.stop or ()),
            # A document needs an answer list that is one, and what the model thinks of each label.
            constraint="answers" if is_document and self.state.capabilities.probabilities else None,
            probabilities=is_document and self.state.capabilities.probabilities,
        )

    def _delivery(
        self,
        request: ChatRequest,
        completion_id: str,
        headers: dict[str, str],
        warnings: list[str],
        leave: Callable[[], None],
    ) -> Delivery:
        # A style is fixed before the first token: nothing of it depends on what comes.
        options = request.stream_options
        style = AnswerStyle(
            completion_id=completion_id,
            created=int(time.time()),
            model=self.state.model_name,
            fingerprint=self._fingerprint,
            tokens=self._token_texts() if request.logprobs else None,
            is_split=request.reasoning_format == "split",
            shows_reasoning=request.include_reasoning is not False,
            includes_usage=bool(options and options.include_usage),
        )
        if request.stream:
            writer = ChunkWriter(style, request.n or 1)
            return StreamedAnswer(writer, headers, self.limits, self._is_stopping, leave)

        # What the client sees is made on the loop, once all of it is there.
        def make(events: list[Any], done: Any) -> dict[str, Any]:
            finished = [event for event in events if isinstance(event, Finished)]
            return whole_answer(style, finished, done, warnings)

        return WholeAnswer(make, headers, self._is_stopping, leave)

    def _is_stopping(self) -> bool:
        return self.state.is_stopping

    def _token_texts(self) -> TokenTexts:
        # Made when somebody asks for the first time: it takes a moment for a large vocabulary.
        if self._tokens is None:
            self._tokens = TokenTexts(self.state.model.tokenizer)
        return self._tokens

    def _submit(self, ask: Ask, listener: Listener) -> Any:
        """Hand an ask to the engine; called in a thread, because its prompt is rendered there."""
        try:
            return self.state.engine.submit(ask, listener)
        except UserError as error:
            raise RefusedError(400, str(error), "messages") from None
        except QueueFullError as error:
            raise RefusedError(
                429,
                "too many requests wait for the model",
                code="queue_full",
                headers={"Retry-After": str(error.retry_after_s)},
            ) from None
        except NotReadyError:
            raise not_ready() from None
        except StoppedError:
            raise stopping() from None
