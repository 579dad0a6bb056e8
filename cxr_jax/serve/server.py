"""One server from its flags to its end: the socket, the model, the engine, the store, and a stop that loses nothing."""

import asyncio
import contextlib
import functools
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from cxr_jax.errors import RunFailedError, UserError, as_utf8, printable
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.runtime.processes import use_compilation_cache
from cxr_jax.serve.limits import Limits
from cxr_jax.serve.openai.keys import read_key_file
from cxr_jax.serve.state import Capabilities, ServerSettings, ServerState

_LOG = logging.getLogger(__name__)
_STOP_SECONDS = 10.0  # for the engine to reach its next boundary, and for answers to end
_TICK_SECONDS = 0.2
_OTHER_FILES = 512  # the database's, films', the model's: beside those of connections


def run_server(settings: ServerSettings) -> int:
    """Serve until a signal comes.

    Returns:
        0 after SIGTERM or SIGINT.

    Raises:
        UserError: for flags that do not go together, a port that is taken, a model that is not there.
        RunFailedError: if the engine cannot start, or ends by itself.
    """
    check_settings(settings)
    # First, because it is quick and most often wrong: a second server on one port.
    listener = bind(settings.host, settings.port)
    with contextlib.closing(listener):
        print(NOT_FOR_DIAGNOSIS)
        print(f"{url_of(settings, listener)}  loading {printable(settings.model)} ..", flush=True)
        use_compilation_cache(least_seconds=0.0)
        state = open_state(settings)
        try:
            return _serve(state, listener)
        finally:
            close_state(state)


def check_settings(settings: ServerSettings) -> None:
    """Refuse flags that would open the server to others unguarded. Raises UserError."""
    if settings.no_auth and not settings.is_loopback:
        raise UserError(f"--no_auth: only on loopback, not with --host={settings.host}")
    if settings.study is not None:
        _check_study(settings)
    # Read once more by the routes: here only to be told before the model is loaded.
    if settings.api_key_file is not None:
        read_key_file(settings.api_key_file)


def _check_study(settings: ServerSettings) -> None:
    """Refuse what has no meaning beside a study, which is served alone. Raises UserError."""
    if settings.store is None:
        raise UserError("--study: a study is kept in a store: give --store, too")
    # A reader who could ask the model in another tab would read no arm without it.
    for flag, is_given in (
        ("--api_key_file", settings.api_key_file is not None),
        ("--dictate", settings.dictate != ServerSettings.dictate),
    ):
        if is_given:
            raise UserError(f"{flag}: not with --study, which is served alone: no room, no API")


# ---- The socket ------------------------------------------------------------------------------------


