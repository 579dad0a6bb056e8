"""Say who is asking: a reader with a session, a program with an API key, or the one user of a server on loopback.

    POST /login {handle, password}   -> as /session, and the cookie; 401, or 429 after ten wrong passwords
    GET  /session                    -> {user, role, csrf, idle_s, sealing}; 401 without a login
    POST /logout

The cookie is HttpOnly and SameSite=Strict; every request that is no GET carries `X-CSRF-Token` as well. A server on
loopback whose store has no users asks nobody: all requests are those of the user `local`, with a token all the same,
since any page in a browser of this machine could send requests here. Every refusal is an event of the chain.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Body, Request, Response

from cxr_jax.errors import UserError
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.state import ServerSettings, ServerState
from cxr_jax.store import Store
from cxr_jax.store.records.actors import Actor
from cxr_jax.store.records.api_keys import ApiKey
from cxr_jax.store.records.sessions import IDLE, Session, is_csrf
from cxr_jax.store.records.users import LOCAL, TooManyTriesError, User

# One cookie, and no other state in the browser: a page that is closed leaves nothing to read.
COOKIE = "cxr_session"
CSRF_HEADER = "X-CSRF-Token"
# What these ask changes nothing that a forged request could use.
_SAFE_METHODS = ("GET", "HEAD")
# Refusals a minute that become events of their own; a flood of them must not become a flood of the chain.
_REFUSALS_A_MINUTE = 60
# Passwords that are checked or wait to be; so a flood of them, or of tries beside each other, stays small.
_LOG_INS = 8
# What proxies add for the server behind them. A proxy on this machine brings others there, and all of them seem to come
# from it; one that adds nothing has to be told by --public_host.
_PROXY_HEADERS = (
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)
# An event has an actor always; this one has no row among the users.
NOBODY = Actor("nobody", "none")


class Auth:
    """Who may do what on one server, as its store and its flags say; `ServerState.auth`."""

    def __init__(self, settings: ServerSettings, store: Store) -> None:
        self._settings, self._store = settings, store
        # Times of the refusals of the last minute, and how many more there were.
        self._recent: deque[float] = deque()
        self._unwritten = 0
        self._lock = threading.Lock()
        # Each waits for its turn at 64 MiB of hashing, on a thread of those that logged-in readers need.
        self._log_ins = threading.BoundedSemaphore(_LOG_INS)

    # ---- Who is asking -----------------------------------------------------------------------------------------------

    def is_open(self, request: Request) -> bool:
        """Return whether nobody is asked who they are: on loopback, without users or by `--no_auth`."""
        # Asked at each request: a user who is added while the server runs closes it at once.
        # Beyond this machine everybody is asked, whatever the flags say.
        if not is_from_here(self._settings, request):
            return False
        return self._settings.no_auth or not self._store.users.has_people()

    def session(self, request: Request) -> Session | None:
        """Return the session of a request, None of one from nobody."""
        if self.is_open(request):
            # The same after a restart, so that a page which is open goes on; no other site can read it.
            return Session(self._store.users.local(), self._store.opaque("csrf", LOCAL))
        token = request.cookies.get(COOKIE)
        return None if token is None else self._store.sessions.find(token)

    def user(self, request: Request, *roles: str) -> User:
        """Return who is asking.

        Args:
            request: with the session's cookie and, if it is no GET, its token.
            roles: that may ask; none named: all.

        Raises:
            RefusedError: 401 without a login, 403 without the token or the role.
        """
        session = self.session(request)
        if session is None:
            raise self.refused(request, 401, "log in first", reason="login")
        # The cookie goes along by itself, the token only if our own page sends it.
        if request.method not in _SAFE_METHODS:
            given = request.headers.get(CSRF_HEADER)
            if not is_csrf(session, given):
                raise self.refused(
                    request, 403, "the token is not the session's", user=session.user, reason="csrf"
                )
        # After the token: a forged request learns nothing about roles.
        if roles and session.user.role not in roles:
            raise self.refused(
                request, 403, f"for {' and '.join(roles)} only", user=session.user, reason="role"
            )
        return session.user

    def reader(self, request: Request) -> User:
        """Return who is asking, a reader; a dependency of FastAPI. Raises what `user` raises."""
        return self.user(request, "reader")

    def key(self, request: Request, scope: str, *, are_others: bool = False) -> ApiKey | None:
        """Return the API key that a request carries, None where none is asked for: on loopback without any keys.

        Args:
            request: with the key as clients of OpenAI's API send it.
            scope: that it needs.
            are_others: whether there are keys beside the store's, so that one is asked for in any case.

        Raises:
            RefusedError: 401 without a key that is one, 403 if it may not do this.
        """
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Clients of OpenAI's API always send some key: where none exist, any is as good as none.
        has_keys = are_others or self._store.api_keys.has_any()
        is_from_this_machine = is_from_here(self._settings, request)
        if scheme.lower() != "bearer" or not given.strip():
            if is_from_this_machine and (self._settings.no_auth or not has_keys):
                return None
            raise self.refused(request, 401, "an API key is needed", reason="key")
        key = self._store.api_keys.find(given.strip())
        if key is None and is_from_this_machine and not has_keys:
            return None
        if key is None:
            raise self.refused(request, 401, "no such API key", reason="key")
        # A key that may read may not make the machine compute.
        if scope not in key.scopes:
            raise self.refused(
                request, 403, f"the key has no scope {scope}", actor=key.actor, reason="scope"
            )
        return key

    def as_json(self, session: Session) -> dict[str, Any]:
        """Return what a page must know of its session.

        `idle_s` are the seconds after which a page without its reader empties itself, None where nobody logs in. With
        `sealing` it keeps what has not reached the server yet: the key is the user's, and no browser stores it.
        """
        user = session.user
        return {
            "user": user.handle,
            "role": user.role,
            "csrf": session.csrf,
            "idle_s": None if user.id == LOCAL else int(IDLE.total_seconds()),
            # HMACs of the store's own key: the same after a restart, and nobody else's.
            "sealing": {
                "tag": self._store.opaque("sealing tag", user.id)[:16],
                "key": self._store.opaque("sealing key", user.id),
            },
        }

    # ---- What is refused ---------------------------------------------------------------------------------------------

    def refused(
        self,
        request: Request,
        status: int,
        message: str,
        *,
        reason: str,
        user: User | None = None,
        actor: Actor | None = None,
        param: str | None = None,
        **facts: Any,
    ) -> RefusedError:
        """Put a refusal down in the chain and return it as the error to raise.

        Args:
            request: what is refused.
            status: of HTTP.
            message: for the client; nothing that it sent.
            reason: one word, for the event.
            user: who asked, if that is known.
            actor: the same, of a key.
            param: the field or header to blame.
            facts: of the event: ids and hashes alone.
        """
        # The path as the router knows it: the one that was sent may hold anything.
        route = request.scope.get("route")
        body = {
            "status": status,
            "reason": reason,
            "path": getattr(route, "path", ""),
            "method": request.method,
            **facts,
        }
        who = actor or (user.actor if user is not None else NOBODY)
        left_out = self._admit_event()
        if left_out is not None:
            # How many went unwritten before stands in the next one that is written.
            extra = {"unwritten_before": left_out} if left_out else {}
            self._store.append("refused", {**body, **extra}, **who.as_arguments())
        # The standard asks for it, and some clients then say what is missing.
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 and reason == "key" else None
        return RefusedError(status, message, param, headers=headers)

    def _admit_event(self) -> int | None:
        """Return how many refusals have gone unwritten before this one, None if this one is to go unwritten, too."""
        with self._lock:
            current_time = time.monotonic()
            # Those that are older than a minute no longer count.
            while self._recent and current_time - self._recent[0] > 60:
                self._recent.popleft()
            if len(self._recent) >= _REFUSALS_A_MINUTE:
                self._unwritten += 1
                return None
            self._recent.append(current_time)
            left_out, self._unwritten = self._unwritten, 0
            return left_out

    # ---- Passwords ---------------------------------------------------------------------------------------------------

    def log_in(self, request: Request, handle: str, password: str) -> tuple[str, Session]:
        """Return the token of a new session, for the cookie, and the session.

        Raises:
            RefusedError: 401 for a wrong password or handle, 429 after too many.
        """
        # Which handle was tried is in no event: people type their password into the wrong field.
        tried = self._store.opaque("handle", handle)
        if not self._log_ins.acquire(blocking=False):
            busy = {"Retry-After": "1"}
            raise RefusedError(429, "too many log in at once; try again", headers=busy)
        try:
            user = self._store.users.check(handle, password)
        except TooManyTriesError as error:
            refusal = self.refused(
                request, 429, "too many tries; wait", reason="tries", handle_ref=tried
            )
            refusal.headers["Retry-After"] = str(error.retry_after)
            raise refusal from None
        finally:
            self._log_ins.release()
        if user is None:
            raise self.refused(
                request, 401, "handle or password is wrong", reason="password", handle_ref=tried
            )
        # A new token each time: one that was set before the login is worth nothing.
        return self._store.sessions.begin(user)

    def check_again(self, request: Request, user: User, password: str | None) -> None:
        """See that whoever signs is who logged in; on a server that asks nobody there is no password.

        Raises:
            RefusedError: 403 without the right password, 429 after too many wrong ones.
        """
        # There is nothing to enter again.
        if user.id == LOCAL:
            return
        try:
            is_right = password is not None and self._store.users.check(user.handle, password)
        except TooManyTriesError as error:
            refusal = self.refused(request, 429, "too many tries; wait", reason="tries", user=user)
            refusal.headers["Retry-After"] = str(error.retry_after)
            raise refusal from None
        if not is_right:
            raise self.refused(
                request,
                403,
                "signing needs your password again",
                reason="password",
                user=user,
                param="password",
            )


def is_private(settings: ServerSettings) -> bool:
    """Return whether only people at this machine can come: on loopback, and no proxy brings others there."""
    # A proxy's visitors all seem to come from loopback; its name among the hosts says that there is one.
    return settings.is_loopback and not settings.public_hosts


def is_from_here(settings: ServerSettings, request: Request) -> bool:
    """Return whether a request comes from a person or a program at this machine, and through no proxy."""
    # The one place that says so: the open room, the API without keys and the metrics all stand on it.
    return is_private(settings) and not any(name in request.headers for name in _PROXY_HEADERS)


def check_start(settings: ServerSettings, store: Store | None) -> str | None:
    """Refuse to listen beyond this machine where anybody could come in; return a line to say at the start, if any.

    Raises:
        UserError: for `--host` or a proxy's name without users, keys or a key file, and for `--no_auth` with either.
    """
    # Said on the terminal, so that nobody believes a password to be asked for.
    if is_private(settings):
        if store is not None and not settings.no_auth and store.users.has_people():
            return None
        return (
            "no users: whoever uses this machine is the user `local`, a reader without a password"
        )
    # Before anything else: no flag opens a server to the network.
    if settings.no_auth:
        raise UserError("--no_auth: only on loopback, and not with --public_host")
    has_keys = settings.api_key_file is not None or (store is not None and store.api_keys.has_any())
    if not has_keys and (store is None or not store.users.has_people()):
        raise UserError(
            f"--host={settings.host}: beyond this machine (also by --public_host) users or API keys are needed first "
            "(python -m cxr_jax.store users add)"
        )
    return None


# ---- Dependencies of routes ------------------------------------------------------------------------------------------


def _auth(request: Request) -> Auth:
    # From the request, so that one function serves every router.
    auth = request.app.state.server.auth
    if auth is None:
        raise RefusedError(503, "this server keeps nothing: it was started without a store")
    # A router that is tried alone may have put something else there.
    assert isinstance(auth, Auth)
    return auth


def anyone(request: Request) -> User:
    """Return who is asking, whatever the role; a dependency of FastAPI."""
    return _auth(request).user(request)


def reader(request: Request) -> User:
    """Return who is asking, a reader; a dependency of FastAPI."""
    return _auth(request).user(request, "reader")


def allowed(*roles: str) -> Callable[[Request], User]:
    """Return a dependency that lets these roles by."""

    def dependency(request: Request) -> User:
        return _auth(request).user(request, *roles)

    return dependency


def router(state: ServerState) -> APIRouter:
    """Make the routes of logging in and out."""
    routes = APIRouter()

    @routes.post("/login")
    def log_in(
        request: Request,
        response: Response,
        handle: str = Body(max_length=200),
        password: str = Body(max_length=1000),
    ) -> dict[str, Any]:
        """Begin a session."""
        auth = _auth(request)
        token, session = auth.log_in(request, handle, password)
        response.set_cookie(
            COOKIE,
            token,
            httponly=True,
            samesite="strict",
            path="/",
            # Over plain HTTP on loopback a Secure cookie would not come back; a proxy says what it speaks.
            secure="https" in (request.url.scheme, request.headers.get("X-Forwarded-Proto")),
        )
        return auth.as_json(session)

    @routes.get("/session")
    def session(request: Request) -> dict[str, Any]:
        """Say who is asking, and the token that other requests carry."""
        auth = _auth(request)
        found = auth.session(request)
        # No event: a page that is opened asks this first, and it is no attempt at anything.
        if found is None:
            raise RefusedError(401, "log in first")
        return auth.as_json(found)

    @routes.post("/logout", status_code=204)
    def log_out(request: Request, response: Response) -> None:
        """End the session."""
        auth = _auth(request)
        # With the token: another site could log people out otherwise.
        auth.user(request)
        state.store.sessions.end(request.cookies.get(COOKIE, ""))
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")

    return routes
