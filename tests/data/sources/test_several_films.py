"""Rows of several films."""

import numpy as np
import pytest
from manifest_rows import PROMPT, grpo, write
from PIL import Image as PilImage

from cxr_jax.data import images, resize
from cxr_jax.data.sources import manifest, patients
from cxr_jax.data.sources.unreadable import UnreadableFiles
from cxr_jax.errors import UserError


def test_rows_of_several_films_give_all_of_them_in_order(tmp_path, root):
    rows = manifest.load_rows(
        write(
            tmp_path,
            grpo(image=None, images=["b.png", "sub/c.png"], id="x"),
            grpo(
                image=None,
                images=[{"path": "a.png", "view": "lat"}, {"path": "b.png", "view": "PA"}],
                id="y",
            ),
            grpo("a.png"),
        ),
        root,
    )
    both, study, single = rows
    assert both.image_paths == (root / "b.png", root / "sub" / "c.png") and both.roles == ()
    assert both.prompt == "<image><image>" + PROMPT
    assert study.image_paths == (root / "b.png", root / "a.png")
    assert study.roles == ("frontal", "lateral")
    assert study.prompt == f"Current frontal: <image> Current lateral: <image>\n{PROMPT}"
    # No patient is known: rows that share a film, by way of others too, are one group.
    assert both.group == study.group == single.group
    source = manifest.FilesSource(rows[:2], 56)
    batch = source.batch([1, 0])
    assert batch["image"].shape == (2, 2, 56, 56)
    for row, index in enumerate((1, 0)):
        for number, path in enumerate(rows[index].image_paths):
            want = resize.fit(images.read_image(path).pixels, 56)
            np.testing.assert_array_equal(batch["image"][row, number], want)
    with pytest.raises(UserError, match="rows of 1 and of 2 images"):
        manifest.FilesSource(rows, 56).batch([0, 2])


def test_films_of_several_patients_are_no_study(tmp_path, root):
    names = [f"patient0000{n}/study1/view1.png" for n in (1, 1, 2)]
    names[1] = names[1].replace("view1", "view2_lateral")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PilImage.fromarray(np.zeros((40, 40), np.uint8)).save(root / name)
    rows = [grpo(image=None, images=films, id="x") for films in (names[:2], [names[0], "a.png"])]
    for row in rows:
        assert manifest.load_rows(write(tmp_path, row), root)[0].patient == "patient00001"
    with pytest.raises(UserError, match=":1: the images are of several patients by their paths"):
        manifest.load_rows(write(tmp_path, grpo(image=None, images=names[1:], id="x")), root)


def test_a_row_is_left_out_for_any_of_its_films(tmp_path, root, capsys):
    (root / "sub" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    rows = manifest.load_rows(
        write(
            tmp_path,
            grpo(image=None, images=["a.png", "sub/c.png"], id="x"),
            grpo(image=None, images=["a.png", "b.png"], id="y"),
        ),
        root,
    )
    with pytest.raises(UserError, match="c.png"):
        manifest.FilesSource(rows, 56).batch([0])
    patient = manifest.FilesSource(rows, 56, unreadable=UnreadableFiles(1))
    assert patient.batch([0, 1])["ids"] == ["y", "y"] and patient.readable([0, 1]) == [1]
    assert capsys.readouterr().err.count("c.png") == 1


def test_files_are_joined_by_rows_that_share_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            [int(file) for file in rng.choice(30, rng.integers(1, 4), replace=False)]
            for _ in range(rng.integers(1, 25))
        ]
        groups = [set(row) for row in rows]  # grown until nothing joins
        for _ in rows:
            groups = [
                set().union(*(other for other in groups if other & group)) for group in groups
            ]
        tops = patients.join_files(rows)
        assert all(top in group for top, group in zip(tops, groups, strict=True))
        for one, top in zip(groups, tops, strict=True):
            for other, other_top in zip(groups, tops, strict=True):
                assert (top == other_top) == bool(one & other)
