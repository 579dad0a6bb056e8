"""Folders of tensorflow-datasets as a source: features by name, the stock chexpert, one line for what is not read."""

import json

import numpy as np
import pytest
from PIL import Image

from cxr_jax.data import images
from cxr_jax.data.shards import __main__ as shards_door
from cxr_jax.data.shards.examples import encode
from cxr_jax.data.shards.records import load_array_record
from cxr_jax.data.sources import __main__ as door
from cxr_jax.data.sources import guard, manifest, sets
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14

CLASS = "tensorflow_datasets.core.features."
STATES = ("uncertain", "positive", "negative", "unmentioned")  # in the stock chexpert's order
STATE_OF_CLASS = (-1, 1, 0, -2)


def feature(kind, inner=None):
    about = {"pythonClassName": f"{CLASS}x_feature.{kind}"}
    return about | ({"sequence": {"feature": feature(inner), "length": "-1"}} if inner else {})


CHEXPERT = {
    "name": feature("Text"),
    "image": feature("Image"),
    "label": feature("Sequence", "ClassLabel"),
    "image_view": feature("ClassLabel"),
}


def prepare(folder, features, examples, classes=None, file_format="array_record", name="chexpert"):
    """A folder as tensorflow-datasets leaves it: split -> examples, each feature -> bytes or ints."""
    folder.mkdir(parents=True)
    listed = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(len(some))],
        }
        for split, some in examples.items()
    ]
    info = {"name": name, "version": "3.1.0", "fileFormat": file_format, "splits": listed}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    about = {"pythonClassName": f"{CLASS}FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(about))
    for key, names in (classes or {}).items():
        (folder / f"{key}.labels.txt").write_text("\n".join(names) + "\n")
    for split, some in examples.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = load_array_record(path).ArrayRecordWriter(str(path), "group_size:1")
        for one in some:
            writer.write(encode(one))
        writer.close()
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "a.png"
    Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(48, 40).astype(np.uint8)).save(path)
    return path.read_bytes()


def chexpert(tmp_path, film):
    drawn = np.random.default_rng(0).integers(0, 4, (4, 14))
    paths = [f"CheXpert-v1.0-small/train/patient0000{n}/study{n}/view1_frontal.jpg" for n in (1, 2)]
    paths += [
        "CheXpert-v1.0-small/train/patient00002/study2/view2_lateral.jpg",
        "CheXpert-v1.0-small/valid/patient64741/study1/view1_frontal.jpg",
    ]
    rows = [
        {
            "name": path.encode(),
            "image": film,
            "label": labels.tolist(),
            "image_view": ["lateral" in path],
        }
        for path, labels in zip(paths, drawn, strict=True)
    ]
    rows = [{**row, "image_view": [int(row["image_view"][0])]} for row in rows]
    classes = {"label": STATES, "image_view": ("frontal", "lateral")}
    splits = {"train": rows[:3], "validation": rows[3:]}
    folder = prepare(tmp_path / "chexpert" / "3.1.0", CHEXPERT, splits, classes)
    return folder, paths, np.array(STATE_OF_CLASS)[drawn]


def test_the_stock_chexpert_is_read_by_its_features(tmp_path, film):
    folder, paths, states = chexpert(tmp_path, film)
    for root in (folder, folder.parent, tmp_path):
        films = sets.open_films("tfds", root)
    assert list(films.ids) == paths and np.array_equal(films.states, states)
    assert list(films.patients) == ["patient00001", *["patient00002"] * 2, "patient64741"]
    assert list(films.studies) == [
        *("patient00001/study1", "patient00002/study2", "patient00002/study2"),
        "patient64741/study1",
    ]
    assert list(films.views) == ["FRONTAL", "FRONTAL", "LATERAL", "FRONTAL"]
    assert list(films.splits) == ["train"] * 3 + ["validation"]
    assert guard.overlaps(films) == {"chexpert_test": 1}


def test_its_rows_train_as_rows_of_files_do(tmp_path, film):
    folder, paths, states = chexpert(tmp_path, film)
    out = tmp_path / "rows.jsonl"
    assert door.main(["tfds", str(tmp_path), f"--out={out}"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["labels"] for record in records] == [
        {name: None if state == -2 else state for name, state in zip(CHEXPERT_14, row, strict=True)}
        for row in states.tolist()
    ]
    asked = [record | {"prompt": "Find."} for record in records]
    out.write_text("".join(json.dumps(record) + "\n" for record in asked))
    source = manifest.FilesSource(manifest.load_rows(out, folder), 28)
    batch = source.batch(range(4))
    assert batch["ids"] == paths and np.array_equal(batch["solution"], states == 1)
    pixels = images.image_from_bytes("a.png", film).pixels
    assert batch["image"].shape == (4, 28, 28) and np.ptp(pixels) > 0.5
    assert np.array_equal(source.image(0), source.image(3))


def test_shards_of_a_data_set_are_the_same_set_again(tmp_path, film):
    """A prepared set goes through our shards, from its layout and back."""
    folder, _, _ = chexpert(tmp_path, film)
    out = tmp_path / "again"
    for source in ([f"tfds:{folder}"], ["tfds", str(folder)]):
        assert shards_door.main([*source, str(out)]) == 0
    before, after = sets.open_films("tfds", folder), sets.open_films("tfds", out)
    for column in ("ids", "patients", "studies", "views", "splits", "states"):
        assert np.array_equal(getattr(before, column), getattr(after, column)), column
    rows = manifest.load_rows(out / "rows.jsonl", out)
    assert [row.id for row in rows] == list(before.ids)


LABELS = {
    "findings that are there": (
        {"labels": feature("Sequence", "ClassLabel")},
        {"labels": ("Edema", "no_finding", "Hernia")},
        [{"labels": [0, 2]}, {"labels": []}],
        {"Edema": (1, 0), "No Finding": (0, 0), "Fracture": (-2, -2)},
    ),
    "one class": (
        {"label": feature("ClassLabel")},
        {"label": ("Pneumonia", "No Finding")},
        [{"label": [0]}, {"label": [1]}],
        {"Pneumonia": (1, 0), "No Finding": (0, 1), "Edema": (-2, -2)},
    ),
    "a feature a label": (
        {"edema": feature("ClassLabel"), "Pleural_Effusion": feature("Tensor")},
        {"edema": STATES},
        [{"edema": [0], "Pleural_Effusion": [1]}, {"edema": [3], "Pleural_Effusion": [0]}],
        {"Edema": (-1, -2), "Pleural Effusion": (1, 0), "Fracture": (-2, -2)},
    ),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_in_other_forms(tmp_path, film, kind):
    features, classes, examples, want = LABELS[kind]
    folder = prepare(
        tmp_path / "set",
        {"image": feature("Image"), **features},
        {"train": [{"image": film, **one} for one in examples]},
        classes,
    )
    films = sets.open_films("tfds", folder)
    assert not films.has_patients and films.ids[1].endswith("-00001/1")
    for label, states in want.items():
        assert tuple(films.states[:, CHEXPERT_14.index(label)]) == states


def spoil(folder, **changes):
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | changes))


