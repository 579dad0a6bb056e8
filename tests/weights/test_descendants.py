"""Folders of Qwen2.5-VL's descendants as other tools save them: read as the same model, or refused in one line."""

import copy
import dataclasses
import json

import golden_cases
import numpy as np
import pytest
from convert_calls import call, refuses
from golden_cases import entries

from cxr_jax.errors import UserError
from cxr_jax.models.qwen2_5_vl import hf_table
from cxr_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, QWEN2_5_VL_7B, read_config, write_config
from cxr_jax.weights import hf_folder, locate, pretrained
from cxr_jax.weights.safetensors_file import write_folder, write_safetensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def parts_of(case):
    """(config.json in the flat layout of transformers 4.49, published key -> array)."""
    c = golden_cases.case(case)
    config = write_config(read_config(c["config"]))
    return config, {hf_table.canonical_key(key): value for key, value in c["weights"].items()}


def write(folder, config, arrays, rename=str, shard_gb=5.0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_folder(folder, entries(arrays, rename), shard_gb)
    return folder


def check_same(folder, case):
    """The folder is read as the case's config and parameters, bit for bit."""
    config, arrays = parts_of(case)
    model_config, params = hf_folder.load(folder)
    assert model_config == read_config(config)
    for rule in hf_table.rules(model_config):
        leaf = params
        for name in rule.path:
            leaf = leaf[name]
        stored = leaf if rule.layer is None else leaf[rule.layer]
        np.testing.assert_array_equal(rule.to_hf(np.asarray(stored)), arrays[rule.key])


# ---- Keys ----------------------------------------------------------------------------------------------------


def layout(visual, decoder, head="lm_head."):
    """A function from the published key to that of a layout, by what stands in place of each part's front."""
    fronts = {"visual.": visual, "model.": decoder, "lm_head.": head}
    return lambda key: next(
        new + key[len(old) :] for old, new in fronts.items() if key.startswith(old)
    )


LAYOUTS = {
    "published, transformers 4.49": layout("visual.", "model."),
    "transformers 4.52 and later": layout("model.visual.", "model.language_model."),
    "language_model.model": layout("visual.", "language_model.model.", "language_model.lm_head."),
    "language_model.model, head outside": layout("visual.", "language_model.model."),
    "nested twice": layout("model.visual.", "model.language_model.model."),
    "tower and decoder alone": layout("visual.", "language_model."),
}
WRAPPERS = {
    "none": str,
    "PEFT": "base_model.model.{}".format,
    "PEFT, short": "base_model.{}".format,
    "DDP": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "FSDP": "_fsdp_wrapped_module.{}".format,
    "DDP around PEFT": "module.base_model.model.{}".format,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_descendant_of_any_key_layout_is_the_same_model(tmp_path, name, wrapper):
    config, arrays = parts_of("ragged")
    rename = lambda key: WRAPPERS[wrapper](LAYOUTS[name](key))
    check_same(write(tmp_path / "model", config, arrays, rename), "ragged")


@pytest.mark.parametrize("shard_gb", [5.0, 1e-4])
@pytest.mark.parametrize("stored_as", ["embedding", "head", "both"])
@pytest.mark.parametrize("name", [*LAYOUTS][1:4])
def test_descendant_with_tied_weights_is_the_same_model(tmp_path, name, stored_as, shard_gb):
    config, arrays = parts_of("even")
    embedding = arrays.pop(EMBEDDING)
    if stored_as != "embedding":
        arrays[HEAD] = embedding
    if stored_as != "head":
        arrays[EMBEDDING] = embedding
    rename = lambda key: f"base_model.model.{LAYOUTS[name](key)}"
    check_same(write(tmp_path / "model", config, arrays, rename, shard_gb), "even")


def test_descendant_saved_with_its_merged_lora_modules_is_the_same_model(tmp_path):
    """What PEFT's wrapped model saves after merge_adapter, without the adapters: `base_layer` amid the names."""
    config, arrays = parts_of("ragged")

    def wrapped(key):
        for module in ("q_proj", "v_proj", "down_proj", "attn.qkv"):
            key = key.replace(f".{module}.", f".{module}.base_layer.")
        return f"base_model.model.{key}"

    check_same(write(tmp_path / "model", config, arrays, wrapped), "ragged")


BUFFERS = (
    "model.rotary_emb.inv_freq",
    "model.language_model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "language_model.model.layers.1.self_attn.rotary_emb.cos_cached",
    "visual.rotary_pos_emb.inv_freq",
    "model.visual.rotary_pos_emb.inv_freq",
    "base_model.model.visual.rotary_pos_emb.inv_freq",
)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_descendant_with_saved_rotary_tables_is_the_same_model(tmp_path, buffer):
    config, arrays = parts_of("ragged")
    arrays[buffer] = np.ones(8, np.float32)
    write(tmp_path / "model", config, arrays, shard_gb=1e-4)
    check_same(tmp_path / "model", "ragged")
    assert call("from-hf", tmp_path / "model", tmp_path / "ours") == 0


TRAINERS = {
    "ms-swift": {
        "args.json": {"model_type": "qwen2_5_vl", "tuner_type": "full", "quant_method": None},
        "additional_config.json": {"lora_dtype": None, "lorap_lr_ratio": None},
    },
    "LLaMA-Factory": {
        "all_results.json": {"train_loss": 0.5},
        "trainer_state.json": {"global_step": 10},
        "trainer_log.jsonl": {"loss": 1},
        "llamaboard_config.yaml": {},
    },
    "transformers": {
        "trainer_state.json": {"log_history": []},
        "video_preprocessor_config.json": {},
    },
}
STATES = ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "latest")


@pytest.mark.parametrize("name", TRAINERS)
def test_descendant_among_files_of_its_trainer_is_the_same_model(tmp_path, name):
    folder = write(tmp_path / "model", *parts_of("ragged"), LAYOUTS["transformers 4.52 and later"])
    for file, content in TRAINERS[name].items():
        (folder / file).write_text(json.dumps(content))
    for file in STATES:
        (folder / file).write_bytes(b"\x80\x02}q\x00.")
    for shard in (
        "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "optimizer_0/__0_0.distcp",
    ):
        (folder / shard).parent.mkdir()
        (folder / shard).write_bytes(b"\x80\x02}q\x00.")
    write_safetensors(
        folder / "optimizer.safetensors", entries({"exp_avg": np.ones(3, np.float32)})
    )
    assert locate.find_folder(folder) == folder
    pretrained.check_weights(str(folder))
    check_same(folder, "ragged")


# ---- config.json ---------------------------------------------------------------------------------------------

_TEXT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps "
    "max_position_embeddings hidden_act use_sliding_window rope_theta rope_scaling"
).split()


