"""Limits of what clients may send, and the guard that holds bodies to them before anybody has read them."""

import asyncio
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
    """Refuses bodies that are too large (413) or too slow (408), as ASGI middleware.

    A declared length is refused before a byte is read; without one the bytes are counted as they come, and the routes
    see the refusal where they read on.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        """Stand before an application."""
        self.app, self.limits = app, limits

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
        received_bytes, is_complete = 0, False

        # The routes call this in place of the server's own; they need not know of it.
        async def counted_receive() -> Message:
            nonlocal received_bytes, is_complete
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
                received_bytes += len(message.get("body", b""))
                is_complete = not message.get("more_body", False)
                if received_bytes > most_bytes:
                    too_large.headers["Connection"] = "close"
                    raise too_large
            return message

        await self.app(scope, counted_receive, send)


def _declared_length(scope: Scope) -> int | None:
    """The number in Content-Length; None without one. What is no number the HTTP parser has refused."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None
