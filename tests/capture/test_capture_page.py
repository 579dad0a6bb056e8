"""Thought capture in a real browser: a voice from espeak-ng through the fake microphone to a row to train on."""

import contextlib
import json
import re
import shutil
import subprocess
import time

import browser
import pytest
from films import draw_film
from room_servers import running, scripted_state
from store_films import png_of

from cxr_jax.capture import audio, chips
from cxr_jax.capture.__main__ import main
from cxr_jax.capture.records import Captures
from cxr_jax.data.sources import manifest
from cxr_jax.serve.auth import Auth

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import expect

pytestmark = pytest.mark.slow
SAID = "No pneumothorax is seen. There is a small left pleural effusion with blunting of the costophrenic angle."
HEARD = [
    ("Know", 0.95),
    ("new", 0.3),
    ("motor", 0.4),
    ("axe.", 0.5),
    ("Small", 0.9),
    ("left", 0.9),
    ("effusion.", 0.9),
]


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """A recording of SAID, with half a second of silence in front."""
    pytest.importorskip("av", reason="recordings are decoded by PyAV (tests/requirements-room.txt)")
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed (apt-get install espeak-ng)")
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", path, SAID], check=True)
    return path


@pytest.fixture(scope="module")
def chromium(voice):
    flags = (
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={voice}%noloop",
        "--autoplay-policy=no-user-gesture-required",
    )
    with browser.launched(*flags) as launched:
        yield launched


@contextlib.contextmanager
def served(store, dictate="none"):
    """A server with a store and no model: what the labeler reads is read beside the loop."""
    state = scripted_state(store=str(store.folder), dictate=dictate)
    state.store, state.auth = store, Auth(state.settings, store)
    with running(state) as url:
        yield url


@pytest.fixture
def script(tmp_path):
    words = [[text, index * 0.5, index * 0.5 + 0.4, p] for index, (text, p) in enumerate(HEARD)]
    (tmp_path / "script.json").write_text(json.dumps(words))
    return f"scripted:{tmp_path / 'script.json'}"


def agree(page, tmp_path):
    """Open a film, by the page's own field for a file, and consent, by the keyboard."""
    page.wait_for_selector("html[data-ready=yes]")
    (tmp_path / "film.png").write_bytes(png_of(draw_film(320, 300)))
    page.set_input_files("#film-file", tmp_path / "film.png")
    expect(page.locator("#no-film")).to_be_hidden()
    page.focus("#agree")
    page.keyboard.press("Enter")
    page.wait_for_selector("#text:focus")
    # Whoever presses before the film is there is told so: on a busy machine a test would be, too.
    expect(page.locator("#text")).to_be_editable()


def wait_for_sound(page):
    """Until the level has moved: asked from here, for the page's policy lets no text be run as a script."""
    until = time.monotonic() + 20
    while page.evaluate("document.getElementById('level').value") < 0.3:
        assert time.monotonic() < until, "the microphone is silent"
        page.wait_for_timeout(50)


def save(page, version=1):
    page.wait_for_selector("#save:not([disabled])")
    page.focus("#save")
    page.keyboard.press("Enter")
    expect(page.locator("#confirm")).to_contain_text("Present:")
    confirmed = page.text_content("#confirm")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text(f"saved as version {version}")
    return confirmed


