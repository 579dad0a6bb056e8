"""The room in a real browser, by the keyboard alone: from a film to a signed report, and what may go wrong between."""

import re

import browser
import numpy as np
import pytest
import room_client
import room_server
from dicom_files import build
from quick_passwords import quick_passwords
from stub_pages import read_film, stub_rooms

from cxr_jax.serve.app import create_app

pytestmark = pytest.mark.slow
PASSWORD = "correct horse"
NOISE = np.random.default_rng(5).integers(0, 4096, (300, 260)).astype(np.uint16)
TRACE = [
    {
        "text": "The heart is enlarged.",
        "claims": [{"label": "Cardiomegaly", "state": "present", "side": None}],
    },
    {
        "text": "A small left effusion is possible.",
        "claims": [{"label": "Pleural Effusion", "state": "uncertain", "side": "left"}],
        "hedged": [[25, 33]],
        "sides": [[8, 12, "left"]],
    },
    {"text": "No pneumothorax.", "claims": [{"label": "Pneumothorax", "state": "absent"}]},
]
CONTRADICTION = {
    "kind": "affirmed_not_named",
    "label": "Cardiomegaly",
    "sentences": [1],
    "text": "the reasoning affirms Cardiomegaly, the answer does not name it",
}
HOSTILE = [
    "<img src=x onerror=\"document.title='run'\"> <script>document.title='run'</script>",
    "[here](javascript:document.title='run') javascript:alert(1) <a href=javascript:alert(1)>x</a>",
    "x" * 2**20,
    "\u0000\u0007\u001b[31m red \u202eevil\u202c \u2066isolated\u2069 \ufeff\u200b end",
    "</li></ol></body><iframe srcdoc='<script>parent.document.title=1</script>'>",
    "{{constructor.constructor('document.title=1')()}} ${document.title=1} &lt;b&gt;",
]


@pytest.fixture
def room(chromium, tmp_path):
    """Opens a room on a stub; gives (page, stub)."""

    def make_stub():
        return room_server.StubRoom(TRACE, ["Pleural Effusion"], [CONTRADICTION])

    with stub_rooms(chromium, tmp_path, make_stub) as enter:
        yield enter


# ---- The way through ----


def test_a_film_is_read_flagged_edited_signed_and_exported_by_the_keyboard(room, film):
    page, stub = room()
    read_film(page, film)
    assert page.locator("#gate").get_attribute("class") == "gate ok"
    assert page.locator("#sentences li").count() == 3

    # ---- What is marked ----
    second = page.locator("#sentence-2")
    assert second.locator(".hedge").text_content() == "possible"
    assert second.locator(".side.left").text_content() == "left"
    assert "Pleural Effusion: uncertain, left" in second.locator(".claims").text_content()
    assert "contradicts" in page.locator("#sentence-1").get_attribute("class")
    assert CONTRADICTION["text"] in page.locator("#contradictions").text_content()
    chips = page.locator(".chip")
    assert chips.count() == 14 and page.locator(".chip-group").count() == 4
    effusion = page.locator(".chip", has_text="Pleural Effusion")
    assert "uncertain" in effusion.text_content() and "\u25e7" in effusion.text_content()
    assert "not calibrated" in page.locator("#probability-words").text_content()

    # ---- Sentences: next, flag, insert, reject ----
    page.keyboard.press("j")
    page.keyboard.press("f")
    assert page.locator("#flagging").is_visible()
    page.keyboard.press("s")
    page.locator("#sentence-2.flagged").wait_for()
    assert ("flag", {"sentence": 2, "kind": "side"}) in stub.calls
    page.keyboard.press("a")
    assert TRACE[1]["text"] in page.locator("#field-pleura").input_value()
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.locator("#sentence-3.rejected").wait_for()
    assert TRACE[2]["text"] not in page.locator("#field-impression").input_value()

    # ---- The report: a field by its letter, typing, its diff, undo and redo ----
    page.keyboard.press("g")
    page.keyboard.press("h")
    page.keyboard.type("Size is normal, w and f are letters here.")
    heart = page.locator("#field-heart")
    assert heart.input_value().startswith("Size is normal")
    assert "Size" in page.locator(".field", has=heart).locator("ins").first.text_content()
    page.keyboard.press("Control+z")
    assert heart.input_value() == ""
    page.keyboard.press("Control+y")
    assert heart.input_value().startswith("Size is normal")
    page.keyboard.press("Alt+n")
    assert heart.input_value() == "Normal size."
    page.locator("#saved", has_text=re.compile(r"saved \d\d:\d\d:\d\d")).wait_for()
    [report] = stub.reports.values()
    assert report["fields"]["heart"] == "Normal size."

    # ---- The signature: Enter twice, and nothing at the first ----
    page.keyboard.press("Control+Enter")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    assert report["state"] == "draft"
    page.keyboard.press("Enter")
    page.locator("#signature-state", has_text="signed by local").wait_for()
    assert ("sign", {"meaning": "author of the report"}) in stub.calls
    assert page.locator("#field-heart").get_attribute("readonly") is not None
    page.locator("#addendum-text").focus()
    page.keyboard.type("Seen again.")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#addenda li", has_text="Seen again.").wait_for()

    # ---- Exports, and nothing left behind in the browser ----
    page.locator("#viewport").focus()
    page.keyboard.press("s")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "report.json"
    assert page.evaluate("() => Object.keys(localStorage)") == []


