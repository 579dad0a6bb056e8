"""Pages whose reader has gone: they empty themselves, and what was not saved is there again for that reader alone."""

import contextlib
import re

import browser
import pytest
import room_client
import room_server
from films import draw_film
from playwright.sync_api import expect
from quick_passwords import quick_passwords
from store_films import png_of

from cxr_jax.capture.records import Captures
from cxr_jax.serve.app import create_app
from cxr_jax.store.records.reports import Change

pytestmark = pytest.mark.slow
PASSWORD = "correct horse"
# How often the page has been told whether a lock that it has waited for is its own.
COUNT_LOCKS = """
window.lockAnswers = 0;
const request = navigator.locks.request.bind(navigator.locks);
navigator.locks.request = (...asked) => request(...asked).finally(() => (window.lockAnswers += 1));
"""


@contextlib.contextmanager
def room_of_two(chromium, folder):
    """A room with the readers anna and bert, its page with a clock of the test's, and its address."""
    with quick_passwords(), room_client.room(folder / "store") as client:
        for handle in ("anna", "bert"):
            client.store.users.add(handle, "reader", PASSWORD)
        expected = ("ERR_FAILED", "404", "401")
        with (
            room_server.served(create_app(client.state)) as address,
            browser.page_of(chromium, address, allowed=expected) as page,
        ):
            page.clock.install()
            page.reload()
            yield client, page, address


def enter_as(page, handle):
    page.locator("#handle").fill(handle)
    page.locator("#password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-ready=yes]")


def begin_report(page, film):
    browser.upload(page, film)
    page.locator("#gate.ok").wait_for()
    page.keyboard.press("e")
    page.locator("#report-state", has_text="version 1").wait_for()


def go_for_half_an_hour(page, secret):
    """Until the page has emptied itself: nothing of `secret` is left to read, sealed words are."""
    page.wait_for_function("() => localStorage.length === 1")
    page.clock.fast_forward("31:00")
    page.locator("#login").wait_for()
    left = page.evaluate(
        "() => JSON.stringify({...localStorage}) + document.documentElement.outerHTML"
    )
    assert secret not in left and "cxr_jax.sealed" in left


def test_a_time_out_leaves_nothing_to_read_and_loses_nothing(chromium, film, tmp_path):
    """Whoever comes next finds an empty page and sealed words; their reader has them again, over no newer version."""
    with room_of_two(chromium, tmp_path) as (client, page, address):
        enter_as(page, "anna")
        begin_report(page, film)
        report = page.evaluate("() => new URLSearchParams(location.hash.slice(1)).get('report')")

        def leave_unsaved(words):
            # The server is away when it is typed, and the reader goes.
            page.route("**/room/reports/*", lambda route: route.abort())
            page.locator("#field-heart").fill(words)
            page.locator("#saved", has_text="offline, 1 kept").wait_for()
            go_for_half_an_hour(page, words)
            page.unroute("**/room/reports/*")

        leave_unsaved("secret words")
        # The session has ended, too, and "back" leads to nothing.
        assert client.store.events("logout")
        page.goto(address)
        page.locator("#login").wait_for()

        # ---- The next reader ----
        enter_as(page, "bert")
        assert page.locator("#film-name").text_content() == "no film"
        assert "secret" not in page.content()
        page.locator("#logout").press("Enter")
        page.locator("#login").wait_for()

        # ---- And the one whose words they are: put back, since nothing else was saved ----
        enter_as(page, "anna")
        page.locator("#saved", has_text=re.compile(r"saved \d\d:")).wait_for()
        assert page.locator("#field-heart").input_value() == "secret words"
        assert client.store.reports.get(report)["fields"]["heart"] == "secret words"
        page.wait_for_function("() => localStorage.length === 0")

        # ---- Another version comes while they wait: shown, and not put over it ----
        leave_unsaved("older words")
        anna = client.store.users.find("anna").actor
        change = Change(report=report, actor=anna, version=2)
        client.store.reports.save(change, {"heart": "newer words"})
        enter_as(page, "anna")
        page.locator("#stale[open]").wait_for()
        assert not page.locator("#stale input[name=heart]").is_checked()
        assert page.locator("#field-heart").input_value() == "newer words"
        page.keyboard.press("Escape")
        page.reload()
        page.locator("#stale[open]").wait_for()
        page.locator("#stale input[name=heart]").press("Space")
        page.locator("#stale-take").press("Enter")
        expect(page.locator("#field-heart")).to_have_value("older words")
        page.locator("#saved", has_text=re.compile(r"saved \d\d:")).wait_for()
        assert client.store.reports.get(report)["fields"]["heart"] == "older words"
        texts = [row["fields"]["heart"] for row in client.store.reports.versions(report)]
        assert texts == ["", "secret words", "newer words", "older words"]


