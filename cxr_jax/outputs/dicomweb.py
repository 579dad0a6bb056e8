"""A client of DICOMweb servers: find studies (QIDO-RS), fetch films (WADO-RS), send outputs (STOW-RS).

Servers come from a file that the operator writes, by name; nothing that a browser or a model says becomes an address.
What a server answers is not trusted: it may be late, huge, redirected or broken. So there is a limit on every reply's
size and time, no redirect is followed, no proxy of the environment is used, and a film is the film that was asked for.
"""

import base64
import http.client
import ipaddress
import json
import os
import re
import secrets
import socket
import ssl
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.outputs.dicom_source import is_uid, read_source

MOST_JSON = 4 << 20  # bytes of a list of studies
MOST_FILM = 64 << 20  # bytes of one instance, as of an upload
MOST_RESULTS = 200
_KEYS = {
    "url",
    "user",
    "password_variable",
    "token_variable",
    "timeout_s",
    "allow_plain",
    "may_store",
}
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SECRET = re.compile(r"[\x21-\x7e]+")
# What may be asked for, and what a value of it looks like: letters, digits, DICOM's wildcards and ranges.
FILTERS = ("PatientID", "StudyDate", "AccessionNumber", "ModalitiesInStudy", "StudyInstanceUID")
_FILTER_VALUE = re.compile(r"[\w .*?^-]{1,64}")
# Attributes of a study that a reader chooses by: keyword -> tag in JSON.
_STUDY_TAGS = {
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "StudyDescription": "00081030",
    "PatientID": "00100020",
    "ModalitiesInStudy": "00080061",
}
_INSTANCE_TAGS = {
    "SOPClassUID": "00080016",
    "SOPInstanceUID": "00080018",
    "SeriesInstanceUID": "0020000E",
    "Modality": "00080060",
}
_BOUNDARY = re.compile(rb'boundary="?([^";,\s]{1,70})"?', re.IGNORECASE)


class RemoteError(RunFailedError):
    """A server that did not do what was asked; the message names it and says why, and holds nothing that it sent."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A DICOMweb server, as the operator's file names it.

    Attributes:
        name: in the file, and in addresses of the room.
        url: of its DICOMweb root.
        user, password_variable: for basic authentication; the password is in that environment variable.
        token_variable: for a bearer token, likewise.
        timeout_s: seconds that one exchange may take in all.
        may_store: whether outputs may be sent there.
    """

    name: str
    url: str
    user: str | None = None
    password_variable: str | None = None
    token_variable: str | None = None
    timeout_s: float = 30.0
    may_store: bool = False


class Stored(NamedTuple):
    """What became of instances that were sent: UIDs that the server has, and UID -> reason of those that it refused."""

    stored: list[str]
    refused: dict[str, int]


# ---- The operator's file ----


