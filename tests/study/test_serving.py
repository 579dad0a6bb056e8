"""The command with --study: the study alone, without a model, a room or an API in the same browser."""

import threading
import time

import httpx

from cxr_jax.serve import study_server
from cxr_jax.serve.state import ServerSettings


def test_a_study_is_served_alone(study, monkeypatch, capsys):
    """A reader who could ask the model in another tab would read no film without it."""
    servers = []

    class Watched(study_server.RoomServer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.append(self)

    monkeypatch.setattr(study_server, "RoomServer", Watched)
    settings = ServerSettings(store=str(study.path), study=study.protocol.name, port=0)
    thread = threading.Thread(target=study_server.serve, args=(settings,))
    thread.start()
    deadline = time.monotonic() + 30
    while not (servers and servers[0].started):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        said = capsys.readouterr().out
        url = said.splitlines()[-1].split()[0]
        assert f"study {study.protocol.name}" in said
        assert httpx.get(f"{url}ready").status_code == 200
        assert httpx.get(url).headers["location"] == "/study"
        for path in ("room/reports", f"room/images/{'0' * 64}/info", "v1/models", "capture"):
            assert httpx.get(f"{url}{path}").status_code == 404
        assert httpx.post(f"{url}room/readings", json={"image": "0" * 64}).status_code == 404
    finally:
        servers[0].should_exit = True
        thread.join(20)
    assert not thread.is_alive() and capsys.readouterr().out == "stopped\n"