def test_an_addendum_that_was_not_added_is_in_its_box_again(chromium, film, tmp_path):
    with room_of_two(chromium, tmp_path) as (client, page, address):
        enter_as(page, "anna")
        begin_report(page, film)
        page.keyboard.press("Control+Enter")
        page.keyboard.press("Space")
        page.locator("#password").fill(PASSWORD)
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        page.locator("#signature-state", has_text="signed by").wait_for()
        box = page.locator("#addendum-text")
        box.fill("secret addendum")
        page.wait_for_function("() => localStorage.length === 1")

        # ---- What is still being typed in another tab has not been left ----
        tab = page.context.new_page()
        tab.add_init_script(COUNT_LOCKS)
        tab.goto(page.url)
        tab.locator("#signature-state", has_text="signed by").wait_for()
        tab.wait_for_function("() => window.lockAnswers === 1")
        assert tab.locator("#addendum-text").input_value() == ""
        assert tab.evaluate("localStorage.length") == 1
        tab.close()
        go_for_half_an_hour(page, "secret addendum")

        enter_as(page, "bert")
        assert page.locator("#film-name").text_content() == "no film"
        page.locator("#logout").press("Enter")
        page.locator("#login").wait_for()

        # ---- Its reader has it again, and it is added when the reader says so ----
        enter_as(page, "anna")
        expect(box).to_have_value("secret addendum")
        assert not client.store.events("report.addendum")
        # The answer is lost: the server has it, the page does not know.
        page.route("**/addendum", lambda route: (route.fetch(), route.abort()))
        page.locator("#addendum button").click()
        page.locator("#message", has_text="cannot be reached").wait_for()
        page.unroute("**/addendum")
        go_for_half_an_hour(page, "secret addendum")
        enter_as(page, "anna")
        page.locator("#addenda", has_text="secret addendum").wait_for()
        # It is not offered once more.
        page.wait_for_function("() => localStorage.length === 0")
        assert box.input_value() == ""
        assert len(client.store.events("report.addendum")) == 1


def test_a_thought_that_was_not_saved_is_the_text_again(chromium, tmp_path):
    (tmp_path / "film.png").write_bytes(png_of(draw_film(320, 300)))

    def begin(page):
        page.wait_for_selector("html[data-ready=yes]")
        page.focus("#agree")
        page.keyboard.press("Enter")
        expect(page.locator("#text")).to_be_editable()

    def enter(page, address, handle):
        enter_as(page, handle)
        page.goto(address + "/capture")
        begin(page)

    a_thought = re.compile("/capture/[0-9a-f]{8,}$")

    def hear_more(route):
        """The server has heard words since the text was sealed."""
        response = route.fetch()
        words = [{"text": word, "start": 1.0} for word in ("And", "more.")]
        heard = {"words": words, "text": "And more.", "seconds": 2.0}
        route.fulfill(response=response, json=response.json() | heard)

    with room_of_two(chromium, tmp_path) as (client, page, address):
        text = page.locator("#text")
        enter(page, address, "anna")
        page.set_input_files("#film-file", tmp_path / "film.png")
        expect(page.locator("#no-film")).to_be_hidden()
        expect(text).to_be_editable()
        # Looked at half way: the thought is begun on the server, which has no word of it.
        text.fill("Secret edema.")
        page.wait_for_selector("#save:not([disabled])")
        page.get_by_label("Cardiomegaly: state").select_option("present")
        page.wait_for_selector("#contradictions p")
        go_for_half_an_hour(page, "Secret")

        enter(page, address, "bert")
        expect(text).to_have_value("")
        assert page.locator("#no-film").is_visible()
        page.context.clear_cookies()

        # ---- Over the same film, without its name in the address; with the label that was set ----
        page.goto(address)
        page.route(a_thought, hear_more)
        enter(page, address, "anna")
        expect(text).to_have_value("Secret edema. And more.")
        page.unroute(a_thought)
        expect(page.locator("#status")).to_have_text("put back, not saved")
        expect(page.get_by_label("Cardiomegaly: state")).to_have_value("present")
        assert page.locator("#no-film").is_hidden()
        [thought] = Captures(client.store).of_user(client.store.users.find("anna").id)
        assert not thought.versions

        text.fill("Secret edema.")

        # ---- Saved, nothing is left; the answer that was lost is not asked for twice ----
        page.get_by_label("Cardiomegaly: as the text says").click()
        page.wait_for_selector("#save:not([disabled])")
        page.route("**/text", lambda route: (route.fetch(), route.abort()))
        page.focus("#save")
        page.keyboard.press("Enter")
        expect(page.locator("#confirm")).to_contain_text("Present:")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("cannot be reached")
        page.unroute("**/text")
        go_for_half_an_hour(page, "Secret")
        enter(page, address, "anna")
        expect(text).to_have_value("Secret edema.")
        page.wait_for_function("() => localStorage.length === 0")
        expect(page.locator("#status")).to_have_text("")

        # ---- A label that is set beside a saved text is not saved either ----
        page.get_by_label("Cardiomegaly: state").select_option("present")
        page.wait_for_selector("#contradictions p")
        assert browser.asks_before_leaving(page)
        go_for_half_an_hour(page, "Secret")
        enter(page, address, "anna")
        expect(page.locator("#status")).to_have_text("put back, not saved")
        expect(page.get_by_label("Cardiomegaly: state")).to_have_value("present")
        # Put back, it is kept as it was.
        page.wait_for_function("() => localStorage.length === 1")
        page.get_by_label("Cardiomegaly: as the text says").click()
        page.wait_for_function("() => localStorage.length === 0")
        assert not browser.asks_before_leaving(page)

        # ---- Erased elsewhere, what was left of it goes, too ----
        text.fill("Secret edema. And cardiomegaly.")
        go_for_half_an_hour(page, "Secret")
        [thought] = Captures(client.store).of_user(client.store.users.find("anna").id)
        Captures(client.store).erase(client.store.users.find("anna").actor, thought.id)
        enter(page, address, "anna")
        expect(page.locator("#status")).to_contain_text("no such thought")
        page.wait_for_function("() => localStorage.length === 0")
        expect(text).to_have_value("")
