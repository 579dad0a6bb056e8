"""The page and other systems, by the keyboard: a study is found, its film pulled and read, the signed report sent."""

import browser
import pytest
import room_server
from fake_archive import archive_of, header_of
from room_client import room

from cxr_jax.serve.app import create_app

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=\"document.title='run'\"> \u202e"


@pytest.fixture(scope="module")
def film(film):
    return film.read_bytes()


@pytest.fixture
def entered(chromium, film, tmp_path):
    """A page of a room whose operator has named an archive; gives (page, client, archive)."""
    (tmp_path / "store").mkdir(mode=0o700)
    with archive_of(film) as archive:
        text = f'[servers.archive]\nurl = "{archive.url}"\nmay_store = true\n'
        (tmp_path / "store" / "pacs.toml").write_text(
            text + '[servers.other]\nurl = "http://127.0.0.1:9/"\n'
        )
        with room(tmp_path / "store") as client, room_server.served(create_app(client.state)) as at:
            with browser.page_of(chromium, at, allowed=("503", "400")) as page:
                page.wait_for_selector("html[data-ready=yes]")
                yield page, client, archive


def test_a_film_comes_from_an_archive_and_its_report_goes_there(entered, film):
    page, client, archive = entered
    header = header_of(film)
    archive.said = {"00081030": HOSTILE}
    archive.others = [{"00080060": {"vr": "CS", "Value": ["SR"]}}]

    # ---- Found, looked into, pulled ----
    page.keyboard.press("d")
    page.locator("#archives[open]").wait_for()
    page.keyboard.press("Enter")
    page.locator("#archive-remark", has_text="at least one").wait_for()
    assert archive.asked == []
    page.keyboard.type(str(header.PatientID))
    page.keyboard.press("Enter")
    page.locator("#archive-remark", has_text="1 study found").wait_for()
    # What an archive says is text.
    study = page.locator("#archive-studies button").first
    assert "<img src=x" in study.text_content() and "‹U+202E›" in study.text_content()
    assert page.locator("#archive-studies img").count() == 0 and page.title() == "Reading room"
    page.keyboard.press("Enter")
    page.locator("#archive-remark", has_text="1 film, and 1 of other kinds").wait_for()
    page.keyboard.press("Enter")
    page.locator("#gate.ok").wait_for()
    assert page.locator("#archives").get_attribute("open") is None
    # Nothing of the patient stays in the page.
    assert str(header.PatientID) not in page.content()
    assert client.store.events("pacs.pulled")[-1].body["server"] == "archive"

    # ---- Nothing goes out before it is signed ----
    page.keyboard.press("q")
    page.locator("#report-state", has_text="version 1").wait_for()
    page.keyboard.press("d")
    page.locator("#archive-why-not", has_text="Only a signed report").wait_for()
    assert page.locator("#archive-send-now").is_disabled()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Enter")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.locator("#signature-state", has_text="signed by local").wait_for()

    # ---- Sent ----
    page.keyboard.press("d")
    page.locator("#archive-kinds input").first.wait_for()
    page.locator("#archive-send-now").focus()
    page.keyboard.press("Enter")
    page.locator("#archive-remark", has_text="archive has 2 of 2").wait_for()
    assert [header_of(sent).Modality for sent in archive.stored] == ["SR", "OT"]
    assert client.store.events("pacs.pushed")[-1].body["stored"] == 2
    # What it does not say it has is not there.
    archive.takes = 1
    page.locator("#archive-send-now").focus()
    page.keyboard.press("Enter")
    page.locator("#archive-remark.bad", has_text="did not take 1").wait_for()


def test_an_archive_that_fails_is_told_in_the_dialog(entered, film):
    page, _, archive = entered
    page.keyboard.press("d")
    page.locator("#archives[open]").wait_for()
    page.locator("#archive-server").select_option("other")
    page.locator("#archive-PatientID").focus()
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    page.locator("#archive-remark.bad", has_text="server other: no HTTP answer").wait_for()
    page.locator("#archive-PatientID").fill("*")
    page.keyboard.press("Enter")
    page.locator("#archive-remark.bad", has_text="no value to search for").wait_for()
    assert archive.asked == []
    # The keys of the page are its own again.
    page.keyboard.press("Escape")
    page.locator("#archives").wait_for(state="hidden")
    # Also for the box that keeps the focus until the page is drawn again.
    question = {"key": "?", "shiftKey": True}
    page.locator("#archive-PatientID").dispatch_event("keydown", question)
    page.locator("#help").wait_for()
