"""Folders of adapters: PEFT's format, as we write it, as others do, and what is refused."""

import dataclasses
import json
import re
import subprocess

import cases
import golden_cases
import jax
import lora_model
import ml_dtypes
import numpy as np
import pytest
from lora_model import ALL, CFG, flat, noise, same, shapes_of
from places import ORACLE, ORACLE_PYTHON

import cxr_jax
from cxr_jax import convert
from cxr_jax.errors import UserError
from cxr_jax.inference import model as inference_model
from cxr_jax.models import lora, registry
from cxr_jax.models.lora import Lora
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.weights import hf_folder, peft_folder
from cxr_jax.weights.safetensors_file import Tensors, write_safetensors


@pytest.fixture(scope="module")
def params():
    return lora_model.params()


@pytest.fixture(scope="module")
def adapters():
    return lora_model.adapters()


# --- PEFT's format -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "ours"
    peft_folder.save(folder, CFG, adapters, ALL, "nvidia/some-model")
    return folder


def stored(folder) -> dict:
    path = folder / "adapter_model.safetensors"
    return {k: np.array(x) for k, x in _tensors(path).items()}


def _tensors(path) -> dict:
    found = Tensors(path.parent, file_name=path.name)
    return {k: found[k] for k in found.stored}


def written(folder, tensors: dict, settings: dict):
    """A PEFT folder of these."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_safetensors(folder / "adapter_model.safetensors", golden_cases.entries(tensors))
    return folder


def settings_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_export_and_import_bit_for_bit(adapters, exported, tmp_path):
    found, same_lora = peft_folder.load(exported, CFG)
    same(found, adapters)
    assert same_lora == ALL
    one = Lora(3, 1.5, ("text/layers/mlp/gate", "vision/merger/fc1"))
    own = {
        "text": {"layers": {"mlp": {"gate": adapters["text"]["layers"]["mlp"]["gate"]}}},
        "vision": {"merger": {"fc1": adapters["vision"]["merger"]["fc1"]}},
    }
    own = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), own)
    peft_folder.save(tmp_path / "one", CFG, own, one, "x")
    assert {x.dtype for x in stored(tmp_path / "one").values()} == {np.dtype(ml_dtypes.bfloat16)}
    found, same_lora = peft_folder.load(tmp_path / "one", CFG)
    same(found, jax.tree.map(lambda x: x.astype(np.float32), own))
    assert same_lora == one
    with pytest.raises(ValueError, match="not those of"):
        peft_folder.save(tmp_path / "bad", CFG, own, ALL, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_model_with_an_adapter_folder(params, adapters, exported, tmp_path, capsys):
    """Read with adapters, and converted with them: both are the merged model. A foreign folder is one line."""
    base = tmp_path / "base"
    hf_folder.save(base, CFG, params)
    want = lora.merge(params, adapters, ALL)
    same(cxr_jax.load(base, adapter=exported).params, want)
    assert (
        convert.main(["from-hf", str(base), str(tmp_path / "merged"), "--adapter", str(exported)])
        == 0
    )
    same(cxr_jax.load(tmp_path / "merged").params, want)
    capsys.readouterr()
    huge = tmp_path / "huge"
    peft_folder.save(huge, CFG, adapters, dataclasses.replace(ALL, alpha=1e300), "base")
    for args, line in (
        (["from-hf", base, tmp_path / "x", "--adapter", tmp_path / "none"], "none"),
        (["from-hf", base, tmp_path / "x", "--adapter", huge], "is infinite or NaN with them"),
        (["to-hf", tmp_path / "merged", tmp_path / "x", "--adapter", exported], "--adapter is for"),
    ):
        assert convert.main([str(a) for a in args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err
        assert not (tmp_path / "x").exists()


def test_names_are_those_of_transformers(exported):
    tensors, pattern = stored(exported), settings_of(exported)["target_modules"]
    q = tensors["base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"]
    assert q.shape == (3, 32)
    assert tensors["base_model.model.model.visual.merger.mlp.2.lora_B.weight"].shape == (32, 3)
    assert len(tensors) == 2 * (2 * 7 + 2 * 5 + 2)
    targeted = {k.split(".lora_")[0].removeprefix("base_model.model.") for k in tensors}
    parts = [cases.nested_key(r.key).split(".") for r in hf_table.rules(CFG)]
    modules = {".".join(x[:n]) for x in parts for n in range(1, len(x))} | {
        "lm_head",
        "model.visual.merger.mlp.1",
    }
    assert {name for name in modules if re.fullmatch(pattern, name)} == targeted


def old_names(key: str) -> str:
    return key.replace("model.model.visual.", "model.visual.").replace(
        "model.language_model.", "model."
    )


LIST = ["q_proj", "v_proj", "mlp.0"]


@pytest.mark.parametrize("rename", [str, old_names], ids=["new", "old"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_others_write(adapters, exported, tmp_path, rename, dtype):
    """Targets by suffix, one layer only, rsLoRA, either naming, any stored type."""
    layered = lambda k: "layers.1." in k and any(f".{x}.lora" in k for x in LIST)
    kept = {rename(k): x.astype(dtype) for k, x in stored(exported).items() if layered(k)}
    folder = written(
        tmp_path / "theirs",
        kept,
        settings_of(exported)
        | {
            "target_modules": LIST,
            "layers_to_transform": [1],
            "use_rslora": True,
            "loftq_config": {},
            "exclude_modules": r".*visual.*",
            "qalora_group_size": 16,
            "megatron_core": "megatron.core",
        },
    )
    found, own = peft_folder.load(folder, CFG)
    assert own.targets == ("text/layers/attn/q", "text/layers/attn/v") and own.rank == 3
    assert own.scale == pytest.approx(6.0 / 3**0.5, rel=1e-12)
    assert flat(found).keys() == {f"text/layers/attn/{x}/{half}" for x in "qv" for half in "ab"}
    for name, x in flat(found).items():
        want = flat(adapters)[name].astype(dtype).astype(np.float32)
        assert x.dtype == np.float32 and not x[0].any()
        np.testing.assert_array_equal(x[1], want[1])


Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"


REFUSED = {
    "another method": (lambda s, t: s.update(peft_type="IA3"), "peft_type is IA3"),
    "DoRA": (lambda s, t: s.update(use_dora=True), "use_dora is not supported"),
    "ranks by pattern": (lambda s, t: s.update(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "alphas by pattern": (lambda s, t: s.update(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "whole modules": (lambda s, t: s.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda s, t: s.update(bias="all"), "bias is all"),
    "transposed": (lambda s, t: s.update(fan_in_fan_out=True), "fan_in_fan_out"),
    "a feature to come": (lambda s, t: s.update(new_trick={"x": 1}), "new_trick is not supported"),
    "another base": (lambda s, t: s.update(init_lora_weights="pissa"), "pissa changes the base"),
    "rank 0": (lambda s, t: s.update(r=0), "rank must be"),
    "no rank": (lambda s, t: s.pop("r"), "rank must be"),
    "another rank": (lambda s, t: s.update(r=4), r"is \[3, 16\]; model and rank need \[4, 16\]"),
    "no alpha": (lambda s, t: s.update(lora_alpha=None), "alpha must be"),
    "no targets": (lambda s, t: s.pop("target_modules"), "target_modules is not of its type"),
    "layers of no type": (
        lambda s, t: s.update(layers_to_transform=[1.5]),
        "layers_to_transform is not of its type",
    ),
    "no match": (lambda s, t: s.update(target_modules=["query"]), "match no module"),
    "no pattern": (lambda s, t: s.update(target_modules="(q_proj"), "not a regular expression"),
    "outside the table": (
        lambda s, t: s.update(target_modules=["q_proj", "embed_tokens"]),
        "embed_tokens cannot",
    ),
    "fewer targets": (
        lambda s, t: s.update(target_modules=["q_proj"]),
        "unexpected: .* and [0-9]+ more",
    ),
    "a tensor missing": (
        lambda s, t: t.pop(Q),
        "missing: model.layers.1.self_attn.q_proj.lora_A.weight",
    ),
    "a tensor too many": (lambda s, t: t.update({Q + "s": t[Q]}), "unexpected: .*weights"),
    "a foreign name": (
        lambda s, t: t.update(extra=t[Q]),
        "extra does not begin with base_model.model.",
    ),
    "a shape": (lambda s, t: t.update({Q: t[Q][:, :-1]}), "q_proj.lora_A.weight is"),
    "a type": (lambda s, t: t.update({Q: t[Q].astype(np.int8)}), "is I8"),
    "not a number": (lambda s, t: t.update({Q: t[Q] * np.float32(np.nan)}), "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(exported, tmp_path, name):
    change, message = REFUSED[name]
    settings, tensors = settings_of(exported), stored(exported)
    change(settings, tensors)
    with pytest.raises(UserError, match=message) as e:
        peft_folder.load(written(tmp_path / "bad", tensors, settings), CFG)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_damaged_files(exported, tmp_path):
    folder = written(tmp_path / "bad", stored(exported), settings_of(exported))
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for bad in (b"", data[:100], data[:-1], data + b"x"):
        weights.write_bytes(bad)
        with pytest.raises(UserError, match="adapter_model.safetensors"):
            peft_folder.load(folder, CFG)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle file"):
        peft_folder.load(folder, CFG)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        peft_folder.load(folder, CFG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        peft_folder.load(folder, CFG)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no adapter_config.json"):
        peft_folder.load(folder, CFG)


# Several images and padding, several layers in both parts, an untied head; of Qwen3-VL, two taps.
@pytest.mark.parametrize("family, seed", [("qwen2_5_vl", 342), ("qwen3_vl", 83)])
def test_peft_and_we_read_each_other(tmp_path, family, seed):
    if not ORACLE_PYTHON.exists():
        pytest.skip(
            "no .venv-oracle (torch, transformers and peft): `bash launch/test.sh` makes it"
        )
    case, model = cases.draw(seed, family), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(case.config))
    write_safetensors(model / "model.safetensors", golden_cases.entries(cases.weights(case)))
    model_config, params = hf_folder.load(model)
    own = Lora(4, 6.0, ("decoder", "vision", "merger"))
    adapters = noise(shapes_of(model_config, own)[1], 0)
    peft_folder.save(tmp_path / "ours", model_config, adapters, own, "base")
    command = [
        ORACLE_PYTHON,
        ORACLE / "peft_check.py",
        str(seed),
        tmp_path / "ours",
        tmp_path / "out",
        family,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        args = (case.input_ids, case.pixel_values, case.grids, case.attention_mask)
        with_ours = inference_model.Model(model_config, lora.join(params, adapters, own)).logits(
            *args
        )
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out) == {"lacked": [], "not_taken": [], "warned": []}
    theirs, shown = (
        np.load(tmp_path / "out" / "ours.npz")["logits"],
        case.attention_mask.astype(bool),
    )
    assert np.abs(with_ours - theirs)[shown].max() <= 1e-4 * theirs[shown].std()

    found, their_lora = peft_folder.load(tmp_path / "out" / "theirs", model_config)
    assert their_lora == Lora(3, 5, ("text/layers/attn/q", "text/layers/attn/v"))
    merged = flat(lora.merge(params, found, their_lora))
    want = np.load(tmp_path / "out" / "theirs.npz")
    for rule in registry.family_of(model_config).tensor_rules(model_config):
        x = merged["/".join(rule.path)]
        np.testing.assert_allclose(
            rule.to_hf(x if rule.layer is None else x[rule.layer]),
            want[rule.key],
            atol=1e-6,
            rtol=1e-6,
        )
    before = flat(params)
    changed = {name for name in merged if (merged[name] != before[name]).any()}
    assert changed == {f"text/layers/attn/{x}/kernel" for x in "qv"}