def test_a_reading_stops(room, film):
    page, stub = room(room_server.StubRoom(TRACE, pause_after=1))
    browser.upload(page, film)
    page.locator("#gate.ok").wait_for()
    page.keyboard.press("q")
    page.locator("#sentence-1").wait_for()
    page.keyboard.press("Escape")
    page.locator("#reading-state", has_text="Stopped after 1").wait_for()
    assert page.locator("#stop").is_hidden() and ("stop", "reading-0") in stub.calls


def test_the_gate_says_why_and_reads_only_when_it_is_told_to(room, tmp_path):
    page, stub = room()
    (tmp_path / "noise.dcm").write_bytes(build(NOISE))
    browser.upload(page, tmp_path / "noise.dcm")
    page.locator("#refusal").wait_for()
    assert "noise" in page.locator("#refusal-reasons").text_content()
    page.keyboard.press("j")
    assert stub.calls == []
    page.locator("#read-anyway").focus()
    page.keyboard.press("Enter")
    page.locator("#report-state", has_text="version").wait_for()
    assert stub.calls[0][1]["read_anyway"] is True
    assert "Read although refused" in page.locator("#gate-reasons").text_content()


def test_a_film_that_cannot_be_read_is_refused_in_words(room, tmp_path):
    page, _ = room(allowed=("415",))
    (tmp_path / "x.dcm").write_bytes(b"no film")
    browser.upload(page, tmp_path / "x.dcm")
    page.locator("#message", has_text="not a PNG, JPEG or DICOM file").wait_for()


# ---- What a model may write ----


def test_nothing_that_a_model_writes_runs(room, film):
    hostile = [{"text": text, "claims": [{"label": text, "state": text}]} for text in HOSTILE]
    contradiction = {"label": HOSTILE[0], "text": HOSTILE[0], "sentences": [1]}
    page, _ = room(room_server.StubRoom(hostile, [HOSTILE[0]], [contradiction]))
    read_film(page, film)
    assert page.title() == "Reading room"
    assert page.locator("#sentences img, #sentences a, iframe, #sentences script").count() == 0
    texts = page.locator("#sentences .model-text")
    assert texts.nth(0).text_content() == HOSTILE[0]
    # A line without end is cut, and says so.
    assert len(texts.nth(2).text_content()) < 5000
    assert "more characters" in texts.nth(2).text_content()
    # What would hide or turn text is seen.
    fourth = texts.nth(3).text_content()
    assert "\u2039U+202E\u203a" in fourth and "\u202e" not in fourth and "\u0000" not in fourth
    # The page still works.
    page.keyboard.press("j")
    page.keyboard.press("a")
    page.keyboard.press("g")
    page.keyboard.press("i")
    page.keyboard.type("still here ")
    assert "still here" in page.locator("#field-impression").input_value()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


# ---- The wrong case ----


def test_text_of_another_film_is_never_shown(room, film, tmp_path):
    """An address may name any film beside any reading and report: of the other film nothing is to be read."""
    page, stub = room()
    read_film(page, film)
    (tmp_path / "noise.dcm").write_bytes(build(NOISE))
    with page.expect_response("**/room/images") as answer:
        browser.upload(page, tmp_path / "noise.dcm")
    other = answer.value.json()["sha256"]
    # A film that comes writes its own address.
    page.locator("#film-name", has_text=f"film {other[:8]}").wait_for()
    for named, words in (("reading=reading-0", "#reading-state"), ("report=report-0", "#message")):
        page.evaluate(f"() => history.replaceState(null, '', '#image={other}&{named}')")
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        page.locator(words, has_text="of another film").wait_for()
        assert page.locator("#film-name").text_content() == f"film {other[:8]}"
        assert page.locator("#sentences li").count() == 0
        assert page.locator("#report-state").text_content() == "none yet"
        assert page.locator("#field-impression").input_value() == ""


