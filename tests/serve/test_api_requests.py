"""What the API takes and what it refuses, each refusal a 4xx that names its field, and nothing fetched for anybody."""

import base64
import hashlib
import json
import socket

import httpx
import numpy as np
import pytest
from api_bodies import BLANK, COLOUR, NOISE, body, data_url, film_url, image_part, png_bytes, user
from dicom_files import build
from films import draw_film
from places import SHARED
from room_servers import running, scripted_state
from scripted_engine import ScriptedEngine

from cxr_jax.outputs import schema
from cxr_jax.serve.limits import Limits
from cxr_jax.serve.state import Capabilities
from experiments.analysis import gate_pictures

FILM = film_url()
LIMITS = Limits(chat_bytes=3_000_000, image_bytes=1_000_000, body_seconds=1.0)


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine()


@pytest.fixture(scope="module")
def client(engine):
    state = scripted_state(engine, limits=LIMITS)
    with running(state) as url, httpx.Client(base_url=url, timeout=200) as client:
        yield client


def post(client, content, **headers):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **headers}
    return client.post("/v1/chat/completions", content=content, headers=headers)


def refusal(answer, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in answer.text
    return error


# ---- Fields ----------------------------------------------------------------------------------------

REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"top_logprobs": 2, "logprobs": True}, "top_logprobs"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"guided_json": {}}, "guided_json"),
    ({"n": 9}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 513}, "max_tokens"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"temperature": 1e-9}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 0}, "top_k"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logprobs": True, "include_reasoning": False}, "logprobs"),
    ({"reasoning_format": "none"}, "reasoning_format"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        "response_format.json_schema",
    ),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": " \n"}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 33_000}]}, "messages"),
    ({"image_roles": ["frontal"]}, "image_roles"),
]


@pytest.mark.parametrize("change, param", REFUSED, ids=lambda case: json.dumps(case)[:40])
def test_what_is_not_done_is_refused_by_name(client, change, param):
    error = refusal(post(client, {**body(text="x"), **change}))
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_values_that_ask_for_nothing_are_taken(client, engine):
    harmless = {"tools": [], "frequency_penalty": 0.0, "logit_bias": {}, "top_logprobs": 0}
    harmless |= {
        "store": False,
        "parallel_tool_calls": True,
        "stop": None,
        "user": "me",
        "top_k": -1,
    }
    answer = post(client, {**body(text="x"), **harmless, "response_format": {"type": "text"}})
    assert answer.status_code == 200 and "X-Ignored-Fields" not in answer.headers
    settings = engine.asks[-1].settings
    assert (settings.temperature, settings.n, settings.top_k) == (0.0, 1, None)
    assert settings.max_new_tokens == 512


def test_names_that_nobody_knows_are_told_in_a_header(client):
    request = body(FILM, text="x", zebra=1, **{"bad\r\nname: x": 2})
    request["messages"][0]["name"] = "me"
    request["messages"][0]["content"][0]["image_url"]["detail"] = "high"
    answer = post(client, request)
    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"].split(", ") == [
        "zebra",
        "bad??name??x",
        "messages[0].name",
        "messages[0].content[0].image_url.detail",
    ]


def test_settings_arrive_as_they_were_sent(client, engine):
    request = body(
        FILM, text="x", seed=7, temperature=0.5, top_p=0.9, top_k=5, n=2, stop="</t", max_tokens=9
    )
    answer = post(client, request)
    ask = engine.asks[-1]
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 2
    settings = ask.settings
    assert (settings.seed, settings.temperature, settings.top_p, settings.top_k) == (7, 0.5, 0.9, 5)
    assert (settings.n, settings.max_new_tokens, ask.stop) == (2, 9, ("</t",))
    [picture] = ask.images
    np.testing.assert_allclose(picture, draw_film(260, 240) / 255, atol=1e-6)
    assert ask.messages == [{"role": "user", "content": "x"}]


def test_a_film_behind_the_text_keeps_its_place(client, engine):
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "this:"},
            image_part(FILM),
            {"type": "text", "text": "is?"},
        ],
    }
    assert post(client, {"model": "phantom", "messages": [message]}).status_code == 200
    assert engine.asks[-1].messages[0]["content"] == "this:<image>is?"


# ---- Bodies ----------------------------------------------------------------------------------------

