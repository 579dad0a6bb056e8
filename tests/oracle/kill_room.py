"""Kills a room's server with SIGKILL at random moments of a load of writes, and looks at what is left.

    python tests/oracle/kill_room.py STORE [--kills=50] [--seed=0] [--writers=4]

Writers use the HTTP API of reports as a page does: they begin reports, save, flag, sign and add to them, each change
under a key of its own, and send what was not answered again. Afterwards every change that was answered with 2xx must be
there, none twice, and the store must be in order. The server has the real application and the real store; its engine
is scripted, so that it starts in seconds. STORE is a folder or a URL of PostgreSQL.
"""

import argparse
import asyncio
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve()
for folder in (HERE.parents[2], HERE.parents[1] / "helpers"):
    sys.path.insert(0, str(folder))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
START_SECONDS = 120

# ---- The server --------------------------------------------------------------------------------------------


def serve(place, port):
    from room_servers import scripted_state

    from cxr_jax.serve.app import create_app
    from cxr_jax.serve.auth import Auth
    from cxr_jax.serve.server import RoomServer, bind, uvicorn_config
    from cxr_jax.store import open_store

    listener = bind("127.0.0.1", port)
    state = scripted_state(store=place)
    state.store = open_store(place, announce=str)
    state.auth = Auth(state.settings, state.store)
    server = RoomServer(uvicorn_config(create_app(state)), lambda: None)
    asyncio.run(server.serve(sockets=[listener]))
    state.store.close()


def spawn(place, port):
    """Fork a server for each line of stdin, and print its id: the imports, which take seconds, are made once."""
    from room_client import room

    # Whatever a server imports, it has imported by now.
    with tempfile.TemporaryDirectory() as folder, room(Path(folder) / "store"):
        pass
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are killed
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(place, port)
            os._exit(0)
        print(child, flush=True)


class Server:
    def __init__(self, place):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, str(HERE), "--spawn", place, str(self.port)]
        self.spawner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.child = None

    def start(self):
        self.spawner.stdin.write("\n")
        self.spawner.stdin.flush()
        self.child = int(self.spawner.stdout.readline())
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return request(self.port, "GET", "/session")
            except OSError:
                assert self.is_there(), "the server did not start"
                assert time.monotonic() < deadline, "the server did not start in time"
                time.sleep(0.02)

    def is_there(self):
        try:
            os.kill(self.child, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self, number):
        os.kill(self.child, number)
        while self.is_there():
            time.sleep(0.005)

    def close(self):
        self.spawner.stdin.close()
        self.spawner.wait(30)


# ---- The load ----------------------------------------------------------------------------------------------


