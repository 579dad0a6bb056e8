"""Workers that decode compressed DICOM pixels: kept from file to file, and none outlives what it could not decode."""

import concurrent.futures
import io
import os
import signal

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import MPEG2MPML, JPEGBaseline8Bit, RLELossless
from test_dicom import build

from cxr_jax.data import decoders, dicom
from cxr_jax.errors import UserError


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    """The workers that are kept: none before and after."""
    kept = []
    monkeypatch.setattr(decoders, "_idle", kept)
    yield kept
    decoders.close()


def film(value: int, shape=(64, 80)) -> bytes:
    """Pixels of about one value, as JPEG."""
    jpeg = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(jpeg, "JPEG", quality=95)
    return build(np.zeros(shape, np.uint8), bits=8, syntax=JPEGBaseline8Bit,
                 PixelData=pydicom.encaps.encapsulate([jpeg.getvalue()]))  # fmt: skip


def pid(worker):
    return worker._process.pid


JUNK = build(syntax=RLELossless, PixelData=pydicom.encaps.encapsulate([b"junk" * 50]))


def test_a_worker_is_kept_from_file_to_file(workers):
    first = decoders.decode(film(40))
    assert first.shape == (64, 80) and abs(int(first.mean()) - 40) < 3
    kept = pid(workers[0])
    assert [round(float(decoders.decode(film(v)).mean())) for v in (200, 7, 90)] == [200, 7, 90]
    assert [pid(w) for w in workers] == [kept]
    assert os.path.exists(f"/proc/{kept}")
    decoders.close()
    assert not workers and not os.path.exists(f"/proc/{kept}")


def test_threads_get_their_own_answers(workers):
    values = list(range(10, 250, 12)) * 2
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        got = [round(float(x.mean())) for x in pool.map(decoders.decode, map(film, values))]
    assert max(abs(a - b) for a, b in zip(got, values, strict=True)) < 3
    assert len(workers) <= 3


def test_a_damaged_file_costs_its_worker_and_no_other_file(workers):
    good = film(40)
    decoders.decode(good)
    before = pid(workers[0])
    with pytest.raises(decoders.Failed, match="damaged"):
        decoders.decode(JUNK)
    assert not workers and not os.path.exists(f"/proc/{before}")
    assert round(float(decoders.decode(good).mean())) == 40


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_was_ended_says_nothing_of_the_file(workers, number):
    decoders.decode(film(40))
    before = pid(workers[0])
    os.kill(before, number)
    assert round(float(decoders.decode(film(90)).mean())) == 90
    assert (pid(workers[0]) == before) == (number == signal.SIGTERM)  # which is for the run, not for its workers


@pytest.mark.parametrize("seconds, mib, reason", [(0.05, 4096, "longer than 0.05 s"), (60, 100, "memory|damaged")])
def test_limits(monkeypatch, seconds, mib, reason):
    monkeypatch.setattr(decoders, "SECONDS", seconds)
    monkeypatch.setattr(decoders, "BYTES", mib * 2**20)
    with pytest.raises(decoders.Failed, match=reason):
        decoders.decode(film(40, (4000, 4000)))
    assert not decoders._idle


def test_a_missing_codec_is_named():
    video = build(np.zeros((64, 80), np.uint8), bits=8, syntax=MPEG2MPML,
                  PixelData=pydicom.encaps.encapsulate([b"junk" * 50]))  # fmt: skip
    with pytest.raises(decoders.Failed, match="no decoder for its compression is installed"):
        decoders.decode(video)


def test_the_reader_names_the_file(tmp_path):
    path = tmp_path / "x.dcm"
    path.write_bytes(JUNK)
    with pytest.raises(UserError, match="x.dcm: the compressed pixel data is damaged"):
        dicom.read(path)