HOSTILE = {
    "no JSON": b"{",
    "no object": b"[1]",
    "deep": b'{"a":' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "a hundred levels": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": 1e999}',
    "a name twice": b'{"model": "phantom", "model": "other"}',
    "half a character": b'{"model": "\\ud800"}',
    "half a character as a name": b'{"\\ud800": 1}',
    "not UTF-8": b'{"model": "\xff"}',
    "a long number": b'{"seed": ' + b"9" * 100_000 + b"}",
    "many elements": b'{"a": [' + b"0," * 60_000 + b"0]}",
    "empty": b"",
    "null": b"null",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused(client, content):
    refusal(post(client, content))


def test_another_type_of_content_is_refused(client):
    answer = post(client, body(text="x"), **{"Content-Type": "text/plain"})
    assert refusal(answer, 415)["param"] == "Content-Type"


def raw(client, head, *pieces):
    """Send bytes as they are, and give the status and the rest of the answer."""
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer and b"}}" in answer:
                break
    return int(answer.split()[1]), answer


HEAD = "POST /v1/chat/completions HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"


def test_a_large_body_is_refused_before_it_is_read(client):
    status, answer = raw(client, HEAD + "Content-Length: 100000000\n\n")
    assert status == 413 and b"body_too_large" in answer


def test_a_large_body_of_no_declared_length_is_refused_at_the_limit(client):
    chunk = b"80000\r\n" + b" " * 0x80000 + b"\r\n"
    status, _ = raw(client, HEAD + "Transfer-Encoding: chunked\n\n", *[chunk] * 6)
    assert status == 413


def test_a_slow_body_is_given_up(client):
    status, _ = raw(client, HEAD + "Content-Length: 50\n\n", b"{")
    assert status == 408


def test_foreign_hosts_and_origins_are_refused(client):
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert post(client, body(text="x"), **headers).status_code in (403, 421)
    port = client.base_url.port
    assert post(client, body(text="x"), Origin=f"http://127.0.0.1:{port}").status_code == 200
    answer = client.get("/health")
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store" and "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


def test_no_error_and_no_log_repeats_what_was_sent(client, caplog):
    # Of its own loggers: a command that ran in this process before may have made them quieter.
    caplog.set_level("DEBUG", logger="cxr_jax.serve")
    secret = "PATIENT-NAME-4711"
    request = {**body(text=secret), "stop": [secret, 5], secret: secret, "user": secret}
    # The one place is the header of skipped names, which tells a client what it spelt wrong.
    answer = post(client, request, **{"User-Agent": secret, "Authorization": f"Bearer {secret}"})
    assert secret not in refusal(answer)["message"]
    client.get(f"/{secret}?{secret}")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("cxr_jax")]
    assert ours and not any(secret in line for line in ours)
    assert secret not in client.get("/metrics").text


# ---- Films -----------------------------------------------------------------------------------------


def hand():
    pixels = gate_pictures.draw_hand(np.random.default_rng(1))
    return data_url(png_bytes((np.clip(pixels, 0, 1) * 255).astype(np.uint8)))


LATERAL = data_url(
    build((draw_film(300, 280).astype(np.uint16)) * 16, ViewPosition="LL"), "application/dicom"
)


