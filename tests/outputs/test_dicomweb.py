"""The DICOMweb client against a server that answers badly, and the operator's file."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from cxr_jax.errors import UserError
from cxr_jax.outputs import dicomweb


class _Handler(http.server.BaseHTTPRequestHandler):
    def _answer(self):
        status, headers, body = self.server.answer(self)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for piece in body:
                self.wfile.write(piece)

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Start a server whose answers a function gives; returns a client of it."""
    started = []

    def start(answer, **settings):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.answer, server.daemon_threads = answer, True
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        started.append(server)
        url = f"http://127.0.0.1:{server.server_port}/dicom-web/"
        return dicomweb.Client(dicomweb.Server(name="archive", url=url, **settings))

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def answering(status=200, body=b"", kind="application/dicom+json", **headers):
    def answer(request):
        return status, {"Content-Type": kind, **headers}, [body]

    return answer


def multipart(*parts):
    body = b"".join(
        b"--b\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % part for part in parts
    )
    return {
        "kind": 'multipart/related; type="application/dicom"; boundary=b',
        "body": body + b"--b--\r\n",
    }


def test_a_study_is_found_by_a_filter_that_may_be_asked_for(serve):
    asked = []

    def answer(request):
        asked.append((request.path, request.headers.get("Authorization")))
        study = {"0020000D": {"vr": "UI", "Value": ["1.2.3"]}, "00080061": {"Value": ["DX", "SR"]}}
        return (
            200,
            {"Content-Type": "application/dicom+json"},
            [json.dumps([study, "odd"]).encode()],
        )

    found = serve(answer).search_studies({"PatientID": "A B*"}, limit=5)
    assert found[0]["StudyInstanceUID"] == "1.2.3" and found[0]["ModalitiesInStudy"] == ["DX", "SR"]
    assert found[0]["StudyDate"] == "" and len(found) == 2
    assert asked == [("/dicom-web/studies?PatientID=A%20B%2A&limit=5", None)]
    client = serve(answering(204))
    assert client.search_studies({"StudyDate": "20260101-20261231"}) == []
    for filters in (
        {},
        {"PatientID": "*"},
        {"PatientName": "Doe"},
        {"PatientID": "a&b=c"},
        {"PatientID": "a" * 65},
    ):
        with pytest.raises(UserError):
            client.search_studies(filters)
    for uids in (("../..", "1.2", "1.2"), ("1.2", "1.2?x", "1.2"), ("1.2", "1.2", "")):
        with pytest.raises(UserError, match="no UID"):
            client.retrieve(*uids)


def test_a_secret_comes_from_the_environment(serve, monkeypatch):
    seen = []

    def answer(request):
        seen.append(request.headers["Authorization"])
        return 200, {}, [b"[]"]

    monkeypatch.setenv("ARCHIVE_SECRET", "s3cret")
    serve(answer, user="me", password_variable="ARCHIVE_SECRET").search_studies({"PatientID": "A"})
    serve(answer, token_variable="ARCHIVE_SECRET").search_studies({"PatientID": "A"})
    assert seen == ["Basic bWU6czNjcmV0", "Bearer s3cret"]
    monkeypatch.delenv("ARCHIVE_SECRET")
    with pytest.raises(UserError, match="not set in the environment"):
        serve(answer, token_variable="ARCHIVE_SECRET").search_studies({"PatientID": "A"})


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (answering(500, b"Doe^Jane"), "status 500"),
        (answering(302, Location="http://127.0.0.1:1/"), "status 302"),
        (answering(200, b"{Doe^Jane"), "not JSON"),
        (answering(200, b"[" * 100_000), "not JSON"),
        (answering(200, b'{"Doe": 1}'), "another form"),
        (answering(200, b"[]", **{"Content-Length": "50"}), "cut off"),
        (answering(200, b"[" + b" " * dicomweb.MOST_JSON + b"]"), "over 4 MiB"),
    ],
)
def test_a_server_that_answers_badly_gets_one_line(serve, answer, why):
    with pytest.raises(dicomweb.RemoteError, match=why) as failed:
        serve(answer).search_studies({"PatientID": "A"})
    assert str(failed.value).startswith("server archive: ") and "Doe" not in str(failed.value)


