"""The API on the real engine: what it says is what `Model.generate` says, token for token, whoever sits beside it."""

import concurrent.futures
import json
import socket
import time

import httpx
import numpy as np
import openai
import pytest
from api_bodies import QUESTION, data_url, png_bytes, user
from room_servers import running

from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.outputs import document
from cxr_jax.serve.state import Capabilities, ServerState

TOKENS = 48


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Phantoms as PNG files: (data URL, path) each."""
    folder = tmp_path_factory.mktemp("films")
    made = []
    for number, film in enumerate(PhantomSource("A", "test", 3).batch(np.arange(4))["image"]):
        content = png_bytes((np.asarray(film) * 255).round().astype(np.uint8))
        path = folder / f"{number}.png"
        path.write_bytes(content)
        made.append((data_url(content), path))
    return made


@pytest.fixture(scope="module")
def client(room):
    return openai.OpenAI(base_url=f"{room.url}/v1", api_key="none", max_retries=0, timeout=300)


def generated(room, paths, prompts, **settings):
    """What the model gives, computed where all of JAX is."""
    call = room.state.engine.call(lambda: room.state.model.generate(paths, prompts, **settings))
    return call.result(300)


def test_the_same_text_token_for_token(room, client, films):
    wanted = [
        dict(seed=1),
        dict(seed=2, temperature=1.0, n=2),
        dict(seed=3, temperature=0.7, top_p=0.9),
        dict(seed=4, temperature=1.2, top_k=5),
    ]

    def ask(number):
        settings = dict(wanted[number])
        extra = {"top_k": settings.pop("top_k")} if "top_k" in settings else {}
        request = dict(model="phantom", messages=[user(films[number][0])], max_tokens=TOKENS)
        stream = client.chat.completions.create(
            **request, **settings, stream=True, logprobs=True, extra_body=extra
        )
        texts, values = {}, {}
        for chunk in stream:
            [choice] = chunk.choices
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            values.setdefault(choice.index, []).extend(
                choice.logprobs.content if choice.logprobs else []
            )
        whole = client.chat.completions.create(**request, **settings, extra_body=extra)
        return texts, values, whole

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    for (texts, values, whole), settings, (_, path) in zip(answers, wanted, films, strict=True):
        [completions] = generated(room, [path], QUESTION, max_new_tokens=TOKENS, **settings)
        assert len(completions) == len(texts) == len(whole.choices)
        for index, completion in enumerate(completions):
            assert texts[index] == whole.choices[index].message.content == completion.text
            assert whole.choices[index].finish_reason == completion.finish_reason
            drawn = [entry.logprob for entry in values[index]]
            np.testing.assert_allclose(drawn, completion.logprobs, atol=1e-4)
            # Tokens as bytes add up to the text; the one that ends a turn has none.
            content = b"".join(bytes(entry.bytes or []) for entry in values[index])
            assert content.decode() == completion.text
        assert whole.usage.completion_tokens == sum(len(one.token_ids) for one in completions)


def test_a_follow_up_finds_its_prompt_computed(client, films):
    url, _ = films[0]
    first = client.chat.completions.create(model="phantom", messages=[user(url)], max_tokens=TOKENS)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    turns = [user(url), said, {"role": "user", "content": "Provide differentials."}]
    again = client.chat.completions.create(model="phantom", messages=turns, max_tokens=8)
    assert again.usage.prompt_tokens > first.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_stop_texts_and_prompts_that_are_too_long(client, films):
    url, _ = films[0]
    answer = client.chat.completions.create(model="phantom", messages=[user(url)], stop=["Devices"])
    [choice] = answer.choices
    assert choice.finish_reason == "stop" and "Devices" not in choice.message.content
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="phantom", messages=[user(url, text="word " * 6_000)])
    assert caught.value.param == "messages"


def test_a_document_of_a_real_reading(client, films):
    wanted = {"type": "json_schema", "json_schema": {"name": "cxr_reading"}}
    answer = client.chat.completions.create(
        model="phantom", messages=[user(films[1][0])], response_format=wanted
    )
    reading = json.loads(answer.choices[0].message.content)
    document.check(reading)
    assert reading["trace"] and reading["valid_format"]
    assert all(0 <= finding["probability"] <= 1 for finding in reading["findings"])


def test_several_films_are_read_together(room, films):
    """The phantom was not trained on several films; what is tested is that they arrive as `generate` takes them."""
    shared = {name: getattr(room.state, name) for name in ServerState.__dataclass_fields__}
    state = ServerState(
        **{**shared, "capabilities": Capabilities(several_images=True), "films": None}
    )
    # The engine is the room's own: it must outlive this server.
    state.engine = _Borrowed(room.state.engine)
    messages = [user(films[0][0], films[1][0])]
    with running(state) as url:
        answer = openai.OpenAI(base_url=f"{url}/v1", api_key="x").chat.completions.create(
            model="phantom", messages=messages, max_tokens=16
        )
    [[completion]] = generated(room, [[films[0][1], films[1][1]]], QUESTION, max_new_tokens=16)
    assert answer.choices[0].message.content == completion.text


class _Borrowed:
    """An engine that a second server uses, and does not stop."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stop(self, timeout_s=0):
        pass


def test_32_clients_vanish_and_nobody_else_notices(room, client, films):
    def counts():
        return room.state.engine.counts()

    before = counts()["cancelled_total"]
    host, port = room.url.removeprefix("http://").split(":")
    message = {
        "model": "phantom",
        "messages": [user(films[2][0])],
        "stream": True,
        "temperature": 1,
    }
    connections = []
    for seed in range(32):
        content = json.dumps({**message, "seed": seed, "max_tokens": 512}).encode()
        connection = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        connections.append(connection)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        request = dict(model="phantom", messages=[user(films[3][0])], max_tokens=TOKENS)
        beside = pool.submit(client.chat.completions.create, **request)
        # Some read, some wait for a slot; then all are gone.
        for connection in connections:
            connection.recv(64)
        for connection in connections:
            connection.close()
        gone = time.monotonic()
        text = beside.result(120).choices[0].message.content
        while counts()["slots_busy"] and time.monotonic() < gone + 30:
            time.sleep(0.02)
    assert counts()["slots_busy"] == 0 and counts()["waiting"] == 0
    [[completion]] = generated(room, [films[3][1]], QUESTION, max_new_tokens=TOKENS)
    assert text == completion.text
    # Those that had ended by themselves were not cancelled: how many depends on the machine.
    assert 1 <= counts()["cancelled_total"] - before <= 32


def test_metrics_tell_of_the_engine(room, client, films):
    client.chat.completions.create(model="phantom", messages=[user(films[0][0])], max_tokens=2)
    metrics = httpx.get(f"{room.url}/metrics").text
    assert 'cxr_jax_requests_total{route="/v1/chat/completions",status="2xx"}' in metrics
    assert "cxr_jax_engine_tokens_total" in metrics
