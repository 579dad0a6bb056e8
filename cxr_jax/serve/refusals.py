"""What a request is refused with: one exception for all routers, and the two forms in which a client sees it.

Under /v1 errors have OpenAI's form, {"error": {"message", "type", "param", "code"}}; elsewhere {"error": {"message",
"param"}}. A message is one line and never holds what the client sent: a body may hold patient data, and errors are
logged by clients.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cxr_jax.errors import UserError, printable

_LOG = logging.getLogger(__name__)

# What OpenAI's clients and its documentation call the kinds of errors.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class RefusedError(HTTPException):
    """A request that is not served; any router may raise it, `add_error_handlers` turns it into the answer.

    Attributes:
        status: of HTTP, 4xx or 503.
        message: one line for the client, without anything that it sent.
        param: the field, header or parameter that is to blame, or None.
        code: a word for programs, such as "model_not_found", or None.
        headers: beside the answer's own, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Name what is wrong."""
        # FastAPI lets exceptions of this class alone out of its reading of a body; all others become 400.
        super().__init__(status, message)
        self.status, self.message, self.param = status, message, param
        self.code = code
        self.headers: dict[str, str] = dict(headers or {})


def error_body(error: RefusedError, *, is_openai: bool) -> dict[str, Any]:
    """Give the JSON of an error, in OpenAI's form or in that of the room."""
    # The page reads two fields, and shows the first; it needs no kinds of errors.
    if not is_openai:
        return {"error": {"message": error.message, "param": error.param}}
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, "server_error"),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: RefusedError, path: str) -> JSONResponse:
    """Make the answer; the path decides the form."""
    # The path alone decides, so that a refusal before any route has the right form, too.
    # Clients of OpenAI's API read errors of every path below this one.
    is_openai = path == "/v1" or path.startswith("/v1/")
    return JSONResponse(
        error_body(error, is_openai=is_openai), status_code=error.status, headers=error.headers
    )


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
