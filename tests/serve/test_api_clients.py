"""Real clients of OpenAI's API against the server: what they parse, what they raise, how streams end and are left."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time

import httpx
import openai
import pytest
from api_bodies import body, film_url, user
from places import NODE_MODULES
from room_servers import running, scripted_state
from scripted_engine import READING, ScriptedEngine

from cxr_jax.errors import UserError
from cxr_jax.serve.limits import CallerLimits, Limits
from cxr_jax.serve.openai.keys import read_key_file
from cxr_jax.serve.openai.reasoning import ReasoningSplitter
from cxr_jax.serve.refusals import RefusedError

TEXT = "".join(READING)
KEY, READER_KEY = "sk-a-key-of-the-tests", "sk-another-key-to-read"


@pytest.fixture(scope="module")
def server():
    state = scripted_state()
    with running(state) as url:
        yield url, state


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def create(client, **fields):
    return client.chat.completions.create(model="phantom", messages=[user(film_url())], **fields)


# ---- OpenAI's client for Python --------------------------------------------------------------------


def test_models_are_listed(client):
    [model] = client.models.list().data
    assert model.id == "phantom" and model.metadata["default_temperature"] == 0
    assert client.models.retrieve("phantom").max_model_len == 4096
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4/o")


def test_a_whole_answer(client):
    answer = create(client, seed=1)
    [choice] = answer.choices
    assert choice.message.content == TEXT and choice.finish_reason == "stop"
    assert answer.usage.total_tokens == 44 and answer.usage.prompt_tokens_details.cached_tokens == 8
    assert answer.object == "chat.completion" and abs(answer.created - time.time()) < 600


def test_a_stream_adds_up_and_ends(client):
    chunks = list(create(client, n=2, stream=True, stream_options={"include_usage": True}))
    *others, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in others)
    assert others[0].choices[0].delta.role == "assistant"
    for index in range(2):
        mine = [chunk.choices[0] for chunk in others if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == TEXT
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
    # Without usage there is no chunk without choices.
    assert all(chunk.choices for chunk in create(client, stream=True))


@pytest.mark.parametrize("is_stream", [False, True])
def test_reasoning_apart_or_hidden(client, is_stream):
    def texts(**extra):
        answer = create(client, stream=is_stream, extra_body=extra)
        parts = (
            [chunk.choices[0].delta for chunk in answer]
            if is_stream
            else [answer.choices[0].message]
        )
        names = ("content", "reasoning", "reasoning_content")
        return ["".join(getattr(part, name, None) or "" for part in parts) for name in names]

    reasoning = " The heart is normal. No effusion. "
    answer = "<answer>No Finding</answer>"
    assert texts(reasoning_format="split") == [answer, reasoning, reasoning]
    assert texts(include_reasoning=False) == [answer, "", ""]
    assert texts(reasoning_format="tags") == [TEXT, "", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("<think>a < b</think>\n\nc <d", "a < b", "c <d"),
        ("  <think>a<answer>c", "a", "<answer>c"),
        ("<thin", "", "<thin"),
        ("no tags </think>", "", "no tags </think>"),
        ("<think>never ends </thin", "never ends </thin", ""),
        ("", "", ""),
    ],
)
def test_reasoning_is_split_the_same_however_it_comes(text, reasoning, content, size):
    splitter = ReasoningSplitter()
    splits = [splitter.add(text[at : at + size]) for at in range(0, len(text), size)]
    splits.append(splitter.add("", is_last=True))
    assert "".join(split.reasoning for split in splits) == reasoning
    assert "".join(split.content for split in splits) == content


def test_errors_are_the_clients_own(client, tmp_path):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[user()])
    assert caught.value.param == "model" and caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        create(
            client,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        )
    assert caught.value.param == "response_format.json_schema"
    # ---- Keys ----
    file = tmp_path / "keys"
    file.write_text(f"# who\n{KEY}\n{READER_KEY} read\n")
    file.chmod(0o600)
    with running(scripted_state(api_key_file=file)) as url:
        of_key = {
            key: openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            for key in ("x", KEY, READER_KEY)
        }
        with pytest.raises(openai.AuthenticationError):
            create(of_key["x"])
        with pytest.raises(openai.PermissionDeniedError):
            create(of_key[READER_KEY])
        assert create(of_key[KEY]).choices[0].message.content == TEXT
        assert httpx.get(f"{url}/v1/models").status_code == 401
        # Metrics are for this machine, unless the request has come through a proxy.
        forwarded = {"X-Forwarded-For": "10.0.0.1"}
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/metrics", headers=forwarded).status_code == 401
        forwarded["Authorization"] = f"Bearer {READER_KEY}"
        assert httpx.get(f"{url}/metrics", headers=forwarded).status_code == 200


@pytest.mark.parametrize(
    "mode, is_taken", [(0o600, True), (0o640, True), (0o644, False), (0o602, False), (0o660, False)]
)
def test_a_file_of_keys_is_for_its_owner(mode, is_taken, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    file.chmod(mode)
    if is_taken:
        assert len(read_key_file(file)) == 1
    else:
        with pytest.raises(UserError, match="others may read or write"):
            read_key_file(file)


@pytest.mark.parametrize("text", ["short", "sk-a-key-of-the-tests fly", "", "a b c", "\xff"])
def test_damaged_files_of_keys_are_refused_without_the_key(text, tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(text.encode("latin-1"))
    file.chmod(0o600)
    with pytest.raises(UserError) as caught:
        read_key_file(file)
    assert not text or text not in str(caught.value)


def test_a_full_queue_and_a_busy_caller_are_told_when_to_come_back(client):
    gate = threading.Event()
    engine = ScriptedEngine(gate=gate, slots=2)
    limits = Limits(concurrent_per_key=3)
    with running(scripted_state(engine, limits=limits)) as url:
        busy = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        streams = [create(busy, stream=True) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            create(busy)
        assert caught.value.response.headers["Retry-After"] == "7"
        engine.slots = 3
        streams.append(create(busy, stream=True))
        next(streams[-1])
        with pytest.raises(openai.RateLimitError) as caught:
            create(busy)
        assert caught.value.code == "rate_limit_exceeded"
        gate.set()
        for stream in streams:
            list(stream)
        # Everybody has given his place back.
        wait_until(lambda: create(busy).choices)


def test_a_caller_has_so_many_requests_a_minute():
    now = [0.0]
    limits = CallerLimits(Limits(requests_per_minute=3), lambda: now[0])
    for _ in range(3):
        limits.enter("a")()
    with pytest.raises(RefusedError) as caught:
        limits.enter("a")
    assert caught.value.headers["Retry-After"] == "20"
    limits.enter("b")
    now[0] = 20.0
    limits.enter("a")


def test_before_it_is_ready_and_after_it_stops(client):
    engine = ScriptedEngine()
    engine.is_ready = False
    state = scripted_state(engine)
    with running(state) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        answer = httpx.post(f"{url}/v1/chat/completions", json=body(text="x"))
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        engine.is_ready = True
        assert httpx.get(f"{url}/ready").status_code == 200
        state.is_stopping = True
        assert httpx.get(f"{url}/ready").status_code == 503
        answer = httpx.post(f"{url}/v1/chat/completions", json=body(text="x"))
        assert answer.json()["error"]["code"] == "stopping"
        state.is_stopping = False


# ---- Clients that leave, that do not read, and a server that stops ---------------------------------


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def open_stream(url, request):
    """A stream by a bare socket, which can be left as a cable is pulled."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    content = json.dumps({**request, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_clients_that_vanish_free_their_slots_at_once():
    gate = threading.Event()
    engine = ScriptedEngine(gate=gate)
    with running(scripted_state(engine)) as url:
        stays = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        others = [create(stays, stream=True) for _ in range(2)]
        connections = [open_stream(url, body(text="x")) for _ in range(32)]
        for connection in connections:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        wait_until(lambda: len(engine.jobs) == 34)
        for connection in connections:
            connection.close()
        # How soon is measured by benchmarks/serve.py.
        wait_until(lambda: len(engine.jobs) == 2)
        assert engine.cancelled_total == 32
        gate.set()
        for stream in others:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
        # One that waits for a whole answer may leave, too.
        gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body(text="x"), timeout=0.3)
        wait_until(lambda: not engine.jobs)
        assert engine.cancelled_total == 33
        assert "cxr_jax_clients_lost_total 33.0" in httpx.get(f"{url}/metrics").text


