"""Damaged folders and checkpoints are refused in one line, and fuzzed files raise UserErrors only."""

import json
import shutil

import numpy as np
import pytest
import safetensors
from convert_calls import call, flip, largest, refuses
from convert_cases import BAD, BF16, F16, F32, LAYER, config_edit, make
from golden_cases import entries

import cxr_jax
from cxr_jax.errors import UserError
from cxr_jax.weights import hf_folder, native_folder
from cxr_jax.weights.safetensors_file import INDEX, Tensors, write_safetensors


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(tmp_path, capsys, name):
    src = make(tmp_path / "src")
    corrupt, message = BAD[name]
    corrupt(src)
    refuses(tmp_path, capsys, ["from-hf", src, tmp_path / "a" / "b" / "dst"], message)


def test_bad_paths(tmp_path, capsys):
    src = make(tmp_path / "src")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_src").symlink_to(src)
    for argv, message in [
        (["from-hf", src, full], "exists and is not an empty folder"),
        (["from-hf", src, full / "file"], "exists and is not an empty folder"),
        (["from-hf", src, full / "file" / "x"], "Not a directory"),
        (["from-hf", src, src], "lies inside"),
        (["from-hf", src, src / "ours"], "lies inside"),
        (["from-hf", src, tmp_path / "to_src" / "ours"], "lies inside"),
        (["from-hf", src, tmp_path], "exists and is not an empty folder"),
        (["from-hf", src, tmp_path / "loop"], "leads to itself"),
        (["from-hf", src, tmp_path / ("x" * 300)], "name too long"),
        (["from-hf", tmp_path / "loop", tmp_path / "dst"], "loop: no model there"),
        (["from-hf", src / "config.json", tmp_path / "dst"], "not a folder"),
        (["from-hf", tmp_path / "nowhere", tmp_path / "dst"], "nowhere: no model there"),
        (["from-hf", full, tmp_path / "dst"], "no model there"),
        (["to-hf", src, tmp_path / "dst"], "a Hugging Face folder already"),
        (["to-hf", src, tmp_path / "dst", "--max_shard_gb=-1"], "must be above 0"),
        (["to-hf", src, tmp_path / "dst", "--max_shard_gb=nan"], "must be above 0"),
        (["to-hf", src, tmp_path / "dst", "--max_shard_gb=x"], "max_shard_gb"),
        (["sideways", src, tmp_path / "dst"], "sideways"),
        (["from-hf", src], "required: DST"),
    ]:
        refuses(tmp_path, capsys, argv, message)
    (tmp_path / "empty").mkdir()
    assert (
        call("from-hf", tmp_path / "to_src", tmp_path / "empty") == 0
    )  # an empty folder and a link will do
    capsys.readouterr()
    refuses(
        tmp_path,
        capsys,
        ["from-hf", tmp_path / "empty", tmp_path / "dst"],
        "one of our checkpoints already",
    )


def manifest_edit(change):
    def corrupt(folder):
        d = json.loads((folder / native_folder.MANIFEST).read_text())
        change(d)
        (folder / native_folder.MANIFEST).write_text(json.dumps(d))

    return corrupt