def test_a_voice_becomes_a_row(chromium, store, script, tmp_path):
    chips.read_text("Warm.")  # the labeler compiles for seconds, once
    with served(store, script) as url, browser.page_of(chromium, url, path="/capture") as page:
        agree(page, tmp_path)
        # Hold to talk; the level moves while somebody speaks.
        page.hover("#talk")
        page.mouse.down()
        wait_for_sound(page)
        page.wait_for_timeout(3000)
        page.mouse.up()
        expect(page.locator("#text")).to_have_value(re.compile("effusion"), timeout=60_000)
        assert page.input_value("#text") == " ".join(text for text, _ in HEARD)
        [capture] = Captures(store).of_user("local")
        folder = Captures(store).folder(capture.id)
        assert audio.count_pieces(folder) >= 3
        # What was recorded is a voice, and in the browser's own format.
        recorded = audio.assemble(folder).file_bytes
        samples = audio.decode(recorded)
        assert recorded[:4] == b"\x1aE\xdf\xa3" and audio.loudness(samples) > -45
        assert 2 < samples.size / audio.SAMPLE_RATE < 8

        # Doubted words, the side and what sounds like "no" wait to be looked at; nothing was changed by itself.
        page.wait_for_selector("#review .mark")
        assert page.locator("#review .mark").count() == 5 and page.is_disabled("#save")
        page.get_by_role("button", name="→ pneumothorax?").first.click()
        expect(page.locator("#text")).to_have_value(re.compile("pneumothorax"))
        page.get_by_role("button", name="→ no?").click()
        expect(page.locator("#text")).to_have_value(re.compile("^No pneumothorax[.]"))
        expect(page.locator("#review .mark")).to_have_count(2)
        for number in range(2):
            page.locator("#review .mark").nth(number).focus()
            page.keyboard.press("Enter")
        assert (
            "Pleural Effusion (left)" in save(page)
            and page.text_content("#contradictions").strip() == ""
        )
        page.screenshot(path=tmp_path / "capture.png")
    [saved] = Captures(store).of_user("local")
    assert saved.versions[0].text == "No pneumothorax. Small left effusion."
    assert main(["export", str(store.folder), "-o", str(tmp_path / "rows.jsonl")]) == 0
    [row] = manifest.load_rows(tmp_path / "rows.jsonl", store.folder)
    assert row.solution == "Pleural Effusion" and row.target.startswith(
        "<think>No pneumothorax. Small"
    )


# A recorder that hands out a piece that was on its way when it was told to pause, and another one when it is stopped.
LATE_RECORDER = """
window.MediaRecorder = class extends EventTarget {
  static isTypeSupported() { return true; }
  constructor(stream) { super(); this.stream = stream; this.state = "inactive"; }
  later(name) {
    setTimeout(() => {
      const event = new Event(name);
      if (name === "dataavailable") event.data = new Blob(["a piece"]);
      this.dispatchEvent(event);
    });
  }
  start() { this.state = "recording"; }
  resume() { this.state = "recording"; }
  pause() { this.state = "paused"; this.later("dataavailable"); this.later("pause"); }
  requestData() { setTimeout(() => this.later("dataavailable"), 200); }
  stop() { this.state = "inactive"; this.later("dataavailable"); }
};
"""


@pytest.mark.parametrize("ending", ["save", "erase"])
def test_a_late_piece_is_waited_for_and_none_is_sent_after_the_end(
    chromium, store, script, tmp_path, ending
):
    """A last second on its way is part of what is heard; what an encoder holds at the end is no refused request."""
    chips.read_text("Warm.")
    with served(store, script) as url, browser.page_of(chromium, url, path="/capture") as page:
        page.add_init_script(LATE_RECORDER)
        page.reload()
        agree(page, tmp_path)
        asked = []
        page.on("request", lambda request: asked.append(request))
        page.hover("#talk")
        page.mouse.down()
        expect(page.locator("#hearing")).to_have_text("listening")
        page.mouse.up()
        expect(page.locator("#hearing")).to_contain_text(
            "recording"
        )  # three words are no recording
        [finish] = [request for request in asked if request.url.endswith("/finish")]
        assert finish.post_data_json["pieces"] == 2
        page.fill("#text", "No edema.")
        page.wait_for_selector("#review")
        if ending == "save":
            page.wait_for_selector("#review .mark")
            page.locator("#review .mark").first.click()
            page.wait_for_selector("#save:not([disabled])")
            page.click("#save")
            page.click("#save")
            expect(page.locator("#status")).to_contain_text("saved as version 1")
            # A saved text stands on what was heard, and the page says so before anything is recorded.
            page.focus("#talk")
            page.keyboard.press("Enter")
            expect(page.locator("#hearing")).to_contain_text("saved")
        else:
            page.click("#erase")
            page.click("#erase")
            expect(page.locator("#status")).to_have_text("erased")
        page.wait_for_timeout(300)
        assert len([request for request in asked if "/audio/" in request.url]) == 2


