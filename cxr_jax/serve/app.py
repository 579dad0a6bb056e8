"""The web application: all routers of the reading room, one set of guards, one form of errors."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cxr_jax.errors import UserError, printable
from cxr_jax.serve import auth, capture_routes
from cxr_jax.serve.limits import BodyGuard
from cxr_jax.serve.metrics import RequestMeter
from cxr_jax.serve.openai import routes
from cxr_jax.serve.refusals import RefusedError, error_response
from cxr_jax.serve.room import images, pacs, pages, pixels, readings, reports
from cxr_jax.serve.security import SecurityGuard
from cxr_jax.serve.state import ServerState

_LOG = logging.getLogger(__name__)

# Each has `router(state) -> APIRouter`. By imports, so that one that fails does not go unnoticed.
_ROUTERS = (
    # ---- For programs, and for operators ----
    routes,
    # ---- For readers ----
    auth,
    images,
    pixels,
    pages,
    readings,
    reports,
    pacs,
    # ---- Beside the room ----
    capture_routes,
)


def create_app(state: ServerState) -> FastAPI:
    """Make the application of one server.

    Args:
        state: what its routers share; the engine may still be warming up.
    """
    # No pages of FastAPI's own: they fetch scripts from a CDN, which the policy forbids.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # For dependencies that see the request alone, such as who is asking.
    app.state.server = state
    # No two of them have a path in common, so their order is of no account.
    for module in _ROUTERS:
        app.include_router(module.router(state))
    add_error_handlers(app)
    # The last one added stands outermost: foreign hosts are refused before a body is looked at.
    app.add_middleware(BodyGuard, limits=state.settings.limits)
    app.add_middleware(SecurityGuard, settings=state.settings)
    app.add_middleware(RequestMeter, metrics=state.metrics)
    return app


# ---- Errors ----------------------------------------------------------------------------------------


def add_error_handlers(app: FastAPI) -> None:
    """Give every error one of the two forms, and nobody a traceback."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return error_response(error, request.url.path)

    # What the readers of images and texts refuse is the client's to mend.
    async def bad_input(request: Request, error: Exception) -> Response:
        return error_response(RefusedError(400, printable(error)), request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        # Where it is and what is wrong with it, but not what it is: pydantic would repeat the client's input.
        place = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(RefusedError(400, str(first["msg"]), place), request.url.path)

    # A path that is not there, a method that a path does not have.
    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = RefusedError(
            error.status_code, str(error.detail), headers=dict(error.headers or {})
        )
        return error_response(refusal, request.url.path)

    async def unforeseen(request: Request, error: Exception) -> Response:
        # The type alone: a message could hold what a client sent.
        _LOG.error("a request failed: %s", type(error).__name__)
        failure = RefusedError(500, "the server failed on this request")
        return error_response(failure, request.url.path)

    # From the most special to the rest; FastAPI looks for the nearest class.
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(UserError, bad_input)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, unforeseen)
