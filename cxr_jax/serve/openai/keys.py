"""Who calls the API: keys from a file or from the store, and nobody at all on loopback."""

import hashlib
import hmac
import stat
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request

from cxr_jax.errors import UserError
from cxr_jax.serve.auth import is_from_here
from cxr_jax.serve.refusals import RefusedError
from cxr_jax.serve.state import ServerState

SCOPES = ("chat", "read")
LOCAL = "local"  # programs of this machine, which nobody asks for a key
_LEAST_KEY = 16  # characters
_MOST_KEYS = 10_000


class Caller(NamedTuple):
    """Who calls, as far as limits need to know: the hash of a key, or the address of this machine's programs."""

    name: str
    scopes: tuple[str, ...]


def read_key_file(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a file of keys: one a line, then optionally a blank and its scopes (chat,read); # begins a remark.

    Returns:
        SHA-256 of each key -> its scopes: the keys themselves are not kept.

    Raises:
        UserError: for a file that others can read or write, or with a line that is none; a line is named by its
            number only.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"--api_key_file={path}: cannot be read ({reason})") from None
    # Whoever can read it has its keys, and whoever can write it lets himself in. A group may read: so a file of the
    # administrator's is given to a service.
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise UserError(
            f"--api_key_file={path}: others may read or write this file (chmod 600, or 640 for a service's group)"
        )
    # A line is named by its number alone: it may hold a key that is nearly right.
    keys: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        scopes = tuple(words[1].split(",")) if len(words) > 1 else SCOPES
        if len(words) > 2 or len(words[0]) < _LEAST_KEY or not set(scopes) <= set(SCOPES):
            raise UserError(
                f"--api_key_file={path}: line {number} is no key of at least {_LEAST_KEY} characters, "
                f"with scopes of {', '.join(SCOPES)}"
            )
        keys[_hash(words[0])] = scopes
    if not 0 < len(keys) <= _MOST_KEYS:
        raise UserError(f"--api_key_file={path}: holds {len(keys)} keys")
    return keys


class KeyRing:
    """All keys of a server, and the rule for callers without one."""

    def __init__(self, state: ServerState) -> None:
        """Read the key file. Raises UserError, as `read_key_file`."""
        self.state = state
        path = state.settings.api_key_file
        self.keys = read_key_file(path) if path is not None else {}

    def caller(self, request: Request, scope: str) -> Caller:
        """Say who calls.

        Raises:
            RefusedError: 401 without a known key where one is needed, 403 if the key is for other things.
        """
        settings, auth = self.state.settings, self.state.auth
        is_here = is_from_here(settings, request)
        token = _bearer(request)
        # A key that is known counts for what it may do, on loopback, too.
        known = self._find(token) if token else None
        if known is not None:
            if scope not in known.scopes:
                raise RefusedError(403, f"this key is not for {scope}", code="insufficient_scope")
            return known
        # Those of the store count beside a file's; their refusals are events of its chain.
        if auth is not None:
            key = auth.key(request, scope, are_others=bool(self.keys))
            return Caller(LOCAL, SCOPES) if key is None else Caller(f"key:{key.name}", key.scopes)
        # Programs of this machine need none, unless somebody has made keys.
        if is_here and (settings.no_auth or not self.keys):
            return Caller(LOCAL, SCOPES)
        raise RefusedError(
            401,
            "no API key, or one that is not known: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def may_see_metrics(self, request: Request) -> bool:
        """Whether figures may be shown: to programs of this machine, and to whoever has a key to read."""
        # Not by the address alone: behind a proxy everybody comes from this machine.
        if is_from_here(self.state.settings, request):
            return True
        # From elsewhere only with a key, even where the rest needs none.
        try:
            return self.caller(request, "read").name != LOCAL
        except RefusedError:
            return False

    def _find(self, token: str | None) -> Caller | None:
        if not token:
            return None
        digest = _hash(token)
        # All of them are compared, each in constant time: how long it takes tells nothing.
        scopes: tuple[str, ...] | None = None
        for known, its_scopes in self.keys.items():
            if hmac.compare_digest(known, digest):
                scopes = its_scopes
        return None if scopes is None else Caller(digest[:16], scopes)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _bearer(request: Request) -> str | None:
    # Two words; anything else is no key, and is told as a missing one.
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip() else None