SLOW_PROMPT = """
const real = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
window.prompts = [];
window.streams = [];
navigator.mediaDevices.getUserMedia = (wanted) => new Promise((done) => {
  window.prompts.push(async () => { const stream = await real(wanted); window.streams.push(stream); done(stream); });
});
"""


@pytest.mark.parametrize("meanwhile", ["another film", "pressed again"])
def test_a_microphone_that_is_granted_late(chromium, store, script, tmp_path, meanwhile):
    """Not left open for a thought that is gone, and opened once, however often the key was pressed."""
    with served(store, script) as url, browser.page_of(chromium, url, path="/capture") as page:
        page.add_init_script(SLOW_PROMPT)
        page.reload()
        agree(page, tmp_path)
        sent = []
        page.on("request", lambda request: sent.append(request.url))
        page.hover("#talk")
        page.mouse.down()
        page.wait_for_function("() => window.prompts.length === 1")
        if meanwhile == "another film":
            (tmp_path / "other.png").write_bytes(png_of(draw_film(330, 300, 1)))
            first = page.evaluate("location.search")
            page.set_input_files("#film-file", tmp_path / "other.png")
            page.wait_for_function("first => location.search !== first", arg=first)
            page.evaluate("prompts[0]()")
            page.wait_for_function(
                "() => streams[0]?.getTracks().every((track) => track.readyState === 'ended')"
            )
            page.mouse.up()
            assert not [address for address in sent if "/audio/" in address]
        else:
            page.mouse.up()
            page.mouse.down()
            page.wait_for_timeout(100)
            for number in range(page.evaluate("prompts.length")):
                page.evaluate("number => prompts[number]()", number)
            expect(page.locator("#hearing")).to_have_text("listening")
            assert page.evaluate("streams.length") == 1
            page.mouse.up()


def test_the_room_leads_here_with_its_film(chromium, store, tmp_path):
    (tmp_path / "film.png").write_bytes(png_of(draw_film(320, 300)))
    with served(store) as url, browser.page_of(chromium, url) as page:
        page.wait_for_selector("html[data-ready=yes]")
        browser.upload(page, tmp_path / "film.png")
        expect(page.locator("#no-film")).to_be_hidden()
        page.focus("#capture-link")
        expect(page.locator("#capture-link")).to_have_attribute(
            "href", re.compile("^/capture[?]image=[0-9a-f]{64}$")
        )


def test_a_thought_stays_with_the_film_that_it_was_begun_over(chromium, store, tmp_path):
    """Begun over one film and answered when another is there: nothing typed now may be put down to the first."""
    chips.read_text("Warm.")
    with served(store) as url, browser.page_of(chromium, url, path="/capture") as page:
        agree(page, tmp_path)
        held = []
        page.route("**/capture", lambda route: route.continue_() if held else held.append(route))
        page.keyboard.type("Edema.")
        while not held:
            page.wait_for_timeout(20)
        (tmp_path / "other.png").write_bytes(png_of(draw_film(330, 300, 1)))
        first = page.evaluate("location.search")
        # What is typed and not saved goes with the first film: not before the reader has been told so.
        page.set_input_files("#film-file", tmp_path / "other.png")
        expect(page.locator("#confirm")).to_contain_text("not saved")
        assert page.input_value("#text") == "Edema." and page.evaluate("location.search") == first
        page.set_input_files("#film-file", tmp_path / "other.png")
        page.wait_for_function("first => location.search !== first", arg=first)
        second = page.evaluate("new URLSearchParams(location.search).get('image')")
        held[0].continue_()
        expect(page.locator("#text")).to_have_value("")
        page.fill("#text", "Left effusion.")
        page.locator("#review .mark").first.click()
        save(page)
    [thought] = Captures(store).of_user("local")
    assert thought.image == second and thought.versions[-1].text == "Left effusion."