def load_servers(path_text: str | Path) -> dict[str, Server]:
    """Read the servers of a TOML file: a table `[servers.NAME]` each.

    Raises:
        UserError: for a file that cannot be read, an unknown key, an address that is none, or a plain connection to
            another machine that `allow_plain` does not allow.
    """
    try:
        tables = tomllib.loads(Path(path_text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no TOML"
        raise UserError(f"{path_text}: cannot be read ({reason})") from None
    servers = tables.get("servers", {})
    if set(tables) - {"servers"} or not isinstance(servers, dict):
        raise UserError(f"{path_text}: holds tables [servers.NAME] and nothing else")
    return {
        name: _server(str(path_text), name, server_keys) for name, server_keys in servers.items()
    }


def _server(path_text: str, name: str, server_keys: Any) -> Server:
    place = (
        f"{path_text}: [servers.{name}]"
        if _NAME.fullmatch(name)
        else f"{path_text}: a name of [servers]"
    )
    if not _NAME.fullmatch(name):
        raise UserError(f"{place} is not of small letters, digits, - and _")
    if not isinstance(server_keys, dict) or set(server_keys) - _KEYS:
        raise UserError(f"{place}: may have {', '.join(sorted(_KEYS))}")
    # Types first: the file is written by hand.
    kinds: dict[str, Any] = {"timeout_s": (int, float), "allow_plain": bool, "may_store": bool}
    for key, value in server_keys.items():
        if not isinstance(value, kinds.get(key, str)):
            raise UserError(f"{place}: {key} is of another kind")
    # The operator says so here, and nobody later.
    settings = {key: value for key, value in server_keys.items() if key != "allow_plain"}
    server = Server(name=name, **{"url": "", **settings})
    address = _split(server, place)
    if address.scheme == "http" and not (
        _is_loopback(address.hostname or "") or server_keys.get("allow_plain")
    ):
        raise UserError(
            f"{place}: https, or allow_plain = true: patient data would go in the clear"
        )
    if not 0 < server.timeout_s <= 600:
        raise UserError(f"{place}: timeout_s from 0 to 600")
    return server


def _split(server: Server, place: str) -> Any:
    try:
        address = urlsplit(server.url)
        port = address.port
    except ValueError:
        raise UserError(f"{place}: url is no address") from None
    is_plain = server.url.isascii() and server.url.isprintable() and " " not in server.url
    if address.scheme not in ("http", "https") or not address.hostname or port == 0 or not is_plain:
        raise UserError(f"{place}: url is no address of the form https://host:port/dicom-web")
    if address.username or address.password or address.query or address.fragment:
        raise UserError(f"{place}: no name, password or query in the url; see password_variable")
    return address


def _is_loopback(host_name: str) -> bool:
    if host_name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host_name).is_loopback
    except ValueError:
        return False


# ---- Requests ----


class Client:
    """Talks to one server. Each call is one exchange; safe in several threads.

    Args:
        server: of `load_servers`.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._address = _split(server, f"server {server.name}")

    def search_studies(self, filters: Mapping[str, str], limit: int = 50) -> list[dict[str, Any]]:
        """Find studies (QIDO-RS).

        Args:
            filters: keyword of FILTERS -> value; at least one, so that nobody lists an archive by mistake.
            limit: studies at most, up to MOST_RESULTS.

        Returns:
            Objects of StudyInstanceUID, StudyDate, StudyDescription, PatientID, ModalitiesInStudy (a list).

        Raises:
            UserError: for a filter that may not be asked for.
            RemoteError: if the server does not answer as it should.
        """
        _check_filters(filters)
        found = self._search("studies", {**filters, "limit": str(max(1, min(limit, MOST_RESULTS)))})
        return [_pick(answer_item, _STUDY_TAGS) for answer_item in found][:MOST_RESULTS]

    def search_instances(self, study_uid: str) -> list[dict[str, Any]]:
        """List the instances of a study: SOPClassUID, SOPInstanceUID, SeriesInstanceUID, Modality. Raises as above."""
        _check_uids(study_uid)
        found = self._search(f"studies/{study_uid}/instances", {"limit": str(MOST_RESULTS)})
        return [_pick(answer_item, _INSTANCE_TAGS) for answer_item in found][:MOST_RESULTS]

    def retrieve(self, study_uid: str, series_uid: str, instance_uid: str) -> bytes:
        """Fetch one instance as a file (WADO-RS), as it is stored.

        Raises:
            UserError: for what is no UID, or a file that is no DICOM.
            RemoteError: if the server does not answer as it should, or with another instance.
        """
        _check_uids(study_uid, series_uid, instance_uid)
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        path_text = f"studies/{study_uid}/series/{series_uid}/instances/{instance_uid}"
        headers, body_bytes = self._exchange(
            "GET", path_text, {"Accept": accept}, None, MOST_FILM + 4096
        )
        parts = _split_parts(headers.get("Content-Type", ""), body_bytes)
        if len(parts) != 1 or len(parts[0]) > MOST_FILM:
            raise self._failed(f"{len(parts)} parts where one instance was asked for")
        # The wrong film under the right name is the worst answer of all.
        got = read_source(f"server {self.server.name}", parts[0]).dataset
        if (got.StudyInstanceUID, got.SOPInstanceUID) != (study_uid, instance_uid):
            raise self._failed("another instance than was asked for")
        return parts[0]

    def store(self, instances: Sequence[bytes]) -> Stored:
        """Send instances (STOW-RS). What the server has already, it has once: our UIDs follow from what is in a file.

        Args:
            instances: whole files.

        Raises:
            UserError: if the operator's file does not allow it, or for a file that is no DICOM.
            RemoteError: if the server does not answer as it should.
        """
        if not self.server.may_store:
            raise UserError(
                f"server {self.server.name}: may_store is not set, nothing is sent there"
            )
        sent_uids = [
            read_source(f"instance {number}", data).dataset.SOPInstanceUID
            for number, data in enumerate(instances, 1)
        ]
        # Random, so that no file can hold it.
        boundary = f"cxr-jax-{secrets.token_hex(16)}"
        body_bytes = b"".join(
            b"--%s\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % (boundary.encode(), data)
            for data in instances
        )
        # The whole batch in one request: an archive then has all of it or says what it lacks.
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        end = b"--%s--\r\n" % boundary.encode()
        _, reply = self._exchange(
            "POST", "studies", headers, body_bytes + end, MOST_JSON, (200, 202, 409)
        )
        return self._stored(sent_uids, self._json(reply, dict))

    def _stored(self, sent_uids: Sequence[str], reply: dict[str, Any]) -> Stored:
        stored = _referenced(reply, "00081199")
        refused = {uid: reason or 0 for uid, reason in _referenced(reply, "00081198").items()}
        # One that the server says nothing of may not be there: that is no success.
        refused |= {uid: 0 for uid in sent_uids if uid not in stored and uid not in refused}
        return Stored([uid for uid in sent_uids if uid in stored and uid not in refused], refused)

    def _search(self, path_text: str, query: Mapping[str, str]) -> list[Any]:
        accept = {"Accept": "application/dicom+json"}
        whole = f"{path_text}?{urlencode(query, quote_via=quote)}"
        _, body_bytes = self._exchange("GET", whole, accept, None, MOST_JSON, (200, 204))
        # No content is how a server says that it found nothing.
        return self._json(body_bytes, list) if body_bytes.strip() else []

    def _json(self, body_bytes: bytes, kind: type) -> Any:
        try:
            value = json.loads(body_bytes)
        except (ValueError, RecursionError):
            raise self._failed("an answer that is not JSON") from None
        if not isinstance(value, kind):
            raise self._failed("an answer of another form")
        return value

    # ---- One exchange ----

    def _exchange(
        self,
        method: str,
        path_text: str,
        headers: Mapping[str, str],
        body_bytes: bytes | None,
        most: int,
        wanted: Sequence[int] = (200,),
    ) -> tuple[http.client.HTTPMessage, bytes]:
        """Send a request and read the answer, within the time and size that it may have. Raises RemoteError."""
        connection = self._connection()
        late = threading.Event()
        peers: list[socket.socket] = []

        def hang_up() -> None:
            late.set()
            for peer_socket in peers:
                _shut(peer_socket)

        # The timeout of a socket is for one piece: who sends a byte now and then would never meet it.
        clock = threading.Timer(self.server.timeout_s, hang_up)
        clock.daemon = True
        clock.start()
        try:
            connection.connect()
            peers.append(connection.sock)
            root = self._address.path.rstrip("/")
            connection.request(
                method, f"{root}/{path_text}", body_bytes, {**headers, **self._authorization()}
            )
            response = connection.getresponse()
            # Redirects among them: a film goes where the operator said, and nowhere else.
            if response.status not in wanted:
                raise self._failed(f"status {response.status}")
            answer = response.read(most + 1)
            if late.is_set():
                raise self._failed(f"no answer within {self.server.timeout_s:g} s")
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise self._failed(f"no answer within {self.server.timeout_s:g} s") from None
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise self._failed(f"no HTTP answer ({reason})") from None
        finally:
            clock.cancel()
            connection.close()
        if len(answer) > most:
            raise self._failed(f"an answer of over {most / 2**20:.0f} MiB")
        # A short answer is no error to the library, and half a film is none.
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) != len(answer):
            raise self._failed("an answer that was cut off")
        return response.headers, answer

    def _connection(self) -> http.client.HTTPConnection:
        # Never through a proxy of the environment.
        host_name, port = self._address.hostname or "", self._address.port
        if self._address.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                host_name, port, timeout=self.server.timeout_s, context=context
            )
        return http.client.HTTPConnection(host_name, port, timeout=self.server.timeout_s)

    def _authorization(self) -> dict[str, str]:
        if self.server.token_variable:
            return {"Authorization": f"Bearer {self._secret(self.server.token_variable)}"}
        if self.server.user and self.server.password_variable:
            pair = f"{self.server.user}:{self._secret(self.server.password_variable)}"
            return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
        return {}

    def _secret(self, variable: str) -> str:
        # From the environment, so that no password lies in a file.
        secret = os.environ.get(variable, "")
        if not _SECRET.fullmatch(secret):
            raise UserError(f"server {self.server.name}: its secret is not set in the environment")
        return secret

    def _failed(self, reason: str) -> RemoteError:
        return RemoteError(f"server {self.server.name}: {reason}")


def _shut(peer_socket: socket.socket) -> None:
    try:
        peer_socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended already


# ---- What is asked, and what is answered ----


def _check_filters(filters: Mapping[str, str]) -> None:
    if not filters:
        raise UserError(f"a search needs one of: {', '.join(FILTERS)}")
    # Names and values both: they become part of an address.
    for name, value in filters.items():
        if name not in FILTERS:
            raise UserError(f"a search may ask for: {', '.join(FILTERS)}")
        # A star alone would list all that the server has.
        if not _FILTER_VALUE.fullmatch(value) or not value.strip(" *?"):
            raise UserError(f"{name}: no value to search for")


def _check_uids(*uids: str) -> None:
    # They become part of a path: nothing but digits and points may.
    if not all(map(is_uid, uids)):
        raise UserError("no UID of a study, series or instance")


def _pick(answer_item: Any, element_tags: Mapping[str, str]) -> dict[str, Any]:
    """The attributes of an answer that are asked for, each as text; ModalitiesInStudy as a list."""
    # A server may leave out, or send, anything: what is not as expected is empty.
    found: dict[str, Any] = {}
    for keyword, element_tag in element_tags.items():
        element = answer_item.get(element_tag, {}) if isinstance(answer_item, dict) else {}
        values = element.get("Value", []) if isinstance(element, dict) else []
        value_texts = [str(value)[:324] for value in values if isinstance(value, (str, int, float))]
        is_list = keyword == "ModalitiesInStudy"
        found[keyword] = value_texts[:32] if is_list else (value_texts[0] if value_texts else "")
    return found


def _referenced(reply: Mapping[str, Any], element_tag: str) -> dict[str, int | None]:
    """UID -> reason of the items of a sequence of a STOW-RS answer."""
    found: dict[str, int | None] = {}
    element = reply.get(element_tag)
    items = element.get("Value", []) if isinstance(element, dict) else []
    for answer_item in items if isinstance(items, list) else []:
        uid = _pick(answer_item, {"uid": "00081155"})["uid"]
        reason = _pick(answer_item, {"reason": "00081197"})["reason"]
        if is_uid(uid):
            found[uid] = int(reason) if reason.isdigit() else None
    return found


def _split_parts(content_type: str, body_bytes: bytes) -> list[bytes]:
    """The parts of a multipart answer; a plain application/dicom is one part."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/dicom":
        return [body_bytes]
    match = _BOUNDARY.search(content_type.encode("latin-1", "replace"))
    if kind != "multipart/related" or match is None:
        return []
    # By the boundary on a line of its own: pixels may hold any bytes.
    pieces = (b"\r\n" + body_bytes).split(b"\r\n--" + match.group(1))
    parts = []
    for piece in pieces[1:]:
        head, blank, content = piece.partition(b"\r\n\r\n")
        if not piece.startswith(b"--") and blank:
            parts.append(content)
    return parts