def test_the_film_that_was_chosen_last_is_the_one_that_is_shown(room, film, tmp_path):
    page, stub = room()
    (tmp_path / "noise.dcm").write_bytes(build(NOISE))
    held = []
    # The first upload is slow: its answer comes when the second film has long been there.
    page.route("**/room/images", lambda route: route.continue_() if held else held.append(route))
    browser.upload(page, tmp_path / "noise.dcm")
    page.wait_for_function(
        "() => document.getElementById('message').textContent.includes('Opening')"
    )
    read_film(page, film)
    name = page.locator("#film-name").text_content()
    with page.expect_response("**/room/images"):
        held[0].continue_()
    page.wait_for_timeout(300)
    assert page.locator("#film-name").text_content() == name
    assert page.locator("#report-state").text_content().startswith("version 1")


def test_a_lungs_field_gives_no_side_to_what_has_none(room, film):
    """Inserted under Lungs R, a finding without a side would be signed as one of the right."""
    claims = [{"label": "Lung Opacity", "state": "present", "side": None}]
    page, _ = room(room_server.StubRoom([{"text": "There is an opacity.", "claims": claims}]))
    read_film(page, film)
    page.locator("#field-impression").fill("")
    page.locator("#viewport").focus()
    page.keyboard.press("a")
    assert page.locator("#field-impression").input_value() == "There is an opacity."
    assert page.locator("#field-lungs_right").input_value() == ""


# ---- Lost connections, two tabs ----


def test_edits_outlive_a_server_that_is_away_and_leave_no_trace(room, film):
    page, stub = room(allowed=("503",))
    read_film(page, film)
    stub.is_down = True
    page.keyboard.press("g")
    page.keyboard.press("h")
    page.keyboard.type("kept")
    page.locator("#saved", has_text="offline, 1 kept").wait_for()
    # What is unsaved is in the browser, and not to be read there.
    page.wait_for_function("() => localStorage.length === 1")
    assert "kept" not in page.evaluate("() => JSON.stringify(localStorage)")
    stub.is_down = False
    page.locator("#saved", has_text=re.compile(r"saved \d\d:")).wait_for()
    page.wait_for_function("() => localStorage.length === 0")
    [report] = stub.reports.values()
    assert report["fields"]["heart"] == "kept"
    # A reload shows the same film, reading and report.
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert page.locator("#field-heart").input_value() == "kept"
    page.locator("#sentence-3").wait_for()


def test_two_tabs_do_not_overwrite_each_other(room, film):
    page, stub = room(allowed=("409",))
    read_film(page, film)
    [name] = stub.reports
    theirs = stub.reports[name]["fields"] | {"bones": "theirs"}
    stub.reports[name] |= {"version": 7, "fields": theirs}
    page.keyboard.press("g")
    page.keyboard.press("h")
    page.keyboard.type("mine")
    page.locator("#stale[open]").wait_for()
    # Changed here alone, it is marked; nothing is put in before the reader says so.
    assert page.locator("#stale input[name=heart]").is_checked()
    assert stub.reports[name]["version"] == 7
    page.locator("#stale-take").press("Enter")
    page.locator("#saved", has_text=re.compile(r"saved \d\d:")).wait_for()
    assert stub.reports[name]["fields"]["heart"] == "mine"
    assert stub.reports[name]["fields"]["bones"] == "theirs"


def test_what_both_have_changed_is_put_over_nobody_s_words_by_itself(room, film):
    page, stub = room(allowed=("409",))
    read_film(page, film)
    [name] = stub.reports
    theirs = stub.reports[name]["fields"] | {"heart": "theirs", "bones": "theirs"}
    stub.reports[name] |= {"version": 7, "fields": theirs}
    page.locator("#field-heart").fill("mine")
    page.locator("#stale[open]").wait_for()
    # The two stand side by side, and neither is chosen.
    row = page.locator(".stale-field")
    assert row.count() == 1 and "changed in both" in row.text_content()
    assert (
        row.locator("del").text_content().strip() == "theirs"
        and row.locator("ins").text_content() == "mine"
    )
    assert not page.locator("#stale input[name=heart]").is_checked()
    # Later: nothing is lost here, nothing changes there, and it can neither be signed nor left.
    page.keyboard.press("Escape")
    page.locator("#saved.bad", has_text="1 of yours not in it").wait_for()
    assert page.locator("#field-heart").input_value() == "mine"
    assert stub.reports[name]["fields"]["heart"] == "theirs"
    page.locator("#compare").press("Enter")
    page.locator("#stale[open]").wait_for()
    page.locator("#stale-take").press("Enter")
    page.wait_for_function("() => document.getElementById('field-heart').value === 'theirs'")
    assert stub.reports[name]["version"] == 7
    page.wait_for_function("() => localStorage.length === 0")


# ---- Legible ----