NORM = "text/final/norm/scale"
BAD_OURS = {
    "flipped bit": (lambda f: flip(largest(f)), "damaged"),
    "truncated": (lambda f: largest(f).write_bytes(largest(f).read_bytes()[:9999]), "damaged"),
    "array file missing": (lambda f: largest(f).unlink(), "damaged"),
    "no arrays": (lambda f: shutil.rmtree(f / native_folder.ARRAYS), "missing or damaged"),
    "checksum": (
        manifest_edit(lambda d: d["arrays"][NORM].update(sha256="0" * 64)),
        f"{NORM} is damaged",
    ),
    "type": (manifest_edit(lambda d: d["arrays"][NORM].update(dtype="BF16")), f"{NORM} is damaged"),
    "type unknown": (manifest_edit(lambda d: d["arrays"][NORM].update(dtype="I64")), "damaged"),
    "shape": (
        manifest_edit(lambda d: d["arrays"][NORM].update(shape=[3])),
        f"{NORM} is .3., should be .64.",
    ),
    "array missing": (manifest_edit(lambda d: d["arrays"].pop(NORM)), f"{NORM} is missing"),
    "array unexpected": (
        manifest_edit(lambda d: d["arrays"].update(x=d["arrays"][NORM])),
        "should be absent",
    ),
    "format": (
        manifest_edit(lambda d: d.update(format="cxr_jax checkpoint 9")),
        "format is cxr_jax checkpoint 9",
    ),
    "manifest not JSON": (lambda f: (f / native_folder.MANIFEST).write_text("{"), "not valid JSON"),
    "tensor types": (manifest_edit(lambda d: d.update(tensor_types={LAYER: "I8"})), "damaged"),
    "config of another size": (config_edit(vocab_size=200), "does not fit config.json"),
}


@pytest.mark.parametrize("name", BAD_OURS)
def test_bad_checkpoints(tmp_path, capsys, name, ours):
    src = shutil.copytree(ours, tmp_path / "ours")
    corrupt, message = BAD_OURS[name]
    corrupt(src)
    capsys.readouterr()
    refuses(tmp_path, capsys, ["to-hf", src, tmp_path / "dst"], message)
    with pytest.raises(UserError, match=message):
        cxr_jax.load(src)


# --- fuzzing -------------------------------------------------------------------------------------------


def damaged(data, rng):
    """`data` with a few bytes flipped, overwritten, removed or doubled."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        i, how = int(rng.integers(len(data))), rng.integers(4)
        if how == 0:
            data[i] ^= 1 << int(rng.integers(8))
        elif how == 1:
            data[i] = rng.choice(list(b'0123456789-+.eE[]{}",:tnN\\\x00\xff'))
        elif how == 2:
            del data[i : i + int(rng.integers(1, 9))]
        else:
            data[i:i] = data[i : i + int(rng.integers(1, 9))]
    return bytes(data)


def same_as_library(path, tensors):
    """The library reads the same: we accept nothing that it refuses, but for metadata, which we do not read."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            assert set(file.keys()) == set(tensors.stored)
            for key in file.keys():
                theirs = file.get_tensor(key)
                assert theirs.dtype == tensors.dtype(key) and theirs.shape == tensors.shape(key)
                assert theirs.tobytes() == tensors[key].tobytes()
    except safetensors.SafetensorError as error:
        assert "__metadata__" in str(error) or "expected a string" in str(error), error


def test_damaged_headers_raise_user_errors_only(tmp_path):
    """Whatever the bytes are: tensors inside the file, which the safetensors library reads alike, or a UserError."""
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path,
        entries({"a": np.ones((2, 3), F32), "b.c": np.ones((4,), F16), "d": np.ones((0, 2), BF16)}),
    )
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1500):
        path.write_bytes(damaged(whole[:end], rng) + whole[end:])
        try:
            tensors = Tensors(tmp_path)
            total = sum(np.array(tensors[k]).nbytes for k in tensors.stored)
            assert total <= path.stat().st_size
            same_as_library(path, tensors)
        except UserError as e:
            refused += 1
            assert "\n" not in str(e) and len(str(e)) < 600
    assert 750 < refused < 1500


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_damaged_settings_raise_user_errors_only(tmp_path, name):
    folder = make(tmp_path / "m", shard_gb=1e-4)
    whole, rng, refused = (folder / name).read_bytes(), np.random.default_rng(1), 0
    for _ in range(300):
        (folder / name).write_bytes(damaged(whole, rng))
        try:
            if name == INDEX:
                Tensors(folder)
            else:
                hf_folder.read_config(folder)
        except UserError:
            refused += 1
    assert refused > 100
