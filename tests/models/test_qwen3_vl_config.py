"""Qwen3-VL's config.json: read in both spellings as transformers reads it, written as it loads it, or refused."""

import copy
import json
import logging

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.models.qwen3_vl import config as qwen3_vl

SIZES = {
    "2b": qwen3_vl.QWEN3_VL_2B,
    "4b": qwen3_vl.QWEN3_VL_4B,
    "8b": qwen3_vl.QWEN3_VL_8B,
    "phantom": qwen3_vl.PHANTOM,
}
# Our field -> transformers' attribute, where they differ.
TEXT = {"head_size": "head_dim", "qkv_bias": "attention_bias", "output_bias": "attention_bias"}
VISION = {"position_table": "num_position_embeddings", "tap_blocks": "deepstack_visual_indexes"}
# What the class of transformers is, whatever the config says.
FIXED = dict(norm="layer", mlp="gelu", patch_bias=True, interpolates_table=True, rotary=True)


def in_spelling_of_5(settings: dict) -> dict:
    settings = copy.deepcopy(settings)
    text = settings["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    settings["vision_config"]["model_type"] = "qwen3_vl_vision"
    settings["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 1e4}
    return settings


def without(part: str, *keys: str):
    def change(settings: dict) -> dict:
        settings = copy.deepcopy(settings)
        for key in keys:
            settings[part].pop(key, None)
        return settings

    return change


def with_value(*path, value):
    def change(settings: dict) -> dict:
        settings = copy.deepcopy(settings)
        place = settings
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
        return settings

    return change


FORMS = {
    "4.57": dict,
    "5": in_spelling_of_5,
    "no theta": without("text_config", "rope_theta"),
    "no rotary settings": without("text_config", "rope_theta", "rope_scaling"),
    "no head size, no eps": without("text_config", "head_dim", "rms_norm_eps"),
    "no positions": without("text_config", "max_position_embeddings", "attention_bias"),
    "tower by defaults": without(
        "vision_config",
        *("depth", "hidden_size", "num_heads", "intermediate_size", "patch_size", "in_channels"),
        *("deepstack_visual_indexes", "num_position_embeddings", "hidden_act"),
        *("spatial_merge_size", "temporal_patch_size"),
    ),
    "key heads as queries": with_value("text_config", "num_key_value_heads", value=None),
    "bias": with_value("text_config", "attention_bias", value=True),
    "not interleaved, which nobody reads": with_value(
        "text_config", "rope_scaling", "mrope_interleaved", value=False
    ),
    "first section, which nobody reads": with_value(
        "text_config", "rope_scaling", "mrope_section", value=[99, 20, 20]
    ),
    "no taps": with_value("vision_config", "deepstack_visual_indexes", value=[]),
    "taps unsorted, one beyond": with_value(
        "vision_config", "deepstack_visual_indexes", value=[17, 2, 40]
    ),
    "tied at both levels": with_value("text_config", "tie_word_embeddings", value=True),
    "another tower's theta": with_value(
        "vision_config", "rope_parameters", value={"rope_type": "axial", "rope_theta": 500.0}
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_every_form_means_to_transformers_what_it_means_here(form, size):
    from transformers import Qwen3VLConfig

    settings = FORMS[form](qwen3_vl.write_config(SIZES[size]))
    ours, theirs = qwen3_vl.read_config(copy.deepcopy(settings)), Qwen3VLConfig.from_dict(settings)
    check_same(ours, theirs)


def check_same(ours, theirs):
    for part, names, same in (
        (ours.text, TEXT, theirs.text_config),
        (ours.vision, VISION, theirs.vision_config),
    ):
        told = {name: getattr(same, names.get(name, name), None) for name in vars(part)}
        told["rope_theta"] = same.rope_parameters["rope_theta"]
        told["mrope_section"] = same.rope_parameters.get("mrope_section", (24, 20, 20))
        for name, value in vars(part).items():
            if told[name] is not None:
                assert np.array_equal(told[name], value), name
    assert {name: getattr(ours.vision, name) for name in FIXED} == FIXED
    assert ours.vision.fullatt_block_indexes is None
    assert ours.text.qk_norm and ours.text.mrope_interleaved and ours.text.norm == "scale"
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    for name in ("image", "video", "vision_start", "vision_end"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_loads_in_transformers_without_a_warning(size, tmp_path, caplog):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(qwen3_vl.write_config(SIZES[size])))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        theirs = AutoConfig.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    check_same(SIZES[size], theirs)
    # And what transformers writes of it reads the same.
    assert qwen3_vl.read_config(json.loads(theirs.to_json_string(use_diff=False))) == SIZES[size]
    assert qwen3_vl.read_config(json.loads(theirs.to_json_string())) == SIZES[size]


REFUSED = {
    "yarn": (
        with_value(
            "text_config",
            "rope_scaling",
            value={"rope_type": "yarn", "factor": 3.0, "mrope_section": [24, 20, 20]},
        ),
        "text_config.rope_scaling.rope_type: rope type 'yarn' is not supported (only 'default')",
    ),
    "mrope": (
        with_value("text_config", "rope_scaling", "type", value="mrope"),
        "text_config.rope_scaling.type: rope type 'mrope' is not supported (only 'default')",
    ),
    "experts": (
        with_value("text_config", "num_experts", value=128),
        "text_config.num_experts 128 is not supported (only dense models)",
    ),
    "experts' own type": (
        with_value("model_type", value="qwen3_vl_moe"),
        "model_type 'qwen3_vl_moe' is not 'qwen3_vl'",
    ),
    "flat": (
        lambda s: {k: v for k, v in s.items() if k != "text_config"},
        "text_config is missing",
    ),
    "activation": (
        with_value("vision_config", "hidden_act", value="gelu"),
        "vision_config.hidden_act 'gelu' is not supported (only 'gelu_pytorch_tanh')",
    ),
    "a block tapped twice": (
        with_value("vision_config", "deepstack_visual_indexes", value=[3, 3]),
        "deepstack_visual_indexes [3, 3] must name blocks, each once",
    ),
    "widths": (
        with_value("vision_config", "out_hidden_size", value=2048),
        "vision_config.out_hidden_size is 2048, and text_config.hidden_size 4096",
    ),
    "tied below alone": (
        lambda s: with_value("text_config", "tie_word_embeddings", value=True)(
            {k: v for k, v in s.items() if k != "tie_word_embeddings"}
        ),
        "tie_word_embeddings stands in text_config only",
    ),
    "odd heads": (
        with_value("vision_config", "num_heads", value=64),
        "hidden_size / num_heads must be a multiple of 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_in_one_line(name):
    change, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        qwen3_vl.read_config(change(qwen3_vl.write_config(qwen3_vl.QWEN3_VL_8B)))
    text = str(error.value)
    assert text.startswith("config.json: ") and message in text and "\n" not in text
