"""The room on a slow connection: what is on its way when its reader goes on costs no word, and takes none elsewhere."""

import re

import browser
import numpy as np
import pytest
import room_server
from dicom_files import build
from stub_pages import read_film, stub_rooms

pytestmark = pytest.mark.slow
NOISE = np.random.default_rng(5).integers(0, 4096, (300, 260)).astype(np.uint16)


@pytest.fixture
def room(chromium, tmp_path):
    """Opens a room on a stub; gives (page, stub)."""
    with stub_rooms(
        chromium, tmp_path, lambda: room_server.StubRoom([{"text": "No effusion."}])
    ) as enter:
        yield enter


def test_a_report_that_is_asked_for_twice_is_begun_once(room, film):
    """A second one, answered late, was put over what had been typed into the first."""
    page, stub = room()
    browser.upload(page, film)
    page.locator("#gate.ok").wait_for()
    held = []
    page.route("**/room/reports", lambda route: held.append(route))
    page.keyboard.press("q")
    # The reading's own report is on its way when the reader asks for it.
    browser.wait_for(page, held)
    page.locator("#begin-report").click()
    held[0].continue_()
    page.locator("#report-state", has_text="version 1").wait_for()
    page.locator("#field-heart").fill("Typed at once.")
    for route in held[1:]:
        route.continue_()
    page.locator("#saved", has_text=re.compile(r"saved \d\d:")).wait_for()
    assert page.locator("#field-heart").input_value() == "Typed at once."
    assert [report["fields"]["heart"] for report in stub.reports.values()] == ["Typed at once."]


def test_a_report_that_cannot_be_begun_says_so(room, film):
    page, stub = room(allowed=("503",))
    page.route("**/room/reports", lambda route: route.fulfill(status=503, json={}))
    browser.upload(page, film)
    page.locator("#gate.ok").wait_for()
    page.keyboard.press("q")
    page.locator("#message", has_text="refused (503)").wait_for()
    page.unroute("**/room/reports")
    page.locator("#begin-report").click()
    page.locator("#report-state", has_text="version 1").wait_for()
    assert [report["reading"] for report in stub.reports.values()] == ["reading-0"]


def test_nothing_is_edited_or_called_off_while_a_signature_is_on_its_way(room, film):
    """A dialog that could be closed looked called off, and what was typed then stood there as if it were signed."""
    page, stub = room()
    read_film(page, film)
    held = browser.held_back(page, "**/sign")
    page.keyboard.press("Control+Enter")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    browser.wait_for(page, held)
    for _ in range(3):
        page.keyboard.press("Escape")
    assert page.locator("#sign-dialog").is_visible() and page.locator("#sign-cancel").is_disabled()
    assert page.locator("#field-heart").get_attribute("readonly") is not None
    held[0].continue_()
    page.locator("#signature-state", has_text="signed by local").wait_for()
    assert page.locator("#sign-dialog").is_hidden()
    [report] = stub.reports.values()
    assert page.locator("#field-heart").input_value() == report["fields"]["heart"]


def test_an_addendum_is_added_to_the_report_that_it_was_typed_for(room, film, tmp_path):
    """Not added, it stayed in its box under the next film; and what was typed while one was sent went with it."""
    page, stub = room()
    read_film(page, film)
    for key in ("Control+Enter", "Space", "Enter", "Enter"):
        page.keyboard.press(key)
    page.locator("#signature-state", has_text="signed by local").wait_for()
    name = page.locator("#film-name").text_content()
    box = page.locator("#addendum-text")
    box.fill("Of this film.")
    assert browser.asks_before_leaving(page)
    (tmp_path / "noise.dcm").write_bytes(build(NOISE))
    page.locator("#viewport").focus()
    browser.upload(page, tmp_path / "noise.dcm")
    page.locator("#message", has_text="addendum is not added").wait_for()
    assert page.locator("#film-name").text_content() == name
    held = browser.held_back(page, "**/addendum")
    page.locator("#addendum button").click()
    browser.wait_for(page, held)
    box.press_sequentially(" And more.")
    assert box.input_value() == "Of this film."
    held[0].continue_()
    page.locator("#addenda li", has_text="Of this film.").wait_for()
    assert box.input_value() == "" and box.is_editable()
    page.locator("#viewport").focus()
    browser.upload(page, tmp_path / "noise.dcm")
    page.locator("#refusal").wait_for()
    assert [entry["text"] for entry in stub.reports["report-0"]["addenda"]] == ["Of this film."]
