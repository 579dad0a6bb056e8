"""Limits of what clients may send, and the guard that holds bodies to them before anybody has read them."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr_jax.serve.refusals import RefusedError, error_response

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of everything one server takes.

    Attributes:
        body_bytes: of a request that carries no file.
        upload_bytes: of a film that is posted to the room.
        chat_bytes: of a chat completion: films as base64 take 4/3 of their size.
        audio_bytes: of a recorded thought.
        image_bytes: of one film inside a chat completion.
        images: in one request.
        elements: commas and brackets of a JSON body: what makes parsing slow and large.
        prompt_characters: of all texts of a request together.
        messages: of a conversation.
        completions: `n` at most.
        new_tokens: `max_tokens` at most.
        stop_texts: in `stop`.
        queue: requests that wait for a slot.
        concurrent_per_key: requests of one client at a time.
        requests_per_minute: of one client.
        stream_bytes: that wait for a slow reader before it is cut.
        body_seconds: for a body to arrive in full.
        send_seconds: for one piece of an answer to be taken.
        decoders: films that are decoded at a time.
        waiting_bytes: of bodies that have come and are not answered yet, of all clients together.
        connections: at a time, of all clients together; more are answered with 503.
        films_bytes: what the films of one reader may take on the disk.
        free_bytes: of the store's disk that films and recordings leave to the chain.
    """

    body_bytes: int = 1 * MEBIBYTE
    upload_bytes: int = 64 * MEBIBYTE
    chat_bytes: int = 72 * MEBIBYTE
    audio_bytes: int = 32 * MEBIBYTE
    image_bytes: int = 24 * MEBIBYTE
    images: int = 4
    elements: int = 50_000
    prompt_characters: int = 32_000
    messages: int = 64
    completions: int = 8
    new_tokens: int = 512
    stop_texts: int = 4
    queue: int = 128
    concurrent_per_key: int = 256
    requests_per_minute: int = 6_000
    stream_bytes: int = 1 * MEBIBYTE
    body_seconds: float = 60.0
    send_seconds: float = 30.0
    decoders: int = 2
    waiting_bytes: int = 1024 * MEBIBYTE
    connections: int = 1024
    films_bytes: int = 20 * 1024 * MEBIBYTE
    free_bytes: int = 512 * MEBIBYTE

    def body_limit(self, path: str) -> int:
        """Say how many bytes a body for this path may have."""
        # By the beginning of a path, so that a route added later is held to a limit, too.
        if path.startswith("/v1/"):
            return self.chat_bytes
        if path.startswith("/room/images"):
            # The form around the file takes a little, too.
            return self.upload_bytes + MEBIBYTE
        if path.startswith("/capture"):
            return self.audio_bytes + MEBIBYTE
        return self.body_bytes


class BodyGuard:
    """Refuses bodies that are too large (413), too slow (408) or too many at once (503), as ASGI middleware.

    A declared length is refused before a byte is read; without one the bytes are counted as they come, and the routes
    see the refusal where they read on.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        """Stand before an application."""
        self.app, self.limits = app, limits
        # Of all requests together; on the loop alone, so it needs no lock.
        self._waiting_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body counted."""
        # Start and end of the server come this way, too, and have no body.
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, most_bytes = scope["path"], self.limits.body_limit(scope["path"])
        too_large = RefusedError(
            413, f"the body is larger than {most_bytes:,} bytes", code="body_too_large"
        )
        # What the client says itself saves the reading; what it does not say is counted below.
        declared = _declared_length(scope)
        if declared is not None and declared > most_bytes:
            # Unread bytes are not a next request: the connection ends with the answer.
            too_large.headers["Connection"] = "close"
            await error_response(too_large, path)(scope, receive, send)
            return

        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.body_seconds
        received_bytes, held_bytes, is_complete = 0, 0, False

        # The routes call this in place of the server's own; they need not know of it.
        async def counted_receive() -> Message:
            nonlocal received_bytes, held_bytes, is_complete
            if is_complete:  # what comes after the body is the client's leaving
                return await receive()
            # One deadline for the whole body: a byte a second would outlast any limit between two pieces.
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except TimeoutError:
                raise RefusedError(
                    408, "the body took too long to arrive", headers={"Connection": "close"}
                ) from None
            if message["type"] == "http.request":
                # Counted here and not by the routes, so that none can forget it.
                piece_bytes = len(message.get("body", b""))
                received_bytes += piece_bytes
                # Each is within its limit, and hundreds of them would still fill the memory.
                if self._waiting_bytes + piece_bytes > self.limits.waiting_bytes:
                    raise _busy()
                self._waiting_bytes += piece_bytes
                held_bytes += piece_bytes
                is_complete = not message.get("more_body", False)
                if received_bytes > most_bytes:
                    too_large.headers["Connection"] = "close"
                    raise too_large
            return message

        # A stream has let go of its body long before it ends.
        async def releasing_send(message: Message) -> None:
            nonlocal held_bytes
            self._waiting_bytes -= held_bytes
            held_bytes = 0
            await send(message)

        try:
            await self.app(scope, counted_receive, releasing_send)
        finally:
            self._waiting_bytes -= held_bytes


def _busy() -> RefusedError:
    headers = {"Retry-After": "2", "Connection": "close"}
    return RefusedError(503, "too many large bodies at once", code="busy", headers=headers)


def _declared_length(scope: Scope) -> int | None:
    """The number in Content-Length; None without one. What is no number the HTTP parser has refused."""
    # As bytes: headers are not decoded before somebody needs them.
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


# ---- Who asks how often ----------------------------------------------------------------------------


class CallerLimits:
    """How many requests one caller may have at a time, and in a minute. Used on the event loop alone."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without callers.

        Args:
            limits: of which two are read.
            clock: seconds; another one in tests.
        """
        self._limits, self._clock = limits, clock
        self._running: Counter[str] = Counter()
        # Of each caller what is left of its minute, and when that was: tokens flow back evenly.
        self._left: dict[str, tuple[float, float]] = {}

    def enter(self, caller: str) -> Callable[[], None]:
        """Count a request of a caller.

        Returns:
            What is to be called when it has ended; a second call does nothing.

        Raises:
            RefusedError: 429 with Retry-After.
        """
        # What runs is counted before what is asked, so that a full caller loses no token.
        if self._running[caller] >= self._limits.concurrent_per_key:
            raise _too_many("too many requests at a time", 1)
        self._take_token(caller)
        self._running[caller] += 1
        has_left = False

        def leave() -> None:
            nonlocal has_left
            if not has_left:
                has_left = True
                self._running[caller] -= 1
                # A name with nothing to count is forgotten.
                if self._running[caller] <= 0:
                    del self._running[caller]

        return leave

    def _take_token(self, caller: str) -> None:
        most, now = self._limits.requests_per_minute, self._clock()
        left, since = self._left.get(caller, (float(most), now))
        left = min(float(most), left + (now - since) * most / 60)
        if left < 1:
            raise _too_many("too many requests in a minute", math.ceil((1 - left) * 60 / most))
        # Known keys are few; names that were guessed never come here.
        self._left[caller] = left - 1, now


def _too_many(message: str, seconds: int) -> RefusedError:
    return RefusedError(
        429, message, code="rate_limit_exceeded", headers={"Retry-After": str(max(1, seconds))}
    )
