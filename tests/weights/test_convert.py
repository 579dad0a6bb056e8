"""Conversion both ways: bit for bit, whole or not at all, and one clear line for whatever cannot be converted."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import golden_cases
import jax
import numpy as np
import pytest
import safetensors
from convert_cases import BAD, BF16, F16, F32, LAYER, config_edit, make, nested
from golden_cases import entries
from places import ORACLE_PYTHON, ROOT

import cxr_jax
from cxr_jax import convert
from cxr_jax.errors import UserError
from cxr_jax.models.family import TensorRule
from cxr_jax.models.qwen2_5_vl import config, hf_table
from cxr_jax.weights import conversion, hf_folder, native_folder
from cxr_jax.weights.locate import find_folder
from cxr_jax.weights.safetensors_file import INDEX, NAMES, Tensors, write_folder, write_safetensors


def stored(folder):
    """Canonical key -> (type, bytes) of every tensor of a Hugging Face folder."""
    tensors = Tensors(folder, hf_table.canonical_key)
    return {k: (tensors.dtype(k), np.array(tensors[k]).tobytes()) for k in tensors.stored}


def call(*argv):
    return convert.main([str(a) for a in argv])


def listing(folder):
    """Every path below a folder; links are not followed."""
    return sorted(
        os.path.join(d, name) for d, dirs, files in os.walk(folder) for name in dirs + files
    )


MIXED = lambda key: (
    BF16 if "layers.1." in key or "blocks.0." in key else F16 if "norm" in key else F32
)
LAYOUTS = {
    "flat, one file": dict(),
    "nested keys, shards, bfloat16": dict(
        case="narrow", dtype=lambda key: BF16, rename=nested, shard_gb=5e-5
    ),
    "tied, head stored once more, float16": dict(
        case="even", dtype=lambda key: F16, stored_head=True
    ),
    "types that differ within a stack": dict(dtype=MIXED, shard_gb=1e-4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_bit_for_bit(tmp_path, layout, capsys):
    src = make(tmp_path / "src", **LAYOUTS[layout])
    assert call("from-hf", src, tmp_path / "new" / "ours") == 0
    assert call("to-hf", tmp_path / "new" / "ours", tmp_path / "back", "--max_shard_gb=0.0001") == 0
    assert stored(tmp_path / "back") == stored(src)
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("written") == 2
    for name in ("config.json", "generation_config.json", "chat_template.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (src / name).read_bytes()
    assert (tmp_path / "back" / "preprocessor_config.json").exists()
    assert not (tmp_path / "back" / "unrelated.py").exists()
    assert not [p for p in listing(tmp_path) if ".partial" in p or ".old" in p]

    # Ours opens directly, and holds the arrays that the Hugging Face folder gives.
    ours, (model_config, params) = (
        cxr_jax.load(tmp_path / "new" / "ours", dtype="float32"),
        hf_folder.load(src, F32),
    )
    assert ours.config == model_config and ours.folder == tmp_path / "new" / "ours"
    jax.tree.map(np.testing.assert_array_equal, ours.params, params)
    assert (
        find_folder(str(tmp_path / "new" / "ours")) == tmp_path / "new" / "ours"
    )  # so does --config.model


def test_a_tied_head_that_stands_alone_comes_back_beside_the_embedding(tmp_path):
    """Under both names, since readers of before transformers 5 look for the embedding alone."""
    src = make(tmp_path / "src", case="even", dtype=lambda key: BF16, head_alone=True)
    assert call("from-hf", src, tmp_path / "ours") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    head = stored(src)["lm_head.weight"]
    assert stored(tmp_path / "back") == {**stored(src), "model.embed_tokens.weight": head}


def test_shards_are_those_of_transformers(tmp_path):
    from safetensors.numpy import load_file

    src = make(tmp_path / "src", dtype=lambda key: F16)
    assert call("from-hf", src, tmp_path / "ours") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "back", "--max_shard_gb=0.00005") == 0
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    read = {name: load_file(tmp_path / "back" / name) for name in files}
    assert index["weight_map"] == {k: name for name, tensors in read.items() for k in tensors}
    assert set(index["weight_map"]) == {
        r.key for r in hf_table.rules(hf_folder.read_config(src))
    }  # the published flat keys
    sizes = {name: sum(x.nbytes for x in tensors.values()) for name, tensors in read.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 50_000 or len(read[name]) == 1 for name, size in sizes.items())


def test_image_settings_of_transformers_5(tmp_path, capsys):
    """Kept byte for byte; older readers get the same limits in the file that they know; damaged ones are refused."""
    src = make(tmp_path / "src")
    text = '{"image_processor": {"size": {"shortest_edge":  3136, "longest_edge": 226576}}}'
    (src / "processor_config.json").write_text(text)
    assert call("from-hf", src, tmp_path / "ours") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    assert (tmp_path / "back" / "processor_config.json").read_text() == text
    old = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert (old["min_pixels"], old["max_pixels"]) == (3136, 226576)
    capsys.readouterr()
    for bad, message in (
        ("{", "not valid JSON"),
        (text.replace("3136", "null"), "processor_config.json: min_pixels"),
    ):
        (src / "processor_config.json").write_text(bad)
        refuses(tmp_path, capsys, ["from-hf", src, tmp_path / "dst"], message)


def test_orbax_alone_reads_our_arrays(tmp_path):
    import orbax.checkpoint as ocp

    src = make(tmp_path / "src", dtype=lambda key: BF16)
    assert call("from-hf", src, tmp_path / "ours") == 0
    tree = ocp.StandardCheckpointer().restore(tmp_path / "ours" / native_folder.ARRAYS)
    jax.tree.map(np.testing.assert_array_equal, tree, hf_folder.load(src)[1])


# --- what cannot be converted --------------------------------------------------------------------------


def refuses(tmp_path, capsys, argv, message, code=2):
    before = listing(tmp_path)
    assert call(*argv) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err and len(said.err) < 600
    assert listing(tmp_path) == before


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


def largest(folder):
    return max(
        (p for p in (folder / native_folder.ARRAYS).rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


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


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    assert call("from-hf", make(folder / "src"), folder / "ours") == 0
    return folder / "ours"


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


# --- whole or not at all -------------------------------------------------------------------------------


def test_a_failure_leaves_nothing(tmp_path, monkeypatch, capsys, ours):
    """Whatever raises, at whatever point: no DST, no temporary folder, no parent that was made."""
    src = make(tmp_path / "src")
    real = TensorRule.to_ours, write_safetensors

    def late(function, error, after):
        calls = []

        def wrapped(*args):
            calls.append(1)
            if len(calls) > after:
                raise error
            return function(*args)

        return wrapped

    full, stopped = OSError(28, "No space left on device"), KeyboardInterrupt()
    for error, message in (
        (full, r"failed \(OSError\): .*No space left"),
        (stopped, "stopped before the end"),
    ):
        monkeypatch.setattr(TensorRule, "to_ours", late(real[0], error, 30))
        refuses(tmp_path, capsys, ["from-hf", src, tmp_path / "a" / "dst"], message, code=1)
        monkeypatch.setattr(conversion, "write_folder", late(write_folder, error, 0))
        refuses(tmp_path, capsys, ["to-hf", ours, tmp_path / "a" / "dst"], message, code=1)
    monkeypatch.undo()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    for argv in (["from-hf", src, tmp_path / "a" / "dst"], ["to-hf", ours, tmp_path / "a" / "dst"]):
        refuses(tmp_path, capsys, argv, "GB are needed")


def start(*argv, limit=None):
    """The command in a process of its own. limit: blocks in the largest file that it may write, as on a full disk."""
    limited = [] if limit is None else ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh"]
    return subprocess.Popen(
        [*limited, sys.executable, "-m", "cxr_jax.convert", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def ends(process, code, message):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code and err.count("\n") == 1 and message in err and out == "", (
        out,
        err,
    )


@pytest.mark.slow
def test_the_command(tmp_path, ours):
    src = make(tmp_path / "src")
    running = [
        start("from-hf", src, tmp_path / "dst"),
        start("from-hf", src, tmp_path / "small", limit=50),
        start("to-hf", ours, tmp_path / "small2", limit=50),
        start("from-hf", src, src / "inside"),
    ]
    out, err = running[0].communicate(timeout=600)
    assert running[0].returncode == 0 and err == "" and "written" in out
    ends(running[1], 1, "the conversion failed")
    ends(running[2], 1, "the conversion failed")
    ends(running[3], 2, "lies inside")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Hugging Face folder of 0.36 GB in bfloat16, in shards of 0.1 GB; (folder, bytes)."""
    folder = tmp_path_factory.mktemp("large") / "src"
    text = config.TextConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=2,
        mrope_section=(8, 12, 12),
    )
    model_config = config.Config(
        config.VisionConfig(
            depth=2,
            hidden_size=128,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=1024,
            fullatt_block_indexes=(1,),
        ),
        text,
    )
    rng, size = np.random.default_rng(0), 0
    noise = rng.integers(0, 0x7F00, 2**20, dtype=np.uint16)
    params: dict = {}
    for path, shape in hf_table.our_shapes(model_config).items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.resize(noise, shape).view(BF16)
        size += node[path[-1]].nbytes
    hf_folder.save(folder, model_config, params, max_shard_gb=0.1)
    return folder, size


