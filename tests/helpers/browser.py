"""A headless Chromium for tests of pages: no network but loopback, and whatever it complains of is a failure."""

import contextlib
import shutil

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
]


@contextlib.contextmanager
def launched(*more_flags):
    """A browser, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    # Machines of tests are slow and shared: what happens late has happened.
    playwright.expect.set_options(timeout=120_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, *more_flags], headless=True
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_of(browser, address, width=1440, height=900, allowed=(), path=""):
    """A fresh page; errors, console errors, refused policies and requests elsewhere fail the test at its end.

    Args:
        allowed: parts of console messages that the test expects.
        path: of the page, behind the server's address.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height}, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(120_000)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            complaints.append(f"a request to {request.url[:80]}")
            if not request.url.startswith((address, "blob:"))
            else None
        ),
    )
    # From the start: interception that begins with the first wait for a choice may come too late for it.
    page.on("filechooser", lambda chooser: None)
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (event) => console.error('policy: ' + event.violatedDirective))"
    )
    try:
        page.goto(address + path)
        yield page
        left = [text for text in complaints if not any(part in text for part in allowed)]
        assert not left, left
    finally:
        context.close()


def upload(page, path):
    """Open a film by the keyboard: O, and the browser's own choice of a file."""
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("o")
    chooser.value.set_files(path)


def held_back(page, pattern, method=None):
    """Hold back the first request that matches, and let the others by; gives the list that its route will stand in."""
    held = []

    def take(route):
        if held or method not in (None, route.request.method):
            return route.fallback()
        return held.append(route)

    page.route(pattern, take)
    return held


def wait_for(page, held):
    """Wait until something stands in a list that routes fill; the page's events go on meanwhile."""
    while not held:
        page.wait_for_timeout(20)


def asks_before_leaving(page):
    """Tell whether the page would ask its reader before a reload: something is on it that the server does not have."""
    return not page.evaluate("() => dispatchEvent(new Event('beforeunload', {cancelable: true}))")
