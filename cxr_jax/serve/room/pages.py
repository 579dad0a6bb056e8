"""The pages of the reading room and their files: HTML, scripts and styles from this package, nothing from elsewhere.

Every file stands at an address that holds the hash of all of them, so a browser may keep them for ever and a new
version is a new address; modules name each other by relative addresses, so nothing is rewritten but the pages.
"""

import functools
import hashlib
import html
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from cxr_jax.outputs import sections
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.state import ServerState

FOLDER = Path(__file__).parents[1] / "static"
_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOR_EVER = "public, max-age=31536000, immutable"


@functools.cache
def load_static() -> dict[str, bytes]:
    """Read every file of the pages, by name. Nobody may change what this returns."""
    return {file.name: file.read_bytes() for file in sorted(FOLDER.iterdir()) if file.is_file()}


@functools.cache
def static_address() -> str:
    """Give the address that all files of the pages stand below."""
    # Names and lengths count, too: two files cannot trade their ends.
    digest = hashlib.sha256()
    for name, content in load_static().items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"/static/{digest.hexdigest()[:16]}"


def page(name: str) -> HTMLResponse:
    """Make the answer that is a page: its file, with the address of its scripts and the notice filled in.

    Args:
        name: of a file of the folder; never from a client.
    """
    # Two placeholders and no template language: a page has no other part that changes.
    text = load_static()[name].decode()
    text = text.replace("{{static}}", static_address())
    text = text.replace("{{notice}}", html.escape(NOT_FOR_DIAGNOSIS))
    return HTMLResponse(text)


def describe_room(state: ServerState) -> dict[str, Any]:
    """Say what the page must know of the server: its model, what that can do, how large a film may be."""
    # Nothing of a film or a reader: the login page asks for this, too.
    capabilities = state.capabilities
    return {
        "notice": NOT_FOR_DIAGNOSIS,
        "model": state.model_name,
        "weights_sha256": state.weights_sha256,
        # What the model was not trained for, the page does not offer, and says why.
        "chat": capabilities.chat,
        "why_no_chat": capabilities.why_not.get("chat"),
        "keeps": state.store is not None,
        # Whether the operator has named any; which, only a reader is told.
        "archives": _has_archives(state),
        "most_bytes": state.settings.limits.upload_bytes,
        # The form of every report, in its order, and what its "normal" key writes.
        "fields": sections.FIELDS,
        "normal": sections.NORMAL,
    }


def _has_archives(state: ServerState) -> bool:
    # A study sends nothing anywhere, and its server starts without the JAX that what is sent is made with.
    if state.settings.study is not None:
        return False
    from cxr_jax.serve.room import pacs

    return pacs.has_archives(state)


def router(state: ServerState) -> APIRouter:
    """Make the routes of pages and their files. Pages hold no data, so they need no login."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    def room(request: Request) -> Response:
        # Without a session the page could only say so: whoever comes is led to the login at once.
        if state.auth is not None and state.auth.session(request) is None:
            return RedirectResponse("/login", 303)
        return page("room.html")

    # The same for everybody: whether a name exists is said by no page.
    @routes.get("/login", include_in_schema=False)
    def login() -> Response:
        return page("login.html")

    # Once, when a page is opened: what it says does not change while a server runs.
    @routes.get("/room/about")
    def about() -> dict[str, Any]:
        return describe_room(state)

    @routes.get("/static/{digest}/{name}", include_in_schema=False)
    def static(digest: str, name: str) -> Response:
        # Looked up in what was read at start: no path is made of what a client sends.
        content = load_static().get(name)
        kind = _TYPES.get(Path(name).suffix)
        # An old address is none: its page would run one version's scripts with another's.
        if content is None or kind is None or not static_address().endswith(f"/{digest}"):
            raise RefusedError(404, "no such file")
        return Response(content, media_type=kind, headers={"Cache-Control": _FOR_EVER})

    return routes
