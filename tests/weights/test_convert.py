"""Folders of Hugging Face to ours and back, bit for bit; what cannot be converted; what transformers reads."""

import json
import shutil
import subprocess

import golden_cases
import jax
import numpy as np
import pytest
from convert_calls import call, listing, refuses, stored
from convert_cases import BF16, F16, F32, make, nested
from places import ORACLE_PYTHON, ROOT

import cxr_jax
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.weights import hf_folder, native_folder
from cxr_jax.weights.locate import find_folder
from cxr_jax.weights.safetensors_file import INDEX, NAMES

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
    "Qwen3-VL, types that differ": dict(case="qwen3_taps", dtype=MIXED, shard_gb=1e-4),
    "Qwen3-VL, tied, head stored once more": dict(
        case="qwen3_taps", dtype=lambda key: BF16, stored_head=True
    ),
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


SOURCES = ("phantom", "images", "ragged", "even, its head alone", "qwen3_taps", "qwen3_deep")


def export(folder, source):
    """A case there and back: (the folder that transformers reads, what it is asked)."""
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

        src = golden_cases.write_folder(folder / "src", name, stored_key)
        given = {k: c[k] for k in ("input_ids", "attention_mask", "grids", "pixels")}
        given["input_ids"] = given["input_ids"].astype(np.int64)
    assert call("from-hf", src, folder / "ours") == 0
    assert call("to-hf", folder / "ours", folder / "back", "--max_shard_gb=0.0001") == 0
    if name == source:
        return folder / "back", given
    for file in ("preprocessor_config.json", "generation_config.json"):
        shutil.copy(folder / "back" / file, src)
    return src, given


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{source: (its folder, what was asked, what loading said, logits)}, all of one process of transformers."""
    folders, given, arguments = {}, {}, []
    for source in SOURCES:
        folder = folders[source] = tmp_path_factory.mktemp("export")
        read, given[source] = export(folder, source)
        np.savez(folder / "in.npz", **given[source])
        arguments += [read, folder / "in.npz", folder / "out.npz"]
    command = [ORACLE_PYTHON, ROOT / "tests/oracle/load_export.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return {
        source: (folder, given[source], json.loads(said), np.load(folder / "out.npz")["logits"])
        for (source, folder), said in zip(folders.items(), done.stdout.splitlines(), strict=True)
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not ORACLE_PYTHON.exists(), reason="needs .venv-oracle, see tests/oracle/requirements.txt"
)
@pytest.mark.parametrize("source", SOURCES)
def test_transformers_computes_the_same(exports, source):
    """An export loads in transformers without a warning, and gives our logits; so does a folder with its head alone."""
    folder, given, said, theirs = exports[source]
    assert not any(said[k] for k in said if k.endswith("_keys") or k == "error_msgs"), said
    images = (given["pixels"], given["grids"]) if len(given["grids"]) else (None, None)
    mine = cxr_jax.load(folder / "ours").logits(
        given["input_ids"], *images, given["attention_mask"]
    )
    shown = given["attention_mask"].astype(bool)
    assert np.abs(theirs - mine)[shown].max() <= 1e-4 * theirs[shown].std()


def test_names_of_types_are_complete():
    assert {np.dtype(t) for t in (F32, F16, BF16)} == set(hf_folder.WEIGHT_TYPES) <= set(NAMES)
