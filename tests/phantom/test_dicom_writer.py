"""The phantom's own DICOM files against the standard."""

import io
import shutil
import subprocess

import numpy as np
import pydicom
import pytest

from cxr_jax.data import images
from cxr_jax.phantom.dicom_writer import write_dicom

VARIANTS = [
    {"hospital": hospital, "photometric": photometric, "ap": is_ap, "bits": bits, "seed": seed}
    for hospital, photometric, is_ap, bits, seed in [
        ("A", "MONOCHROME2", False, 12, 0),
        ("A", "MONOCHROME1", True, 12, 1),
        ("B", "MONOCHROME2", True, 9, 2**70),
        ("B", "MONOCHROME1", False, 16, (3, "a\\b^c=d")),
        ("A", "MONOCHROME1", False, 10, "x" * 200),
        ("B", "MONOCHROME2", False, 15, "Zürich\n\t\udcff"),
    ]
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_film_has_no_errors_for_the_validator(tmp_path, variant):
    """Whatever the seed is: it becomes part of names and ids."""
    path = tmp_path / "phantom.dcm"
    image = np.random.default_rng(0).random((33, 47), np.float32)
    write_dicom(path, image, **variant)
    dataset = pydicom.dcmread(path)
    for name in (
        "AnatomicRegionSequence ViewCodeSequence DetectorType PositionerType "
        "AcquisitionContextSequence"
    ).split():
        assert name in dataset
    # The reader understands the code as it does the word.
    view, dataset.ViewPosition = dataset.ViewPosition, ""
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert images.image_from_bytes("x", buffer.getvalue()).meta["view"] == view
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian: dicom3tools) is not installed")
    run = subprocess.run(["dciodvfy", path], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "Error" not in run.stdout + run.stderr, run.stderr
