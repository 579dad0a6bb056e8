"""Quantized folders, as they are published: one line that names quantization_config, at every door, before weights."""

import json
import shutil
from pathlib import Path

import golden_cases
import numpy as np
import pytest

import cxr_jax
from cxr_jax import convert
from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.planning import programs
from cxr_jax.weights import hf_folder, pretrained, quantization
from cxr_jax.weights.safetensors_file import TensorToWrite, write_safetensors

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
BITSANDBYTES = {
    "_load_in_4bit": True,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "llm_int8_skip_modules": ["lm_head", "visual"],
    "quant_method": "bitsandbytes",
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["re:.*visual.*"],
}
# What stands in config.json -> what the line says beside quantization_config.
DECLARED = {
    "AWQ": ({"quantization_config": {**AWQ, "modules_to_not_convert": ["visual"]}}, "awq, 4 bits"),
    "GPTQ": ({"quantization_config": GPTQ}, "gptq, 4 bits"),
    "bitsandbytes 4 bit": ({"quantization_config": BITSANDBYTES}, "bitsandbytes, 4 bits"),
    "bitsandbytes 8 bit": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "bitsandbytes",
    ),
    "FP8": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "fp8",
    ),
    "compressed-tensors": ({"quantization_config": COMPRESSED}, "compressed-tensors"),
    "compressed-tensors of before": ({"compression_config": COMPRESSED}, "compression_config"),
    "ModelOpt": ({"quantization_config": {"quant_algo": "FP8", "producer": {}}}, "FP8"),
    "nested": ({"text_config": {"quantization_config": GPTQ}}, "text_config.quantization_config"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
    "no method": ({"quantization_config": {"bits": 3}}, "3 bits"),
    "bits of a group": (
        {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}},
        "quantization_config",
    ),
    "no object": ({"quantization_config": "awq"}, "quantization_config"),
}


@pytest.fixture
def folder(tmp_path):
    """A folder whose weights are not touched: what refuses it must not need them."""
    folder = golden_cases.write_folder(tmp_path / "model", "even", hf_table.canonical_key)
    for file in pretrained.asset("phantom").glob("*token*"):
        shutil.copy(file, folder)
    (folder / "model.safetensors").write_bytes(b"never read")
    return folder


def declare(folder, settings):
    parsed = json.loads((folder / "config.json").read_text())
    nested = {**parsed, **settings.pop("text_config")} if "text_config" in settings else None
    parsed |= settings
    (folder / "config.json").write_text(
        json.dumps(parsed if nested is None else {**parsed, "text_config": nested})
    )


@pytest.mark.parametrize("kind", DECLARED)
def test_quantized_folder_is_refused_by_its_config(folder, capsys, kind):
    settings, words = DECLARED[kind]
    declare(folder, dict(settings))
    doors = {
        "load, predict, evaluate": lambda: cxr_jax.load(folder),
        "train, --dry_run": lambda: pretrained.check_model(str(folder)),
        "plan": lambda: programs.read_model(str(folder)),
        "base of an adapter, arrays": lambda: hf_folder.load(folder),
    }
    for door, enter in doors.items():
        with pytest.raises(UserError) as refusal:
            enter()
        line = str(refusal.value)
        assert "quantization_config" in line and words in line and str(folder) in line, (door, line)
        assert "\n" not in line and "missing" not in line and len(line) < 300
    assert convert.main(["from-hf", str(folder), str(folder.parent / "ours")]) == 2
    said = capsys.readouterr().err
    assert "quantization_config" in said and said.count("\n") == 1
    assert not (folder.parent / "ours").exists()


FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@pytest.mark.parametrize("name", FILES)
def test_quantized_folder_is_refused_by_a_file_beside_its_config(folder, name):
    (folder / name).write_text(json.dumps({"bits": 4, "group_size": 128}))
    refusal = rf"{name} says what quantization_config says"
    layer = "model.layers.0.mlp.up_proj."
    weights = folder / "model.safetensors"

    def write(**tensors):
        entries = [
            TensorToWrite(layer + key, a.shape, a.dtype, lambda a=a: a)
            for key, a in tensors.items()
        ]
        write_safetensors(weights, entries)

    # Nobody can look into the weights: bytes of another format, a name of their own.
    with pytest.raises(UserError, match=refusal):
        pretrained.check_model(str(folder))
    weights.rename(folder / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(UserError, match=refusal):
        pretrained.check_model(str(folder))
    packed = np.zeros((4, 4), np.int8)
    for tensors in (
        {"qweight": packed},
        {"weight": packed, "scales": packed},
        {"weight_scale_inv": packed},
    ):
        write(**tensors)
        with pytest.raises(UserError, match=refusal):
            pretrained.check_model(str(folder))
    weights.unlink()
    index = {"weight_map": {layer + "weight_packed": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=refusal):
        pretrained.check_model(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_leftover_file_over_plain_weights_is_no_quantization(tmp_path, name):
    folder = golden_cases.write_folder(tmp_path / "model", "even", hf_table.canonical_key)
    (folder / name).write_text(json.dumps(GPTQ))
    hf_folder.load(folder)
    pretrained.check_model(str(folder))
    # Shards that are away are told as such.
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-2.safetensors is missing"):
        hf_folder.load(folder)


@pytest.mark.parametrize(
    "ending",
    [
        "qweight",
        "weight_packed",
        "weight_scale",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "SCB",
    ],
)
def test_quantized_folder_is_refused_by_its_tensors(tmp_path, ending):
    folder = golden_cases.write_folder(tmp_path / "model", "even", hf_table.canonical_key)
    weights = dict(golden_cases.case("even")["weights"])
    layer = "model.layers.0.mlp.up_proj."
    del weights[next(key for key in weights if hf_table.canonical_key(key) == layer + "weight")]
    weights[layer + ending] = np.zeros((8, 8), np.uint8)
    write_safetensors(
        folder / "model.safetensors", golden_cases.entries(weights, hf_table.canonical_key)
    )
    with pytest.raises(
        UserError, match=rf"up_proj\.{ending} is of quantized weights.* no quantization_config"
    ):
        hf_folder.load(folder)


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {},
        False,
        "none",
        {"quant_method": None, "load_in_4bit": False, "llm_int8_threshold": 6.0},
        {"quant_method": "none", "bits": 0, "modules_to_not_convert": ["visual"]},
        {"group_size": 128, "desc_act": False},
        {"quant_method": "", "config_groups": {"group_0": {"weights": {"num_bits": None}}}},
    ],
)
def test_a_quantization_config_of_nothing_is_no_quantization(tmp_path, nothing):
    folder = golden_cases.write_folder(tmp_path / "model", "even", hf_table.canonical_key)
    declare(folder, {"quantization_config": nothing})
    hf_folder.load(folder)


@pytest.mark.parametrize("nothing", ["none", {"bits": None, "group_size": 128}])
def test_another_key_of_nothing_is_no_quantization(nothing):
    quantization.refuse(Path("model"), {"quantization": nothing})
    with pytest.raises(UserError, match="quantization_config"):
        quantization.refuse(Path("model"), {"quantization": {"bits": 4}})