# Peak memory before and after a conversion, in KiB. Not ru_maxrss: a child inherits it from a larger parent.
MEASURE = """
import sys
from cxr_jax import convert
import jax, orbax.checkpoint, ml_dtypes
import numpy as np
jax.random.key(0)
peak = lambda: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))
before = peak()
assert convert.main(sys.argv[1:]) == 0
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_stays_low(tmp_path, large):
    folder, size = large
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 4
    biggest_array = 49152 * 1024 * 2
    for argv, arrays in (
        (["from-hf", folder, tmp_path / "ours"], size),
        (["to-hf", tmp_path / "ours", tmp_path / "back", "--max_shard_gb=0.1"], biggest_array),
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, argv)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        before, peak = map(int, done.stdout.split("\n")[-2].split())
        extra = (peak - before) * 1024 - arrays
        print(f"{argv[0]}: {arrays / 2**20:.0f} MiB of arrays, {extra / 2**20:.0f} MiB beyond them")
        # A shard is 100 MB. All else than arrays: one tensor, its pages in the file, and what libraries keep.
        assert -0.2 * arrays < extra < 300 * 2**20  # and the measure did see the arrays
    assert stored(tmp_path / "back") == stored(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path, large, number):
    """At the start, while reading, while Orbax writes, ...: DST is whole, or there is no trace."""
    folder, _ = large

    def whole(i):
        """Whether the i-th conversion was done before its signal came."""
        root = tmp_path / str(i)
        root.mkdir()
        process = start("from-hf", folder, root / "a" / "dst")
        while process.poll() is None and not (root / "a").exists():
            time.sleep(0.01)
        time.sleep(0.4 * i)
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
        time.sleep(0.5)  # whatever were still writing
        if process.returncode == 0:
            native_folder.load(root / "a" / "dst")
            shutil.rmtree(root / "a")
        assert process.returncode == 0 or (
            process.returncode == 1 and err.startswith("error: stopped")
        ), err
        assert listing(root) == []
        return process.returncode == 0

    with concurrent.futures.ThreadPoolExecutor(
        4
    ) as pool:  # the start of a process takes longer than the rest
        assert not all(pool.map(whole, range(4)))


# --- transformers --------------------------------------------------------------------------------------


def test_transformers_reads_the_settings(tmp_path):
    """Without torch: config, tokenizer, image processor and generation settings of an export."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    assert call("from-hf", "phantom", tmp_path / "ours") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    phantom = cxr_jax.asset("phantom")
    assert stored(tmp_path / "back") == stored(phantom)
    model_config = AutoConfig.from_pretrained(tmp_path / "back")
    assert model_config.model_type == "qwen2_5_vl" and model_config.text_config.hidden_size == 192
    mine = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (
        mine.get_vocab() == AutoTokenizer.from_pretrained(phantom).get_vocab()
        and mine.chat_template
    )
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == list(
        hf_folder.read_config(phantom).eos_token_id
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not ORACLE_PYTHON.exists(), reason="needs .venv-oracle, see tests/oracle/requirements.txt"
)
@pytest.mark.parametrize("source", ["phantom", "images", "ragged", "even, its head alone"])
def test_transformers_computes_the_same(tmp_path, source):
    """An export loads in transformers without a warning, and gives our logits; so does a folder with its head alone."""
    name = source.partition(",")[0]
    c = golden_cases.case("images" if source == "phantom" else name)
    src = source
    if source == "phantom":
        ids = np.random.default_rng(0).integers(10, 900, (2, 40))
        given = dict(
            input_ids=ids,
            attention_mask=np.ones_like(ids),
            grids=np.zeros((0, 3), int),
            pixels=np.zeros(0),
        )
    else:

        def stored_key(key):
            is_tied = name != source and hf_table.canonical_key(key) == "model.embed_tokens.weight"
            return "lm_head.weight" if is_tied else key

        src = golden_cases.write_folder(tmp_path / "src", name, stored_key)
        given = {k: c[k] for k in ("input_ids", "attention_mask", "grids", "pixels")}
        given["input_ids"] = given["input_ids"].astype(np.int64)
    assert call("from-hf", src, tmp_path / "ours") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "back", "--max_shard_gb=0.0001") == 0
    theirs_to_read = tmp_path / "back"
    if name != source:
        theirs_to_read = src
        for file in ("preprocessor_config.json", "generation_config.json"):
            shutil.copy(tmp_path / "back" / file, src)
    np.savez(tmp_path / "in.npz", **given)
    done = subprocess.run(
        [
            ORACLE_PYTHON,
            ROOT / "tests/oracle/load_export.py",
            theirs_to_read,
            tmp_path / "in.npz",
            tmp_path / "out.npz",
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert not any(said[k] for k in said if k.endswith("_keys") or k == "error_msgs"), said
    theirs = np.load(tmp_path / "out.npz")["logits"]
    images = (given["pixels"], given["grids"]) if len(given["grids"]) else (None, None)
    mine = cxr_jax.load(tmp_path / "ours").logits(
        given["input_ids"], *images, given["attention_mask"]
    )
    shown = given["attention_mask"].astype(bool)
    assert np.abs(theirs - mine)[shown].max() <= 1e-4 * theirs[shown].std()


def test_names_of_types_are_complete():
    assert {np.dtype(t) for t in (F32, F16, BF16)} == set(hf_folder.WEIGHT_TYPES) <= set(NAMES)
