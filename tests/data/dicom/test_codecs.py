"""Workers that decode compressed DICOM pixels: kept from file to file, and none outlives what it could not decode."""

import concurrent.futures
import gc
import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import build
from PIL import Image
from pydicom.uid import MPEG2MPML, JPEGBaseline8Bit, RLELossless

from cxr_jax.data import dicom
from cxr_jax.data.dicom import codecs
from cxr_jax.errors import UserError


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    """The workers that are kept: none before and after."""
    kept = []
    monkeypatch.setattr(codecs, "_idle", kept)
    yield kept
    codecs.close()


def film(value: int, shape=(64, 80)) -> bytes:
    """Pixels of about one value, as JPEG."""
    jpeg = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(jpeg, "JPEG", quality=95)
    return build(
        np.zeros(shape, np.uint8),
        bits=8,
        syntax=JPEGBaseline8Bit,
        PixelData=pydicom.encaps.encapsulate([jpeg.getvalue()]),
    )


def pid(worker):
    return worker._process.pid


JUNK = build(syntax=RLELossless, PixelData=pydicom.encaps.encapsulate([b"junk" * 50]))


def test_a_worker_is_kept_from_file_to_file(workers):
    first = codecs.decode(film(40))
    assert first.shape == (64, 80) and abs(int(first.mean()) - 40) < 3
    kept = pid(workers[0])
    assert [round(float(codecs.decode(film(v)).mean())) for v in (200, 7, 90)] == [200, 7, 90]
    assert [pid(w) for w in workers] == [kept]
    assert os.path.exists(f"/proc/{kept}")
    codecs.close()
    assert not workers and not os.path.exists(f"/proc/{kept}")


def test_threads_get_their_own_answers(workers):
    values = list(range(10, 250, 12)) * 2
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        got = [round(float(x.mean())) for x in pool.map(codecs.decode, map(film, values))]
    assert max(abs(a - b) for a, b in zip(got, values, strict=True)) < 3
    assert len(workers) <= 3


def test_a_damaged_file_costs_its_worker_and_no_other_file(workers):
    good = film(40)
    codecs.decode(good)
    before = pid(workers[0])
    with pytest.raises(codecs.DecodeError, match="damaged"):
        codecs.decode(JUNK)
    assert not workers and not os.path.exists(f"/proc/{before}")
    assert round(float(codecs.decode(good).mean())) == 40


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_was_ended_says_nothing_of_the_file(workers, number):
    codecs.decode(film(40))
    before = pid(workers[0])
    os.kill(before, number)
    assert round(float(codecs.decode(film(90)).mean())) == 90
    assert (pid(workers[0]) == before) == (
        number == signal.SIGTERM
    )  # which is for the run, not for its workers


def test_all_that_were_kept_may_have_been_ended(workers):
    workers += [codecs.Worker() for _ in range(3)]
    for worker in workers:
        os.kill(pid(worker), signal.SIGKILL)
    assert round(float(codecs.decode(film(90)).mean())) == 90 and len(workers) == 1


STAND_IN = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import _codec_worker as worker
real = worker._decode

def decode(size, *limits):
    data = worker._read(size)
    with open({note!r}, "a") as f:
        f.write(str(os.getpid()) + "\\n")
    out = lambda text: (sys.stdout.buffer.write(text), sys.stdout.buffer.flush())
    if data == b"sleep":
        time.sleep(60)
    elif data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif data == b"out of memory":
        os.kill(os.getpid(), signal.SIGKILL)
    elif data == b"huge":
        out((2**45).to_bytes(8, "big"))
        time.sleep(60)
    elif data == b"cut":
        out((1000).to_bytes(8, "big") + b"x" * 10)
        return worker.DAMAGED
    elif data == b"no array":
        out((10).to_bytes(8, "big") + b"x" * 10)
    else:
        worker._read = lambda size: data
        return real(size, *limits)
    return 0

worker._decode = decode
sys.exit(worker.main(*sys.argv[1:]))
"""


@pytest.fixture
def stand_in(workers, tmp_path, monkeypatch):
    """Workers whose children do what their input says. Returns () -> whether every child so far is gone."""
    note, script = tmp_path / "children", tmp_path / "stand_in.py"
    folder = str(Path(codecs._codec_worker.__file__).parent)
    script.write_text(STAND_IN.format(folder=folder, note=str(note)))
    monkeypatch.setattr(codecs._codec_worker, "__file__", str(script))
    codecs.decode(film(40))  # the worker is warm: what follows is of the child

    def gone():
        state = lambda child: Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        until = time.monotonic() + 20
        while time.monotonic() < until:
            alive = [
                c
                for c in note.read_text().split()
                if os.path.exists(f"/proc/{c}") and state(c) != "Z"
            ]
            if not alive:
                return True
            time.sleep(0.05)
        return False

    return gone


@pytest.mark.parametrize(
    "what, reason",
    [
        (b"crash", "damaged"),
        (b"out of memory", "the system has ended"),
        (b"cut", "damaged"),
        (b"no array", "damaged"),
        (b"huge", "something else ends it"),
    ],
)
def test_whatever_becomes_of_a_child_is_one_reason(workers, stand_in, what, reason):
    before = pid(workers[0])
    with pytest.raises(codecs.DecodeError, match=reason):
        codecs.decode(what)
    assert not workers and not os.path.exists(f"/proc/{before}") and stand_in()
    assert round(float(codecs.decode(film(90)).mean())) == 90


def test_a_child_that_takes_too_long_is_gone(workers, stand_in, monkeypatch):
    monkeypatch.setattr(codecs, "SECONDS", 0.5)
    before = pid(workers[0])
    with pytest.raises(codecs.DecodeError, match="longer than 0.5 s"):
        codecs.decode(b"sleep")
    assert not workers and not os.path.exists(f"/proc/{before}") and stand_in()


def test_a_decode_that_is_interrupted_leaves_no_process(workers, stand_in):
    def interrupt(*_):
        raise KeyboardInterrupt

    before, handler = pid(workers[0]), signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # what is raised while garbage is collected, Python prints and forgets
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            codecs.decode(b"sleep")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        gc.enable()
    assert not workers and not os.path.exists(f"/proc/{before}") and stand_in()


@pytest.mark.parametrize(
    "seconds, mib, reason", [(0.05, 4096, "longer than 0.05 s"), (60, 100, "memory|damaged")]
)
def test_limits(monkeypatch, seconds, mib, reason):
    monkeypatch.setattr(codecs, "SECONDS", seconds)
    monkeypatch.setattr(codecs, "BYTES", mib * 2**20)
    with pytest.raises(codecs.DecodeError, match=reason):
        codecs.decode(film(40, (4000, 4000)))
    assert not codecs._idle


def test_a_missing_codec_is_named():
    video = build(
        np.zeros((64, 80), np.uint8),
        bits=8,
        syntax=MPEG2MPML,
        PixelData=pydicom.encaps.encapsulate([b"junk" * 50]),
    )
    with pytest.raises(codecs.DecodeError, match="no decoder for its compression is installed"):
        codecs.decode(video)


def test_the_reader_names_the_file(tmp_path):
    path = tmp_path / "x.dcm"
    path.write_bytes(JUNK)
    with pytest.raises(UserError, match="x.dcm: the compressed pixel data is damaged"):
        dicom.read(path)