def bind(host: str, port: int) -> socket.socket:
    """Take the port, so that a taken one is told before the model is loaded. Connections are refused until it listens.

    Raises:
        UserError: for a port that is taken or not allowed, or a host that is none of this machine.
    """
    try:
        [(family, _, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise UserError(f"--host={printable(host)}: no such address") from None
    # With its protocol, or asyncio does not know it for TCP and leaves 40 ms between two small packets.
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        # A port whose last server has just ended may be taken again; one that is in use may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = (error.strerror or "cannot be used").lower()
        raise UserError(f"--port={port}: {reason} (--port=0 takes a free one)") from None
    return listener


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """The address that a browser on this machine opens."""
    port = listener.getsockname()[1]
    # In a URL the colons of an address are those of a port, but for brackets.
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    # "Any address" is none that can be opened.
    if settings.host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{host}:{port}/"


# ---- What the server holds -------------------------------------------------------------------------


def open_state(settings: ServerSettings) -> ServerState:
    """Load the model and start its engine, open the store.

    Raises:
        UserError: for what is not there or does not fit.
    """
    # Only by a server that really starts: flags are told wrong without them.
    from cxr_jax.serve.auth import check_start
    from cxr_jax.store import open_store

    # Before the model, which takes longer: a store that another server has is told at once.
    store = None if settings.store is None else open_store(settings.store)
    # From here on somebody must close it: the caller, or this function if it fails.
    try:
        if remark := check_start(settings, store):
            print(remark, flush=True)
        return _state_with(settings, store)
    except BaseException:
        # A store that stays locked would refuse the next start in this process.
        if store is not None:
            store.close()
        raise


def _state_with(settings: ServerSettings, store: Any) -> ServerState:
    """Load the model and make what serves it."""
    # Heavy: seconds, of which a mistaken flag must not cost any.
    import cxr_jax
    from cxr_jax.serve.auth import Auth
    from cxr_jax.serve.engine import Engine
    from cxr_jax.serve.metrics import Metrics
    from cxr_jax.weights import hf_folder

    # On this thread; from the start of the engine on only its own computes.
    model = cxr_jax.load(settings.model)
    metrics = Metrics()
    engine = Engine(
        model, queue_limit=settings.limits.queue, warm=(functools.partial(_read_words, model),)
    )
    state = ServerState(
        settings=settings,
        store=store,
        auth=None if store is None else Auth(settings, store),
        engine=engine,
        model=model,
        model_name=name_of(settings.model),
        weights_sha256=hf_folder.weights_sha256(model.folder) or "",
        capabilities=capabilities_of(model, is_phantom=settings.model == "phantom"),
        metrics=metrics,
    )
    metrics.watch_engine(engine.counts)
    return state


def _read_words(model: Any) -> None:
    """Compile what reads sentences: the first document or streamed sentence would wait for it."""
    from cxr_jax.outputs import trace_sentences

    trace_sentences.read_trace("No effusion.", trace_sentences.find_words(model.folder))


def close_state(state: ServerState) -> None:
    """Stop the engine and close the store; whatever was admitted and not answered has been told so."""
    # In this order: the engine may still tell the store what it has finished.
    state.is_stopping = True
    state.engine.stop(timeout_s=_STOP_SECONDS)
    if state.store is not None:
        state.store.close()


def name_of(model: str) -> str:
    """What clients call the model: the last part of a folder's name, as text that fits a header and a URL."""
    name = as_utf8(Path(model).resolve().name if "/" in model or Path(model).is_dir() else model)
    return (
        "".join(sign if sign.isascii() and sign.isprintable() else "_" for sign in name) or "model"
    )


def capabilities_of(model: Any, *, is_phantom: bool) -> Capabilities:
    """What the model can do, as far as its files tell."""
    why_not = {}
    # The embedded one was trained on one film a prompt; published models read several.
    if is_phantom:
        why_not["several_images"] = "the phantom was trained on one film a prompt"
    try:
        model.answers  # noqa: B018  compiled on first use, which takes seconds
    except UserError as error:
        why_not["probabilities"] = str(error)
    return Capabilities(
        chat=True,
        several_images="several_images" not in why_not,
        probabilities="probabilities" not in why_not,
        why_not=why_not,
    )


# ---- Running ---------------------------------------------------------------------------------------


class RoomServer(uvicorn.Server):
    """uvicorn's server, which a signal ends in our order: admit nothing, end the streams, then close."""

    def __init__(self, uvicorn_settings: uvicorn.Config, begin_stop: Callable[[], None]) -> None:
        """Make a server; `begin_stop` is called once, on the loop, before connections are closed."""
        super().__init__(uvicorn_settings)
        self._begin_stop = begin_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGTERM and SIGINT, and do not raise them again at the end: a stop that was asked for exits with 0."""
        # In tests the server runs in another thread, where signals are not heard.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # The second signal does not wait for anybody.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the connections."""
        self._begin_stop()
        await super().shutdown(sockets)


def uvicorn_config(app: Any, limits: Limits | None = None) -> uvicorn.Config:
    """The settings of uvicorn: one worker, nothing about clients in logs, no names of software in headers."""
    return uvicorn.Config(
        app,
        access_log=False,  # it would log paths and addresses
        log_config=None,
        log_level=logging.CRITICAL,
        server_header=False,
        proxy_headers=False,  # whoever comes through a proxy is a stranger all the same
        ws="none",
        lifespan="off",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(_STOP_SECONDS),
        h11_max_incomplete_event_size=64 * 1024,
        # One more is answered at once with 503: a server that runs out of files answers nobody.
        limit_concurrency=(limits or Limits()).connections,
    )


def allow_files(connections: int) -> None:
    """Let the process open as many files as so many connections need, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _serve(state: ServerState, listener: socket.socket) -> int:
    """Run the loop until a signal, or until the engine has failed."""
    from cxr_jax.serve.app import create_app

    app = create_app(state)
    state.engine.start()

    def begin_stop() -> None:
        # From now on routes refuse, and every job of the engine ends with an event that tells its client.
        state.is_stopping = True
        threading.Thread(target=state.engine.stop, kwargs={"timeout_s": _STOP_SECONDS}).start()

    allow_files(state.settings.limits.connections)
    # The loop lives in this thread alone; the engine reaches it by call_soon_threadsafe.
    server = RoomServer(uvicorn_config(app, state.settings.limits), begin_stop)

    async def run() -> None:
        watcher = asyncio.create_task(_watch_engine(state, server))
        try:
            await server.serve(sockets=[listener])
        finally:
            watcher.cancel()

    # Returns when a signal has come and all connections are closed.
    asyncio.run(run())
    if state.engine.failure is not None:
        raise RunFailedError(f"the engine: {state.engine.failure}")
    print("stopped", flush=True)
    return 0


async def _watch_engine(state: ServerState, server: uvicorn.Server) -> None:
    """Say when the model is ready, and end a server whose engine has failed."""
    begun = asyncio.get_running_loop().time()
    was_ready = False
    while not state.is_stopping:
        if state.engine.failure is not None:
            server.should_exit = True
            return
        if state.engine.is_ready and not was_ready:
            was_ready = True
            seconds = asyncio.get_running_loop().time() - begun
            print(f"ready (programs compiled in {seconds:.0f} s)", file=sys.stdout, flush=True)
        await asyncio.sleep(_TICK_SECONDS)
