"""The study's page in Chromium: a reader signs a session by the page alone; manual films bring no byte of the AI."""

import shutil
import subprocess
import sys

import pytest

from .conftest import make_study

playwright = pytest.importorskip("playwright.sync_api", reason="tests/requirements-room.txt")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


@pytest.fixture
def address(tmp_path):
    make_study(tmp_path / "t")
    command = [sys.executable, "-m", "cxr_jax.serve.study_server", str(tmp_path / "t"), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield next(line.split()[0] for line in server.stdout if line.startswith("http://"))
        server.terminate()


def sign(page):
    """Fill in the form and sign."""
    page.click("#rest-absent")
    for slider in page.query_selector_all("#suspicion input"):
        slider.evaluate("each => { each.value = 30; each.dispatchEvent(new Event('input')); }")
    page.click("#confidence .points button >> nth=4")
    page.click("#sign")


def test_reader_signs_a_session(address, tmp_path):
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        errors, bodies = [], []
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}study")
        arms, signed = set(), 0
        while True:
            page.wait_for_selector("#card:not([hidden]) .main-action, #reading:not([hidden]) #sign")
            if page.is_visible("#reading"):
                page.wait_for_function("document.getElementById('film').viewer.film")
                place = page.inner_text("#place")
                if not page.is_visible("#ai"):
                    bodies.append(page.content())
                sign(page)
                signed += 1
                # The next film, a card or questions: whatever the server says.
                page.wait_for_function(
                    "place => !document.getElementById('card').hidden"
                    " || document.getElementById('place').textContent !== place",
                    arg=place,
                )
                continue
            title = page.inner_text("#card h1") if page.is_visible("#card h1") else ""
            if title.startswith("End of session"):
                break
            for group in page.query_selector_all("#card .points"):
                group.query_selector("button").click()
            arms |= {title} - {""}
            page.click("#card .main-action")
            page.wait_for_function(
                "title => !document.getElementById('reading').hidden"
                " || document.querySelector('#card h1')?.textContent !== title",
                arg=title or None,
            )
        assert signed == 9
        page.wait_for_selector("text=End of session 1")
        assert len(arms) == 3 and not errors
        assert bodies and all("zebrafish" not in body for body in bodies)
        browser.close()
