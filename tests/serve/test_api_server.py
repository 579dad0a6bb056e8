"""The command: its flags, its port, its stop; and a small part of the fuzzing of tests/oracle/fuzz_api.py."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import fuzz_api
import httpx
import pytest
from api_bodies import body
from places import ROOT
from room_servers import running, scripted_state

from cxr_jax.errors import UserError
from cxr_jax.serve import __main__ as command
from cxr_jax.serve import server
from cxr_jax.serve.limits import Limits
from cxr_jax.serve.state import ServerSettings


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--port=70000"], "port from 0 to 65535"),
        (["--port=x"], "port from 0 to 65535"),
        (["--prot=1"], "--prot"),
        (["--host=no.such.host.invalid"], "no such address"),
        (["--host=0.0.0.0", "--no_auth"], "only on loopback"),
        (["--host=0.0.0.0", "--port=0", "--store=none"], "users or API keys"),
        (["--study=x", "--store=none"], "--store"),
        (["--study=x", "--store=s", "--api_key_file=k"], "not with --study"),
        (["--study=x", "--store=s", "--dictate=whisper:m"], "not with --study"),
        (["--film_quota=0"], "--film_quota"),
        (["--port=0", "--store=none", "--api_key_file=/no/such/file"], "cannot be read"),
        (["--port=0", "--store=none", "--model=/no/such/model"], "no"),
    ],
    ids=lambda case: case[0] if isinstance(case, list) else "",
)
def test_bad_flags_are_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(server, "use_compilation_cache", lambda **_: None)
    assert command.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "Traceback" not in error


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert command.main([f"--port={other.getsockname()[1]}", "--store=none"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "address already in use" in error


def test_a_port_is_free_again_at_once():
    listener = server.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    # Until it listens nobody can connect.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(UserError, match=f"--port={port}"):
        listener.listen()
        server.bind("127.0.0.1", port)
    listener.close()
    server.bind("127.0.0.1", port).close()


@pytest.mark.parametrize(
    "model, name",
    [("phantom", "phantom"), ("/models/NV Reason\n", "NV Reason_"), ("a/b/é", "_"), ("/", "model")],
)
def test_a_model_is_called_by_the_end_of_its_folder(model, name):
    assert server.name_of(model) == name


def test_urls_that_a_browser_can_open():
    listener = server.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    hosts = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::1": "[::1]"}
    for host, shown in hosts.items():
        assert server.url_of(ServerSettings(host=host), listener) == f"http://{shown}:{port}/"
    listener.close()


def test_random_and_hostile_bodies():
    log = fuzz_api.Tracebacks()
    fuzz_api.logging.getLogger().addHandler(log)
    try:
        statuses, problems, _, _ = asyncio.run(fuzz_api.fuzz(scripted_state(), 7, 400))
    finally:
        fuzz_api.logging.getLogger().removeHandler(log)
    assert not problems and not log.lines and sum(statuses.values()) == 400
    assert statuses[200] and statuses[400] > 200 and max(statuses) < 500


def test_connections_have_a_limit_that_is_told():
    """One more is answered at once, and not with silence: a server without files for its connections answers nobody."""
    with running(scripted_state(limits=Limits(connections=4))) as url:
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        waiting = [socket.create_connection(address, timeout=10) for _ in range(4)]
        assert httpx.get(f"{url}/health").status_code == 503
        for connection in waiting:
            connection.close()
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline


# ---- The command itself ----------------------------------------------------------------------------


def lines_of(process):
    """Read a process' lines in a thread, so that a test can wait for one."""
    lines = []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
    return lines


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_start_answer_and_stop(tmp_path):
    """From the flags to the exit code: ready only when compiled, a stream ends with an error, exit code 0."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cxr_jax.serve", "--port=0", f"--store={tmp_path / 'room'}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = lines_of(process)
        wait_for(lambda: len(lines) > 1, process)
        assert lines[0] == "Research use only. Not for diagnosis.\n"
        url = lines[1].split()[0]
        statuses = set()

        def is_ready():
            try:
                with urllib.request.urlopen(f"{url}ready") as answer:
                    return answer.status == 200
            except OSError as error:
                statuses.add(getattr(error, "code", "refused"))
                return False

        wait_for(is_ready, process)
        assert 503 in statuses
        request = body(text="Find abnormalities.", stream=True, temperature=1.5, n=8)
        with httpx.stream("POST", f"{url}v1/chat/completions", json=request, timeout=60) as stream:
            pieces = stream.iter_lines()
            assert json.loads(next(pieces)[6:])["choices"]
            process.send_signal(signal.SIGTERM)
            rest = [line for line in pieces if line]
        assert rest[-1] == "data: [DONE]" and "error" in json.loads(rest[-2][6:])
        assert process.wait(30) == 0 and lines[-1] == "stopped\n"
        assert process.stderr.read().count("Traceback") == 0
    finally:
        process.kill()
        process.wait()
