"""Hugging Face folders: both ways bit for bit, both layouts, shards, and a clear refusal of anything else."""

import dataclasses
import json
import shutil

import golden_cases
import jax
import ml_dtypes
import numpy as np
import pytest

import cxr_jax
from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.models.qwen2_5_vl.config import (
    PHANTOM,
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    read_config,
    write_config,
)
from cxr_jax.weights import hf_folder, pretrained
from cxr_jax.weights.safetensors_file import Tensors, write_folder, write_safetensors

NESTED = {"visual.": "model.visual.", "model.": "model.language_model."}


def nested(key):
    return next((new + key[len(old) :] for old, new in NESTED.items() if key.startswith(old)), key)


def open_tensors(folder):
    return Tensors(folder, hf_table.canonical_key)


@pytest.fixture
def folder(tmp_path):
    return golden_cases.write_folder(tmp_path / "model", "ragged", hf_table.canonical_key)


def rewrite(folder, change):
    """Apply `change` to the dict of all tensors of a folder."""
    tensors = open_tensors(folder)
    arrays = {k: np.array(tensors[k]) for k in tensors.stored}
    change(arrays)
    write_safetensors(folder / "model.safetensors", golden_cases.entries(arrays))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", golden_cases.NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_bit_for_bit(name, dtype, tmp_path):
    src = golden_cases.write_folder(tmp_path / "a", name)
    model_config, params = hf_folder.load(src, np.dtype(dtype))
    hf_folder.save(tmp_path / "b", model_config, params)
    cfg2, params2 = hf_folder.load(tmp_path / "b")
    assert cfg2 == model_config
    same(params, params2)
    tensors, weights = open_tensors(tmp_path / "b"), golden_cases.case(name)["weights"]
    assert set(tensors.stored) == {hf_table.canonical_key(k) for k in weights}
    for key, value in weights.items():  # HF -> ours -> HF
        np.testing.assert_array_equal(tensors[hf_table.canonical_key(key)], value.astype(dtype))


def test_files_are_what_the_safetensors_library_reads(tmp_path):
    from safetensors.numpy import load_file

    src = golden_cases.write_folder(tmp_path / "a", "even")
    model_config, params = hf_folder.load(src)
    hf_folder.save(tmp_path / "b", model_config, params)
    theirs = load_file(tmp_path / "b" / "model.safetensors")
    for key, value in golden_cases.case("even")["weights"].items():
        np.testing.assert_array_equal(theirs[hf_table.canonical_key(key)], value)


def test_both_key_layouts_give_the_same_parameters(tmp_path):
    a = hf_folder.load(golden_cases.write_folder(tmp_path / "a", "ragged", hf_table.canonical_key))
    b = hf_folder.load(
        golden_cases.write_folder(
            tmp_path / "b", "ragged", lambda k: nested(hf_table.canonical_key(k))
        )
    )
    assert a[0] == b[0]
    same(a[1], b[1])


def test_shards(folder, tmp_path):
    whole = hf_folder.load(folder)
    tensors = open_tensors(folder)
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(folder / "config.json", shards)
    weight_map = {}
    for i, key in enumerate(sorted(tensors.stored)):
        weight_map[key] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    for name in set(weight_map.values()):
        part = {k: np.array(tensors[k]) for k, f in weight_map.items() if f == name}
        write_safetensors(shards / name, golden_cases.entries(part))
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same(whole[1], hf_folder.load(shards)[1])
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is missing"):
        hf_folder.load(shards)


def test_tied_head_may_be_stored_once_more(tmp_path):
    src = golden_cases.write_folder(tmp_path / "a", "even", hf_table.canonical_key)
    before = hf_folder.load(src)
    rewrite(src, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    same(before[1], hf_folder.load(src)[1])


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("rename", [str, nested])
def test_tied_weights_stored_as_head_only(tmp_path, rename, shards):
    """transformers reads such a folder as the tied model, too (test_convert.py compares the logits)."""
    src = golden_cases.write_folder(tmp_path / "a", "even", hf_table.canonical_key)
    before = hf_folder.load(src)
    tensors = open_tensors(src)
    arrays = {key: np.array(tensors[key]) for key in tensors.stored}
    arrays["lm_head.weight"] = arrays.pop(EMBEDDING)
    (src / "model.safetensors").unlink()
    entries = golden_cases.entries(
        arrays, lambda key: key if key == "lm_head.weight" else rename(key)
    )
    write_folder(src, entries, 1e-4 if shards else 5.0)
    assert any(src.glob("*.index.json")) == shards
    after = hf_folder.load(src)
    assert after[0] == before[0]
    same(before[1], after[1])


def test_missing_shards_are_told_before_a_run(tmp_path):
    """At a dry run, which reads no weights."""
    src = golden_cases.write_folder(tmp_path / "a", "even", hf_table.canonical_key)
    for model in (str(src), "phantom", "random:phantom"):
        pretrained.check_weights(model)
    (src / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        pretrained.check_weights(str(src))


def test_untied_weights_need_both(folder):
    """What stands for the other in a tied model does not in an untied one: a head is not guessed."""
    for key in ("lm_head.weight", EMBEDDING):
        rewrite(folder, lambda arrays, key=key: arrays.pop(key))
        with pytest.raises(UserError, match=f"missing: {key}"):
            hf_folder.load(folder)
        golden_cases.write_folder(folder, "ragged", hf_table.canonical_key)


LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), f"missing: {LAYER}"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "unexpected: extra"),
        (lambda t: t.update({LAYER: t[LAYER][:-1]}), f"wrong shape: {LAYER}"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[LAYER]}),
            "unexpected: model.layers.2",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("visual.")], "and [0-9]+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        hf_folder.load(folder)


