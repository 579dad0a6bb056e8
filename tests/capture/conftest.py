"""A store with films in it, readers of it, and words that were "heard"."""

import pytest
from quick_passwords import quick_passwords
from store_films import add_film, smooth_film

pytest.importorskip("sqlalchemy", reason="thought capture needs the extra `serve`")

from cxr_jax.capture import audio, consent, correct
from cxr_jax.capture.chips import read_text
from cxr_jax.capture.records import Captures
from cxr_jax.capture.transcribe import Word
from cxr_jax.store import open_store


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "store", announce=str)
    # Who logs in here is not what these tests are about.
    with quick_passwords():
        yield opened
    opened.close()


@pytest.fixture
def reader(store):
    return store.users.add("reader-1", "reader", "a long password").actor


@pytest.fixture
def captures(store):
    return Captures(store)


@pytest.fixture
def think(captures, store, reader):
    """Keeps a thought over a film as a page does; returns its id."""

    def keep(text, image=None, actor=None, labels=None, heard=()):
        actor = actor or reader
        image = image or add_film(store, smooth_film(0), actor)
        capture_id = captures.begin(actor, image, consent.SHA256)
        if heard:
            captures.put_piece(capture_id, 0, "key", b"voice")
            captures.keep_heard(
                actor,
                capture_id,
                audio.assemble(captures.folder(capture_id)),
                mime="audio/webm",
                seconds=2.0,
                asr={"engine": "scripted", "words": [list(word) for word in heard]},
                model_sha256="5" * 64,
            )
        gold = {label: chip.as_json() for label, chip in read_text(text).chips.items()}
        before = " ".join(word.text for word in heard)
        captures.save(
            actor,
            capture_id,
            after_version=0,
            text=text,
            labels={"gold": gold | (labels or {})},
            operations=correct.find_operations(before, text),
        )
        return capture_id

    return keep


@pytest.fixture
def heard():
    """Words of a model that doubts some of them."""
    return [
        Word("Know", 0.0, 0.2, 0.9),
        Word("new", 0.2, 0.4, 0.3),
        Word("motor", 0.4, 0.7, 0.4),
        Word("axe.", 0.7, 1.0, 0.5),
        Word("Left", 1.0, 1.2, 0.97),
        Word("effusion.", 1.2, 2.0, 0.95),
    ]
