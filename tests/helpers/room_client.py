"""A room with a store and a scripted engine, asked through FastAPI's client as a page would."""

import contextlib
import hashlib
import io
import time

from fastapi.testclient import TestClient
from films import draw_film
from PIL import Image as PilImage
from room_servers import scripted_state
from scripted_engine import ScriptedEngine

from cxr_jax.serve.app import create_app
from cxr_jax.serve.auth import Auth
from cxr_jax.store import open_store

READING = (
    "<think> The heart is enlarged.",
    " There may be a small left pleural effusion.",
    " No pneumothorax. </think> <answer>Cardio",
    "megaly</answer>",
)
BASE_URL = "http://127.0.0.1"


def film_file(seed=0):
    buffer = io.BytesIO()
    PilImage.fromarray(draw_film(120, 100, seed)).save(buffer, "PNG")
    return buffer.getvalue()


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def room(place, engine=None, **settings):
    """Yield a client of a room; `client.state` is the server's, `client.store` its store."""
    state = scripted_state(engine or ScriptedEngine(READING), store=str(place), **settings)
    state.store = open_store(place, announce=str)
    state.auth = Auth(state.settings, state.store)
    try:
        # From this machine, as a browser on it comes, or a proxy.
        peer = ("127.0.0.1", 50_000)
        with TestClient(create_app(state), base_url=BASE_URL, client=peer) as client:
            client.state, client.store = state, state.store
            take_token(client)
            yield client
    finally:
        state.store.close()


def take_token(client):
    """Let the client's next requests carry the session's token."""
    answer = client.get("/session")
    if answer.status_code == 200:
        client.headers["X-CSRF-Token"] = answer.json()["csrf"]
    return answer


def log_in(client, handle, password):
    answer = client.post("/login", json={"handle": handle, "password": password})
    if answer.status_code == 200:
        client.headers["X-CSRF-Token"] = answer.json()["csrf"]
    return answer


def upload(client, seed=0):
    answer = client.post("/room/images", files={"file": ("x.png", film_file(seed))})
    assert answer.status_code == 201, answer.text
    return answer.json()["sha256"]


def read(client, image, **wanted):
    """Ask for a reading, wait for its end, and return its id and its events."""
    answer = client.post("/room/readings", json={"image": image, **wanted})
    assert answer.status_code == 202, answer.text
    reading = answer.json()["id"]
    return reading, events(client, reading)


def events(client, reading, after=None):
    """Follow a reading to its end: `(number, name, text of the data)` each."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    text = client.get(f"/room/readings/{reading}/events", headers=headers).text
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((int(lines["id"]), lines["event"], lines["data"]))
    return found


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
