"""The room's page on a stub, for tests that open one after another in the same browser."""

import contextlib

import browser
import numpy as np
import room_server


def write_phantom(folder):
    """A phantom's film as a DICOM: the gate lets it by."""
    from cxr_jax.data.sources.phantom import PhantomSource
    from cxr_jax.phantom.dicom_writer import write_dicom

    path = folder / "film.dcm"
    image = np.asarray(PhantomSource("A", "test", 3).batch(np.arange(1))["image"])[0]
    write_dicom(path, image, hospital="A", ap=False, seed=1)
    return path


@contextlib.contextmanager
def stub_rooms(chromium, folder, make_stub):
    """Yields a function that opens a room on a stub and gives (page, stub)."""
    with contextlib.ExitStack() as stack:

        def enter(stub=None, allowed=(), **page_options):
            stub = stub or make_stub()
            state = room_server.make_state(folder)
            app = room_server.app_of(state, stub.router(state))
            address = stack.enter_context(room_server.served(app))
            opened = browser.page_of(chromium, address, allowed=allowed, **page_options)
            page = stack.enter_context(opened)
            page.wait_for_selector("html[data-ready=yes]")
            return page, stub

        yield enter


def read_film(page, path):
    """Open a film and have it read, until its report is there."""
    browser.upload(page, path)
    page.locator("#gate:not([hidden])").wait_for()
    page.keyboard.press("q")
    page.locator("#report-state", has_text="version").wait_for()
