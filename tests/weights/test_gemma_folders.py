"""Folders of Gemma 3: all layouts in circulation are one model, and come back bit for bit; others are one line."""

import json
import re
import subprocess

import cases_gemma3 as cases
import gemma_tokenizer
import ml_dtypes
import numpy as np
import pytest
from convert_calls import call, refuses
from golden_cases import entries
from places import ORACLE, ORACLE_PYTHON, ROOT

import cxr_jax
from cxr_jax.models import lora, registry
from cxr_jax.models.gemma3 import hf_table
from cxr_jax.runtime.trees import flatten
from cxr_jax.weights import hf_folder, peft_folder
from cxr_jax.weights.safetensors_file import Tensors, write_folder

SEEDS = (2, 27, 107)  # several images, layers of both kinds; ten layers; tied and not


def arrays_of(case, dtype=np.float32):
    return {key: value.astype(dtype) for key, value in cases.weights(case).items()}


def write(folder, case, layout="published", arrays=None, shard_gb=5.0, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**case.config, **changes}))
    arrays = arrays_of(case) if arrays is None else arrays
    write_folder(folder, entries(arrays, lambda key: cases.stored_key(key, layout)), shard_gb)
    return folder


def stored(folder):
    """Published key -> (type, bytes), of a folder that is in the published layout."""
    tensors = Tensors(folder, str)
    return {k: (tensors.dtype(k), np.array(tensors[k]).tobytes()) for k in tensors.stored}


@pytest.mark.parametrize("seed", SEEDS)
def test_layouts_are_one_model(tmp_path, seed):
    case = cases.draw(seed)
    loaded = [
        hf_folder.load(write(tmp_path / str(number), case, layout))
        for number, layout in enumerate(cases.LAYOUTS)
    ]
    # As a LoRA module's base or in a trainer's wrapper, too.
    wrapped = tmp_path / "wrapped"
    write(wrapped, case, arrays={})
    named = {f"base_model.model.{cases.stored_key(k, 'transformers 5')}" for k in arrays_of(case)}
    assert {hf_table.canonical_key(key) for key in named} == set(arrays_of(case))
    (config, params), *others = loaded
    for other_config, other_params in others:
        assert other_config == config
        for (path, mine), (other_path, theirs) in zip(
            flatten(params), flatten(other_params), strict=True
        ):
            assert path == other_path and np.array_equal(mine, theirs)
    # The one matrix that is stored as [in, out].
    key = "multi_modal_projector.mm_input_projection_weight"
    assert np.array_equal(params["vision"]["merger"]["proj"]["kernel"], arrays_of(case)[key])


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back_bit_for_bit(tmp_path, layout, dtype):
    case = cases.draw(SEEDS[0])
    arrays = arrays_of(case, dtype)
    if "lm_head.weight" not in arrays:  # a tied head may be stored once more
        arrays["lm_head.weight"] = arrays["language_model.model.embed_tokens.weight"]
    source = write(tmp_path / "source", case, layout, arrays, shard_gb=1e-4)
    assert call("from-hf", source, tmp_path / "ours") == 0
    assert call("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    want = {key: (value.dtype, value.tobytes()) for key, value in arrays.items()}
    assert stored(tmp_path / "back") == want
    processor = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert processor["image_seq_length"] == case.config["mm_tokens_per_image"]
    again = hf_folder.read_config(tmp_path / "back")
    assert again == hf_folder.read_config(source)


def test_a_head_of_the_tower_and_quantized_weights_are_one_line(tmp_path, capsys):
    case = cases.draw(SEEDS[0])
    with_head = arrays_of(case) | {"vision_tower.vision_model.head.probe": np.zeros(3, np.float32)}
    source = write(tmp_path / "head", case, arrays=with_head)
    message = "unexpected: vision_tower.vision_model.head.probe"
    refuses(tmp_path, capsys, ["from-hf", source, tmp_path / "x"], message)
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    source = write(tmp_path / "quantized", case, **quantized)
    refuses(tmp_path, capsys, ["from-hf", source, tmp_path / "x"], "bitsandbytes")
    source = write(tmp_path / "text", case, model_type="gemma3_text")
    refuses(tmp_path, capsys, ["from-hf", source, tmp_path / "x"], "'gemma3_text' is not")


# ---- Adapters ------------------------------------------------------------------------------------------------


def adapters_of(config):
    settings = lora.Lora(3, 6.0, ("decoder", "vision"))
    params = registry.family_of(config).parameter_shapes(config)
    rng = np.random.default_rng(0)
    adapters = {}
    for path in settings.paths_in(lora.modules_of(as_tree(params))):
        *_, fan_in, fan_out = params[(*path.split("/"), "kernel")]
        count = params[(*path.split("/"), "kernel")][:-2]
        node = adapters
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node["a"] = rng.standard_normal((*count, fan_in, 3)).astype(np.float32)
        node["b"] = rng.standard_normal((*count, 3, fan_out)).astype(np.float32) / 9
    return adapters, settings


def as_tree(shapes):
    tree = {}
    for path, shape in shapes.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.zeros(shape, np.float32)
    return tree


def test_names_of_adapters_are_those_of_transformers(tmp_path):
    case = cases.draw(SEEDS[0])
    config = registry.read_config(case.config)
    adapters, settings = adapters_of(config)
    folder = tmp_path / "adapter"
    peft_folder.save(folder, config, adapters, settings, "base")
    saved = json.loads((folder / "adapter_config.json").read_text())
    keys = Tensors(folder, str, "adapter_model.safetensors").stored
    names = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in keys}
    # The modules of transformers 5, from the table of the oracle.
    linear = {
        cases.stored_key(key, "transformers 5").removesuffix(".weight")
        for key, shape in cases.shapes(case).items()
        if len(shape) == 2 and "_proj." in key or ".fc" in key and len(shape) == 2
    }
    assert names == linear
    assert all(re.fullmatch(saved["target_modules"], name) for name in names)
    loaded, read = peft_folder.load(folder, config)
    assert read == settings
    for (path, mine), (other, theirs) in zip(flatten(loaded), flatten(adapters), strict=True):
        assert path == other and np.array_equal(mine, theirs)


