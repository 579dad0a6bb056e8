"""Who may talk to the server, as far as headers tell, and what browsers are told about its pages. ASGI middleware.

A server on loopback is reached by every page in a browser of this machine: through a name that an attacker points at
127.0.0.1 (the Host header tells), or by forms and scripts of other sites (the Origin header tells).
"""

from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr_jax.serve.refusals import RefusedError, error_response
from cxr_jax.serve.state import LOOPBACK_HOSTS, ServerSettings

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "media-src 'self' blob:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'self'",
    )
)
# Of every answer; a route may replace Cache-Control alone, for hashed static files.
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=(), payment=(), usb=()",
}
_SAFE_METHODS = ("GET", "HEAD")


class SecurityGuard:
    """Refuses foreign hosts and origins, and adds the headers to every answer."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        """Stand before an application; `settings` has the names that clients may use."""
        self.app = app
        names = (*LOOPBACK_HOSTS, "[::1]", settings.host, *settings.public_hosts)
        self.hosts = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and send the answer with the headers."""
        if scope["type"] == "websocket":
            # Nothing here speaks it: without this line a router would answer with a bare 403.
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._why_refused(scope)
        if refused is not None:
            await error_response(refused, scope["path"])(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _why_refused(self, scope: Scope) -> RefusedError | None:
        # Two Host headers are read differently by different proxies: neither is believed.
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or _host_name(hosts[0]) not in self.hosts:
            return RefusedError(421, "the Host header names another server", "Host")
        # No name here has one, and PostgreSQL fails on it wherever it becomes part of a question.
        if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
            return RefusedError(400, "the address holds a NUL")
        # A form of another site is sent with its Origin; programs that are no browsers send none.
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if origins and scope["method"] not in _SAFE_METHODS and not _is_same(origins, hosts[0]):
            return RefusedError(403, "the Origin header names another site", "Origin")
        # Browsers say it of every request: even a GET of another site's page is none of ours.
        sites = [value for name, value in scope["headers"] if name == b"sec-fetch-site"]
        if scope["method"] not in _SAFE_METHODS and sites and sites[0] in (b"cross-site",):
            return RefusedError(403, "the request comes from another site", "Sec-Fetch-Site")
        return None


def _host_name(header: bytes) -> str:
    """The name in a Host header, without its port, in lower case."""
    # A header is bytes; latin-1 reads any of them, and no name that is allowed has more than ASCII.
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):  # an address of IPv6 has colons of its own
        return text.partition("]")[0] + "]"
    return text.partition(":")[0]


def _is_same(origins: list[bytes], host: bytes) -> bool:
    """Whether an Origin is the host that was asked, port included."""
    # Two of them come from no browser.
    if len(origins) != 1:
        return False
    try:
        origin = urlsplit(origins[0].decode("latin-1"))
    except ValueError:  # brackets that are no address
        return False
    return (
        origin.scheme in ("http", "https")
        and origin.netloc.lower() == host.decode("latin-1").strip().lower()
    )