def nested(config, keep_flat=False):
    """As transformers 4.52 and later write it; `keep_flat`: as some of them do, beside the flat keys."""
    text = copy.deepcopy({key: config[key] for key in _TEXT}) | {"model_type": "qwen2_5_vl_text"}
    text |= {
        "image_token_id": None,
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
    }
    rest = config if keep_flat else {key: config[key] for key in config.keys() - set(_TEXT)}
    return {**rest, "text_config": text, "dtype": "bfloat16"}


def with_rope(**rope):
    def change(config):
        section = config["rope_scaling"]["mrope_section"]
        return {**config, "rope_scaling": {"mrope_section": section, **rope}}

    return change


def rope_of_5(config):
    """transformers 5: one dict, the base in it."""
    config = nested(config)
    text = config["text_config"]
    rope = {
        **text.pop("rope_scaling"),
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
    }
    rope.pop("type")
    text["rope_parameters"] = rope
    config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    config["vision_config"]["model_type"] = "qwen2_5_vl_vision"
    return config


def in_vision(drop=(), **values):
    def change(config):
        vision = {key: value for key, value in config["vision_config"].items() if key not in drop}
        return {**config, "vision_config": {**vision, **values}}

    return change


def same_for_others(config):
    """Keys that descendants have and that change nothing."""
    more = dict(torch_dtype="bfloat16", dtype="bfloat16", auto_map=None, sliding_window=32768)
    more |= dict(
        max_window_layers=70, vision_token_id=151654, quantization_config=None, head_dim=None
    )
    more |= dict(num_experts=0, use_sliding_window=None, rope_parameters=None)
    return {**config, **more, "transformers_version": "4.51.3"}


FORMS = {
    "flat": dict,
    "flat, many more keys": same_for_others,
    "nested": nested,
    "nested beside flat": lambda config: nested(config, keep_flat=True),
    "nested, rope_parameters": rope_of_5,
    "mrope": with_rope(type="mrope"),
    "default": with_rope(type="default"),
    "both names": with_rope(type="default", rope_type="default"),
    "both names, one null": with_rope(type="mrope", rope_type=None),
    "both names, mixed": with_rope(type="mrope", rope_type="default"),
    "new name": with_rope(rope_type="mrope"),
    "no name": with_rope(),
    "in_chans": in_vision(drop=["in_channels"], in_chans=3),
    "in_channels": in_vision(drop=["in_chans"], in_channels=3),
    "null in_channels": in_vision(in_channels=None, in_chans=3),
    "no channels": in_vision(drop=["in_channels", "in_chans"]),
    "nulls": in_vision(hidden_act=None, temporal_patch_size=None, rope_parameters=None),
    "patch sizes as lists": in_vision(temporal_patch_size=[2]),
}