def cut(folder, share):
    shard = next(folder.glob("*-train.array_record-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * share)])


def flip(folder):
    shard = next(folder.glob("*-train.array_record-*"))
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x89PNG") + 60] ^= 1
    shard.write_bytes(bytes(content))


def without(folder, name):
    about = json.loads((folder / "features.json").read_text())
    del about["featuresDict"]["features"][name]
    (folder / "features.json").write_text(json.dumps(about))


BAD = {
    "tfrecord": (lambda folder: spoil(folder, fileFormat="tfrecord"), "prepared as tfrecord"),
    "no format": (lambda folder: spoil(folder, fileFormat=""), "prepared as tfrecord"),
    "no film": (lambda folder: without(folder, "image"), "has no feature 'image'; it has name"),
    "no labels": (lambda folder: without(folder, "label"), "has no labels"),
    "no splits in words": (lambda folder: spoil(folder, splits=[{"name": "x"}]), "is not as"),
    "no JSON": (lambda folder: (folder / "features.json").write_text("{"), "is not valid JSON"),
    "no features": (lambda folder: (folder / "features.json").unlink(), "cannot be read"),
    "a cut shard": (lambda folder: cut(folder, 0.5), "is damaged or cut short"),
    "an empty shard": (lambda folder: cut(folder, 0), "is damaged or cut short"),
    "a flipped bit": (flip, "is damaged or cut short"),
    "no shard": (lambda folder: next(folder.glob("*-train*")).unlink(), "cannot be read"),
    "fewer records": (
        lambda folder: spoil(
            folder,
            splits=[
                {
                    "name": "train",
                    "filepathTemplate": "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "shardLengths": ["9"],
                }
            ],
        ),
        "has 3 records, and dataset_info.json says 9",
    ),
    "other classes": (
        lambda folder: (folder / "label.labels.txt").write_text("cat\ndog\n"),
        "no class of the feature 'label'",
    ),
    "too few classes": (
        lambda folder: (folder / "label.labels.txt").write_text("positive\nnegative\n"),
        "its labels are not states",
    ),
    "no set at all": (
        lambda folder: (folder / "dataset_info.json").unlink(),
        "holds no dataset_info",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, film, kind, capsys):
    folder, _, _ = chexpert(tmp_path, film)
    damage, reason = BAD[kind]
    damage(folder)
    out = tmp_path / "rows.jsonl"
    assert door.main(["tfds", str(tmp_path), f"--out={out}"]) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert reason in said and said.startswith("error: ") and said.count("\n") == 1


def test_of_several_sets_one_must_be_named(tmp_path, film):
    folder, _, _ = chexpert(tmp_path, film)
    prepare(folder.with_name("3.0.10"), CHEXPERT, {"train": []})
    # The newest version, by numbers.
    assert sets.open_films("tfds", tmp_path).root == folder
    prepare(tmp_path / "other" / "1.0.0", CHEXPERT, {"train": []})
    with pytest.raises(UserError, match="several prepared data sets"):
        sets.open_films("tfds", tmp_path)


def test_parquet_is_read_like_array_record(tmp_path, film):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder, _, states = chexpert(tmp_path, film)
    for split in ("train", "validation"):
        [shard] = folder.glob(f"*-{split}.array_record-*")
        reader = load_array_record(shard).ArrayRecordReader(str(shard))
        data = pyarrow.table({"data": reader.read_all()})
        path = folder / shard.name.replace("array_record", "parquet")
        parquet.write_table(data, path, row_group_size=2)
        shard.unlink()
    spoil(folder, fileFormat="parquet")
    films = sets.open_films("tfds", folder)
    assert np.array_equal(films.states, states)
    read = [images.read_image(folder / name).pixels for name in films.images[::-1]]
    assert len({pixels.tobytes() for pixels in read}) == 1 and np.ptp(read[0]) > 0.5
    [shard] = folder.glob("*-train.parquet-*")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged or cut short"):
        sets.open_films("tfds", folder)