@pytest.mark.parametrize(
    "url, reason",
    [
        (NOISE, "noise"),
        (BLANK, "blank"),
        (COLOUR, "colour"),
        (hand(), "hand"),
        (LATERAL, "frontal"),
    ],
    ids=["noise", "blank", "colour", "hand", "lateral"],
)
def test_what_is_no_frontal_chest_film_is_refused_with_its_reason(client, engine, url, reason):
    error = refusal(post(client, body(url)))
    assert reason in error["message"] and "--" not in error["message"]
    assert error["param"] == "messages[0].content[0].image_url.url"
    assert error["code"] == "unusable_image"
    answer = post(client, body(url, read_anyway=True))
    assert (
        answer.status_code == 200 and answer.json()["warnings"] and len(engine.asks[-1].images) == 1
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_real_files_are_read_and_bad_ones_refused(client):
    good = sorted((SHARED / "dicom" / "derived").glob("*.dcm"))
    for path in good:
        answer = post(client, body(data_url(path.read_bytes(), "application/dicom")))
        assert answer.status_code == 200, (path.name, answer.text)
    for path in sorted((SHARED / "dicom" / "bad").iterdir()):
        kind = {".png": "image/png", ".jpg": "image/jpeg"}.get(path.suffix, "application/dicom")
        answer = post(client, body(data_url(path.read_bytes(), kind)))
        assert answer.status_code in (200, 400), path.name
        assert "Traceback" not in answer.text and str(path) not in answer.text


BAD_URLS = {
    "http": "http://127.0.0.1:9/film.png",
    "https": "https://example.com/film.png",
    "file": "file:///etc/passwd",
    "svg": "data:image/svg+xml;base64,PHN2Zy8+",
    "a path": "/etc/passwd",
    "no base64": "data:image/png,abc",
    "another charset": "data:image/png;charset=x;base64,AAAA",
    "damaged base64": "data:image/png;base64,@@@@",
    "another kind": data_url(png_bytes(draw_film(99, 99)), "image/jpeg"),
    "no picture": data_url(b"hello", "image/png"),
    "empty": data_url(b"", "application/dicom"),
    "cut": data_url(png_bytes(draw_film(99, 99))[:2000]),
    "too large": data_url(bytes(1_100_000)),
}


def test_no_url_is_fetched(client, engine, monkeypatch):
    count = engine.submitted
    opened = []
    own = (client.base_url.host, client.base_url.port)
    connect = socket.socket.connect

    def watched(connection, address):
        if address != own:
            opened.append(address)
        return connect(connection, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    for name, url in BAD_URLS.items():
        error = refusal(post(client, body(url)))
        assert error["param"] == "messages[0].content[0].image_url.url", name
    assert not opened and engine.submitted == count


def test_a_second_film_needs_a_model_that_reads_several(client):
    error = refusal(post(client, body(FILM, FILM)))
    assert error["param"] == "messages[0].content[1].image_url.url"
    later = [user(FILM), {"role": "assistant", "content": "x"}, user(FILM)]
    error = refusal(post(client, {"model": "phantom", "messages": later}))
    assert error["param"] == "messages[2].content[0].image_url"
    error = refusal(
        post(client, {"model": "phantom", "messages": [{**user(FILM), "role": "system"}, user()]})
    )
    assert error["param"] == "messages[0].content[0].image_url"


def test_several_films_with_roles():
    engine = ScriptedEngine()
    state = scripted_state(engine, Capabilities(several_images=True))
    with running(state) as url, httpx.Client(base_url=url, timeout=20) as client:
        request = body(LATERAL, FILM, image_roles=["lateral", "frontal"])
        assert post(client, request).status_code == 200
        ask = engine.asks[-1]
        # In the order of roles, each named in the question.
        assert [len(image) for image in ask.images] == [260, 300]
        assert ask.messages[0]["content"].startswith(
            "Current frontal: <image> Current lateral: <image>\n"
        )
        # Without roles every film is held to be a frontal one.
        refusal(post(client, body(LATERAL, FILM)))
        refusal(post(client, body(FILM, FILM, image_roles=["frontal", "sideways"])))
        assert post(client, body(FILM, film_url(1))).status_code == 200
        error = refusal(post(client, body(*[FILM] * 5)))
        assert error["param"] == "messages[0].content[4].image_url.url"


# ---- Documents -------------------------------------------------------------------------------------


def test_a_document_keeps_our_schema(client, engine):
    published = client.get("/v1/schemas/cxr_reading").json()
    for json_schema in (
        {"name": "x", "schema": published, "strict": True},
        {"name": "cxr_reading"},
    ):
        wanted = {"type": "json_schema", "json_schema": json_schema}
        request = body(FILM, response_format=wanted, stream=False)
        answer = post(client, request).json()
        document = json.loads(answer["choices"][0]["message"]["content"])
        assert schema.problems(document) == []
        ask = engine.asks[-1]
        assert ask.constraint == "answers" and ask.probabilities
        content = base64.b64decode(FILM.partition(",")[2])

        assert document["image"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert document["findings"][0]["probability"] == 0.25 and document["answer"] == [
            "No Finding"
        ]
    for change in ({"n": 2}, {"stop": "a"}, {"logprobs": True}, {"reasoning_format": "split"}):
        [param] = change
        assert refusal(post(client, {**request, **change}))["param"] == param
    refusal(post(client, body(text="x", response_format=wanted)))
    streamed = post(client, {**request, "stream": True}).text
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert json.loads(text) == document and streamed.endswith("data: [DONE]\n\n")
