"""Traces written by a model behind an OpenAI-compatible endpoint (`/v1/chat/completions`), read back like any other.

Reports are patient data: by default they go to this machine only. Whatever answers is not trusted: it may be late,
huge, broken, or say what is not so.
"""

import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from cxr_jax.data.traces import tour
from cxr_jax.data.traces.rows import Case, Written
from cxr_jax.errors import RunFailedError, UserError, shown

MAX_ANSWER = 1 << 20  # bytes of a response
_MAX_IN_A_ROW = 5  # requests that get no answer at all, before the run is given up
_ATTEMPTS = 3  # for one answer, where a server is busy or cannot be reached
_WAIT = 0.5  # seconds before the second attempt; twice that before the third
_TOKENS = 2048
# What a server may answer that has no time now.
_BUSY = (408, 425, 429, 500, 502, 503, 504)
# A key that a header can hold.
_SECRET = re.compile(r"[\x21-\x7e]+")

# What verify.py asks of a trace, said to a model.
_SYSTEM = (
    "You rewrite the sentences of a chest X-ray report as a radiologist's systematic reading. Use only these parts, in "
    f"this order, each once, as 'Name: sentences', and leave out those of which nothing is said: {', '.join(tour.TOUR)}"
    ". Write one sentence for each sentence that is given, with its own words; you may leave words out or change their "
    "order. Add nothing: no finding, no side, no size, no number, no comparison, no degree of certainty, and no "
    "statement that anything is normal which is not given. Keep every denial and every hedge. Sentences of the "
    "impression are the Summary. Answer with the text alone."
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where traces are asked for.

    Attributes:
        url: of the server, up to `/v1`, or of its `chat/completions`.
        model: the name of the model there.
        timeout: seconds that one answer may take in all.
        parallel: requests at a time.
        key_variable: the environment variable that holds a key, if one is needed.
        allow_remote: whether the server may be another machine.
    """

    url: str
    model: str
    timeout: float = 120.0
    parallel: int = 1
    key_variable: str | None = None
    allow_remote: bool = False


class _NoAnswerError(Exception):
    """There is no answer; the message says why, in words that hold none of it."""


class _BusyError(_NoAnswerError):
    """Likewise, and another attempt may get one."""


class _SilentError(_BusyError):
    """Likewise, and nobody has answered at all."""


# ---- The address ---------------------------------------------------------------------------------------------------


def check(endpoint: Endpoint) -> str | None:
    """Look at the address before any report is read.

    Returns:
        A warning for a server that is another machine; None for this one.

    Raises:
        UserError: for what is no address, and for another machine that is not allowed.
    """
    address = _split(endpoint)
    _key(endpoint)
    if is_loopback(address.hostname or ""):
        return None
    host_name = shown(address.hostname)
    if not endpoint.allow_remote:
        raise UserError(
            f"--endpoint: {host_name} is not this machine, and reports are patient data; "
            "--allow_remote sends them there"
        )
    return (
        f"warning: report text is sent to {host_name}: data use agreements (PhysioNet's for MIMIC-CXR, among others) "
        "forbid third parties that they do not name"
    )


def is_loopback(host_name: str) -> bool:
    """Whether a host is this machine by its name alone: localhost, 127.0.0.0/8 or ::1. No name is looked up."""
    if host_name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host_name).is_loopback
    except ValueError:
        return False


def _split(endpoint: Endpoint) -> SplitResult:
    try:
        address = urlsplit(endpoint.url)
        port = address.port
    except ValueError:
        raise UserError("--endpoint is no address of the form http://host:port/v1") from None
    is_plain = endpoint.url.isascii() and endpoint.url.isprintable() and " " not in endpoint.url
    if address.scheme not in ("http", "https") or not address.hostname or port == 0 or not is_plain:
        raise UserError("--endpoint is no address of the form http://host:port/v1")
    if address.username or address.password or address.query or address.fragment:
        raise UserError(
            "--endpoint: no name, key or query in the address; a key goes into --key_variable"
        )
    return address


def _key(endpoint: Endpoint) -> str | None:
    if endpoint.key_variable is None:
        return None
    key = os.environ.get(endpoint.key_variable, "")
    if not _SECRET.fullmatch(key):
        raise UserError(
            f"--key_variable: {shown(endpoint.key_variable)} is not set in the environment, or holds no key"
        )
    return key


# ---- Traces --------------------------------------------------------------------------------------------------------


def writer(endpoint: Endpoint) -> Callable[[Sequence[Case]], list[Written]]:
    """Make what asks an endpoint for the traces of cases.

    Raises:
        RunFailedError: from what is made, if nobody answers several times in a row.
    """
    silent = 0
    lock = threading.Lock()

    def write_one(report_case: Case) -> Written:
        nonlocal silent
        # Whoever comes after the last straw does not ask at all.
        with lock:
            if silent >= _MAX_IN_A_ROW:
                raise RunFailedError(f"--endpoint: no answer {_MAX_IN_A_ROW} times in a row")
        try:
            answer_text = _ask(endpoint, messages(report_case))
        except _NoAnswerError as reason:
            with lock:
                is_silent = isinstance(reason, _SilentError)
                silent = (silent + 1) * is_silent
            return Written(None, f"endpoint: {reason}")
        with lock:
            silent = 0
        return _trace_of(answer_text, report_case)

    def write(report_cases: Sequence[Case]) -> list[Written]:
        with futures.ThreadPoolExecutor(endpoint.parallel) as pool:
            waiting = [pool.submit(write_one, report_case) for report_case in report_cases]
            try:
                return [future.result() for future in waiting]
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise

    return write


def messages(report_case: Case) -> list[dict[str, str]]:
    """Write what is asked of the model: the sentences that a trace may be made of, and nothing else of the report."""
    lines = [
        ("Impression: " if part.is_impression else "Findings: ") + part.text
        for part in report_case.draft.material
    ]
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def _trace_of(answer_text: str, report_case: Case) -> Written:
    """The trace of an answer, which may bring its tags, and its own answer."""
    # The answer is ours to give; one that differs shows that the model read something else.
    trace, tag, rest = answer_text.partition("<answer>")
    if tag:
        names = {name.strip().lower() for name in rest.partition("</answer>")[0].split(",")}
        if names != {name.lower() for name in report_case.names}:
            return Written(None, "endpoint: another answer than the labels'")
    trace = trace.strip().removeprefix("<think>").strip()
    return Written(trace.removesuffix("</think>").strip())


# ---- One answer ----------------------------------------------------------------------------------------------------


def _ask(endpoint: Endpoint, conversation: list[dict[str, str]]) -> str:
    """The text of an answer. Raises _NoAnswerError."""
    # A busy server and a torn answer may do better next time; any other refusal stays one.
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _read_text(_post(endpoint, conversation))
        except _BusyError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_WAIT * attempt)
    raise AssertionError("the last attempt returns or raises")


def _post(endpoint: Endpoint, conversation: list[dict[str, str]]) -> bytes:
    """The body of a response to one request, within the time and size that it may have."""
    address = _split(endpoint)
    path = address.path.rstrip("/")
    # Both ways of naming a server are usual.
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    body = {
        "model": endpoint.model,
        "messages": conversation,
        "temperature": 0,
        "max_tokens": _TOKENS,
    }
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := _key(endpoint):
        headers["Authorization"] = f"Bearer {key}"
    connection = _connection(address, endpoint.timeout)
    # The timeout of a socket is for one piece: who sends a byte now and then would never meet it.
    late = threading.Event()
    peers: list[socket.socket] = []  # the connection lets go of its own while an answer is read

    def hang_up() -> None:
        late.set()
        for peer_socket in peers:
            _shut(peer_socket)

    # So a clock hangs up, wherever the exchange stands then.
    clock = threading.Timer(endpoint.timeout, hang_up)
    clock.daemon = True
    clock.start()
    try:
        connection.connect()
        peers.append(connection.sock)
        _check_peer(connection.sock, endpoint)
        connection.request("POST", path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            # Redirects among them: a report goes where the user said, and nowhere else.
            if response.status in _BUSY:
                raise _BusyError(f"status {response.status}")
            raise _NoAnswerError(f"status {response.status}")
        answer = response.read(MAX_ANSWER + 1)
        if late.is_set():
            raise _SilentError(f"no answer within {endpoint.timeout:g} s")
    # What was cut off by the clock looks like any torn connection: ask the clock first.
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise _SilentError(f"no answer within {endpoint.timeout:g} s") from None
        name = type(error).__name__
        raise _SilentError(getattr(error, "strerror", None) or f"no HTTP answer ({name})") from None
    finally:
        clock.cancel()
        connection.close()
    if len(answer) > MAX_ANSWER:
        raise _NoAnswerError(f"an answer of over {MAX_ANSWER:,} bytes")
    return answer


def _connection(address: SplitResult, timeout: float) -> http.client.HTTPConnection:
    # Never through a proxy of the environment.
    host_name = address.hostname or ""
    if address.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(
            host_name, address.port, timeout=timeout, context=context
        )
    return http.client.HTTPConnection(host_name, address.port, timeout=timeout)


def _check_peer(peer_socket: socket.socket, endpoint: Endpoint) -> None:
    """Localhost may be another machine by the file of hosts: look at who has answered. Raises _NoAnswerError."""
    if not endpoint.allow_remote and not is_loopback(peer_socket.getpeername()[0]):
        raise _NoAnswerError("the server is not this machine")


def _shut(peer_socket: socket.socket) -> None:
    try:
        peer_socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended already


def _read_text(body: bytes) -> str:
    try:
        # Deep nesting overflows the parser, which is one more way of being no JSON.
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise _BusyError("an answer that is not JSON") from None
    try:
        answer_text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _NoAnswerError("an answer without choices[0].message.content") from None
    if not isinstance(answer_text, str) or not answer_text.strip():
        raise _NoAnswerError("an empty answer")
    return answer_text