def test_a_slow_reader_is_cut_and_nobody_else():
    engine = ScriptedEngine(pieces=["x" * 100_000] * 200)
    limits = Limits(stream_bytes=500_000)
    with running(scripted_state(engine, limits=limits)) as url:
        connection = open_stream(url, body(text="x"))
        connection.recv(100)
        wait_until(lambda: engine.cancelled_total + len(engine.jobs) == 0 or not engine.jobs)
        # What was on its way comes; the end of the stream does not.
        answer = b""
        while chunk := connection.recv(1 << 20):
            answer += chunk
        connection.close()
        assert len(answer) < 15_000_000 and b"[DONE]" not in answer
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_a_server_that_stops_ends_its_streams_with_an_error():
    engine = ScriptedEngine(gate=threading.Event())
    said = []
    with running(scripted_state(engine)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        stream = create(client, stream=True)
        next(stream)

        def read():
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            said.append(caught.value.code)

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: engine.jobs)
    reading.join(5)
    assert said == ["stopping"]


# ---- OpenAI's client for JavaScript ----------------------------------------------------------------

SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none", maxRetries: 0 });
const messages = JSON.parse(process.env.MESSAGES);
const models = await client.models.list();
const whole = await client.chat.completions.create({ model: "phantom", messages });
const stream = await client.chat.completions.create(
  { model: "phantom", messages, stream: true, stream_options: { include_usage: true } });
let text = "", usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const errors = [];
for (const fields of [{ model: "other" }, { n: 99 }]) {
  try { await client.chat.completions.create({ model: "phantom", messages, ...fields }); }
  catch (error) { errors.push([error.constructor.name, error.param]); }
}
console.log(JSON.stringify(
  { models: models.data.map((m) => m.id), whole: whole.choices[0].message.content, text, usage, errors }));
"""


@pytest.mark.skipif(
    not (NODE_MODULES / "openai").is_dir() or not shutil.which("node"),
    reason="openai for JavaScript is not here (bash launch/test_tools.sh)",
)
def test_the_client_for_javascript_reads_the_same(server, tmp_path):
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    script = tmp_path / "client.mjs"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "URL": f"{server[0]}/v1",
        "MESSAGES": json.dumps([user(film_url())]),
    }
    done = subprocess.run(
        ["node", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["models"] == ["phantom"] and said["whole"] == said["text"] == TEXT
    assert said["usage"]["total_tokens"] == 44
    assert said["errors"] == [["NotFoundError", "model"], ["BadRequestError", "n"]]
