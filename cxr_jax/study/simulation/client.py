"""A simulated reader's browser, as far as the server can see it: HTTP, and whatever a network does to it."""

import contextlib
import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cxr_jax.errors import RunFailedError

_PATIENCE_S, _AGAIN_S = 180.0, 0.1
_BUSY = 429  # too many at once, to be asked again


class Address(Protocol):
    """Where a server is; it may be away for a while."""

    port: int
    is_lost: bool


class Refused(Exception):  # noqa: N818  a fact of a simulation, not an error of this program
    """An answer of 4xx."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(status)
        self.status, self.error = status, error


def _nobody() -> None:
    """Count nothing."""


class Client:
    """One reader's connection to the server.

    Attributes:
        counts: what went wrong, by name.
        cuts: answers that did not come, because the server was killed or the connection broke.
        received: paths and bytes that came back, headers included, if `keeps_bytes`; a test looks into them.
    """

    def __init__(
        self, server: Address, chance: random.Random, answered: Callable[[], None] = _nobody
    ) -> None:
        """Begin without a session.

        Args:
            answered: called after each answer of 2xx.
        """
        self._server, self._chance, self._answered = server, chance, answered
        self._headers: dict[str, str] = {"Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self.counts: Counter[str] = Counter()
        self.cuts = 0
        self.received: list[tuple[str, bytes]] = []
        self.keeps_bytes = False

    def log_in(self, handle: str, password: str) -> None:
        """Begin a session."""
        status, headers, answer = self._insist(
            "POST", "/login", {"handle": handle, "password": password}
        )
        if status != 200:
            raise RunFailedError(f"simulate: the log-in was refused with {status}")
        # As a browser: the cookie by itself, the token by the page.
        self._headers["Cookie"] = headers["Set-Cookie"].partition(";")[0]
        self._headers["X-CSRF-Token"] = json.loads(answer)["csrf"]

    def get(self, path: str) -> Any:
        """Ask, and again until there is an answer."""
        return self._call("GET", path, None)

    def post(
        self, path: str, content: Mapping[str, Any], loss: float = 0.0, twice: float = 0.0
    ) -> Any:
        """Send, perhaps lose the answer and send again, perhaps send twice although it arrived.

        Raises:
            Refused: for an answer of 4xx.
        """
        # The server may have done it all and the answer be lost: the key makes that harmless.
        if self._chance.random() < loss:
            self._send_and_hang_up(path, content)
        answer = self._call("POST", path, content)
        if self._chance.random() < twice:
            self.counts["double posts"] += 1
            again = self._call("POST", path, content)
            # Whoever sends twice is answered twice, and counted once.
            if again != answer:
                raise RunFailedError("simulate: a request that came twice was answered otherwise")
        return answer

    def _send_and_hang_up(self, path: str, content: Mapping[str, Any]) -> None:
        """Send a request whole and close the connection before its answer."""
        self.counts["lost connections"] += 1
        self.close()
        # A connection of its own, which nobody reads from.
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", path, json.dumps(content), self._headers)
        connection.close()

    def _call(self, method: str, path: str, content: Mapping[str, Any] | None) -> Any:
        status, _, answer = self._insist(method, path, content)
        # No simulation may excuse a server's own error.
        if status >= 500:
            raise RunFailedError(f"simulate: {method} {path.split('/')[-1]} failed with {status}")
        if status >= 400:
            raise Refused(status, json.loads(answer)["error"])
        self._answered()
        return answer if path.endswith("/pixels") else json.loads(answer)

    def _insist(
        self, method: str, path: str, content: Mapping[str, Any] | None
    ) -> tuple[int, Any, bytes]:
        """Send until there is an answer: a page would keep what it has and try again, too."""
        until = time.monotonic() + _PATIENCE_S
        while not self._server.is_lost and time.monotonic() < until:
            try:
                answer = self._exchange(method, path, content)
                if answer[0] != _BUSY:
                    return answer
            except (OSError, http.client.HTTPException):
                # The server was killed, or the network is gone.
                self.close()
                self.cuts += 1
                self.counts["retries"] += 1
            time.sleep(_AGAIN_S)
        raise RunFailedError("simulate: the server does not come back")

    def _exchange(
        self, method: str, path: str, content: Mapping[str, Any] | None
    ) -> tuple[int, Any, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                "127.0.0.1", self._server.port, timeout=30
            )
        text = None if content is None else json.dumps(content)
        self._connection.request(method, path, text, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        if self.keeps_bytes:
            self.received.append((path, str(response.headers).encode() + answer))
        return response.status, response.headers, answer

    def close(self) -> None:
        """Let the connection go."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
