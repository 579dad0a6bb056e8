"""The web application: all routers of the reading room, one set of guards, one form of errors."""

from fastapi import FastAPI

from cxr_jax.serve import auth, capture_routes
from cxr_jax.serve.limits import BodyGuard
from cxr_jax.serve.metrics import RequestMeter
from cxr_jax.serve.openai import routes
from cxr_jax.serve.refusals import add_error_handlers
from cxr_jax.serve.room import images, pacs, pages, pixels, readings, reports
from cxr_jax.serve.security import SecurityGuard
from cxr_jax.serve.state import ServerState

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