# ---- transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{seed: (case, folder, what loading said)}, all of one process of transformers."""
    made, arguments = {}, []
    for seed in SEEDS:
        case, folder = cases.draw(seed), tmp_path_factory.mktemp("export")
        config, params = hf_folder.load(write(folder / "source", case))
        hf_folder.save(folder / "hf", config, params, tokenizer=gemma_tokenizer.folder())
        given = dict(input_ids=case.input_ids, attention_mask=shown(case), grids=case.grids)
        np.savez(folder / "in.npz", pixels=case.images(), **given)
        arguments += [folder / "hf", folder / "in.npz", folder / "out.npz"]
        made[seed] = case, folder
    command = [ORACLE_PYTHON, ROOT / "tests/oracle/load_export.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {seed: (*made[seed], said) for seed, said in zip(SEEDS, lines, strict=True)}


def shown(case):
    return np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE_PYTHON.exists(), reason="needs .venv-oracle")
@pytest.mark.parametrize("seed", SEEDS)
def test_transformers_loads_an_export_without_a_warning(exports, seed):
    case, folder, said = exports[seed]
    assert not any(said[k] for k in said if k.endswith("_keys") or k == "error_msgs"), said
    theirs, mask = np.load(folder / "out.npz")["logits"], shown(case).astype(bool)
    images = (case.pixel_values, case.grids) if len(case.grids) else (None, None)
    mine = cxr_jax.load(folder / "hf").logits(case.input_ids, *images, shown(case))
    assert np.abs(theirs - mine)[mask].max() <= 1e-4 * theirs[mask].std()


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE_PYTHON.exists(), reason="needs .venv-oracle")
def test_peft_takes_our_adapters(tmp_path):
    case = cases.draw(SEEDS[0])
    config, params = hf_folder.load(write(tmp_path / "source", case))
    adapters, settings = adapters_of(config)
    peft_folder.save(tmp_path / "adapter", config, adapters, settings, "base")
    script = ORACLE / "peft_check.py"
    command = [ORACLE_PYTHON, script, str(SEEDS[0]), tmp_path / "adapter", tmp_path / "out"]
    done = subprocess.run([*command, "gemma3"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not said["warned"] and not said["lacked"] and not said["not_taken"], said
    theirs = np.load(tmp_path / "out" / "ours.npz")["logits"]
    peft_folder.merge(params, adapters, settings)
    merged = cxr_jax.inference.model.Model(config, params)
    images = (case.pixel_values, case.grids) if len(case.grids) else (None, None)
    mask = np.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    mine = merged.logits(case.input_ids, *images, mask)
    shown = mask.astype(bool)
    assert np.abs(theirs - mine)[shown].max() <= 1e-4 * theirs[shown].std()