CONTRAST = """() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return { rgb: numbers.slice(0, 3), alpha: numbers[3] ?? 1 };
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((level) => {
      const share = level / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, { rgb, alpha }) => rgb.map((level, i) => alpha * level + (1 - alpha) * under[i]), [0, 0, 0]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest("#viewport, script, option")) continue;
    const ground = behind(element);
    const [one, other] = [light(parse(getComputedStyle(element).color).rgb), light(ground)].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    const size = parseFloat(getComputedStyle(element).fontSize);
    found.push({ ratio, size, text: walker.currentNode.textContent.slice(0, 40), tag: element.className || element.tagName });
  }
  return found;
}"""  # noqa: E501


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768)])
def test_all_text_has_contrast_and_fits(room, film, width, height):
    page, _ = room(width=width, height=height)
    read_film(page, film)
    page.keyboard.press("g")
    page.keyboard.press("h")
    page.keyboard.type("Changed.")
    for state in ("reading", "help", "sign"):
        if state == "help":
            page.locator("#help-button").click()
        if state == "sign":
            page.keyboard.press("Escape")
            page.locator("#sign").click()
        measured = page.evaluate(CONTRAST)
        assert len(measured) > 60
        faint = [text for text in measured if text["ratio"] < 4.5 or text["size"] < 11]
        assert not faint, faint
    page.keyboard.press("Escape")
    # Nothing runs out of the window, and the notice is read in full.
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "() => ['notice', 'saved', 'tools', 'conclusion'].every((id) => {"
        " const box = document.getElementById(id).getBoundingClientRect();"
        " return box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight; })"
    )


def test_the_focus_is_seen_and_reaches_everything(room, film):
    page, _ = room()
    read_film(page, film)
    seen, outlines = set(), []
    for _ in range(120):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => { const at = document.activeElement; const style = getComputedStyle(at);"
            " return [at.id || at.textContent.slice(0, 30), style.outlineStyle + style.outlineWidth]; }"
        )
        seen.add(name)
        if name and name != "Reading room":
            outlines.append((name, outline))
    for name in ("viewport", "turn", "model-view", "unfold", "field-heart", "sign", "help-button"):
        assert name in seen, (name, seen)
    body = [(name, outline) for name, outline in outlines if outline.startswith("none")]
    assert len(body) <= 4, body  # the body itself, when the browser's own bar has the focus


def test_the_pause_hides_film_and_text_and_a_key_can_be_changed(room, film):
    page, _ = room()
    read_film(page, film)
    page.keyboard.press("b")
    assert page.locator("#paused").is_visible() and not page.locator("#conclusion").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("b")
    assert page.locator("#conclusion").is_visible()
    assert page.locator("#sentence-1").get_attribute("aria-current") == "true"
    page.keyboard.press("?")
    page.locator("#key-rows tr", has_text="next sentence").locator("button").click()
    page.keyboard.press("n")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    assert page.locator("#sentence-2").get_attribute("aria-current") == "true"


# ---- Readers with a password ----


def test_a_reader_logs_in_signs_with_the_password_and_leaves_nothing_behind(
    chromium, film, tmp_path
):
    with quick_passwords(), room_client.room(tmp_path / "store") as client:
        client.store.users.add("anna", "reader", "correct horse")
        app = create_app(client.state)
        with room_server.served(app) as address:
            with browser.page_of(chromium, address, allowed=("401", "403")) as page:
                # ---- Whoever comes without a session is led to the login ----
                assert page.url.endswith("/login")
                page.keyboard.type("anna")
                page.keyboard.press("Tab")
                page.keyboard.type("wrong horse")
                page.keyboard.press("Enter")
                page.locator("#remark", has_text="wrong").wait_for()
                page.keyboard.type("correct horse")
                page.keyboard.press("Enter")
                page.wait_for_selector("html[data-ready=yes]")
                assert "anna" in page.locator("#user").text_content()

                # ---- The signature asks for the password again ----
                browser.upload(page, film)
                page.locator("#gate.ok").wait_for()
                # A report that no model has had a part in has its text alone to export.
                page.keyboard.press("e")
                page.locator("#report-state", has_text="version 1").wait_for()
                page.keyboard.type("Portable film.")
                assert page.locator("#exports a").all_text_contents() == ["Text"]
                page.keyboard.press("Control+Enter")
                page.keyboard.press("Space")
                page.locator("#password").focus()
                page.keyboard.type("wrong horse")
                page.keyboard.press("Enter")
                page.keyboard.press("Enter")
                page.locator("#sign-remark", has_text="password").wait_for()
                page.locator("#password").focus()
                page.keyboard.type("correct horse")
                page.keyboard.press("Enter")
                page.keyboard.press("Enter")
                page.locator("#signature-state", has_text="signed by anna").wait_for()

                # ---- The logout clears the browser ----
                page.evaluate("() => localStorage.setItem('cxr_jax.keys', '{}')")
                page.locator("#logout").press("Enter")
                page.locator("#login").wait_for()
                assert page.evaluate("() => Object.keys(localStorage)") == []
                page.goto(address)
                assert page.url.endswith("/login")
