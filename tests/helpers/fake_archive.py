"""An archive on loopback with as much DICOMweb as a room asks for (QIDO-RS, WADO-RS, STOW-RS), over films of a test."""

import contextlib
import http.server
import io
import json
import threading
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pydicom

STUDY_TAGS = {
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "StudyDescription": "00081030",
    "PatientID": "00100020",
}
INSTANCE_TAGS = {
    "SOPClassUID": "00080016",
    "SOPInstanceUID": "00080018",
    "SeriesInstanceUID": "0020000E",
    "Modality": "00080060",
}


def header_of(content):
    return pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)


def attributes(header, tags, **more):
    found = {tag: str(getattr(header, name, "")) for name, tag in tags.items()} | more
    return {tag: {"vr": "LO", "Value": [value]} for tag, value in found.items()}


class _Handler(http.server.BaseHTTPRequestHandler):
    def send(self, status, body, kind="application/dicom+json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        archive, address = self.server.archive, urlsplit(self.path)
        archive.asked.append(self.path)
        parts, query = address.path.strip("/").split("/")[1:], parse_qs(address.query)
        headers = {content: header_of(content) for content in archive.films}
        if len(parts) == 1:
            wanted = query.get("PatientID", [None])[0]
            found = {
                header.StudyInstanceUID: attributes(
                    header, STUDY_TAGS, **archive.said, **{"00080061": header.Modality}
                )
                for header in headers.values()
                if wanted in (None, header.PatientID)
            }
            return self.send(200, json.dumps(list(found.values())).encode())
        if len(parts) == 3:
            of_study = [h for h in headers.values() if h.StudyInstanceUID == parts[1]]
            items = [attributes(header, INSTANCE_TAGS) for header in of_study]
            return self.send(200, json.dumps(items + archive.others).encode())
        for content, header in headers.items():
            if header.SOPInstanceUID == parts[-1]:
                part = (
                    b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--b--\r\n"
                )
                kind = 'multipart/related; type="application/dicom"; boundary=b'
                return self.send(200, part, kind)
        return self.send(404, b"{}")

    def do_POST(self):
        archive = self.server.archive
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = self.headers["Content-Type"].split("boundary=")[1].encode()
        parts = [
            piece.split(b"\r\n\r\n", 1)[1][:-2] for piece in body.split(b"--" + boundary)[1:-1]
        ]
        archive.stored += parts
        items = [
            {"00081155": {"vr": "UI", "Value": [header_of(part).SOPInstanceUID]}} for part in parts
        ]
        kept, left = items[: archive.takes], items[archive.takes :]
        answer = {"00081199": {"vr": "SQ", "Value": kept}, "00081198": {"vr": "SQ", "Value": left}}
        return self.send(200, json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def archive_of(*films):
    """Serve films; gives `url`, what was `asked` and `stored`, and what else it says: `said`, `others`, `takes`."""
    archive = SimpleNamespace(films=films, asked=[], stored=[], said={}, others=[], takes=99)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.archive, server.daemon_threads = archive, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    archive.url = f"http://127.0.0.1:{server.server_port}/dicom-web"
    try:
        yield archive
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
