"""OHIF opens what we store: `unshare -n python ohif.py FOLDER DIST`, after `npm pack @ohif/app@3.13.2` in some folder.

Too large for the suite (204 MB), so it is run by hand. FOLDER is as for orthanc_session.py, DIST the package's `dist`.
The film goes there without VOI LUT Function (0028,1056), which the current Cornerstone3D cannot read (its issue 2844).
Writes FOLDER/ohif.png, ohif_picture.png, ohif_text.png and ohif_findings.png, for eyes, and prints what the list of
series says and what text stands in the viewport of each. That of the findings is empty: OHIF shows an Imaging
Measurement Report (126000) as its images under coordinates, and ours have none; every other SR it shows as text.
"""

import base64
import http.server
import json
import mimetypes
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pydicom
from orthanc_session import Client, load_servers, send, start, wait_for
from playwright.sync_api import sync_playwright

CONFIG = """window.config = {routerBasename: '/', extensions: [], modes: [], showStudyList: true,
 defaultDataSourceName: 'dicomweb', dataSources: [{namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
 sourceName: 'dicomweb', configuration: {friendlyName: 'Orthanc', name: 'orthanc', wadoUriRoot: '/dicom-web',
 qidoRoot: '/dicom-web', wadoRoot: '/dicom-web', qidoSupportsIncludeField: false, imageRendering: 'wadors',
 thumbnailRendering: 'wadors', enableStudyLazyLoad: true, supportsFuzzyMatching: false, supportsWildcard: true,
 omitQuotationForMultipartRequest: true}}]};"""


class Proxy(http.server.BaseHTTPRequestHandler):
    """OHIF's files, and behind /dicom-web the archive: one origin, as OHIF wants it."""

    def do_GET(self):
        if self.path.startswith("/dicom-web"):
            return self._pass_on()
        name = self.path.partition("?")[0].lstrip("/")
        file = self.server.dist / name
        if name == "app-config.js":
            return self._answer(200, "text/javascript", CONFIG.encode())
        # Its own addresses are all one page.
        file = file if name and file.is_file() else self.server.dist / "index.html"
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return self._answer(
            200, "application/wasm" if file.suffix == ".wasm" else kind, file.read_bytes()
        )

    def _pass_on(self):
        request = urllib.request.Request(f"http://127.0.0.1:18042{self.path}")
        pair = base64.b64encode(f"room:{os.environ['ORTHANC_PASSWORD']}".encode()).decode()
        request.add_header("Authorization", f"Basic {pair}")
        request.add_header("Accept", self.headers.get("Accept", "*/*"))
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                self._answer(reply.status, reply.headers["Content-Type"], reply.read())
        except urllib.error.HTTPError as error:
            self._answer(error.code, "text/plain", error.read())

    def _answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def look(study_uid: str, folder: Path) -> dict:
    """Open the study in Chromium; returns what the page lists, and its complaints."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)[:200]))
        page.goto(f"http://127.0.0.1:18080/viewer?StudyInstanceUIDs={study_uid}", timeout=180_000)
        page.wait_for_selector("canvas", timeout=180_000)
        # All four series, and the film drawn: what OHIF shows last.
        page.wait_for_function("document.body.innerText.split('SR').length >= 3", timeout=180_000)
        page.wait_for_timeout(15_000)
        page.screenshot(path=str(folder / "ohif.png"))
        # Its tour and its notice lie over the lists.
        for button in ("Skip all", "Confirm and hide"):
            page.get_by_text(button).click(timeout=20_000)
        # The capture, then each SR, as a reader opens them: by what the list says of them.
        shown = {}
        for name, words in (
            ("picture", "Picture ("),
            ("text", "Text ("),
            ("findings", "Findings in codes ("),
        ):
            page.get_by_text(words).first.dblclick(timeout=20_000)
            page.wait_for_timeout(10_000)
            page.screenshot(path=str(folder / f"ohif_{name}.png"))
            shown[name] = page.inner_text("[data-cy=viewport-grid]").split("\n")
        text = page.inner_text("body")
        browser.close()
    return {"text": text.split("\n"), "shown": shown, "complaints": complaints}


def main() -> None:
    folder, dist = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ["ORTHANC_PASSWORD"] = "only-in-this-network"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    (folder / "storage").mkdir()
    (folder / "pacs.toml").write_text(
        '[servers.orthanc]\nurl = "http://127.0.0.1:18042/dicom-web"\nuser = "room"\n'
        'password_variable = "ORTHANC_PASSWORD"\nmay_store = true\n'
    )
    process = start(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 18080), Proxy)
    server.dist = dist
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        wait_for(process)
        film = pydicom.dcmread(folder / "film.dcm")
        del film.VOILUTFunction
        assert send(film) == 0
        client = Client(load_servers(folder / "pacs.toml")["orthanc"])
        names = sorted(path for path in folder.glob("*.dcm") if path.name != "film.dcm")
        client.store([path.read_bytes() for path in names])
        print(json.dumps(look(film.StudyInstanceUID, folder)))
    finally:
        server.shutdown()
        process.terminate()
        process.wait(20)


if __name__ == "__main__":
    main()
