"""Thoughts in the store: consent, versions, erasure, and what the chain still knows."""

import pytest
import sqlalchemy as sa
from store_films import add_film, smooth_film

from cxr_jax.capture import audio, consent
from cxr_jax.capture.records import StaleError
from cxr_jax.errors import UserError
from cxr_jax.store import tables

TEXT = "A quiet word about zebrafish: no effusion."


def test_without_consent_nothing_is_kept(captures, store, reader):
    for agreed in ("", "0" * 64, None):
        with pytest.raises(UserError, match="consent"):
            captures.begin(reader, None, agreed)
    with pytest.raises(UserError, match="no such film"):
        captures.begin(reader, "0" * 64, consent.SHA256)
    assert captures.of_user(reader.id) == [] and store.events("capture.begun") == []


def test_versions_are_kept_with_their_operations(captures, store, reader, think, heard):
    capture_id = think("No pneumothorax. Left effusion.", heard=heard)
    captures.save(
        reader,
        capture_id,
        after_version=1,
        text="No pneumothorax.",
        labels={"gold": {}},
        operations=[],
    )
    with pytest.raises(StaleError, match="version 2"):
        captures.save(reader, capture_id, after_version=1, text="x", labels={}, operations=[])
    found = captures.get(capture_id, reader.id)
    assert [version.text for version in found.versions] == [
        "No pneumothorax. Left effusion.",
        "No pneumothorax.",
    ]
    assert [o["before"] for o in found.versions[0].operations] == ["Know new motor axe."]
    assert found.words == heard and found.state == "saved"
    # Only hashes are in the chain.
    events = [str(event.body) for event in store.events() if event.kind.startswith("capture.")]
    assert len(events) == 4 and not any("effusion" in body or "axe" in body for body in events)
    assert store.verify() == [] and captures.verify() == []


def test_what_was_heard_stays_once_a_text_stands_on_it(captures, reader, think, heard):
    capture_id = think("No pneumothorax.", heard=heard)
    with pytest.raises(StaleError, match="saved"):
        captures.put_piece(capture_id, 1, "k", b"more")
    recording = audio.assemble(captures.folder(capture_id))
    with pytest.raises(StaleError, match="saved"):
        captures.keep_heard(
            reader, capture_id, recording, mime="", seconds=1, asr={}, model_sha256=None
        )


def test_a_thought_is_its_readers(captures, store, reader, think):
    other = store.users.add("reader-2", "reader", "another password").actor
    image = add_film(store, smooth_film(1), reader)
    capture_id = think("No effusion.", image)
    assert captures.get(capture_id, other.id) is None and captures.of_user(other.id) == []
    assert [found.id for found in captures.of_user(reader.id, image)] == [capture_id]
    assert captures.of_user(reader.id, "0" * 64) == []


def test_erasure_leaves_hashes_alone(captures, store, reader, think, heard):
    capture_id = think(TEXT, heard=heard)
    assert bytes_of(store).count(b"zebrafish") >= 1
    saved = captures.get(capture_id).versions[0]
    captures.erase(reader, capture_id)
    erased = captures.get(capture_id)
    assert (erased.state, erased.asr, erased.seconds) == ("erased", None, None)
    assert [(v.text, v.labels, v.operations) for v in erased.versions] == [(None, None, None)]
    assert erased.versions[0].text_sha256 == saved.text_sha256 and erased.audio_sha256
    assert not captures.folder(capture_id).exists() and captures.saved() == []
    # Gone from the disk, too, not only from the answers.
    for secret in (b"zebrafish", b"voice", b"motor"):
        assert secret not in bytes_of(store)
    kinds = [event.kind for event in store.events() if event.kind.startswith("capture.")]
    assert kinds == ["capture.begun", "capture.heard", "capture.saved", "capture.erased"]
    assert store.verify() == [] and captures.verify() == []
    # Nothing comes after it.
    with pytest.raises(StaleError, match="erased"):
        captures.put_piece(capture_id, 0, "k", b"voice")
    with pytest.raises(StaleError, match="erased"):
        captures.save(reader, capture_id, after_version=1, text="x", labels={}, operations=[])
    captures.erase(reader, capture_id)  # again is no harm
    with pytest.raises(UserError, match="no such thought"):
        captures.erase(reader, "0" * 32)


def bytes_of(store):
    return b"".join(path.read_bytes() for path in store.folder.rglob("*") if path.is_file())


def test_a_changed_text_or_recording_is_found(captures, store, think, heard):
    capture_id = think("No pneumothorax. Left effusion.", heard=heard)
    with store.engine.begin() as connection:
        texts = tables.capture_text
        connection.execute(sa.update(texts).values(text="Right effusion."))
    [problem] = captures.verify()
    assert capture_id in problem and "text of version 1" in problem and "Right" not in problem
    [piece] = captures.folder(capture_id).iterdir()
    piece.write_bytes(b"other")
    assert "the recording is not the one" in captures.verify()[1]
    piece.unlink()
    assert "missing" in captures.verify()[1]
