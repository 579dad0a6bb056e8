"""A phantom film, and readings of it: made once for all tests of outputs."""

import dataclasses

import numpy as np
import pytest
from said import AT

from cxr_jax.outputs import document
from cxr_jax.outputs.dicom_source import Source, read_source
from cxr_jax.outputs.export import FilmFile
from cxr_jax.phantom.dicom_writer import write_dicom

TRACE = (
    "Endotracheal tube in place. The mediastinum is widened. There is a small left pleural effusion. No pneumothorax. "
    "Possible right lower lobe pneumonia. Old right rib fracture."
)


@dataclasses.dataclass(frozen=True)
class Made:
    """A film and what was read in it."""

    file: FilmFile
    pixels: np.ndarray
    source: Source
    draft: dict
    signed: dict

    @property
    def readings(self):
        return {"draft": self.draft, "signed": self.signed}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.dcm"
    pixels = np.random.default_rng(0).random((96, 80)).astype(np.float32)
    write_dicom(path, pixels, hospital="A", ap=False, seed=3)
    source = read_source(path)
    draft = document.build(
        document.ImageFacts(sha256=source.sha256, view="PA"),
        document.ModelFacts(name="stub", weights_sha256="b" * 64),
        document.CompletionFacts(
            text=f"<think>{TRACE}</think><answer>Pneumonia, Support Devices</answer>",
            finish_reason="stop",
            prompt="Find abnormalities.",
            probabilities={"Pneumonia": 0.3, "Pleural Effusion": 0.9},
        ),
    )
    # Something added, something denied, something left out, a side changed.
    edited = draft["report"] | {
        "heart": "Enlarged.",
        "pleura": "No pleural effusion.",
        "lungs_right": "",
        "lungs_left": "Possible left lower lobe pneumonia.",
    }
    signed = document.sign(draft, by="r1", at=AT, meaning="reviewed", report=edited)
    return Made(FilmFile("film.dcm", path.read_bytes()), pixels, source, draft, signed)
