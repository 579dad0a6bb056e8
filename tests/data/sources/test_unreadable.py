"""Films that cannot be read during a run: left out up to a limit, the same ones whatever was read before."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image as PilImage

from cxr_jax.config.sections import DataConfig
from cxr_jax.data import image_cache
from cxr_jax.data.sources import manifest, splits, unreadable
from cxr_jax.data.sources.base import indices_of
from cxr_jax.data.sources.unreadable import UnreadableFiles
from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl.config import PHANTOM
from cxr_jax.training import image_checks

FILMS = 9
TORN = {2, 3, 7}
ALL_TORN = len(TORN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    rows = []
    for number in range(FILMS):
        file = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64), np.uint8)
        PilImage.fromarray(pixels).save(file)
        if number in TORN:
            file.write_bytes(file.read_bytes()[:200])
        rows.append(
            {
                "image": file.name,
                "patient_id": f"p{number}",
                "prompt": f"Question {number}?",
                "completion": f"Answer {number}.",
                "solution": "Edema" if number % 2 else "Fracture",
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def open_source(folder, limit=ALL_TORN, **options):
    rows = manifest.load_rows(folder / "rows.jsonl", folder)
    return manifest.FilesSource(rows, 56, unreadable=UnreadableFiles(limit), **options)


def test_the_next_row_that_can_be_read_stands_in_with_its_own_truth(folder, capsys):
    batch = open_source(folder).batch([2, 3, 7, 0])
    assert batch["ids"] == ["4.png", "4.png", "8.png", "0.png"]
    assert batch["prompts"][0] == "Question 4?" and batch["targets"][2] == "Answer 8."
    whole = open_source(folder).batch([4, 4, 8, 0])
    for name, value in whole.items():
        np.testing.assert_array_equal(batch[name], value)
    # Each file is named once, by one line.
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(TORN) and all(line.startswith("warning: ") for line in said)
    assert "1 of at most 3 (config.data.max_bad)" in said[0]


def test_batches_are_a_function_of_the_step_whatever_was_read_before(folder):
    """A run that resumes at any step, and each of several processes, gets the rows of the run that never stopped."""
    steps = [indices_of(step, 4, FILMS, seed=3) for step in range(12)]
    source = open_source(folder)
    whole = [source.batch(indices) for indices in steps]
    random = np.random.default_rng(0)
    for first, threads in itertools.product((1, 5, 11), (1, 3)):
        fresh = open_source(folder, threads=threads, cache=image_cache.ImageCache(0))
        for step in random.permutation(np.arange(first, 12)):
            assert fresh.about(steps[step])["ids"] == whole[step]["ids"]
            part = slice(0, 2) if threads == 1 else slice(2, 4)
            batch = fresh.batch(steps[step][part])
            for name, value in batch.items():
                np.testing.assert_array_equal(value, whole[step][name][part])


def test_without_unreadable_files_the_limit_changes_nothing(folder):
    good = [number for number in range(FILMS) if number not in TORN]
    for name, value in open_source(folder, limit=0).batch(good).items():
        np.testing.assert_array_equal(value, open_source(folder).batch(good)[name])


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_one_file_too_many_is_an_error_that_names_it(folder, limit):
    with pytest.raises(UserError, match=rf"\d\.png: .*config\.data\.max_bad={limit}"):
        open_source(folder, limit=limit, threads=1).batch(range(FILMS))


def test_a_set_that_is_scored_holds_no_row_twice(folder):
    held = splits.held_out(open_source(folder), FILMS)
    assert held["ids"] == [f"{n}.png" for n in range(FILMS) if n not in TORN]
    assert held["texts"] == [f"Question {n}?" for n in range(FILMS) if n not in TORN]
    assert len(held["image"]) == len(held["solution"]) == FILMS - len(TORN)
    rows = [row for row in open_source(folder).rows if int(row.id[0]) in TORN]
    with pytest.raises(UserError, match="can be read"):
        splits.held_out(manifest.FilesSource(rows, 56, unreadable=UnreadableFiles(9)), 3)


def test_the_sources_of_a_run_share_one_count(folder):
    names = {"manifest": str(folder / "rows.jsonl"), "image_root": str(folder), "size": 56}
    opened = splits.open_splits(DataConfig.with_defaults(source="files", max_bad=3, **names))
    sources = [opened.train, *opened.select.values(), *opened.test.values()]
    assert len({id(source.unreadable) for source in sources}) == 1
    assert sources[0].unreadable.limit == 3


def test_check_reads_every_file_and_lists_what_it_cannot_read(folder, capsys):
    paths = [row.image_path for row in open_source(folder).rows] * 2
    assert unreadable.check_files(paths[:2]) == "checked 2 films: all can be read"
    line = unreadable.check_files(paths, limit=3)
    assert line.startswith("checked 9 films: 3 cannot be read and will be left out")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^3 of 9 films cannot be read, the first: .*2\.png"):
        unreadable.check_files(paths, limit=2)
    listed = capsys.readouterr().out.splitlines()
    assert [line.startswith("unreadable: ") for line in listed] == [True] * 3
    with pytest.raises(UserError, match=r"2\.png: .*max_bad=0"):
        unreadable.check_files(paths[:3])


def test_check_finds_rows_whose_films_have_no_room_in_a_prompt(folder):
    """A strip has as many tokens as any film, and windows that fill their places badly."""
    rows = [row for row in open_source(folder).rows if int(row.id[0]) not in TORN][:3]
    sizes = {row.image_path: (2000, 2000) for row in rows}
    data = DataConfig.with_defaults(source="files", max_pixels=476**2)
    image_checks.check_room_for_films(PHANTOM, data, rows, sizes)
    few = dataclasses.replace(data, image_tokens=200)
    with pytest.raises(UserError, match=f"^row {rows[0].id}: its film is 289 image tokens.*3 of 3"):
        image_checks.check_room_for_films(PHANTOM, few, rows, sizes)
    sizes[rows[1].image_path] = (20_000, 110)
    with pytest.raises(UserError, match=f"^row {rows[1].id}: .*raise config.data.image_tokens"):
        image_checks.check_room_for_films(PHANTOM, data, rows, sizes)
    # Squares of one size always fit, and what cannot be read is reported elsewhere.
    image_checks.check_room_for_films(
        PHANTOM, DataConfig.with_defaults(source="files"), rows, sizes
    )
    image_checks.check_room_for_films(PHANTOM, few, rows, {})


def test_what_the_image_gate_refuses_cannot_be_read(folder):
    """These films are noise."""
    paths = [folder / "0.png", folder / "1.png"]
    assert unreadable.check_files(paths, gate="warn") == "checked 2 films: all can be read"
    with pytest.raises(UserError, match="^2 of 2 films cannot be read.*no chest film"):
        unreadable.check_files(paths, gate="refuse")
