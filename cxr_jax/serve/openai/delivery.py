"""From the engine's thread to one client: answers that are given up as soon as nobody reads them.

The engine calls a listener on its own thread; events cross over to the loop, become bytes there, and wait for the
client. A client that leaves cancels its job; one that reads too slowly is cut when a limit of bytes waits for it, or
one piece for a limit of seconds; its job is cancelled, and nobody else notices.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cxr_jax.serve.asks import Done, Event, Failed, Finished, Piece
from cxr_jax.serve.limits import Limits
from cxr_jax.serve.openai.answers import DONE_LINE, ChunkWriter, line_of
from cxr_jax.serve.refusals import RefusedError, error_body, error_response


# Made anew each time: an exception that is raised again keeps the frames of all times before, bodies included.
def stopping() -> RefusedError:
    """What a server that has been told to stop answers."""
    return RefusedError(
        503, "the server is stopping", code="stopping", headers={"Retry-After": "30"}
    )


def not_ready() -> RefusedError:
    """What a server answers whose model still compiles."""
    return RefusedError(
        503, "the model is not ready yet", code="not_ready", headers={"Retry-After": "5"}
    )


class Delivery(Response):
    """What both kinds of answers share: a job that is cancelled when its client is gone.

    Attributes:
        job: of the engine, set as soon as it has been admitted.
        is_stopping: asks whether the server has been told to stop.
        on_end: called once when the answer has ended, however that was.
    """

    def __init__(self, is_stopping: Callable[[], bool], on_end: Callable[[], None]) -> None:
        """Make an answer that waits for its job."""
        super().__init__()
        self.job: Any = None
        self.is_stopping, self.on_end = is_stopping, on_end
        self.background: BackgroundTask | None = None
        self._loop = asyncio.get_running_loop()
        self._is_cut: asyncio.Future[None] = self._loop.create_future()

    def cut(self) -> None:
        """Give the client up: its connection ends without an end of the answer, so that it knows."""
        if not self._is_cut.done():
            self._is_cut.set_result(None)

    def listener(self, event: Event) -> None:
        """Take an event on the engine's thread."""
        # A loop that has closed raises here, which costs the engine this ask and nothing else.
        self._loop.call_soon_threadsafe(self.take, event)

    def take(self, event: Event) -> None:
        """Take an event on the loop."""
        raise NotImplementedError

    async def deliver(self, scope: Scope, send: Send) -> None:
        """Send the answer as it comes."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer until it ends or the client leaves."""
        # Two tasks, since a server tells of a client that has left only to whoever listens.
        leaving = asyncio.ensure_future(_until_gone(receive))
        sending = asyncio.ensure_future(self.deliver(scope, send))
        try:
            await asyncio.wait(
                (leaving, sending, self._is_cut), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            # Of a job that has ended this does nothing.
            if self.job is not None:
                self.job.cancel()
            for unfinished_task in (leaving, sending):
                unfinished_task.cancel()
            # Whatever a broken connection raises: there is nobody to tell.
            await asyncio.gather(leaving, sending, return_exceptions=True)
            self.on_end()

    def why_failed(self, event: Failed) -> RefusedError:
        """What a failure of the engine is to the client."""
        # The engine does not say why its jobs end; whoever stopped it knows.
        if self.is_stopping():
            return stopping()
        return RefusedError(500, "the server failed on this request")


async def _until_gone(receive: Receive) -> None:
    # A client may send more than it said; only its leaving counts.
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- Whole -----------------------------------------------------------------------------------------


class WholeAnswer(Delivery):
    """An answer in one piece, sent when all of it is there."""

    def __init__(
        self,
        make_answer: Callable[[list[Event], Done], dict[str, Any]],
        headers: dict[str, str],
        is_stopping: Callable[[], bool],
        on_end: Callable[[], None],
    ) -> None:
        """Make an answer.

        Args:
            make_answer: the JSON from all events and the last one.
            headers: of the answer.
            is_stopping: as of `Delivery`.
            on_end: as of `Delivery`.
        """
        super().__init__(is_stopping, on_end)
        self._make, self._answer_headers = make_answer, headers
        self._events: list[Event] = []
        self._end: asyncio.Future[Done | Failed] = self._loop.create_future()

    def take(self, event: Event) -> None:
        """Keep an event until the last one."""
        if isinstance(event, (Done, Failed)):
            if not self._end.done():
                self._end.set_result(event)
        # The whole completion comes at its end: pieces are for who watches.
        elif not isinstance(event, Piece):
            self._events.append(event)

    async def deliver(self, scope: Scope, send: Send) -> None:
        """Wait for the last event, then send all."""
        last_event = await self._end
        if isinstance(last_event, Failed):
            response: Response = error_response(self.why_failed(last_event), scope["path"])
        else:
            response = JSONResponse(
                self._make(self._events, last_event), headers=self._answer_headers
            )
        # Its body is one message: there is nothing left to hear from the client.
        await response(scope, _nothing_more, send)


async def _nothing_more() -> Any:
    await asyncio.Event().wait()


# ---- In pieces -------------------------------------------------------------------------------------


class StreamedAnswer(Delivery):
    """An answer as server-sent events."""

    def __init__(
        self,
        writer: ChunkWriter,
        headers: dict[str, str],
        limits: Limits,
        is_stopping: Callable[[], bool],
        on_end: Callable[[], None],
    ) -> None:
        """Make a stream that begins with the chunks of `writer.first`."""
        super().__init__(is_stopping, on_end)
        self._writer, self._limits, self._stream_headers = writer, limits, headers
        self._waiting: list[bytes] = [writer.first()]
        self._waiting_bytes = len(self._waiting[0])
        self._has_ended = False
        # Set whenever something waits; an event that comes while one is sent is not lost.
        self._wake = asyncio.Event()
        self._wake.set()

    def take(self, event: Event) -> None:
        """Write an event into what waits for the client."""
        # After a cut the engine still tells the end of the job.
        if self._has_ended:
            return
        if isinstance(event, Piece):
            self._put(self._writer.piece(event))
        elif isinstance(event, Finished):
            self._put(self._writer.finished(event))
        elif isinstance(event, Done):
            self._put(self._writer.done(event), is_last=True)
        elif isinstance(event, Failed):
            error = error_body(self.why_failed(event), is_openai=True)
            self._put(line_of(error) + DONE_LINE, is_last=True)

    def _put(self, new_line: bytes, *, is_last: bool = False) -> None:
        self._waiting.append(new_line)
        self._waiting_bytes += len(new_line)
        self._has_ended = is_last
        # A reader that takes nothing may not fill the memory of the others: it gets no more, and no end.
        if self._waiting_bytes > self._limits.stream_bytes:
            self._waiting, self._waiting_bytes, self._has_ended = [], 0, True
            self.cut()
        self._wake.set()

    async def deliver(self, scope: Scope, send: Send) -> None:
        """Send what waits, as fast as the client takes it. Raises OSError or TimeoutError for one that does not."""
        headers = {
            **self._stream_headers,
            "Content-Type": "text/event-stream; charset=utf-8",
            # A proxy that collects an answer would undo the stream.
            "X-Accel-Buffering": "no",
        }
        raw_headers = [
            (name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()
        ]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        while True:
            await self._wake.wait()
            self._wake.clear()
            # The last piece of a stream that was cut must not look like its end.
            if self._is_cut.done():
                return
            # All that waits goes as one piece: a slow client gets fewer and larger ones.
            piece, has_ended = b"".join(self._waiting), self._has_ended
            self._waiting, self._waiting_bytes = [], 0
            message = {"type": "http.response.body", "body": piece, "more_body": not has_ended}
            # Returns when the system has taken it, which is how a slow reader is noticed.
            await asyncio.wait_for(send(message), self._limits.send_seconds)
            if has_ended:
                return


@contextlib.contextmanager
def ending(on_end: Callable[[], None]) -> Any:
    """Call `on_end` if what is inside fails; otherwise the answer will."""
    try:
        yield
    except BaseException:
        on_end()
        raise
