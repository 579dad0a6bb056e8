"""A server of one reader study and of nothing else: no model, no engine, since a study's readings are frozen.

    python -m cxr_jax.serve.study_server STUDY [--port=0] [--host=127.0.0.1] [--public_host=NAME]

`python -m cxr_jax.serve --store=FOLDER --study=NAME` is the same server. A study is never served beside the room: who
could ask the model in another tab would have no arm without it.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence

from fastapi import FastAPI, Response
from starlette.responses import RedirectResponse

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import exit_code, printable
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.serve import auth, study_routes
from cxr_jax.serve.limits import BodyGuard
from cxr_jax.serve.metrics import Metrics
from cxr_jax.serve.refusals import add_error_handlers
from cxr_jax.serve.room import pages
from cxr_jax.serve.security import SecurityGuard
from cxr_jax.serve.server import (
    RoomServer,
    allow_files,
    bind,
    check_settings,
    url_of,
    uvicorn_config,
)
from cxr_jax.serve.state import Capabilities, ServerSettings, ServerState
from cxr_jax.store import Store, open_store
from cxr_jax.study.folder import StudyFolder


def study_state(settings: ServerSettings, store: Store) -> ServerState:
    """Make the state of a server without a model."""
    state = ServerState(
        settings=settings,
        engine=None,
        model=None,
        model_name="none",
        weights_sha256="",
        capabilities=Capabilities(),
        metrics=Metrics(),
        store=store,
    )
    # The room's own log-in: a reader has one password for both.
    state.auth = auth.Auth(settings, store)
    return state


def create_study_app(state: ServerState) -> FastAPI:
    """Make the application: log-in, pages and the study, behind the room's guards."""
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    application.state.server = state

    # No room and no API: nothing here could read a film by a model.
    @application.get("/", include_in_schema=False)
    def front() -> Response:
        """Lead to the study: this server has no room."""
        return RedirectResponse("/study")

    for module in (auth, pages, study_routes):
        application.include_router(module.router(state))

    @application.get("/ready")
    def ready() -> dict[str, str]:
        """Say that it answers; there is nothing to load."""
        return {"status": "ready"}

    add_error_handlers(application)
    # The last one added stands outermost, as in the room.
    application.add_middleware(BodyGuard, limits=state.settings.limits)
    application.add_middleware(SecurityGuard, settings=state.settings)
    return application


def serve(settings: ServerSettings) -> int:
    """Serve the study that the settings name until a signal comes; return 0 then.

    Raises:
        UserError: for flags that have no meaning here, a port that is taken, a store without that study.
    """
    check_settings(settings)
    # A taken port is told before the store is locked.
    listener = bind(settings.host, settings.port)
    with contextlib.closing(listener), contextlib.closing(open_store(str(settings.store))) as store:
        if remark := auth.check_start(settings, store):
            print(remark)
        state = study_state(settings, store)
        application = create_study_app(state)

        def begin_stop() -> None:
            state.is_stopping = True

        print(NOT_FOR_DIAGNOSIS)
        # Programs that start this server wait for the address.
        print(f"{url_of(settings, listener)}  study {printable(settings.study or '')}", flush=True)
        allow_files(settings.limits.connections)
        # As the room: no access log, since paths hold ids of tasks, and no traceback, which may hold an answer.
        server = RoomServer(uvicorn_config(application, settings.limits), begin_stop)
        asyncio.run(server.serve(sockets=[listener]))
    print("stopped", flush=True)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.serve.study_server", description=__doc__)
    parser.add_argument("study", metavar="STUDY", help="its folder, or the URL of its database")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument(
        "--public_host",
        action="append",
        default=[],
        help="a name by which readers' machines know this server; any number of times",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def action() -> int:
        args = parse_args(argv)
        folder = StudyFolder.at(args.study)
        settings = ServerSettings(
            host=args.host,
            port=args.port,
            store=folder.store_place,
            study=folder.protocol.name,
            public_hosts=tuple(args.public_host),
        )
        return serve(settings)

    return exit_code(action, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
