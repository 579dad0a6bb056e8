"""Traces by a served model: a stand-in on loopback that answers well, badly, late, without end, or not at all."""

import http.server
import json
import re
import socket
import threading
import time

import pytest

from cxr_jax.data.report_rows import make_report
from cxr_jax.data.report_sections import SECTIONS
from cxr_jax.data.traces import endpoint, rows
from cxr_jax.errors import RunFailedError, UserError

REPORT = (
    "FINDINGS: Small right effusion. No pneumothorax. Heart is normal. IMPRESSION: Right effusion."
)
NOTE = re.compile(r"Note (\d+)")
GOOD = "Pleura: Small right effusion. No pneumothorax.\nHeart: Heart is normal.\nSummary: Right effusion."


class Server(http.server.ThreadingHTTPServer):
    """Answers every request by `answer`, a function of the handler and of the request's body; keeps the bodies."""

    daemon_threads = True

    def handle_error(self, *_):
        """A client that hangs up is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, dict(self.headers), json.loads(self.body)))
        self.server.answer(self)

    def log_message(self, *_):
        pass

    def send(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def say(self, text):
        self.send(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


@pytest.fixture
def server():
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAIT", 0)


def place(server, **more):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return endpoint.Endpoint(**({"url": url, "model": "stand-in", "timeout": 5.0} | more))


def ask(server, texts=(REPORT,), tries=1, **more):
    """What becomes of reports: rows, and reasons of those rejected."""
    reports = [make_report("in", row, str(row), text, SECTIONS) for row, text in enumerate(texts)]
    counts = rows.TraceCounts()
    write = endpoint.writer(place(server, **more))
    made = list(rows.make_rows(reports, rows.TraceOptions(tries=tries), counts, write))
    return [one.row if one.row else one.rejected["reasons"] for one in made]


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.02)


ANSWERS = {
    "good": (lambda handler: handler.say(GOOD), None),
    "tags": (
        lambda handler: handler.say(f"<think>{GOOD}</think><answer>pleural effusion</answer>"),
        None,
    ),
    "finding": (lambda handler: handler.say(GOOD + " Edema."), "Edema: not mentioned"),
    "side": (lambda handler: handler.say(GOOD.replace("right", "left")), "Pleural Effusion: right"),
    "denial": (lambda handler: handler.say(GOOD.replace("No p", "P")), "Pneumothorax: denied"),
    "normal": (lambda handler: handler.say(GOOD + " Bones are intact."), "sentence 5 stands on"),
    "label": (lambda handler: handler.say(f"{GOOD}<answer>Edema</answer>"), "another answer"),
    "junk": (lambda handler: handler.say("Sure! Here it is: \u2603"), "Pleural Effusion: affirmed"),
    "nothing": (lambda handler: handler.say(" "), "an empty answer"),
    "huge": (lambda handler: handler.send(b"x" * (endpoint.MAX_ANSWER + 9)), "an answer of over"),
    "long": (lambda handler: handler.say("Effusion. " * 9999), "the trace has over"),
    "slow": (trickle, "no answer within 0.5 s"),
    "broken": (lambda handler: handler.send(b'{"choices": ['), "not JSON"),
    "deep": (lambda handler: handler.send(b"[" * 100_000), "not JSON"),
    "other": (lambda handler: handler.send(b"[1]"), "without choices"),
    "number": (lambda handler: handler.say(3), "an empty answer"),
    "error": (lambda handler: handler.send(b"", 500), "status 500"),
    "redirect": (
        lambda handler: handler.send(b"", 307, Location="http://192.0.2.1/v1/chat/completions"),
        "status 307",
    ),
}


def test_answers(server):
    """A report a kind of answer, all in one go; each names its kind, so that the stand-in knows which it is asked."""
    kinds = list(ANSWERS)
    server.answer = lambda handler: ANSWERS[kinds[int(NOTE.search(handler.body)[1])]][0](handler)
    made = ask(
        server, texts=[f"{REPORT} Note {number}." for number in range(len(kinds))], timeout=0.5
    )
    for (answer, reason), one in zip(ANSWERS.values(), made, strict=True):
        if reason is None:
            trace = " ".join(GOOD.split())
            assert one["messages"][1]["content"][0]["text"] == (
                f"<think>{trace}</think><answer>Pleural Effusion</answer>"
            )
        else:
            assert any(reason in some for some in one), (answer, one)


def test_what_is_asked(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    server.answer = ANSWERS["good"][0]
    ask(server, key_variable="A_KEY")
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "stand-in" and body["temperature"] == 0
    assert body["messages"][1]["content"].splitlines() == [
        "Findings: Small right effusion.",
        "Findings: No pneumothorax.",
        "Findings: Heart is normal.",
        "Impression: Right effusion.",
    ]


def test_a_busy_server_is_asked_again(server):
    left = [503, 429]
    server.answer = lambda handler: handler.send(b"", left.pop()) if left else handler.say(GOOD)
    assert ask(server)[0]["solution"] == "Pleural Effusion" and len(server.asked) == 3


def test_a_bad_trace_is_asked_for_again(server):
    texts = [GOOD, GOOD + " Edema."]
    server.answer = lambda handler: handler.say(texts.pop())
    assert ask(server, tries=2)[0]["solution"] == "Pleural Effusion"


def test_rows_keep_the_order_of_reports(server):
    server.answer = ANSWERS["good"][0]
    made = ask(server, [REPORT] * 20, parallel=4)
    assert [row["id"] for row in made] == list(map(str, range(20)))


def test_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    silent = endpoint.Endpoint(url=f"http://127.0.0.1:{port}", model="x", timeout=1)
    reports = [make_report("in", row, str(row), REPORT, SECTIONS) for row in range(1, 9)]
    write = endpoint.writer(silent)
    with pytest.raises(RunFailedError, match="no answer 5 times"):
        list(rows.make_rows(reports, rows.TraceOptions(), rows.TraceCounts(), write))


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "ftp://127.0.0.1", "http://", "http://127.0.0.1:x", "http://127.0.0.1:99999"),
        *("http://me:key@127.0.0.1", "http://127.0.0.1/v1?key=1", "http://127.0.0.1/a b"),
        *(
            "http://192.0.2.1/v1",
            "http://example.org",
            "http://127.0.0.1.example.org",
            "http://0.0.0.0",
        ),
        *("http://[::ffff:192.0.2.1]", "http://localhost.example.org", "http://2130706433"),
    ],
)
def test_addresses_that_are_refused(url):
    with pytest.raises(UserError, match="--endpoint"):
        endpoint.check(endpoint.Endpoint(url=url, model="x"))


def test_addresses_that_are_taken(monkeypatch):
    for host in ("127.0.0.1", "127.1.2.3:80", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert endpoint.check(endpoint.Endpoint(url=f"http://{host}/v1", model="x")) is None
    far = endpoint.Endpoint(url="https://example.org/v1", model="x", allow_remote=True)
    warning = endpoint.check(far)
    assert warning.startswith("warning: report text is sent to example.org") and "\n" not in warning
    with pytest.raises(UserError, match="--key_variable"):
        endpoint.check(
            endpoint.Endpoint(url="http://localhost", model="x", key_variable="NO_SUCH_KEY")
        )