def request(port, method, path, body=None, headers=None, content_type="application/json"):
    """Status and JSON; OSError where no whole answer came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {**(headers or {}), "Content-Type": content_type}
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    except (http.client.HTTPException, ValueError) as error:
        raise OSError("no whole answer") from error
    finally:
        connection.close()


class Writer(threading.Thread):
    """One page: it sends a change until it is answered, and notes what was."""

    def __init__(self, number, port, token, image, stop, seed):
        super().__init__()
        self.number, self.port, self.image, self.stop = number, port, image, stop
        self.token = token
        self.draw = random.Random(f"{seed} {number}")
        self.acknowledged, self.refused, self.retries = [], [], 0

    def send(self, method, path, body, version=None):
        mark = f"w{self.number}n{len(self.acknowledged) + len(self.refused)}"
        headers = {"X-CSRF-Token": self.token, "Idempotency-Key": mark}
        if version is not None:
            headers["If-Match"] = str(version)
        body = json.loads(json.dumps(body).replace("MARK", mark))
        while True:
            try:
                status, answer = request(self.port, method, path, body, headers)
            except OSError:
                if self.stop.is_set():
                    return None
                self.retries += 1
                time.sleep(0.05)
                continue
            if status >= 500:
                self.refused.append((path, status, answer))
                return None
            done = self.acknowledged if status < 300 else self.refused
            done.append((mark, path, status, answer))
            return answer if status < 300 else None

    def run(self):
        bound = {"shown": {"image": self.image, "reading": None}}
        while not self.stop.is_set():
            report = self.send("POST", "/room/reports", {"image": self.image})
            if report is None:
                continue
            address, version = f"/room/reports/{report['id']}", report["version"]
            for _ in range(self.draw.randint(1, 12)):
                if self.draw.random() < 0.2:
                    flag = {"kind": "missing", "note": "MARK", **bound}
                    self.send("POST", f"{address}/flags", flag)
                    continue
                field = self.draw.choice(["heart", "pleura", "impression"])
                edit = {"fields": {field: "MARK " + "x" * self.draw.randint(0, 2000)}, **bound}
                saved = self.send("PUT", address, edit, version)
                version = version if saved is None else saved["version"]
            signed = self.send("POST", f"{address}/sign", {"meaning": "MARK", **bound}, version)
            if signed is not None:
                more = {"text": "MARK", **bound}
                self.send("POST", f"{address}/addendum", more, signed["version"])


# ---- What is left ------------------------------------------------------------------------------------------


def look(place, writers):
    """Return what is wrong, one line each, and how many events there are."""
    from cxr_jax.store import open_store

    store = open_store(place, announce=str)
    try:
        wrong = [str(problem) for problem in store.verify(files=True)]
        events = store.events()
        # Each change carries its mark, once, in the event that it has become.
        marks = Counter()
        for event in events:
            body = event.body
            texts = [body.get("meaning"), body.get("text"), body.get("note")]
            texts += list(body.get("fields", {}).values()) if event.kind == "report.saved" else []
            marks.update(text.split(" ")[0] for text in texts if text)
        begun = {event.body["report"] for event in events if event.kind == "report.begun"}
        for writer in writers:
            for mark, path, _, answer in writer.acknowledged:
                if path == "/room/reports":
                    wrong += [] if answer["id"] in begun else [f"{mark}: its report is not there"]
                elif marks[mark] != 1:
                    wrong.append(f"{mark}: answered, and there {marks[mark]} times")
            wrong += [f"refused: {line[:3]}" for line in writer.refused]
        wrong += [f"{mark}: there {count} times" for mark, count in marks.items() if count > 1]
        acknowledged = sum(len(writer.acknowledged) for writer in writers)
        # Two reports of one key would have two beginnings.
        begun_keys = sum(path == "/room/reports" for w in writers for _, path, *_ in w.acknowledged)
        if not begun_keys <= len(begun) <= begun_keys + len(writers):
            wrong.append(f"{len(begun)} reports begun, {begun_keys} answered")
        return wrong, {"events": len(events), "acknowledged": acknowledged}
    finally:
        store.close()


def kill(place, kills, seed=0, writers=4):
    """Run all of it; return what is wrong and some figures."""
    from room_client import film_file

    draw = random.Random(seed)
    server, stop = Server(place), threading.Event()
    _, session = server.start()
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    status, film = request(
        server.port,
        "POST",
        "/room/images",
        form + film_file() + b"\r\n--b--\r\n",
        {"X-CSRF-Token": session["csrf"]},
        "multipart/form-data; boundary=b",
    )
    assert status == 201, film
    pages = [
        Writer(number, server.port, session["csrf"], film["sha256"], stop, seed)
        for number in range(writers)
    ]
    for page in pages:
        page.start()
    try:
        for _ in range(kills):
            time.sleep(draw.uniform(0.05, 1.2))
            server.end(signal.SIGKILL)
            server.start()
        time.sleep(0.5)
    finally:
        stop.set()
        for page in pages:
            page.join()
        server.end(signal.SIGTERM)
        server.close()
    wrong, figures = look(place, pages)
    return wrong, {**figures, "kills": kills, "retries": sum(page.retries for page in pages)}


def main():
    if sys.argv[1:2] == ["--spawn"]:
        return spawn(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser()
    parser.add_argument("place")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writers", type=int, default=4)
    arguments = parser.parse_args()
    begun = time.monotonic()
    wrong, figures = kill(arguments.place, arguments.kills, arguments.seed, arguments.writers)
    print(json.dumps({**figures, "seconds": round(time.monotonic() - begun)}))
    print(
        "\n".join(wrong)
        if wrong
        else "nothing acknowledged is lost, nothing is there twice, the store is in order"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
