"""Shards: films of a manifest or a data set as records, byte for byte, and the same rows and batches from them."""

import dataclasses
import hashlib
import json
import shutil
import struct

import numpy as np
import pytest
from manifest_rows import PROMPT, TARGET, grpo, sft, write
from PIL import Image

from cxr_jax.data import images
from cxr_jax.data.shards import __main__ as door
from cxr_jax.data.shards import examples, records
from cxr_jax.data.sources import manifest
from cxr_jax.data.sources.guard import hash_files
from cxr_jax.errors import UserError


@pytest.fixture
def films(tmp_path):
    """A folder of nine films of several kinds, and rows on them in several schemas."""
    folder = tmp_path / "films"
    (folder / "patient00003/study2").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(7)]
    names += ["deep.png", "patient00003/study2/view1_frontal.jpg"]
    for name in names:
        pixels = drawn.integers(0, 255, (40, 48), np.uint8)
        film = Image.fromarray(pixels.astype(np.uint16) * 256 if name == "deep.png" else pixels)
        film.save(folder / name)
    turns = [("system", "Be brief."), ("user", "<image>Old, <image>new?"), ("assistant", TARGET)]
    later = [("user", "And?"), ("assistant", "Nothing.")]
    rows = [
        *(grpo(name, subject_id=7, StudyDate="20200102") for name in names[:3]),
        sft(names[3], labels={"No Finding": 1, "Edema": 0, "Fracture": -1, "Pneumonia": None}),
        grpo(names[0], id="again", conversations=[{"from": "human", "value": "Another?"}]),
        {
            "id": "two",
            "images": [names[4], names[5]],
            "patient_id": "p",
            "solution": "Edema",
            "messages": [{"role": role, "content": text} for role, text in turns + later],
        },
        {
            "id": "roles",
            "images": [{"path": names[6], "role": "frontal"}, {"path": names[5], "role": "prior"}],
            "patient_id": "p",
            "solution": "Edema",
            "prompt": PROMPT,
            "split": "test",
        },
        {
            "image": names[7],
            "solution": "",
            "labels": {"Edema": 0},
            "prompt": PROMPT,
            "policy": {"blank": "negative"},
        },
        {"image": names[8], "solution": "Edema", "prompt": "<image>\n" + PROMPT, "view": "AP"},
    ]
    return folder, write(tmp_path, *rows)


def shards_of(films, out, *flags):
    folder, rows = films
    assert door.main([str(rows), str(out), f"--image_root={folder}", *flags]) == 0
    return out


def test_rows_and_batches_of_shards_are_those_of_the_files(films, tmp_path):
    folder, rows = films
    out = shards_of(films, tmp_path / "out")
    before, after = manifest.load_rows(rows, folder), manifest.load_rows(out / "rows.jsonl", out)
    for one, other in zip(before, after, strict=True):
        assert dataclasses.replace(one, image_paths=()) == dataclasses.replace(
            other, image_paths=()
        )
        for file, member in zip(one.image_paths, other.image_paths, strict=True):
            assert records.read_film(member) == file.read_bytes()
            assert images.read_image(member).meta == images.read_image(file).meta
    chosen = [place for place, row in enumerate(before) if len(row.image_paths) == 1]
    batches = [
        manifest.FilesSource([rows[place] for place in chosen], 28).batch(range(len(chosen)))
        for rows in (before, after)
    ]
    for key, values in batches[0].items():
        assert np.array_equal(values, batches[1][key]), key
    # Whatever reads a film reads one in a shard: hashes, too.
    members = [row.image_paths[0] for row in after]
    assert len(hash_files.hash_files(members, out)) == len(set(members))


