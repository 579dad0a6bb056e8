"""Films that readers upload, over HTTP: one file of a form, told by its bytes, never by its name."""

from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from cxr_jax.data import radiograph
from cxr_jax.errors import UserError
from cxr_jax.serve import auth
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.room import access
from cxr_jax.serve.room.films import Films, find_film, shelf_of
from cxr_jax.serve.state import ServerState

__all__ = ["Films", "find_film", "read_upload", "reader_of", "router", "shelf_of"]


async def read_upload(request: Request, most_bytes: int) -> bytes:
    """Read the one file `file` of a multipart body. Its name is never looked at.

    Raises:
        RefusedError: for a body that is not such a form, or a file that is too large.
    """
    no_form = RefusedError(400, "send the film as multipart/form-data, in the field `file`", "file")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise no_form
    # One file and no other field: nothing else of a form is looked at, so nothing else is taken.
    try:
        form = await request.form(max_files=1, max_fields=0, max_part_size=2**16)
    except (HTTPException, KeyError, UnicodeError):
        raise RefusedError(400, "the form is damaged or holds more than a file", "file") from None
    try:
        upload = form.get("file")
        # A field without a file's name is a text, and no film.
        if upload is None or isinstance(upload, str):
            raise no_form
        # The guard of bodies has counted the form; a film itself has a round limit.
        content = await upload.read(most_bytes + 1)
    finally:
        await form.close()
    if len(content) > most_bytes:
        raise RefusedError(413, f"an image may have {most_bytes // 2**20} MiB at most", "file")
    return content


def reader_of(state: ServerState) -> Any:
    """Give the dependency that says who is asking; without a store everybody at this machine is one reader."""

    def nobody(request: Request) -> None:
        access.check_private(state, request)

    return Depends(nobody if state.auth is None else auth.reader)


def router(state: ServerState) -> APIRouter:
    """Make the routes of images: upload and description."""
    routes = APIRouter()
    reader = reader_of(state)
    most_bytes = state.settings.limits.upload_bytes

    @routes.post("/room/images", status_code=201)
    async def upload(request: Request, user: Any = reader) -> Any:
        content = await read_upload(request, most_bytes)
        # Before any library looks at it.
        if not radiograph.may_be_picture(content):
            raise RefusedError(415, radiograph.NO_PICTURE, "file")
        # Decoding takes seconds: in a thread, or every other client would wait.
        try:
            return await run_in_threadpool(access.keep_film, state, user, content)
        except UserError as error:
            raise RefusedError(400, str(error), "file") from None

    @routes.get("/room/images/{digest}/info")
    def info(request: Request, digest: str, user: Any = reader) -> Any:
        return access.film_of(state, request, user, digest)

    return routes
