"""A study's server in a process of its own, which can be killed as a power cut would, and starts again on its port."""

import contextlib
import importlib
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from cxr_jax.errors import RunFailedError

_SERVER = "cxr_jax.serve.study_server"
_START_S, _STOP_S = 300.0, 20.0
# A database may hold the lock of a server that was killed for a moment longer.
_STARTS, _BETWEEN_STARTS_S = 5, 1.0
_JITTER_S = 0.05
# Below what most systems give to connections that leave the machine.
_PORTS = range(20_000, 32_000)
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Find a port that is free and that the system gives to no outgoing connection.

    While a server is down, a client that dials a port of that other kind may be given the very port as its own, is
    connected to itself then, and keeps the server from coming back.

    Raises:
        RunFailedError: if there is none.
    """
    try:
        first, last = map(int, _EPHEMERAL.read_text(encoding="ascii").split())
    except (OSError, ValueError):  # not Linux, whose neighbours begin above our range
        first, last = 32_768, 65_535
    candidates = [port for port in _PORTS if not first <= port <= last]
    # By chance, and not from the study's seed: two simulations may run beside each other.
    for port in random.SystemRandom().sample(candidates, min(len(candidates), 200)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RunFailedError(f"simulate: no free port from {_PORTS[0]} to {_PORTS[-1]}")


def _serve(place: str, port: int, log: str) -> None:
    """Be the server, in a process of its own; what it says goes into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # By name: the web stands above this package, which only starts its command.
    sys.exit(importlib.import_module(_SERVER).main([place, f"--port={port}"]))


class Server:
    """A study server in a process of its own.

    Attributes:
        port: the same for as long as the study is simulated.
        is_lost: whether it could not be started again; nobody need wait for it.
    """

    def __init__(self, place: str) -> None:
        """Say what is served: a study's folder, or the URL of its database."""
        self.place, self.port, self.is_lost = place, 0, False
        # Forked from a process that has imported all of it: fifty starts would spend minutes on imports.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([__name__, _SERVER])
        self._process: BaseProcess | None = None

    def start(self) -> None:
        """Start it and wait until it answers. Raises RunFailedError."""
        self.port = self.port or free_port()
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
            arguments = (self.place, self.port, log.name)
            self._process = self._processes.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
            if not self._answers(self._process):
                # Waited for, so that it has let go of port and store when somebody tries again.
                self.kill()
                lines = log.read().strip().splitlines() or ["it said nothing"]
                raise RunFailedError(
                    f"simulate: the study's server did not start: {lines[-1][:200]}"
                )

    def _answers(self, process: "BaseProcess") -> bool:
        """Wait until it listens; tell whether it does."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until and process.is_alive():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """Kill it without a word, as a power cut would, and see that it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.join()

    def restart(self) -> None:
        """Kill it and start it again, as whoever watches over a server would. Raises RunFailedError."""
        self.kill()
        for attempt in range(_STARTS):
            try:
                return self.start()
            except RunFailedError:
                if attempt == _STARTS - 1:
                    self.is_lost = True
                    raise
            time.sleep(_BETWEEN_STARTS_S)

    def stop(self) -> None:
        """Stop it as an operator would, and see that it is gone."""
        if self._process is None:
            return
        self._process.terminate()
        # A server that hangs must not outlive the simulation.
        self._process.join(_STOP_S)
        self.kill()


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    """Have a server run while the block does."""
    server.start()
    try:
        yield
    finally:
        server.stop()


# ---- Kills -----------------------------------------------------------------------------------------


class Kills:
    """Kills of a server, each once its clients have been given a number of answers.

    Counted in answers and not in seconds: a slow machine would be killed before anything has happened.

    Attributes:
        done: how many there were.
    """

    def __init__(self, server: Server, count: int, answers: int, seed: str) -> None:
        """Draw the moments.

        Args:
            count: of kills.
            answers: that clients will be given in all, or a few less.
            seed: of the moments.
        """
        self._server, self._chance = server, random.Random(seed)
        self._moments = moments(self._chance, count, answers)
        self._answered, self._is_over, self.done = 0, False, 0
        self._news = threading.Condition()

    def answered(self) -> None:
        """Count an answer; clients call it from their own threads."""
        with self._news:
            self._answered += 1
            self._news.notify_all()

    def _may_go_on(self, moment: int) -> bool:
        """Wait for a moment; tell whether there still is anybody to kill the server for."""
        with self._news:
            self._news.wait_for(lambda: self._is_over or self._answered >= moment)
            return not self._is_over

    def _run(self) -> None:
        for moment in self._moments:
            if not self._may_go_on(moment):
                return
            # In the middle of what others have asked for since.
            time.sleep(self._chance.uniform(0, _JITTER_S))
            self._server.restart()
            self.done += 1

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Kill and start again while the block runs. Raises RunFailedError if a start fails."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self._run()
            except BaseException as error:  # told to whoever waits for the readers
                failures.append(error)

        # From now on, whatever was answered before: those who log in have done so.
        with self._news:
            self._answered = 0
        killer = threading.Thread(target=run)
        killer.start()
        try:
            yield
        finally:
            with self._news:
                self._is_over = True
                self._news.notify_all()
            killer.join()
            # What readers say then is that nobody answers; the reason is here.
            if failures:
                raise failures[0]


def moments(chance: random.Random, count: int, answers: int) -> Sequence[int]:
    """Draw after how many answers a server is killed, in their order; each its own as long as there are enough."""
    possible = range(1, max(answers, 1) + 1)
    if count > len(possible):
        return sorted(chance.choices(possible, k=count))
    return sorted(chance.sample(possible, count))
