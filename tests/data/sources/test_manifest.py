"""Manifests of files: the two published formats, strictness, batches, splits; the label-table converter."""

import json
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image as PilImage
from places import SHARED

from cxr_jax.config.sections import DataConfig
from cxr_jax.data import image_cache, images, radiograph, resize
from cxr_jax.data.sources import label_table, manifest, patients, splits
from cxr_jax.data.sources.rows import describe_repeats
from cxr_jax.data.sources.unreadable import UnreadableFiles
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14, INDEX
from cxr_jax.models.qwen2_5_vl.processor import PROCESSOR

DATA = SHARED
PROMPT = "Find abnormalities and support devices."


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in [("a.png", (80, 60)), ("b.png", (64, 64)), ("sub/c.png", (50, 90))]:
        PilImage.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder / name)
    return folder


def grpo(image="a.png", solution="Edema", **extra):
    talk = [{"from": "human", "value": PROMPT}]
    return {"id": image, "image": image, "conversations": talk, "solution": solution} | extra


TARGET = "<think>Clear.</think><answer>No Finding</answer>"


def sft(image="b.png", solution="No Finding", text=TARGET, **extra):
    user = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]
    turns = [("user", user), ("assistant", [{"type": "text", "text": text}])]
    row = {"id": image, "image": image, "subject_id": 7, "study_id": 9, "solution": solution}
    return (
        row | {"messages": [{"role": role, "content": content} for role, content in turns]} | extra
    )


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)
    )
    return path


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
    for key in ("id", "labels", "policy"):
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


ONE = 56 * 56 * 4 / 2**20  # MiB of an image


@pytest.fixture
def reads(monkeypatch):
    """Names of the files read, in order."""
    names, real = [], images.read_image
    monkeypatch.setattr(
        manifest.images, "read_image", lambda p, r: (names.append(p.name), real(p, r))[1]
    )
    return names


def test_cache_is_bounded_and_used(tmp_path, root, reads):
    rows = manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root)
    roomy = manifest.FilesSource(rows, 56, cache=image_cache.ImageCache(3 * ONE))
    first = roomy.batch([0, 1, 2])["image"]
    np.testing.assert_array_equal(roomy.batch([0, 1, 2, 1])["image"], first[[0, 1, 2, 1]])
    assert len(reads) == 3
    assert roomy.cache.stats() == {"hits": 4, "misses": 3, "images": 3, "mib": 3 * ONE}
    for images_held in (0, 0.9, 1, 1.9, 2, 3):
        source = manifest.FilesSource(rows, 56, cache=image_cache.ImageCache(images_held * ONE))
        for _ in range(3):
            np.testing.assert_array_equal(source.batch([0, 1, 2])["image"], first)
            assert source.cache.stats()["images"] == int(
                images_held
            )  # all the room is used, and no more
        assert (
            sum(x.nbytes for x in source.cache._images.values())
            == source.cache.stats()["mib"] * 2**20
        )


def test_cache_drops_what_was_not_asked_for_the_longest(tmp_path, root, reads):
    rows = manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root)
    source = manifest.FilesSource(rows, 56, cache=image_cache.ImageCache(2 * ONE), threads=1)
    for i in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, and 1 that of 2
        source.image(i)
    assert reads == ["a.png", "b.png", "c.png", "b.png"]
    with pytest.raises(ValueError, match="read-only"):
        source.image(0)[0, 0] = 1
    with pytest.raises(UserError, match="cache_mib=-1"):
        image_cache.ImageCache(-1)
    with pytest.raises(UserError, match="threads=-1"):
        manifest.FilesSource(rows, threads=-1)