def test_damaged_files(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for bad in (
        b"",
        b"abc",
        data[:5],
        data[:200],
        data[:-1],
        b"\xff" * 100,
        data[:8] + b"{nonsense" + data[17:],
    ):
        weights.write_bytes(bad)
        with pytest.raises(UserError, match="model.safetensors"):
            hf_folder.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        hf_folder.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        hf_folder.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        hf_folder.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "qwen2_vl", "model_type 'qwen2_vl'"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("rope_scaling", {"type": "yarn", "factor": 4}, "rope type 'yarn'"),
        ("rope_scaling", {"type": "mrope", "mrope_section": [1, 2, 3]}, "mrope_section"),
        ("num_key_value_heads", 3, "do not divide"),
        ("hidden_size", 32, "must sum to half of the head size"),
        ("vocab_size", None, "vocab_size is missing"),
        ("vision_config", None, "vision_config is missing"),
    ],
)
def test_configs_that_are_not_supported(key, value, message):
    d = json.loads(json.dumps(golden_cases.case("ragged")["config"]))
    d[key] = value
    with pytest.raises(UserError, match=message):
        read_config(d)


OTHER_ROPE = dataclasses.replace(
    PHANTOM, vision=dataclasses.replace(PHANTOM.vision, rope_theta=500.0)
)


@pytest.mark.parametrize("model_config", [PHANTOM, QWEN2_5_VL_3B, QWEN2_5_VL_7B, OTHER_ROPE])
def test_config_round_trip(model_config):
    assert read_config(json.loads(json.dumps(write_config(model_config)))) == model_config
    hash(model_config)


def test_published_sizes():
    """Parameter counts of the published models, from shapes alone."""
    total = lambda model_config: sum(int(np.prod(r.shape)) for r in hf_table.rules(model_config))
    assert total(QWEN2_5_VL_3B) == 3_754_622_976
    assert total(QWEN2_5_VL_7B) == 8_292_166_656
    conv = next(r for r in hf_table.rules(QWEN2_5_VL_3B) if r.transform == "conv")
    assert conv.shape == (1280, 3, 2, 14, 14)


def test_saving_replaces_whole_folders_only(tmp_path, monkeypatch):
    model_config, params = hf_folder.load(golden_cases.write_folder(tmp_path / "a", "text"))
    hf_folder.save(tmp_path / "out", model_config, params)
    (tmp_path / "out" / "old.txt").write_text("x")
    monkeypatch.setattr(
        hf_folder, "write_folder", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        hf_folder.save(tmp_path / "out", model_config, params)
    monkeypatch.undo()
    same(hf_folder.load(tmp_path / "out")[1], params)
    assert (tmp_path / "out" / "old.txt").exists()
    hf_folder.save(tmp_path / "out", model_config, params, dtype=ml_dtypes.bfloat16)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]  # no leftovers


def test_load_by_name(tmp_path):
    model_config, params = hf_folder.load(golden_cases.write_folder(tmp_path / "m", "even"))
    hf_folder.save(tmp_path / "run" / "hf", model_config, params, dtype=ml_dtypes.bfloat16)
    model = cxr_jax.load(tmp_path / "run")
    assert model.config == model_config and {
        x.dtype.name for x in jax.tree.leaves(model.params)
    } == {"float32"}
    low = cxr_jax.load(str(tmp_path / "run" / "hf"), dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(low.params)} == {"bfloat16"}
    c = golden_cases.case("even")
    logits = [m.logits(c["input_ids"], c["pixels"], c["grids"]) for m in (model, low)]
    assert logits[1].dtype == np.float32 and np.isfinite(logits[1]).all()
    assert np.abs(logits[0] - logits[1]).max() < 0.5 * logits[0].std()
    with pytest.raises(UserError, match="nowhere"):
        cxr_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="tokenizer"):
        model.generate([None], ["x"])