def test_typing_alone_by_the_keyboard(chromium, store, tmp_path):
    chips.read_text("Warm.")
    with served(store) as url, browser.page_of(chromium, url, path="/capture", width=1024) as page:
        agree(page, tmp_path)
        assert page.is_hidden("#talk") and "please type" in page.text_content("#talk-help")
        page.keyboard.type("Left <b>effusion</b>. No edema.")
        expect(page.locator("#review .mark")).to_have_count(2)
        assert page.locator("#review b").count() == 0
        page.select_option("[aria-label='Edema: state']", "present")
        expect(page.locator("#contradictions")).to_contain_text("Edema")
        page.click("[aria-label='Edema: as the text says']")
        expect(page.locator("#contradictions")).to_have_text("")
        for number in range(2):
            page.locator("#review .mark").nth(number).click()
        save(page)
        # What was looked at stays so when the text grows behind it.
        page.focus("#text")
        page.keyboard.press("Control+End")
        page.keyboard.type(" Heart normal.")
        expect(page.locator("#review")).to_contain_text("normal")
        assert page.locator("#review .mark.looked").count() == 2
        save(page, 2)
        # Erased by two presses, and gone.
        page.click("#erase")
        page.click("#erase")
        expect(page.locator("#status")).to_have_text("erased")
    captures = Captures(store)
    assert captures.of_user("local") == [] and captures.verify() == []
    assert [event.kind for event in store.events()][-1] == "capture.erased"


def test_nothing_is_typed_while_a_film_is_on_its_way(chromium, store, tmp_path):
    """A film that arrives begins a new thought: what was typed while it came went with the one before."""
    chips.read_text("Warm.")
    with served(store) as url, browser.page_of(chromium, url, path="/capture") as page:
        agree(page, tmp_path)
        held = browser.held_back(page, "**/pixels")
        # Opened again by its address, on a slow connection: consent is given long before the film is there.
        page.reload()
        browser.wait_for(page, held)
        page.locator("#agree").click()
        page.locator("#text").press_sequentially("Edema.")
        assert page.input_value("#text") == ""
        held[0].continue_()
        page.wait_for_selector("html[data-ready=yes]")
        page.locator("#text").press_sequentially("No edema.")
        expect(page.locator("#review .mark")).not_to_have_count(0)
        assert page.input_value("#text") == "No edema."
        assert browser.asks_before_leaving(page)
        page.locator("#review .mark").first.click()
        # Saved once, however often and fast Save is pressed while the answer is on its way.
        held = browser.held_back(page, "**/text", "PUT")
        for _ in range(4):
            page.click("#save")
        browser.wait_for(page, held)
        held[0].continue_()
        expect(page.locator("#status")).to_contain_text("saved as version 1")
        assert not browser.asks_before_leaving(page)
    [thought] = Captures(store).of_user("local")
    assert thought.image and [version.text for version in thought.versions] == ["No edema."]


def test_nothing_is_asked_of_a_thought_that_is_being_erased(chromium, store, script, tmp_path):
    """Erased while it is being heard: no question follows that the server would refuse."""
    with served(store, script) as url, browser.page_of(chromium, url, path="/capture") as page:
        page.add_init_script(LATE_RECORDER)
        page.reload()
        agree(page, tmp_path)
        hears = []

        def still_hearing(route):
            hears.append(route.request.method)
            answer = route.fetch()
            if route.request.method != "GET" or not answer.ok:
                return route.fulfill(response=answer)
            return route.fulfill(json=answer.json() | {"hearing": True})

        page.route(re.compile("/capture/(?!about|mine)[^/]+$"), still_hearing)
        page.hover("#talk")
        page.mouse.down()
        expect(page.locator("#hearing")).to_have_text("listening")
        page.mouse.up()
        browser.wait_for(page, hears)
        page.click("#erase")
        page.click("#erase")
        expect(page.locator("#status")).to_have_text("erased")
        count = len(hears)
        page.wait_for_timeout(600)  # longer than a poll
        assert hears[-1] == "DELETE" and len(hears) == count
        assert page.text_content("#hearing") == ""
        page.fill("#text", "No edema.")
        expect(page.locator("#review .mark")).not_to_have_count(0)