@pytest.mark.parametrize("case", ["ragged", "even"])
@pytest.mark.parametrize("form", FORMS)
def test_descendant_of_any_form_of_config_is_the_same_model(tmp_path, form, case):
    config, arrays = parts_of(case)
    changed = FORMS[form](copy.deepcopy(config))
    check_same(write(tmp_path / "model", changed, arrays), case)


def test_forms_of_config_mean_to_transformers_what_they_mean_here():
    """But for nulls, which its strict classes refuse, and lists, which it keeps."""
    from transformers import Qwen2_5_VLConfig

    for form in FORMS.keys() - {"null in_channels", "nulls", "patch sizes as lists"}:
        config = FORMS[form](parts_of("ragged")[0])
        ours = read_config(copy.deepcopy(config))
        theirs = Qwen2_5_VLConfig.from_dict(config)
        rope = theirs.text_config.rope_parameters
        assert rope["rope_type"] in ("default", None), form
        for part, same in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
            read = {name: getattr(part, name) for name in vars(part)}
            # What no file tells is the family's own arithmetic: the default.
            told = {f.name: getattr(same, f.name, f.default) for f in dataclasses.fields(part)}
            told["sliding_window"] = read.get("sliding_window")  # not used, see use_sliding_window
            told["rope_theta"] = same.rope_parameters["rope_theta"]
            told["mrope_section"] = rope.get("mrope_section")
            for name, value in read.items():
                assert np.array_equal(told[name], value), (form, name)
        assert theirs.tie_word_embeddings == ours.tie_word_embeddings


@pytest.mark.parametrize("model_config", [QWEN2_5_VL_3B, QWEN2_5_VL_7B])
def test_sizes_of_the_tower_that_saves_of_4_49_leave_out(model_config):
    """transformers 4.49 to 4.51 save of vision_config what differs from its class: not even the depth."""
    config = write_config(model_config)
    vision = {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "spatial_patch_size": 14,
    }
    vision |= {"tokens_per_second": 2, "torch_dtype": "bfloat16"}
    if model_config is QWEN2_5_VL_3B:
        vision["out_hidden_size"] = 2048
    assert read_config({**config, "vision_config": vision}) == model_config


# ---- What is not supported -----------------------------------------------------------------------------------


def at(*path, value):
    def change(config):
        *parents, key = path
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
        return config

    return change


PARAMETERS = {"rope_type": "yarn", "factor": 4.0}
UNSUPPORTED = {
    "yarn": (at("rope_scaling", "type", value="yarn"), r"rope_scaling\.type: rope type 'yarn'"),
    "yarn as rope_type": (
        at("rope_scaling", "rope_type", value="yarn"),
        r"rope_scaling\.rope_type.*'yarn'",
    ),
    "yarn beside default": (
        with_rope(type="yarn", rope_type="default"),
        r"rope_scaling\.type: rope type 'yarn'",
    ),
    "yarn, and default in the newer dict": (
        lambda config: {
            **with_rope(type="yarn")(config),
            "rope_parameters": {"rope_type": "default"},
        },
        r"rope_scaling\.type: rope type 'yarn'",
    ),
    "yarn in the other dict": (
        at("rope_parameters", value=PARAMETERS),
        r"rope_parameters\.rope_type.*'yarn'",
    ),
    "linear": (at("rope_scaling", "type", value="linear"), "'linear'"),
    "longrope": (at("rope_scaling", "type", value="longrope"), "'longrope'"),
    "no text": (at("rope_scaling", "type", value=7), "rope type '7'"),
    "interleaved": (at("rope_scaling", "mrope_interleaved", value=True), "mrope_interleaved True"),
    "rope by layer": (at("rope_parameters", value={"full_attention": {}}), "full_attention"),
    "part of a head": (
        at("rope_parameters", value={"partial_rotary_factor": 0.5}),
        "partial_rotary_factor 0.5",
    ),
    "rope no object": (at("rope_scaling", value=[1]), "rope_scaling is not a JSON object"),
    "two sections": (at("rope_parameters", value={"mrope_section": [8, 0, 0]}), "mrope_section is"),
    "two bases": (
        at("rope_parameters", value={"rope_theta": 5e6}),
        "rope_theta is 5000000.0, and 1000000.0",
    ),
    "part of a head, older place": (
        at("partial_rotary_factor", value=0.5),
        "partial_rotary_factor 0.5",
    ),
    "tower's rope": (
        at("vision_config", "rope_parameters", value=PARAMETERS),
        r"vision_config\.rope_par.*'yarn'",
    ),
    "sliding window": (at("use_sliding_window", value=True), "use_sliding_window True"),
    "sliding layers": (
        at("layer_types", value=["sliding_attention"]),
        "layer_types has sliding_attention",
    ),
    "experts": (at("num_experts", value=64), "num_experts 64"),
    "experts of others": (at("num_local_experts", value=8), "num_local_experts 8"),
    "experts' width": (at("moe_intermediate_size", value=768), "moe_intermediate_size 768"),
    "activation": (at("hidden_act", value="gelu"), "hidden_act 'gelu'"),
    "tower's activation": (
        at("vision_config", "hidden_act", value="quick_gelu"),
        "hidden_act 'quick_gelu'",
    ),
    "head size": (at("head_dim", value=128), "head_dim 128"),
    "MoE by type": (at("model_type", value="qwen3_vl_moe"), "model_type 'qwen3_vl_moe'"),
    "other family": (at("model_type", value="qwen2_vl"), "model_type 'qwen2_vl'"),
    "decoder alone": (at("model_type", value="qwen2_5_vl_text"), "model_type 'qwen2_5_vl_text'"),
    "quantized": (
        at("quantization_config", value={"quant_method": "awq", "bits": 4}),
        "quantization_config.*awq",
    ),
}
_NESTED_TOO = [*UNSUPPORTED][: [*UNSUPPORTED].index("tower's rope")] + [
    "sliding window",
    "sliding layers",
    "experts",
]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_descendant_asks_and_is_not_supported_is_one_line(tmp_path, capsys, name):
    change, message = UNSUPPORTED[name]
    config, arrays = parts_of("ragged")
    folder = write(tmp_path / "model", change(copy.deepcopy(config)), arrays)
    refuses(tmp_path, capsys, ["from-hf", folder, tmp_path / "out"], message)


