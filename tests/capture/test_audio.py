"""Pieces of a recording on the disk, and what becomes of a recording, a hostile one included."""

import io
import os
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
from places import ROOT

from cxr_jax.capture import audio
from cxr_jax.errors import UserError


def wav_of(samples, rate=16_000, width=2):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)
    return buffer.getvalue()


def tone(seconds, rate=16_000):
    return (8000 * np.sin(np.arange(int(seconds * rate)) * 0.17)).astype("<i2").tobytes()


def webm_of(av, samples):
    """What a browser's recorder writes: opus in webm."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        resampler = av.AudioResampler("s16", "mono", 48_000, frame_size=960)
        frame = av.AudioFrame.from_ndarray(np.frombuffer(samples, "<i2")[None], "s16", "mono")
        frame.sample_rate = 16_000
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return buffer.getvalue()


def test_pieces_make_the_recording(tmp_path):
    folder = tmp_path / "a" / "b"
    assert audio.put_piece(folder, 1, "k1", b"two")
    assert audio.count_pieces(folder) == 0 and audio.missing_pieces(folder, 2) == [0]
    with pytest.raises(UserError, match="missing, 0 first"):
        audio.assemble(folder, 2)
    assert audio.put_piece(folder, 0, "k0", b"one")
    recording = audio.assemble(folder)
    assert recording == (b"onetwo", 2) and recording.sha256.startswith("25b6746d")
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o600"}
    audio.erase(folder)
    assert not folder.exists()


def test_a_piece_that_comes_again_is_there_once(tmp_path):
    assert audio.put_piece(tmp_path, 0, "k", b"one")
    assert not audio.put_piece(tmp_path, 0, "k", b"one")
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(audio.PieceConflictError, match="another content"):
        audio.put_piece(tmp_path, 0, "k", b"other")
    with pytest.raises(audio.PieceConflictError, match="another key"):
        audio.put_piece(tmp_path, 0, "l", b"one")
    assert audio.assemble(tmp_path).file_bytes == b"one"


@pytest.mark.parametrize("key", ["", "../x", "a b", "a" * 65, "a/b", "a.piece"])
def test_a_key_is_no_path(tmp_path, key):
    with pytest.raises(UserError, match="key"):
        audio.put_piece(tmp_path, 0, key, b"one")


def test_limits(tmp_path, monkeypatch):
    for number, piece in ((-1, b"x"), (audio.MAX_PIECES, b"x"), (0, bytes(audio.MAX_PIECE + 1))):
        with pytest.raises(audio.TooMuchError):
            audio.put_piece(tmp_path, number, "k", piece)
    with pytest.raises(UserError, match="empty"):
        audio.put_piece(tmp_path, 0, "k", b"")
    monkeypatch.setattr(audio, "MAX_BYTES", 5)
    audio.put_piece(tmp_path, 0, "k", b"123")
    with pytest.raises(audio.TooMuchError, match="at most 5 bytes"):
        audio.put_piece(tmp_path, 1, "l", b"456")
    with pytest.raises(UserError, match="nothing was recorded"):
        audio.assemble(tmp_path / "none")


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    code = (
        "import sys; from pathlib import Path; from cxr_jax.capture import audio\n"
        "for n in range(10**6):\n"
        "    audio.put_piece(Path(sys.argv[1]), n % audio.MAX_PIECES, f'k{n}', b'%d' % n * 50)\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c")], stdout=subprocess.PIPE, cwd=ROOT
    )
    acknowledged = [int(process.stdout.readline()) for _ in range(40)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split()]
    process.wait()
    assert audio.count_pieces(tmp_path / "c") in (len(acknowledged), len(acknowledged) + 1)
    whole = audio.assemble(tmp_path / "c", len(acknowledged)).file_bytes
    assert whole == b"".join(b"%d" % number * 50 for number in acknowledged)


def test_loudness():
    assert audio.loudness(np.zeros(10, np.float32)) == audio.loudness(np.zeros(0)) == -120
    assert audio.loudness(np.full(10, 0.1, np.float32)) == pytest.approx(-20, abs=1e-4)


# ---- Decoding --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip(
        "av", reason="recordings are decoded by PyAV (tests/requirements-room.txt)"
    )


def test_a_recording_becomes_samples(av):
    samples = audio.decode(wav_of(tone(0.5)))
    assert samples.dtype == np.float32 and samples.size == 8000
    assert np.abs(samples - np.frombuffer(tone(0.5), "<i2") / 32768).max() < 1e-6
    # Another rate, and the container of a browser.
    assert abs(audio.decode(wav_of(tone(0.5, 8000), 8000)).size - 8000) < 40
    webm = webm_of(av, tone(1.0))
    assert abs(audio.decode(webm).size - 16_000) < 1600
    # A page that was closed: what came until then.
    assert 3000 < audio.decode(webm[: len(webm) * 2 // 3]).size < 16_000


@pytest.mark.parametrize(
    "file_bytes, reason",
    [
        (b"", "no recording"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "no recording"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "no recording"),
        (b"\x1aE\xdf\xa3" + b"junk" * 50, "damaged"),
        (b"RIFF\xff\xff\xff\x7fWAVE" + b"junk" * 50, "damaged"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 50, "damaged"),
        (b"OggS" + b"\xff" * 500, "damaged"),
    ],
)
def test_what_is_no_recording_is_one_reason(av, file_bytes, reason):
    with pytest.raises(UserError, match=reason):
        audio.decode(file_bytes)


def test_a_recording_has_an_end(av):
    with pytest.raises(UserError, match="longer than 20 minutes"):
        audio.decode(wav_of(b"\x80" * (21 * 60 * 8000), 8000, width=1))


@pytest.mark.parametrize(
    "seconds, mib, reason", [(0.05, 2048, "longer than"), (60, 60, "memory|damaged|start")]
)
def test_decoding_is_limited(av, monkeypatch, seconds, mib, reason):
    monkeypatch.setattr(audio, "WORKER_SECONDS", seconds)
    monkeypatch.setattr(audio, "WORKER_BYTES", mib * 2**20)
    with pytest.raises(UserError, match=reason):
        audio.decode(wav_of(tone(1)))
