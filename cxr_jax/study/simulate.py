"""Simulated readers: they log in and read over HTTP, as people would, on connections that break, in two tabs at times.

The server is started and stopped here, on loopback. Its clock runs `clock_speed` times faster for them: a reading of
50 s takes 50 ms. What the server acknowledged is written down and looked for in the store at the end.
"""

import contextlib
import http.client
import json
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cxr_jax.errors import RunFailedError, UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.store import Store, open_store, sha256_of
from cxr_jax.store.records.actors import OPERATOR
from cxr_jax.study.allocate import Place
from cxr_jax.study.behaviour import Conduct, Effects, as_json, draw_conduct, read_effects
from cxr_jax.study.commands import manage
from cxr_jax.study.folder import SealedCase, StudyFolder
from cxr_jax.study.shown import ABSENT, PRESENT, UNSURE

_SERVER = "cxr_jax.serve.study_server"
_START_S, _STOP_S, _PATIENCE_S = 120.0, 20.0, 180.0
_MISREAD = 0.04  # of the labels that a reader states, without AI and without a plant
_STREAM = 9  # of the protocol's seed


# ---- A server of its own ---------------------------------------------------------------------------


class Server:
    """A study server in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait for the line that names its address. Raises RunFailedError."""
        # Its own process, so that it can be killed as a power cut would.
        command = [sys.executable, "-m", _SERVER, str(self.folder), f"--port={self.port}"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        # Read to its end if it fails, to the address if it does not.
        for line in self._process.stdout:
            if line.startswith("http://"):
                self.port = urlsplit(line.split()[0]).port or 0
                return self._wait()
        raise RunFailedError(f"{self.folder}: the study's server did not start")

    def _wait(self) -> None:
        """Wait until it listens; it names its port a little before."""
        # It names its port before it listens.
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            time.sleep(0.02)
        raise RunFailedError(f"{self.folder}: the study's server does not answer")

    def kill(self) -> None:
        """Kill it without a word, as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Stop it as an operator would, and see that it is gone."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()


# ---- A client --------------------------------------------------------------------------------------


class Refused(Exception):  # noqa: N818  a fact of a simulation, not an error of this program
    """An answer of 4xx."""

    def __init__(self, status: int, request_body: Mapping[str, Any]) -> None:
        super().__init__(status)
        self.status, self.body = status, request_body


class Client:
    """One reader's browser, as far as the server can see it."""

    def __init__(self, server: Server, chance: random.Random) -> None:
        self._server, self._chance = server, chance
        self._headers: dict[str, str] = {"Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self.counts: Counter[str] = Counter()
        # Paths and the bytes that came back, headers included; a test looks into them.
        self.received: list[tuple[str, bytes]] = []
        self.keeps_bytes = False

    def log_in(self, handle: str, password: str) -> None:
        """Begin a session."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                status, headers, request_body = self._exchange(
                    "POST", "/login", {"handle": handle, "password": password}
                )
                break
            except (OSError, http.client.HTTPException):
                # Killed on the way: whoever logs in tries again, too.
                self.close()
                if time.monotonic() > until:
                    raise RunFailedError("simulate: the server does not come back") from None
                time.sleep(0.1)
        if status != 200:
            raise RunFailedError(f"simulate: the log-in was refused with {status}")
        # As a browser: the cookie by itself, the token by the page.
        self._headers["Cookie"] = headers["Set-Cookie"].partition(";")[0]
        self._headers["X-CSRF-Token"] = json.loads(request_body)["csrf"]

    def get(self, task_path: str) -> Any:
        """Ask, and again until there is an answer."""
        return self._call("GET", task_path, None)

    def post(
        self, task_path: str, content: Mapping[str, Any], loss: float = 0.0, twice: float = 0.0
    ) -> Any:
        """Send, perhaps lose the answer and send again, perhaps send twice although it arrived.

        Raises:
            Refused: for an answer of 4xx.
        """
        # The server may have done it all and the answer be lost: the key makes that harmless.
        if self._chance.random() < loss:
            self._send_and_hang_up(task_path, content)
        answer = self._call("POST", task_path, content)
        if self._chance.random() < twice:
            self.counts["double posts"] += 1
            again = self._call("POST", task_path, content)
            # Whoever sends twice is answered twice, and counted once.
            if again != answer:
                raise RunFailedError("simulate: a request that came twice was answered otherwise")
        return answer

    def _send_and_hang_up(self, task_path: str, content: Mapping[str, Any]) -> None:
        """Send a request whole and close the connection before its answer."""
        self.counts["lost connections"] += 1
        self.close()
        # A connection of its own, which nobody reads from.
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", task_path, json.dumps(content), self._headers)
        connection.close()

    def _call(self, method: str, task_path: str, content: Mapping[str, Any] | None) -> Any:
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                status, _, request_body = self._exchange(method, task_path, content)
            except (OSError, http.client.HTTPException):
                # The server was killed, or the network is gone: a page would keep what it has and try again.
                self.close()
                if time.monotonic() > until:
                    raise RunFailedError("simulate: the server does not come back") from None
                self.counts["retries"] += 1
                time.sleep(0.05)
                continue
            # No simulation may excuse a server's own error.
            if status >= 500:
                raise RunFailedError(
                    f"simulate: {method} {task_path.split('/')[-1]} failed with {status}"
                )
            if status >= 400:
                raise Refused(status, json.loads(request_body)["error"])
            return json.loads(request_body) if not task_path.endswith("/pixels") else request_body

    def _exchange(
        self, method: str, task_path: str, content: Mapping[str, Any] | None
    ) -> tuple[int, Any, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                "127.0.0.1", self._server.port, timeout=30
            )
        body_text = None if content is None else json.dumps(content)
        self._connection.request(method, task_path, body_text, self._headers)
        response = self._connection.getresponse()
        request_body = response.read()
        if self.keeps_bytes:
            self.received.append((task_path, str(response.headers).encode() + request_body))
        return response.status, response.headers, request_body

    def close(self) -> None:
        """Let the connection go."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


# ---- What a reader does ----------------------------------------------------------------------------


@dataclass
class World:
    """What simulated readers know that real ones do not: the truth, and what they themselves are like."""

    folder: StudyFolder
    effects: Effects
    sealed: list[SealedCase]
    conduct: Conduct
    suspicion: dict[str, np.ndarray]
    places: dict[tuple[int, int, int], Place] = field(default_factory=dict)


def make_world(folder: StudyFolder, effects: Effects) -> World:
    """Draw what every reader would do with every case in every arm."""
    protocol = folder.protocol
    # Programs may know the truth: they have to be wrong as often as they are told.
    sealed = folder.read_sealed()
    seed = [protocol.seed, _STREAM]
    shape = (protocol.arms, protocol.readers)
    conduct = draw_conduct(effects, *shape, [sealed_case.abnormal for sealed_case in sealed], seed)
    # A latent number of its own for each label: whoever has an effusion need not have cardiomegaly.
    suspicion = {}
    for number, label_name in enumerate(protocol.suspicion_labels):
        present = [sealed_case.truth.get(label_name) == PRESENT for sealed_case in sealed]
        drawn = draw_conduct(effects, *shape, present, [*seed, 1 + number]).suspicion
        # Halfway between the two kinds of case is 50 of 100.
        middle = effects.separation.get("", 1.5) / 2
        suspicion[label_name] = np.round(100 / (1 + np.exp(-1.7 * (drawn - middle))), 1)
    places = {(p.reader_no, p.session_no, p.position): p for p in folder.places}
    return World(folder, effects, sealed, conduct, suspicion, places)


class Reader:
    """One simulated reader at his browser."""

    def __init__(self, world: World, server: Server, reader_no: int) -> None:
        self.world, self.reader_no = world, reader_no
        # Not numpy's: one stream of yes and no, apart from what was drawn for the whole study.
        self.chance = random.Random(f"{world.folder.protocol.seed} {reader_no}")
        self.client = Client(server, self.chance)
        self.acknowledged: list[tuple[str, int, str]] = []
        self.signed: set[str] = set()

    def work(self, handle: str, password: str) -> None:
        """Do all that the server has for this reader."""
        self.client.log_in(handle, password)
        while True:
            following = self.client.get("/study/next")
            if following["kind"] == "done":
                break
            if following["kind"] == "task":
                self._read(following)
            elif following["kind"] == "ratings":
                self._rate(following["task"], following["items"])
            else:
                answers = {"tlx": [self.chance.randrange(101) for _ in following["tlx"]]}
                answers["sus"] = [self.chance.randint(1, 5) for _ in following["sus"]]
                request_body = {"session": following["session"], "answers": answers}
                self.client.post("/study/questionnaire", request_body)
        self.client.close()

    def _read(self, following: Mapping[str, Any]) -> None:
        """Open a task, look, answer, sign."""
        task, effects = following["task"], self.world.effects
        place = self.world.places[
            self.reader_no, following["session"] - 1, following["position"] - 1
        ]
        task_path = f"/study/tasks/{task}"
        # Each opening is a tab of its own.
        page_name = self._name()
        opened = self.client.post(f"{task_path}/open", {"page": page_name})
        # Nobody sees a film before it is opened: a slow server's opening is none of the reader's time.
        began = time.monotonic()
        self.client.get(f"{task_path}/pixels")
        events = self._events(place)
        binding = {"shown_sha256": opened["shown_sha256"]}
        if self.chance.random() < effects.lost_connection:
            page_name = self._second_tab(task_path, page_name, binding, opened["version"])
        # The server's clock has to have come as far as the reader's has.
        speed = self.world.folder.protocol.clock_speed
        time.sleep(max(0.0, events[-1]["t"] / speed - (time.monotonic() - began)))
        odds = {"loss": effects.lost_connection, "twice": effects.double_post}
        # All of a film's times in one batch; a page sends several.
        batch = {"page": page_name, "idem_key": self._name(), "events": events}
        self.client.post(f"{task_path}/events", batch, **odds)
        if not place.practice and self.chance.random() < effects.skip:
            skip = {
                "reason": "cannot be judged",
                "page": page_name,
                "idem_key": self._name(),
                **binding,
            }
            self.client.post(f"{task_path}/skip", skip, **odds)
            return
        answer = self._answer(place, opened["shown"])
        version = self._save(task_path, task, answer, opened["version"], page_name, binding, odds)
        arm_index, case_no = self._place_in_conduct(place)
        confidence = int(self.world.conduct.confidence[arm_index, self.reader_no, case_no])
        signature = {"page": page_name, "idem_key": self._name(), "version": version, **binding}
        signed = self.client.post(
            f"{task_path}/sign", signature | {"confidence": confidence}, **odds
        )
        self.signed.add(task)
        if signed["items"]:
            self._rate(task, signed["items"])

    def _save(
        self,
        task_path: str,
        task: str,
        answer: dict[str, Any],
        version: int,
        page_name: str,
        binding: Mapping[str, str],
        odds: Mapping[str, float],
    ) -> int:
        """Save half an answer and then the whole, as autosaving does."""
        # First without the sliders, as a reader fills in the form.
        halves = ({**answer, "suspicion": {}, "flags": [], "rejected": []}, answer)
        for content in halves:
            request = {"page": page_name, "idem_key": self._name(), "version": version, **binding}
            saved = self.client.post(f"{task_path}/answer", request | {"answer": content}, **odds)
            version = saved["version"]
            self.acknowledged.append((task, version, sha256_of(content)))
        return version

    def _second_tab(
        self, task_path: str, page_name: str, binding: Mapping[str, str], version: int
    ) -> str:
        """Open the task in another tab; what the first one saves after that must be refused."""
        self.client.counts["second tabs"] += 1
        other = self._name()
        self.client.post(f"{task_path}/open", {"page": other})
        request = {"page": page_name, "idem_key": self._name(), "version": version, **binding}
        try:
            self.client.post(f"{task_path}/answer", request | {"answer": {}})
        except Refused as refusal:
            if refusal.status == 409:
                return other
        raise RunFailedError("simulate: a tab that is out could still save")

    def _rate(self, task: str, items: list[dict[str, Any]]) -> None:
        ratings = {item["name"]: self.chance.randint(2, len(item["points"])) for item in items}
        self.client.post(
            f"/study/tasks/{task}/ratings", {"ratings": ratings, "idem_key": self._name()}
        )

    def _name(self) -> str:
        return f"{self.chance.getrandbits(96):024x}"

    def _place_in_conduct(self, place: Place) -> tuple[int, int]:
        return self.world.folder.protocol.arms.index(place.arm), place.case_no

    # ---- Times and answers ----

    def _events(self, place: Place) -> list[dict[str, Any]]:
        """What the tab tells of the reading: its first paint, heartbeats, perhaps a pause, the signature."""
        arm_index, case_no = self._place_in_conduct(place)
        seconds = float(np.exp(self.world.conduct.log_seconds[arm_index, self.reader_no, case_no]))
        seconds *= float(np.exp(self.world.effects.session * place.session_no))
        events: list[dict[str, Any]] = [{"kind": "task_shown", "t": 0.0}]
        pause = 120.0 if self.chance.random() < self.world.effects.pause else 0.0
        middle = seconds / 2
        # Heartbeats from the second half come after the pause.
        beats = np.arange(10.0, seconds, 10.0)
        events += [{"kind": "heartbeat", "t": float(beat)} for beat in beats if beat < middle]
        if pause:
            events.append({"kind": "pause", "t": middle})
            events.append({"kind": "resume", "t": middle + pause})
        events += [
            {"kind": "heartbeat", "t": float(beat) + pause} for beat in beats if beat >= middle
        ]
        events.append({"kind": "sign", "t": seconds + pause})
        return events

    def _answer(self, place: Place, shown: Mapping[str, Any]) -> dict[str, Any]:
        """The signed report: mostly the truth, the planted error where it was not caught."""
        arm_index, case_no = self._place_in_conduct(place)
        sealed_case = self.world.sealed[case_no]
        labels = {
            label_name: self._state(
                sealed_case.truth.get(label_name, ABSENT), sealed_case.truth_sides.get(label_name)
            )
            for label_name in CHEXPERT_14
        }
        caught = bool(self.world.conduct.caught[arm_index, self.reader_no, case_no])
        made_flags: list[dict[str, Any]] = []
        # In each arm's own medium: a sentence where there are any, a chip elsewhere.
        rejected: list[str] = []
        if sealed_case.plant is not None:
            planted = sealed_case.plant
            state_word, side = planted.state_true, planted.side_true
            if not caught:
                state_word, side = planted.state_shown, planted.side_shown
            labels[planted.label] = {"state": state_word, "side": side}
            if caught and "sentences" in shown:
                kinds = {"side": "side", "drop": "missing", "hedge": "overconfident"}
                number = planted.sentences[0] if planted.sentences else None
                made_flags.append({"sentence": number, "kind": kinds.get(planted.kind, "wrong")})
            elif caught and shown:
                rejected.append(planted.label)
        made_flags += self._false_flags(place, shown, sealed_case)
        suspicion = {
            label_name: float(scores[arm_index, self.reader_no, case_no])
            for label_name, scores in self.world.suspicion.items()
        }
        present = [label_name for label_name, value in labels.items() if value["state"] == PRESENT]
        fields = {"impression": ", ".join(present) or "No acute abnormality."}
        return {
            "fields": fields,
            "labels": labels,
            "suspicion": suspicion,
            "flags": made_flags,
            "rejected": rejected,
        }

    def _state(self, state_word: str, side: str | None) -> dict[str, Any]:
        """What a reader states of one label: the truth, but for a slip."""
        if self.chance.random() < _MISREAD:
            state_word = ABSENT if state_word in (PRESENT, UNSURE) else PRESENT
        return {"state": state_word, "side": side if state_word != ABSENT else None}

    def _false_flags(
        self, place: Place, shown: Mapping[str, Any], sealed_case: SealedCase
    ) -> list[dict[str, Any]]:
        arm_index, case_no = self._place_in_conduct(place)
        wanted = int(self.world.conduct.false_flags[arm_index, self.reader_no, case_no])
        planted = sealed_case.plant.sentences if sealed_case.plant else ()
        free = [
            sentence["n"] for sentence in shown.get("sentences", []) if sentence["n"] not in planted
        ]
        # Flags on true sentences: whoever flags everything detects everything.
        chosen = self.chance.sample(free, min(wanted, len(free)))
        return [{"sentence": number, "kind": "wrong"} for number in chosen]


# ---- The whole study -------------------------------------------------------------------------------


def simulate(
    task_path: Path, effects_file: Path | None = None, threads: int = 6, kills: int = 0
) -> list[str]:
    """Let simulated readers do a whole study.

    Args:
        effects_file: what they are like; None: the defaults.
        threads: readers at work at once.
        kills: how often the server is killed on the way, and started again.

    Raises:
        UserError: for a study that is not open or not a simulated one.
        RunFailedError: if an answer that was acknowledged is not there at the end.
    """
    # Refused before any reader is made.
    effects = read_effects(effects_file) if effects_file else Effects()
    with manage.open_study(task_path) as study:
        study.need_state("open")
        if not study.protocol.simulated:
            raise UserError(f"{task_path}: not made with --simulated; its readers are people")
        logins = _make_readers(study.store, study.folder, study.ledger.reader_of_user)
        study.append("study.simulated", {"effects": as_json(effects)})
    world = make_world(StudyFolder(task_path), effects)
    server = Server(task_path)
    readers = [Reader(world, server, number) for number in range(len(logins))]
    began = time.monotonic()
    with _running(server), _killing(server, kills):
        with ThreadPoolExecutor(max(1, threads)) as pool:
            jobs = [
                pool.submit(reader.work, *login)
                for reader, login in zip(readers, logins, strict=True)
            ]
            for job in jobs:
                job.result()
    seconds = time.monotonic() - began
    # What went wrong on the way is part of what is reported.
    counts = sum((reader.client.counts for reader in readers), Counter())
    with contextlib.closing(open_store(task_path, exclusive=False)) as store:
        _check_acknowledged(store, readers)
    signed = sum(len(reader.signed) for reader in readers)
    saved = sum(len(reader.acknowledged) for reader in readers)
    told = ", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "nothing went wrong"
    return [
        f"{task_path}: SIMULATED readers: {signed} reports signed in {seconds:.0f} s; {kills} kills, {told}",
        f"{task_path}: all {saved} acknowledged answers are in the store, each once",
    ]


def _make_readers(
    store: Store, folder: StudyFolder, reader_of_user: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Users of the store that are programs, each with a place in the study; fresh ones at each call."""
    if reader_of_user:
        raise UserError(f"{folder.path}: this study has readers already")
    logins = []
    for number in range(folder.protocol.readers):
        handle, password = f"simulated-{number + 1}", secrets.token_urlsafe(16)
        user = store.users.add(handle, "reader", password)
        request_body = {"user": user.id, "reader_no": number}
        store.append(
            "study.reader_assigned",
            request_body,
            study=folder.protocol.name,
            **OPERATOR.as_arguments(),
        )
        logins.append((handle, password))
    return logins


@contextlib.contextmanager
def _running(server: Server) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.stop()


@contextlib.contextmanager
def _killing(server: Server, kills: int) -> Iterator[None]:
    """Kill the server at random moments while the block runs, and start it again each time."""
    is_over = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        chance = random.Random(kills)
        try:
            for _ in range(kills):
                # In the middle of requests: readers are at work all the time.
                if is_over.wait(chance.uniform(0.1, 1.5)):
                    return
                server.kill()
                server.start()
        except BaseException as error:  # told to whoever waits for the readers
            failures.append(error)

    # Beside the readers, who know nothing of it.
    killer = threading.Thread(target=run)
    killer.start()
    try:
        yield
    finally:
        is_over.set()
        killer.join()
    if failures:
        raise failures[0]


def _check_acknowledged(store: Store, readers: list[Reader]) -> None:
    """See that each acknowledged answer is in the store as that version, and none twice. Raises RunFailedError."""
    for reader in readers:
        versions: dict[str, dict[int, str]] = {}
        for task, version, digest in reader.acknowledged:
            if task not in versions:
                # Read from the store itself, not from the server.
                rows = store.answers.versions(task)
                versions[task] = {stored["version"]: stored["sha256"] for stored in rows}
                if len({stored["idem_key"] for stored in rows}) != len(rows):
                    raise RunFailedError("simulate: an answer is in the store twice")
            if versions[task].get(version) != digest:
                raise RunFailedError("simulate: an acknowledged answer is not in the store")
