"""Manifests of files: the two published formats, strictness, batches, splits."""

import json
import os

import numpy as np
import pytest
from manifest_rows import PROMPT, grpo, sft, write
from PIL import Image as PilImage

from cxr_jax.config.sections import DataConfig
from cxr_jax.data import image_cache, images, radiograph, resize
from cxr_jax.data.sources import manifest, patients, splits
from cxr_jax.data.sources.rows import describe_repeats
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR


def test_both_formats(tmp_path, root):
    one, two = manifest.load_rows(
        write(tmp_path, grpo(solution="edema,  Cardiomegaly"), b"\r\n", sft()), root
    )
    assert (one.id, one.prompt, one.target, one.group) == ("a.png", PROMPT, None, "a.png")
    assert one.solution == "Cardiomegaly, Edema" and all(one.known)  # in CheXpert order
    assert one.image_path == root / "a.png"
    assert two.target == "<think>Clear.</think><answer>No Finding</answer>" and two.group == "7"


def test_flattened_folders_byte_order_mark_and_llava_image_mark(tmp_path, root):
    row = grpo("deep/er/b.png", conversations=[{"from": "human", "value": "<image>\n" + PROMPT}])
    data = b"\xef\xbb\xbf" + json.dumps(row).encode()
    [got] = manifest.load_rows(write(tmp_path, data), root)
    assert got.image_path == root / "b.png" and got.prompt == PROMPT


def test_known_labels_extension(tmp_path, root):
    row = grpo(
        solution="Edema", labels={"Edema": 1, "Fracture": 0, "Pneumonia": -1, "Cardiomegaly": None}
    )
    [got] = manifest.load_rows(write(tmp_path, row), root)
    assert [name for name in CHEXPERT_14 if got.known[INDEX[name]]] == ["Edema", "Fracture"]


BAD = {
    "not valid JSON": b'{"id": "a.png", \n',
    "not UTF-8": b'{"id": "\xff"}\n',
    "not a JSON object": b"[1]\n",
    "neither messages nor conversations": {"id": "a", "image": "a.png", "solution": "Edema"},
    "no prompt": grpo(conversations=[{"from": "gpt", "value": "x"}]),
    "a turn is not an object": grpo(conversations=["x", None, {"from": "human", "value": 3}]),
    "neither a text nor a list": grpo(conversations=[{"from": "human", "value": 3}]),
    "assistant's turn is empty": sft(text=" "),
    "name 2 and 1 images": sft(
        messages=[{"role": "user", "content": [{"image": "a.png"}, {"image": "b.png"}, "x"]}]
    ),
    "two of the images are one file": grpo(image=None, images=["a.png", "a.png"], id="x"),
    "image file not found ": grpo(image=None, images=["a.png", "missing.png"], id="x"),
    "no image": grpo(image=None, id="x"),
    "boxes is no list": grpo(boxes={"left": 0}),
    "box 2 is not ": grpo(boxes=[[0, 0, 1, 1], [0, 0, True, 1]]),
    "box 1 is not ": grpo(boxes=[[0, 0, 1]]),
    "box 1 does not lie on the film": grpo(boxes=[[512, 0, 256, 1024]]),
    "image file not found": grpo("missing.png"),
    "not a path relative": grpo("/etc/passwd"),
    "not a path relative ": grpo("C:\\x\\a.png"),
    "not a path relative  ": grpo("https://example.org/a.png"),
    "leaves the image root": grpo("../rows.jsonl"),
    "leaves the image root ": grpo("sub\\..\\..\\rows.jsonl"),
    "link that leaves": grpo("link.png"),
    "the image root itself": grpo(".", id="x"),
    "the image root itself ": grpo("./", id="x"),
    "no solution": grpo(solution=" "),
    "no solution ": grpo(solution=None),
    "none of the 14 labels": grpo(solution="Edema, Effusion"),
    "none of the 14 labels ": grpo(solution="Edema,"),
    "none of the 14 labels  ": grpo(labels={"Effusion": 1}),
    "labels is not an object": grpo(labels=[1]),
    "none of 1, 0, -1": grpo(labels={"Edema": 2}),
    "contradict": grpo(labels={"Edema": 0}),
    "the id is not a string": grpo(id=[1]),
    "the id is that of line 1": grpo("b.png"),
}


NONE_AT_ALL = (None, float("nan"), "", [])


