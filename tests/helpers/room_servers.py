"""Servers of the reading room for tests: of a scripted engine, which start at once, or of any other state."""

import asyncio
import contextlib
import functools
import threading
import time
from types import SimpleNamespace

from scripted_engine import ScriptedEngine

import cxr_jax
from cxr_jax.models import tokenizer
from cxr_jax.serve.app import create_app
from cxr_jax.serve.metrics import Metrics
from cxr_jax.serve.server import RoomServer, bind, uvicorn_config
from cxr_jax.serve.state import Capabilities, ServerSettings, ServerState


@contextlib.contextmanager
def running(state):
    """Serve a state on a free port of loopback, in a thread; yields its URL without the last slash."""
    listener = bind("127.0.0.1", 0)

    def begin_stop():
        state.is_stopping = True
        state.engine.stop(timeout_s=5)

    server = RoomServer(uvicorn_config(create_app(state), state.settings.limits), begin_stop)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    port = listener.getsockname()[1]
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


class ScriptedModel:
    """What routes read of a model: a config, and the embedded model's tokenizer once somebody asks for it."""

    folder = None
    config = SimpleNamespace(text=SimpleNamespace(max_position_embeddings=4096))

    @functools.cached_property
    def tokenizer(self):
        return tokenizer.load(str(cxr_jax.asset("phantom")))


def scripted_state(engine=None, capabilities=None, **settings):
    """A state whose engine says what is written down."""
    engine = engine or ScriptedEngine()
    metrics = Metrics()
    metrics.watch_engine(engine.counts)
    return ServerState(
        settings=ServerSettings(port=0, **settings),
        engine=engine,
        model=ScriptedModel(),
        model_name="phantom",
        weights_sha256="0" * 64,
        capabilities=capabilities or Capabilities(chat=True),
        metrics=metrics,
    )