@pytest.mark.parametrize("place", ["nested", "flat beside nested"])
@pytest.mark.parametrize("name", _NESTED_TOO)
def test_it_is_refused_at_either_level_of_the_config(name, place):
    change, message = UNSUPPORTED[name]
    config = nested(parts_of("ragged")[0], keep_flat=True)
    if place == "nested":
        config["text_config"] = change(config["text_config"])
    else:
        config = change(config)
    with pytest.raises(UserError, match=message) as refused:
        read_config(config)
    assert ("text_config" in str(refused.value)) == (place == "nested")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 5e6),
        ("rms_norm_eps", 1e-3),
        ("num_attention_heads", 2),
        ("mrope_section", [8, 0, 0]),
    ],
)
def test_a_flat_setting_that_the_nested_one_contradicts_is_refused(key, value):
    """Nothing in the weights would show it, and transformers takes the nested one without a word."""
    config = nested(parts_of("ragged")[0], keep_flat=True)
    if key == "mrope_section":
        config["rope_scaling"] = {"type": "mrope", key: value}
    else:
        config[key] = value
    with pytest.raises(UserError, match=f"{key} is .* in text_config"):
        read_config(config)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "an adapter that is not merged"),
        (
            "base_model.model.visual.blocks.0.attn.qkv.lora_B.weight",
            "an adapter that is not merged",
        ),
        ("lm_head.modules_to_save.default.weight", "an adapter that is not merged"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "unexpected: model.layers.0.mlp.experts"),
        ("v_head.summary.weight", "unexpected: v_head.summary.weight"),
        ("language_model.model.norm.weight", "model.norm.weight occurs twice"),
        ("visual.blocks.0.attn.qkv.qweight", "quantized weights"),
    ],
)
def test_tensors_of_a_descendant_that_have_no_place_are_named(tmp_path, capsys, extra, message):
    config, arrays = parts_of("ragged")
    arrays[extra] = np.ones(4, np.float32)
    folder = write(tmp_path / "model", config, arrays)
    refuses(tmp_path, capsys, ["from-hf", folder, tmp_path / "out"], message)


def test_a_folder_of_an_adapter_or_of_a_trainer_alone_says_what_it_is(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    write_safetensors(adapter / "adapter_model.safetensors", entries({"a": np.ones(2, np.float32)}))
    with pytest.raises(UserError, match="an adapter and no model there"):
        locate.find_folder(adapter)
    (adapter / "config.json").write_text(json.dumps(parts_of("ragged")[0]))
    with pytest.raises(UserError, match="adapter_model.safetensors beside it is an adapter"):
        hf_folder.load(adapter)
    states = tmp_path / "states"
    states.mkdir()
    for file in STATES:
        (states / file).write_bytes(b"")
    with pytest.raises(UserError, match="no model there"):
        locate.find_folder(states)
    (states / "config.json").write_text(json.dumps(parts_of("ragged")[0]))
    (states / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="index.json is missing"):
        hf_folder.load(states)


def test_videos_in_ids_are_refused():
    from cxr_jax.inference.requests import check_ids

    config = read_config(parts_of("ragged")[0])
    ids = np.array([[1, 2, config.video_token_id]])
    with pytest.raises(UserError, match=f"video_token_id {config.video_token_id}"):
        check_ids(ids, np.ones_like(ids, bool), config)
    check_ids(ids, np.array([[True, True, False]]), config)  # padding may be any id