@pytest.mark.parametrize("none", NONE_AT_ALL)
def test_what_says_nothing_is_as_if_the_key_were_not_there(tmp_path, root, none):
    without_id = {key: value for key, value in grpo().items() if key != "id"}
    [plain] = manifest.load_rows(write(tmp_path, without_id), root)
    for key in ("id", "labels", "policy", "boxes"):
        [row] = manifest.load_rows(write(tmp_path, without_id | {key: none}), root)
        assert row == plain
    labels = {"Edema": 1}
    [blank] = manifest.load_rows(write(tmp_path, grpo(labels=labels)), root)
    for more in (
        {"labels": labels | {"Fracture": none}},
        {"labels": labels, "policy": {"blank": none, "uncertain": "unknown"}},
    ):
        assert manifest.load_rows(write(tmp_path, grpo(**more)), root) == [blank]


def test_the_root_is_no_image_by_its_whole_path_either(tmp_path, root):
    with pytest.raises(UserError, match="the image root itself"):
        manifest.load_rows(write(tmp_path, grpo(str(root.absolute()), id="x")), root)


def test_what_is_no_label_is_not_shown(tmp_path, root):
    for more in ({"solution": "Edema, Jane Doe"}, {"labels": {"Edema": 1, "Jane Doe": 0}}):
        with pytest.raises(UserError, match="name 2 in ") as caught:
            manifest.load_rows(write(tmp_path, grpo(**more)), root)
        assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("reason", BAD)
def test_every_problem_names_file_line_and_reason(tmp_path, root, reason):
    os.symlink(__file__, root / "link.png")
    path = write(tmp_path, grpo("b.png"), b"\n", BAD[reason])
    with pytest.raises(UserError, match=reason.strip()) as caught:
        manifest.load_rows(path, root)
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_problems_of_the_whole_manifest(tmp_path, root):
    with pytest.raises(UserError, match="no such file"):
        manifest.load_rows(tmp_path / "no.jsonl", root)
    with pytest.raises(UserError, match="not a directory"):
        manifest.load_rows(write(tmp_path, grpo()), tmp_path / "no")
    with pytest.raises(UserError, match="no rows"):
        manifest.load_rows(write(tmp_path, b"\n\n"), root)


def test_batch(tmp_path, root):
    rows = manifest.load_rows(
        write(tmp_path, grpo(solution="Edema, Fracture"), sft(), grpo("sub/c.png")), root
    )
    source = manifest.FilesSource(rows, size=56)
    batch = source.batch(np.array([2, 0, 1]))
    assert batch["image"].shape == (3, 56, 56) and batch["image"].dtype == np.float32
    want = resize.fit(images.read_image(root / "a.png").pixels, 56)
    np.testing.assert_array_equal(batch["image"][1], want)
    assert [CHEXPERT_14[i] for i in np.flatnonzero(batch["solution"][1])] == ["Edema", "Fracture"]
    assert batch["solution"].dtype == batch["known"].dtype == bool and batch["known"].shape == (
        3,
        14,
    )
    assert batch["ids"] == ["sub/c.png", "a.png", "b.png"] and batch["targets"][0] is None
    assert batch["prompts"] == [PROMPT] * 3 and source.prompts() == (PROMPT,) and len(source) == 3
    with pytest.raises(IndexError):
        source.batch([3])


def test_a_row_is_the_same_whichever_rows_are_beside_it(tmp_path, root):
    rows = manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root)
    whole = manifest.FilesSource(rows, 56).batch([2, 0, 1])
    part = manifest.FilesSource(rows, 56, threads=1, cache=image_cache.ImageCache(0)).batch([1, 2])
    for name, value in part.items():
        np.testing.assert_array_equal(value, [whole[name][2], whole[name][0]])
    assert manifest.FilesSource(rows, 56).about([1, 2]) == {
        "prompts": [PROMPT] * 2,
        "ids": ["b.png", "sub/c.png"],
    }


def test_an_unreadable_image_is_named(tmp_path, root):
    (root / "a.png").write_bytes(radiograph.PNG_MAGIC)
    source = manifest.FilesSource(manifest.load_rows(write(tmp_path, grpo()), root))
    with pytest.raises(UserError, match="a.png"):
        source.batch([0])


