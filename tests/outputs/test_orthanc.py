"""A real archive: Orthanc takes what we send, once, and gives it back as it was."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from places import ORACLE
from said import AT, said

from cxr_jax.data import images
from cxr_jax.outputs import sr
from cxr_jax.outputs.export import ExportSettings, export

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def missing():
    """What is absent, in words; None if all is there."""
    if shutil.which("Orthanc") is None or not PLUGIN.exists():
        return "Orthanc with DICOMweb (Debian's orthanc, orthanc-dicomweb) is absent"
    if importlib.util.find_spec("pynetdicom") is None:
        return "pynetdicom is absent (tests/requirements-room.txt)"
    # A network of its own needs rights that a container may not give.
    made = shutil.which("unshare") and subprocess.run(
        ["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True
    )
    return None if made and made.returncode == 0 else "no network namespace can be made here"


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=str(missing()))
def test_orthanc_stores_finds_and_gives_back(made, tmp_path):
    (tmp_path / "film.dcm").write_bytes(made.file.data)
    settings = ExportSettings(at=AT)
    for kind in ("sr.dcm", "text.dcm", "sc.dcm"):
        (tmp_path / kind).write_bytes(export(kind, made.signed, [made.file], settings))
    ran = subprocess.run(
        ["unshare", "-n", sys.executable, str(ORACLE / "orthanc_session.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    outcome = json.loads(ran.stdout)
    film = pydicom.dcmread(tmp_path / "film.dcm")
    assert outcome["c_store"] == 0
    assert outcome["studies"] == [film.StudyInstanceUID] and outcome["none"] == []
    back = pydicom.dcmread(tmp_path / "back.film.dcm")
    assert back.PixelData == film.PixelData
    # And it reads as the film did.
    read, sent = (
        images.read_image(tmp_path / name).pixels for name in ("back.film.dcm", "film.dcm")
    )
    assert np.array_equal(read, sent)
    # Sent twice, there once.
    assert outcome["stored"] == 3 and outcome["refused"] == {}
    assert outcome["instances"] == sorted([film.Modality, "OT", "SR", "SR"])
    for before, after in outcome["back"].values():
        assert before == after
    back = pydicom.dcmread(tmp_path / "back.sr.dcm")
    assert sr.read_states(back) == said(made.signed)
