"""A server of the reading room for tests: the real films, pixels and pages, a model and readings that are made up.

What it makes up follows the contract of `cxr_jax.serve.room.readings` and `reports`; a test may give it any trace,
hostile ones included.
"""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI

from cxr_jax.serve.app import _add_error_handlers
from cxr_jax.serve.limits import BodyGuard, Limits
from cxr_jax.serve.room import images, pages, pixels
from cxr_jax.serve.security import SecurityGuard
from cxr_jax.serve.state import Capabilities, ServerSettings


def make_state(tmp_folder, limits=None, **changes):
    settings = ServerSettings(store=str(tmp_folder), limits=limits or Limits())
    fields = dict(
        settings=settings,
        engine=None,
        model=None,
        model_name="stub",
        weights_sha256="0" * 64,
        capabilities=Capabilities(),
        metrics=None,
        store=SimpleNamespace(folder=tmp_folder),
        auth=None,
        films=None,
        is_stopping=False,
    )
    return SimpleNamespace(**(fields | changes))


def app_of(state, *routers):
    """The room's films and pages, and whatever else a test brings, behind the server's own guards."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = state
    for module in (images, pixels, pages):
        app.include_router(module.router(state))
    for router in routers:
        app.include_router(router)
    _add_error_handlers(app)
    app.add_middleware(BodyGuard, limits=state.settings.limits)
    app.add_middleware(SecurityGuard, settings=state.settings)
    return app


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def served(app):
    """Run an application on loopback; gives its address."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
