"""The pages' files: what must not stand in them, and how they are served."""

import re

import pytest
import room_server
from fastapi.testclient import TestClient

from cxr_jax.serve.room import pages

FILES = sorted(pages.FOLDER.iterdir())
# Ways by which text becomes markup or code.
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser|"
    r"createContextualFragment|setHTMLUnsafe|javascript:|\bstyle=|\son[a-z]+=\"|<script>|<style"
)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    state = room_server.make_state(tmp_path_factory.mktemp("room"))
    with TestClient(room_server.app_of(state), base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_turns_text_into_markup_or_comes_from_elsewhere(path):
    text = path.read_text()
    assert not FORBIDDEN.search(text)
    assert not re.search(r"(?<!www\.w3\.org/2000/svg)https?://(?!www\.w3\.org/2000/svg)", text)


def test_a_page_names_its_files_by_their_hash_and_says_the_notice(client):
    for address in ("/", "/login"):
        answer = client.get(address)
        assert "Research use only. Not for diagnosis." in answer.text
        assert "{{" not in answer.text
        assert answer.headers["cache-control"] == "no-store"
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        for file in re.findall(r'(?:src|href)="(/static[^"]+)"', answer.text):
            served = client.get(file)
            assert served.status_code == 200 and "immutable" in served.headers["cache-control"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2f__init__.py", "room.html", "login.html"])
def test_only_scripts_styles_and_pictures_are_files(client, name):
    assert client.get(f"{pages.static_address()}/{name}").status_code == 404
    assert client.get("/static/0123456789abcdef/room.js").status_code == 404


def test_a_page_can_know_what_the_server_is(client):
    about = client.get("/room/about").json()
    assert about["chat"] is False and list(about["fields"]) == list(about["normal"])