def test_a_server_that_never_ends_is_left(serve):
    def answer(request):
        def drip():
            for _ in range(100):
                yield b" "
                time.sleep(0.05)

        return 200, {}, drip()

    # The message says that it was the limit which ended it, and not the server.
    with pytest.raises(dicomweb.RemoteError, match=r"within 0\.5 s"):
        serve(answer, timeout_s=0.5).search_studies({"PatientID": "A"})
    with pytest.raises(dicomweb.RemoteError, match="no HTTP answer"):
        gone = dicomweb.Server(name="gone", url="http://127.0.0.1:9/")
        dicomweb.Client(gone).search_studies({"PatientID": "A"})


def test_a_film_is_the_film_that_was_asked_for(serve, made):
    film, header = made.file.data, made.source.dataset
    uids = header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID
    assert serve(answering(**multipart(film))).retrieve(*uids) == film
    assert serve(answering(200, film, "application/dicom")).retrieve(*uids) == film
    with pytest.raises(dicomweb.RemoteError, match="another instance"):
        serve(answering(**multipart(film))).retrieve(uids[0], uids[1], "1.2.3")
    for bad in (multipart(), multipart(film, film), {"body": film, "kind": "text/html"}):
        with pytest.raises(dicomweb.RemoteError, match="parts where one"):
            serve(answering(**bad)).retrieve(*uids)
    with pytest.raises(UserError):
        serve(answering(**multipart(b"no DICOM"))).retrieve(*uids)


def test_what_a_server_does_not_say_it_has_is_not_stored(serve, made):
    uid = made.source.dataset.SOPInstanceUID

    def reply(tag, **more):
        item = {"00081155": {"vr": "UI", "Value": [uid]}, **more}
        return answering(200, json.dumps({tag: {"vr": "SQ", "Value": [item]}}).encode())

    kept = serve(reply("00081199"), may_store=True).store([made.file.data])
    assert kept == dicomweb.Stored([uid], {})
    refused = reply("00081198", **{"00081197": {"vr": "US", "Value": [272]}})
    assert serve(refused, may_store=True).store([made.file.data]) == dicomweb.Stored([], {uid: 272})
    assert serve(answering(200, b"{}"), may_store=True).store([made.file.data]).refused == {uid: 0}
    with pytest.raises(UserError, match="may_store"):
        serve(reply("00081199")).store([made.file.data])


def test_the_operator_s_file(tmp_path):
    path = tmp_path / "pacs.toml"

    def load(text):
        path.write_text(text)
        return dicomweb.load_servers(path)

    servers = load(
        '[servers.a]\nurl = "https://a.example/x"\nmay_store = true\n[servers.b]\nurl = "http://[::1]:80/"'
    )
    assert servers["a"].may_store and not servers["b"].may_store
    assert load('[servers.a]\nurl = "http://a.example/"\nallow_plain = true')["a"].url
    for text in (
        "servers = 1", "[other]", "[servers.a]", '[servers.a]\nurl = "http://a.example/"', '[servers.A]\nurl = "https://a/"',
        '[servers.a]\nurl = "ftp://a/"', '[servers.a]\nurl = "https://u:p@a/"', '[servers.a]\nurl = "https://a/?q"',
        '[servers.a]\nurl = 3', '[servers.a]\nurl = "https://a/"\npassword = "x"', "not toml",
        '[servers.a]\nurl = "https://a/"\ntimeout_s = 0', '[servers.a]\nurl = "https://a:b/"',
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            load(text)
        assert str(path) in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        dicomweb.load_servers(tmp_path / "absent.toml")
