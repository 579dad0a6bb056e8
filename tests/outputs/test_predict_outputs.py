"""`predict --sr --fhir`: what is refused before any model reads, and that nothing is left of it."""

import numpy as np
import pytest
from PIL import Image

from cxr_jax import predict


@pytest.fixture
def no_model(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(predict, "_load", load)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["film.png", "--sr=out.dcm"], "only a DICOM names"),
        (["film.png", "film.dcm", "--fhir=out.json"], "of one film, or of one study"),
        (["film.dcm", "--sr=film.dcm"], "is read, and may not be replaced"),
        (["film.dcm", "--sr=out.dcm", "--fhir=./out.dcm"], "two files of one name"),
        (["film.dcm", "--sr=absent/out.dcm"], "no such folder"),
        (["film.dcm", "--fhir=."], "it is a folder"),
        (["film.dcm", "--sr="], "empty"),
        (["film.dcm", "--sr=out.dcm", "--codes=snomed"], "codes"),
    ],
)
def test_places_and_films_that_will_not_do_are_refused_at_once(
    made, tmp_path, monkeypatch, capsys, no_model, flags, why
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.dcm").write_bytes(made.file.data)
    Image.fromarray(np.uint8(made.pixels * 255)).save(tmp_path / "film.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert predict.main([*flags, "--image_gate=off", "--json"]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and "PHANTOM" not in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