def test_split_holds_out_whole_patients(tmp_path, root):
    rows = [grpo("a.png", id=f"test/patient{i // 2:05d}/study1/view{i % 2}.jpg") for i in range(40)]
    path = write(tmp_path, *rows)
    train, held = manifest.open_split(path, root, size=56, seed=1, cache_mib=0, threads=1)
    assert train.cache is held.cache and (train.threads, held.threads) == (1, 1)
    assert (len(train), len(held)) == (28, 12)  # 6 of 20 patients: a third, rounded down
    assert not {r.group for r in train.rows} & {r.group for r in held.rows}
    again = manifest.open_split(path, root, size=56, seed=1)[1]
    assert [r.id for r in again.rows] == [r.id for r in held.rows]
    other = manifest.open_split(path, root, size=56, seed=2)[1]
    assert [r.id for r in other.rows] != [r.id for r in held.rows]
    many = write(tmp_path, *(grpo("a.png", id=str(i), patient_id=i) for i in range(400)))
    assert [len(s) for s in manifest.open_split(many, root, size=56)] == [360, 40]
    with pytest.raises(UserError, match="two patients"):
        manifest.open_split(write(tmp_path, *rows[:2]), root)


def test_films_keep_their_aspect_ratio_in_every_split(tmp_path, root):
    """Train, selection and test: levels as the processor of Hugging Face makes them, kept apart from squares."""
    from transformers import Qwen2VLImageProcessorPil

    path = write(tmp_path, *(grpo(id=f"test/patient{i:05d}/study1/view0.jpg") for i in range(12)))
    films = PilImage.fromarray(np.random.default_rng(0).integers(0, 256, (190, 140), np.uint8))
    [image] = {row.image_path for row in manifest.load_rows(path, root)}
    films.save(image, format="PNG")
    limits = dict(min_pixels=784, max_pixels=10_000)
    data = DataConfig.with_defaults(
        source="files", manifest=str(path), image_root=str(root), size=224, **limits
    )
    found = splits.open_splits(data, processor=PROCESSOR)
    size = {"shortest_edge": 784, "longest_edge": 10_000}
    want = Qwen2VLImageProcessorPil()([films], size=size)
    for source in (found.train, *found.select.values(), *found.test.values()):
        batch = source.batch([0, 0])
        assert "image" not in batch
        [levels], [same] = batch["images"]
        assert levels.dtype == np.uint8 and levels.shape == (112, 84) and same is levels
        patches = PROCESSOR.normalise(PROCESSOR.cut(levels), np)
        np.testing.assert_array_equal(patches, want["pixel_values"])
        held = splits.held_out(source, 3)
        assert [len(films) for films in held["images"]] == [1] * len(held["texts"])
    squares = manifest.FilesSource(found.train.rows, 56, cache=found.train.cache)
    assert squares.batch([0])["image"].shape == (1, 56, 56)


# --- rows of other tools, repeated rows


def test_the_same_rows_by_lines_array_and_other_schemas(tmp_path, root):
    rows = [grpo("a.png", "Edema", id="1"), grpo("b.png", "Fracture", id="2")]
    want = manifest.load_rows(write(tmp_path, *rows), root)
    texts = {"messages": lambda row: [{"role": "user", "content": "<image>" + PROMPT}]}
    texts |= {"prompt": lambda row: PROMPT, "query": lambda row: PROMPT + "<image>"}
    for key, ask in texts.items():
        others = [
            {
                "id": row["id"],
                "images": [row["image"]],
                "solution": [row["solution"]],
                key: ask(row),
            }
            for row in rows
        ]
        assert manifest.load_rows(write(tmp_path, *others), root) == want
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(others, indent=1))
        assert manifest.load_rows(path, root) == want


def test_an_error_in_an_array_names_file_row_and_reason(tmp_path, root):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([grpo("a.png"), grpo("b.png", solution="Oedema")], indent=1))
    with pytest.raises(UserError) as caught:
        manifest.load_rows(path, root)
    assert str(caught.value) == f"{path}: row 2: name 1 in solution is none of the 14 labels"


def test_absolute_paths_below_the_root_are_read(tmp_path, root):
    [row] = manifest.load_rows(write(tmp_path, grpo(str(root / "sub" / "c.png"))), root)
    assert row.image_path == root / "sub" / "c.png"


