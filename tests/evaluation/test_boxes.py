"""Boxes of films: where they lie on what a model sees, and that what they hold is what is covered."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from cxr_jax.config.sections import DataConfig, EvaluationConfig
from cxr_jax.data import resize
from cxr_jax.data.sources import __main__ as door
from cxr_jax.data.sources import manifest
from cxr_jax.data.sources.films import rows as film_rows
from cxr_jax.data.sources.manifest import FilesSource
from cxr_jax.data.studies import drawn
from cxr_jax.evaluation import scored_sets
from cxr_jax.evaluation.occlusion import DOSES, BoxAudit
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR

SIDE = 56
# In pixels of the published films: the left edge of the picture, and the lower right.
BOXES = {"00000001_000.png": (0, 512, 256, 256), "00000003_000.png": (768, 768, 256, 256)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Four films in the layout of NIH; two have a box, whose place is white on the film."""
    folder = tmp_path_factory.mktemp("nih")
    (folder / "images").mkdir()
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    ]
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    for number in range(4):
        name = f"0000000{number}_000.png"
        lines.append(f"{name},{'Effusion' if name in BOXES else 'No Finding'},0,{number},50,M,PA")
        # The first film is twice as wide as it is high, as a cut film is.
        film = np.random.default_rng(number).integers(60, 120, (64, 128 if number == 1 else 64))
        if name in BOXES:
            left, top, width, height = (side / 1024 for side in BOXES[name])
            high, wide = film.shape
            film[
                int(top * high) : int((top + height) * high),
                int(left * wide) : int((left + width) * wide),
            ] = 255
            boxes.append(f"{name},Effusion,{','.join(map(str, BOXES[name]))},,,")
        Image.fromarray(film.astype(np.uint8)).save(folder / "images" / name)
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines))
    (folder / "BBox_List_2017.csv").write_text("\n".join(boxes))
    data = DataConfig.with_defaults(source="nih", root=str(folder), size=SIDE)
    return film_rows.load_rows(data).rows


class LookingReader:
    """Names label 1 where a quarter of the white that a box holds is left, and label 2 of every image."""

    def read(self, params, images, texts):
        whites = [
            np.mean(np.asarray(image[0] if isinstance(image, tuple) else image) / params > 0.9)
            for image in images
        ]
        answer = np.zeros((len(images), 14), bool)
        answer[:, 1], answer[:, 2] = np.array(whites) > 0.25 / 16, True
        return types.SimpleNamespace(answer=answer, valid=np.ones(len(images), bool))


@pytest.mark.parametrize("is_native", [False, True])
def test_what_a_box_holds_is_covered_wherever_the_film_lies(rows, is_native):
    assert [len(row.boxes) for row in rows] == [0, 1, 0, 1]
    source = FilesSource(rows, SIDE)
    if is_native:
        source.native = resize.NativeSize(PROCESSOR, 28 * 28, SIDE * SIDE)
    scored = scored_sets.open_scored_set("nih", source, 0, 0)
    scale = 255 if is_native else 1
    for place, row in enumerate(rows):
        mask = scored.box_mask(place)
        assert (mask is not None) == bool(row.boxes)
        if mask is None:
            continue
        film = np.asarray(source.image(place)) / scale
        assert mask.shape == film.shape
        # White is in the box alone, but for the edges that resizing makes.
        assert film[mask].mean() > 0.85 and (film[~mask] > 0.9).mean() < 0.01

    settings = EvaluationConfig.with_defaults(n_audit=5)
    audit = BoxAudit(LookingReader(), scale, scored.texts, settings, scored.box_mask)
    for places, batch in scored.parts(3, lambda: None):
        audit.add(places, batch)
    places, answers = audit.joined()
    assert places.tolist() == [1, 3]
    assert [*answers] == [*(f"covered {dose:g}" for dose in DOSES), "mirrored"]
    assert not answers["covered 1"].labels[:, 1].any() and answers["mirrored"].labels[:, 1].all()
    assert all(given.labels[:, 2].all() for given in answers.values())
    # No more films than are asked for, and none without.
    few = BoxAudit(
        LookingReader(),
        scale,
        scored.texts,
        EvaluationConfig.with_defaults(n_audit=1),
        scored.box_mask,
    )
    none = BoxAudit(LookingReader(), scale, scored.texts, settings, lambda place: None)
    for places, batch in scored.parts(4, lambda: None):
        few.add(places, batch)
        none.add(places, batch)
    assert few.joined()[0].tolist() == [1] and none.joined() == (pytest.approx([]), {})


def test_rows_that_are_written_keep_their_boxes(rows, tmp_path):
    root = rows[0].image_path.parents[1]
    table = tmp_path / "rows.jsonl"
    assert door.main(["nih", str(root), f"--out={table}"]) == 0
    # Rows of a data set ask nothing yet.
    asked = [json.loads(line) | {"prompt": "Find."} for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps(row) + "\n" for row in asked))
    again = manifest.load_rows(table, root / "images")
    assert [row.boxes for row in again] == [row.boxes for row in rows]
    # What reaches over the edge is cut off there, and what is nowhere is none.
    over = drawn.as_row([(0.9, -0.1, 0.2, 0.4), (1.2, 0, 0.1, 0.1)])
    assert len(over) == 1 and over[0] == pytest.approx([0.9, 0, 0.1, 0.3])


def test_a_box_that_begins_before_the_film_is_covered_from_its_edge():
    marked = resize.fit_boxes([(-0.01, -0.01, 0.51, 0.51)], (512, 512), 224)
    assert marked[:112, :112].all() and marked.sum() == 112 * 112


def test_boxes_go_where_the_film_goes():
    """A film with one white rectangle: its box, fitted, is where the rectangle is after fitting."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        height, width = generator.integers(30, 300, 2)
        top, bottom = np.sort(generator.choice(height, 2, replace=False))
        left, right = np.sort(generator.choice(width, 2, replace=False))
        film = np.zeros((height, width), np.float32)
        film[top:bottom, left:right] = 1
        size = (int(generator.integers(20, 200)), int(generator.integers(20, 200)))
        box = (left / width, top / height, (right - left) / width, (bottom - top) / height)
        mask = resize.fit_boxes([box], (height, width), size)
        fitted = resize.fit(film, size)
        assert mask.shape == fitted.shape
        # All that is bright is inside, and the inside is bright but for a pixel around.
        assert not (fitted > 0.55)[~mask].any()
        inner = (
            mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
        )
        assert (fitted[1:-1, 1:-1][inner] > 0.3).all()