def test_records_hold_what_is_known_of_a_film(films, tmp_path):
    out = shards_of(films, tmp_path / "set" / "2.1.0")
    info = json.loads((out / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("set", "2.1.0", "array_record")
    assert {split["name"]: split["shardLengths"] for split in info["splits"]} == {
        "train": ["8"],
        "test": ["1"],
    }
    train = list(records.read_all(out / "set-train.array_record-00000-of-00001"))
    assert [one["id"][0].decode() for one in train] == [
        *("0.png", "1.png", "2.png", "3.png", "two", "two#2", "deep.png"),
        "patient00003/study2/view1_frontal.jpg",
    ]
    state = {one["id"][0]: one["state"] for one in train}
    assert state[b"3.png"] == [1, -2, -2, -2, -2, 0, -2, -2, -2, -2, -2, -2, -1, -2]
    assert state[b"deep.png"] == [-2] * 5 + [0] + [-2] * 8 and state[b"0.png"].count(0) == 13
    last = train[-1]
    assert (last["patient"], last["study"], last["view"]) == (
        [b"patient00003"],
        [b"study2"],
        [b"frontal"],
    )
    assert train[3]["target"] == [TARGET.encode()] and train[5]["prompt"] == [b""]
    about = json.loads((out / "shards.json").read_text())
    for name, facts in about["shards"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == facts["sha256"]


def test_a_stopped_command_goes_on_and_gives_the_same_bytes(films, tmp_path, monkeypatch, capsys):
    drawn = np.random.default_rng(1)
    for number in range(3):
        # Noise, which does not compress: each alone is above half of a shard.
        noise = drawn.integers(0, 256, (900, 800), np.uint8)
        Image.fromarray(noise).save(films[0] / f"{number}.png")
    whole = shards_of(films, tmp_path / "whole", "--shard_mib=1")
    assert len(list(whole.glob("*train*"))) == 3
    encode, calls, stop_at = examples.encode, [], 3

    def fail_late(features):
        calls.append(features)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return encode(features)

    monkeypatch.setattr("cxr_jax.data.shards.write.encode", fail_late)
    args = [str(films[1]), str(tmp_path / "cut"), f"--image_root={films[0]}", "--shard_mib=1"]
    assert door.main(args) == 1
    assert not (tmp_path / "cut" / "dataset_info.json").exists()
    done = len(list((tmp_path / "cut").glob("*train*")))
    assert 0 < done < 3
    # What is whole is not written again.
    calls.clear()
    stop_at = 0
    facts = json.loads((tmp_path / "cut" / "shards.json").read_text())["shards"]
    assert door.main(args) == 0
    assert len(calls) == 9 - sum(fact["records"] for fact in facts.values())
    assert {
        path.name.replace("cut", "whole"): path.read_bytes()
        for path in (tmp_path / "cut").glob("*-of-*")
    } == {path.name: path.read_bytes() for path in whole.glob("*-of-*")}
    prints = [
        json.loads((tmp_path / name / "shards.json").read_text())["fingerprint"]
        for name in ("cut", "whole")
    ]
    assert prints[0] == prints[1]
    # Other films, another size of shards, a folder of something else: refused, and left as it was.
    for given in ([*args[:3], "--shard_mib=2"], [args[0], str(films[0]), args[2]]):
        assert door.main(given) == 2
    assert "of other films" in (said := capsys.readouterr().err) and "not empty" in said
    assert door.main([*args[:2], args[2], "--shard_mib=0"]) == 2


def test_a_film_that_is_none_is_refused(films, tmp_path, capsys):
    (films[0] / "2.png").write_bytes(b"no picture at all" * 20)
    args = [str(films[1]), str(tmp_path / "out"), f"--image_root={films[0]}"]
    assert door.main(args) == 2 and "2.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert door.main([str(tmp_path / "none.jsonl"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_damage_is_told_in_one_line(films, tmp_path):
    out = shards_of(films, tmp_path / "out")
    [shard] = out.glob("*-train*")
    member = shard / "1"
    good = shard.read_bytes()
    middle = good.index((films[0] / "1.png").read_bytes()[200:260])
    cases = {
        "cut": good[: len(good) // 2],
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "empty": b"",
    }
    for name, content in cases.items():
        shard.write_bytes(content)
        with pytest.raises(UserError) as caught:
            records.read_film(member)
        assert "damaged or cut short" in str(caught.value) and "\n" not in str(caught.value), name
    shard.write_bytes(good)
    assert records.read_film(member)
    with pytest.raises(UserError, match="9 records, and no record 9|8 records, and no record 8"):
        records.read_film(shard / "8")
    # No name that files can have is taken for a record.
    assert not records.is_member(shard / "x") and not records.is_member(out / "rows.jsonl" / "1")
    with pytest.raises(UserError, match="no such file|cannot be read"):
        images.read_image(out / "out-train.array_record-00003-of-00009" / "1")


def test_examples_are_read_as_they_are_written_whatever_the_writer():
    features = {"a": b"xyz", "n": [-2, 0, 300, -(2**63), 2**63 - 1], "none": [], "z": b""}
    assert examples.decode(examples.encode(features)) == {
        "a": [b"xyz"],
        "n": features["n"],
        "none": [],
        "z": [b""],
    }

    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def example(name, feature):
        return field(1, field(1, field(1, name) + field(2, feature)))

    # By hand: floats packed, and a list of numbers one by one.
    floats = example(b"f", field(2, field(1, struct.pack("<2f", 1.5, -2))))
    single = example(b"i", field(3, b"\x08\x05\x08\x07"))
    assert examples.decode(floats + single) == {"f": [1.5, -2.0], "i": [5, 7]}
    with pytest.raises(examples.BadExampleError):
        examples.decode(b"\x0a\xff\x01no")


def test_tensorflow_datasets_reads_the_same(films, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    out = shards_of(films, tmp_path / "films" / "1.0.0")
    skip = {"image": tfds.decode.SkipDecoding()}
    read = {}
    for split in ("train", "test"):
        source = tfds.data_source("films", split=split, data_dir=tmp_path, decoders=skip)
        read |= {one["id"].decode(): one for one in source}
    rows = {row.id: row for row in manifest.load_rows(films[1], films[0]) if row.id != "again"}
    for name, row in rows.items():
        one = read[name]
        assert one["image"] == row.image_paths[0].read_bytes()
        assert one["prompt"].decode() == row.prompt and one["target"].decode() == (row.target or "")
        assert one["state"].dtype == np.int8 and one["state"].shape == (14,)
    decoded = tfds.builder_from_directory(out).as_data_source(split="test")[0]["image"]
    assert np.array_equal(decoded[..., 0], np.asarray(Image.open(rows["roles"].image_paths[0])))
    shutil.rmtree(out)