def test_one_film_that_two_keys_name(tmp_path, root):
    """The published rows name it beside the messages and in them; users flatten the folders of both."""
    for inner in ("b.png", "deep/b.png", "other/folder/b.png"):
        [row] = manifest.load_rows(write(tmp_path, sft(inner) | {"image": "deep/b.png"}), root)
        assert row.image_path == root / "b.png"
    for outer, inner in (("a.png", "b.png"), ("a.png", "sub/c.png")):
        with pytest.raises(UserError, match="different files"):
            manifest.load_rows(write(tmp_path, sft(inner) | {"image": outer}), root)


def test_nan_is_null_wherever_pandas_writes_it(tmp_path, root):
    nan = float("nan")
    row = grpo(id=nan, labels={"Edema": 1, "Fracture": nan, "Pneumonia": 0.0})
    [got] = manifest.load_rows(write(tmp_path, row), root)
    assert got.id == "a.png"
    assert [name for name in CHEXPERT_14 if got.known[INDEX[name]]] == ["Edema", "Pneumonia"]


@pytest.mark.parametrize(
    "row, reason",
    [
        (grpo(labels={"Edema": 1, "edema ": 0}), "twice"),
        (grpo(solution=[]), "no solution"),
        (grpo(solution=["Edema", 3]), "no solution"),
        (grpo(solution=float("nan")), "no solution"),
        (grpo(id=True), "the id is not a string"),
        (
            grpo(solution="The lungs are clear of any focal consolidation. " * 3),
            "name 1 in solution is none",
        ),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path, root, row, reason):
    with pytest.raises(UserError, match=reason) as caught:
        manifest.load_rows(write(tmp_path, row), root)
    assert "lungs" not in str(caught.value)


def test_repeated_rows_are_counted_and_read_once_on_request(tmp_path, root):
    rows = [
        grpo("a.png", id="1"),
        grpo("b.png", id="2"),
        grpo("a.png", id="3"),
        grpo("a.png", id="4"),
    ]
    path = write(tmp_path, *rows)
    kept = manifest.load_rows(path, root)
    assert [row.id for row in kept] == ["1", "2", "3", "4"]
    assert "2 of 4 rows repeat" in describe_repeats(kept) and "=keep" in describe_repeats(kept)
    once = manifest.load_rows(path, root, "once")
    assert [row.id for row in once] == ["1", "2"]
    assert "2 of 4 rows repeat" in describe_repeats(once) and "=once" in describe_repeats(once)
    assert describe_repeats(kept[:2]) is None
    # A file that was written twice: the ids come again, too.
    double = write(tmp_path, *rows[:2], *rows[:2])
    with pytest.raises(UserError, match=":3: the id is that of line 1"):
        manifest.load_rows(double, root)
    assert [row.id for row in manifest.load_rows(double, root, "once")] == ["1", "2"]


def test_rows_that_contradict_each_other_are_refused_and_other_answers_are_not(tmp_path, root):
    two = [grpo("a.png", "Edema", id="1"), grpo("a.png", "Fracture", id="2")]
    answers = [sft(text="One.", id="1"), sft(text="Two.", id="2")]
    for repeats in ("keep", "once"):
        with pytest.raises(
            UserError, match=":2: the same film and question as line 1, with another"
        ):
            manifest.load_rows(write(tmp_path, *two), root, repeats)
        rows = manifest.load_rows(write(tmp_path, *answers), root, repeats)
        assert [row.target for row in rows] == ["One.", "Two."] and describe_repeats(rows) is None


def test_rows_that_vanish_move_no_patient_across_the_split(tmp_path, root):
    rows = [grpo("a.png", id=f"patient{n:05d}", prompt=f"{n}?") for n in range(60)]
    for n, row in enumerate(rows):
        row["conversations"] = [{"from": "human", "value": f"Question {n}?"}]
    _, held = manifest.open_split(write(tmp_path, *rows), root, seed=1)
    last = max(patients.place_of(row.group, 1) for row in held.rows)
    held_before = {row.group for row in held.rows}
    random = np.random.default_rng(0)
    for count in (59, 50, 30, 20):
        fewer = [rows[n] for n in sorted(random.choice(60, count, replace=False))]
        train, held = manifest.open_split(
            write(tmp_path, *fewer), root, seed=1, sides=patients.Sides(last)
        )
        assert {row.group for row in held.rows} <= held_before
        assert not {row.group for row in train.rows} & held_before
