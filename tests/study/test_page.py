"""The study's page in Chromium: a reader signs a session by mouse and by keys; manual films bring no byte of the AI."""

import contextlib
import subprocess
import sys

import pytest
from browser import asks_before_leaving, held_back, launched, page_of, wait_for

from cxr_jax.store import open_store
from cxr_jax.study.analysis.rows import make_rows
from cxr_jax.study.folder import StudyFolder
from cxr_jax.study.ledger import Ledger

from .conftest import SECRET_SENTENCE, make_study

pytestmark = pytest.mark.slow
FILMS = 9  # of a session: two cases and one practice film an arm
HURRY = """() => {
  for (let n = 0; n < 2; n += 1) document.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", ctrlKey: true}));
  document.getElementById("skip").click();
}"""
ARMS = {(False, False): "manual", (True, False): "labels", (True, True): "full"}


@contextlib.contextmanager
def served(path):
    """A study's server in a process of its own; yields its address."""
    command = [sys.executable, "-m", "cxr_jax.serve.study_server", str(path), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield next(line.split()[0] for line in server.stdout if line.startswith("http://"))
        finally:
            server.terminate()


# ---- What a reader does ----------------------------------------------------------------------------


def after(page, action):
    """Do something and wait until the server has put the next thing before the reader."""
    before = page.get_attribute("body", "data-step")
    action()
    # By a selector: waiting for a script would be refused by the page's own policy.
    page.wait_for_selector(f"body[data-step]:not([data-step='{before}'])")


def arm_of(page):
    return ARMS[page.is_visible("#ai"), page.is_visible("#ai ol")]


def sign_by_mouse(page):
    page.click("#sign")
    assert "not set yet" in page.inner_text("#remark")
    row = page.locator(".label-row", has_text="Pleural Effusion")
    row.get_by_text("present").click()
    row.locator("select").select_option("left")
    page.click("#rest-absent")
    for slider in page.locator("#suspicion input").all():
        slider.click(position={"x": 40, "y": 2})
    if page.is_visible("#ai ol"):
        page.locator("#ai li").nth(1).get_by_text("side", exact=True).click()
    elif page.is_visible("#ai"):
        page.locator("#ai .ai-chip", has_text="Pleural Effusion").click()
    page.fill("#fields textarea >> nth=-1", "Effusion on the left.")
    page.click("#confidence .points button >> nth=4")
    after(page, lambda: page.click("#sign"))


def sign_by_keys(page):
    """The same without a mouse; a button that a key has pressed keeps the focus."""
    press = page.keyboard.press

    def go_to(selector):
        for _ in range(200):
            if page.evaluate("each => document.activeElement.matches(each)", selector):
                return
            press("Tab")
        raise AssertionError(f"no key leads to {selector}")

    if page.is_visible("#ai ol"):
        for key in "jjfs":
            press(key)
    go_to("[aria-label='Pleural Effusion'] button")
    press("Enter")
    go_to("[aria-label='Pleural Effusion'] select")
    press("l")  # left, as any list of a browser goes by letters
    press("Alt+a")
    for number in range(page.locator("#suspicion input").count()):
        go_to(f"#suspicion .slider:nth-child({number + 1}) input")
        press("ArrowLeft")
    press("Escape")
    press("5")
    # Twice and skipped at once, as hurried hands do: signed once, and nobody asks why it is skipped.
    after(page, lambda: page.evaluate(HURRY))


def answer_questions(page, choice=2):
    for group in page.locator("#card .points").all():
        group.locator("button").nth(choice).click()
    after(page, lambda: page.click("#card .main-action"))


def read_session(page, look=lambda name: None):
    """Read until the session's end; gives the arms of the films that were signed, in their order.

    Args:
        look: called with the name of everything that is put before the reader.
    """
    page.wait_for_selector("body[data-step]")
    signed = []
    while True:
        if page.is_visible("#reading"):
            arm = arm_of(page)
            look(arm)
            (sign_by_keys if signed.count(arm) % 2 else sign_by_mouse)(page)
            signed.append(arm)
            continue
        title = page.inner_text("#card h1")
        look(title)
        if page.is_visible("#card .points"):
            answer_questions(page)
        elif page.is_visible("#card .main-action"):
            after(page, lambda: page.keyboard.press("Enter"))
        else:
            return signed, title


# ---- The test --------------------------------------------------------------------------------------


def test_a_failing_server_loses_no_time_and_mouse_work_is_not_idle(tmp_path):
    study = make_study(tmp_path / "t", idle_after_s=1)
    failures = {"events": [500, 503], "answer": [502], "sign": [507]}

    def fail(route):
        left = failures.get(route.request.url.rpartition("/")[2])
        if left:
            return route.fulfill(status=left.pop(0), body="<html>Bad gateway</html>")
        return route.fallback()

    def log_in(route):
        """A reader who has logged in, and is taken for gone after a few seconds."""
        session = route.fetch().json()
        return route.fulfill(json=session | {"idle_s": 2})

    allowed = [f"status of {status}" for status in (500, 502, 503, 507)]
    with served(study.path) as address, launched() as browser:
        with page_of(browser, address.rstrip("/"), path="/study", allowed=allowed) as page:
            page.route("**/study/tasks/**", fail)
            page.wait_for_selector("#card .main-action")
            # A proxy that is in trouble for a moment: the reader can ask again.
            page.route("**/study/next", lambda route: route.fulfill(status=502, body="<html>"))
            page.reload()
            page.locator("#card h1", has_text="Stopped").wait_for()
            page.unroute("**/study/next")
            after(page, lambda: page.click("#card .main-action"))
            after(page, lambda: page.click("#card .main-action"))
            # Three seconds of clicks in the form alone; then a key, which would tell of idle time.
            for row in page.locator(".label-row").all():
                row.get_by_text("absent").click()
                page.wait_for_timeout(200)
            page.keyboard.press("Escape")
            sign_by_mouse(page)
            # What is typed stands on this page alone until the server has answered: a reload asks before it goes.
            held = held_back(page, "**/answer")
            page.fill("#fields textarea >> nth=0", "Typed.")
            wait_for(page, held)
            assert asks_before_leaving(page)
            held[0].continue_()
            page.wait_for_selector("#saved:has-text('saved')")
            assert not asks_before_leaving(page)
            page.evaluate("() => { window.prompt = () => 'moved'; }")
            after(page, lambda: page.click("#skip"))
            # Then the reader goes away: nothing is left to see for whoever comes next.
            page.route("**/session", log_in)
            page.reload()
            page.wait_for_selector("#reading:not([hidden])")
            page.wait_for_url("**/login", timeout=30_000)
    assert not any(failures.values())
    with contextlib.closing(open_store(study.path, exclusive=False)) as store:
        [signed], [skipped] = store.events("task.signed"), store.events("task.skipped")
        batches = store.events("task.events")
    told = [event for each in batches if each.task == signed.task for event in each.body["events"]]
    left = [event for each in batches if each.task != signed.task for event in each.body["events"]]
    # A film that is skipped within seconds took its time, too.
    passed = [e["kind"] for b in batches if b.task == skipped.task for e in b.body["events"]]
    assert {"task_shown", "first_edit"} <= set(passed)
    # What the page did not see of its reader, to its end.
    assert [event["kind"] for event in left][-1] == "idle" and left[-1]["seconds"] >= 2
    moments = {event["kind"]: event["t"] for event in told}
    assert {"task_shown", "first_edit", "sign"} <= set(moments) and signed.body["confidence"] == 5
    idle = [e for e in told if e["kind"] == "idle" and e["t"] > moments["first_edit"]]
    assert all(event["seconds"] < 2.5 for event in idle)


def test_reader_signs_a_session_by_mouse_and_by_keys(tmp_path):
    study = make_study(tmp_path / "t")
    manual = []
    with served(study.path) as address, launched() as browser:
        # The washout after the session is told by a refusal, which Chromium writes to its console.
        allowed = ("status of 423",)
        with page_of(browser, address.rstrip("/"), path="/study", allowed=allowed) as page:

            def look(name):
                if name == "manual":
                    manual.append(page.content())

            signed, title = read_session(page, look)
    assert len(signed) == FILMS and title == "Not yet"
    assert {arm: signed.count(arm) for arm in signed} == dict.fromkeys(ARMS.values(), 3)
    assert len(manual) == 3
    assert all(SECRET_SENTENCE not in text and "zebrafish" not in text for text in manual)
    with contextlib.closing(open_store(study.path, exclusive=False)) as store:
        ledger = Ledger(study.protocol.name)
        ledger.refresh(store)
        rows = make_rows(study, store, ledger, study.read_sealed())
    rows = [row for row in rows if row["state"] == "signed"]
    assert len(rows) == FILMS
    assert all(row["clock_ok"] and row["active_s"] > 0 and row["confidence"] == 5 for row in rows)
    # By mouse and by keys alike: side set, and the AI's sentence or chip held against it.
    answers = [task.answer for task in ledger.tasks.values() if task.answer]
    wanted = {"state": "present", "side": "left"}
    assert [answer["labels"]["Pleural Effusion"] for answer in answers] == [wanted] * FILMS
    flags = [answer["flags"] for answer in answers if answer["flags"]]
    assert flags == [[{"sentence": 2, "kind": "side"}]] * 3
    assert sum(answer["rejected"] == ["Pleural Effusion"] for answer in answers) == 2
    assert StudyFolder(study.path).protocol.washout_days == 28
