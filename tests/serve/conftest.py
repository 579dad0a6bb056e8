"""One server on loopback for all tests of the room, with the real engine and the embedded model; a browser, a film."""

import time
from types import SimpleNamespace

import browser
import pytest
from room_servers import running
from stub_pages import write_phantom

from cxr_jax.serve.server import open_state
from cxr_jax.serve.state import ServerSettings


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    """The one real server: `room.url`, `room.state`. Tests must leave it as they found it."""
    folder = tmp_path_factory.mktemp("room")
    state = open_state(ServerSettings(port=0, store=str(folder)))
    state.engine.start()
    with running(state) as url:
        while not state.engine.is_ready:
            assert state.engine.failure is None, state.engine.failure
            time.sleep(0.05)
        yield SimpleNamespace(url=url, state=state, folder=folder)


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as launched:
        yield launched


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """The path of a phantom's DICOM."""
    return write_phantom(tmp_path_factory.mktemp("film"))
