"""Views of RSNA and SIIM, which stand in the DICOM headers alone."""

import numpy as np
import pytest
from dicom_files import build

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources import sets
from cxr_jax.data.sources.films import rows as film_rows

VIEWS = {"a": "PA", "b": "ap", "c": "LL", "d": "", "e": None, "f": "torn"}
WANTED = ["PA", "AP", "LATERAL", "UNKNOWN", "UNKNOWN", "UNKNOWN"]


def write_film(path, view):
    path.parent.mkdir(parents=True, exist_ok=True)
    if view == "torn":
        path.write_bytes(b"no DICOM")
    elif view is not None:
        path.write_bytes(build(ViewPosition=view))


@pytest.mark.parametrize("below", ["", "rsna-pneumonia"])
def test_rsna(tmp_path, below):
    lines = ["patientId,x,y,width,height,Target", *(f"{film},,,,,0" for film in VIEWS)]
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(lines))
    for film, view in VIEWS.items():
        write_film(tmp_path / below / "stage_2_train_images" / f"{film}.dcm", view)
    films = sets.open_films("rsna", str(tmp_path))
    assert films.views.tolist() == WANTED
    assert "the views of 3 films are those of their DICOM headers" in films.notes
    # So a run reads the frontal films without being told to read any view.
    if not below:
        found = film_rows.load_rows(
            DataConfig.with_defaults(source="rsna", root=str(tmp_path), max_bad=1)
        )
        assert [row.id for row in found.rows] == ["a", "b"]


def test_siim(tmp_path):
    lines = ["ImageId, EncodedPixels", *(f"{film},-1" for film in VIEWS)]
    (tmp_path / "train-rle.csv").write_text("\n".join(lines))
    for number, (film, view) in enumerate(VIEWS.items()):
        write_film(tmp_path / "dicom-images-train" / f"1.{number}" / "2" / f"{film}.dcm", view)
    assert sets.open_films("siim", str(tmp_path)).views.tolist() == WANTED


def test_tables_alone_say_that_views_are_unknown(tmp_path):
    (tmp_path / "train-rle.csv").write_text("ImageId,EncodedPixels\na,-1\n")
    films = sets.open_films("siim", str(tmp_path))
    assert np.asarray(films.views).tolist() == ["UNKNOWN"]
    assert any("config.data.views=any" in note for note in films.notes)