def test_two_threads_do_not_decode_one_image_at_a_time():
    cache, begun, go, calls = image_cache.ImageCache(0), threading.Event(), threading.Event(), []

    def decode():
        calls.append(1)
        begun.set()
        go.wait(5)
        if len(calls) == 2:
            raise UserError("a.png: is torn")
        return np.ones(3, np.float32)

    def ask():
        try:
            got.append(cache.get("a", decode))
        except UserError as e:
            got.append(str(e))

    for count, want in (
        (1, np.ones(3)),
        (2, "a.png: is torn"),
    ):  # not even where nothing can be kept
        begun.clear(), go.clear()
        got, threads = [], [threading.Thread(target=ask) for _ in range(4)]
        for t in threads:
            t.start()
        begun.wait(5)
        while cache.stats()["hits"] < 3 * count:  # until all the others wait for the one
            time.sleep(0.01)
        go.set()
        for t in threads:
            t.join(5)
        assert len(calls) == count and len(got) == 4
        for value in got:
            np.testing.assert_array_equal(value, want)


def test_rows_of_a_batch_are_decoded_by_several_threads(tmp_path, root, monkeypatch):
    rows, together = (
        manifest.load_rows(write(tmp_path, grpo(), sft(), grpo("sub/c.png")), root),
        threading.Barrier(3),
    )
    real = images.read_image
    monkeypatch.setattr(
        manifest.images, "read_image", lambda p, r: (together.wait(5), real(p, r))[1]
    )
    assert manifest.FilesSource(rows, 56, threads=3).batch([0, 1, 2])["ids"] == [
        "a.png",
        "b.png",
        "sub/c.png",
    ]


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


# --- label tables


def table(tmp_path, *rows, header=("file", *CHEXPERT_14)):
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(",".join(row) for row in (header, *rows)) + "\n", encoding="utf-8")
    return path


def cells(**states):
    return [states.get(name.replace(" ", "_"), "") for name in CHEXPERT_14]


def test_converter_keeps_what_is_known(tmp_path, root, capsys):
    path = table(
        tmp_path,
        [
            "a.png",
            *cells(Edema="1.0", Fracture="0", Pneumonia="-1", Pleural_Other="U", Lung_Lesion="nan"),
        ],
        ["b.png", *cells(No_Finding="1", Support_Devices="1")],
        ["c.png", *cells(Fracture="0")],
        ["d.png", *cells(No_Finding="1", Edema="1")],
    )
    out = tmp_path / "out.jsonl"
    assert label_table.main([str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "2 rows" in said
        and "1 left out: no label" in said
        and "1 left out: No Finding together" in said
    )
    one, two = manifest.load_rows(out, root)
    assert one.solution == "Edema" and sum(one.known) == 2
    assert two.solution == "No Finding, Support Devices"


def test_converter_reads_columns_by_name(tmp_path):
    header = ("Path", *reversed(CHEXPERT_14))
    path = table(tmp_path, ["a.png", *reversed(cells(Edema="1"))], header=header)
    [row] = label_table.convert(label_table.read_table(path))[0]
    assert row["image"] == "a.png" and row["solution"] == "Edema"


@pytest.mark.parametrize(
    "header, row, reason",
    [
        (("file", *CHEXPERT_14[1:]), ["a.png", *cells()[1:]], "no column 'No Finding'"),
        (("pic", *CHEXPERT_14), ["a.png", *cells()], "no image column"),
        (("file", *CHEXPERT_14), ["a.png", *cells(Edema="2")], "labels.csv:2: Edema is not one of"),
        (("file", *CHEXPERT_14), [" ", *cells(Edema="1")], "labels.csv:2: no image name"),
        (("file", *CHEXPERT_14), ["a.png", *cells()], "no row has a label"),
    ],
)
def test_converter_refuses(tmp_path, capsys, header, row, reason):
    out = tmp_path / "out.jsonl"
    assert label_table.main([str(table(tmp_path, row, header=header)), str(out)]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1 and not out.exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent")
def test_real_label_table(tmp_path):
    out = tmp_path / "out.jsonl"
    assert label_table.main([str(DATA / "images" / "manifest.csv"), str(out)]) == 0
    train, held = manifest.open_split(out, DATA, size=56, seed=1)
    assert len(train) > len(held) >= 20
    assert held.batch(range(2))["image"].std() > 0.1


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


# ---- Several films a row ---------------------------------------------------------------------------------------


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
