"""Gemma 3's config.json: read as transformers reads it, refused in a line where it asks for other arithmetic."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

from cxr_jax.errors import UserError
from cxr_jax.models import tensor_table
from cxr_jax.models.gemma3.config import GEMMA_PHANTOM, MEDGEMMA_4B, read_config, write_config

# As MedGemma 4B's file, which leaves heads, head size and vocabulary to the classes.
PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def changed(place, **changes):
    settings = copy.deepcopy(PUBLISHED)
    section = settings.setdefault(place, {}) if place else settings
    section.update(changes)
    return settings


def without(place, *keys):
    settings = copy.deepcopy(PUBLISHED)
    for key in keys:
        del (settings[place] if place else settings)[key]
    return settings


def test_the_published_file_is_the_named_size():
    config = read_config(copy.deepcopy(PUBLISHED))
    assert config == MEDGEMMA_4B
    # The 4 x 4 patches that become one of 256 tokens, and which of 34 layers see everything.
    assert (config.vision.spatial_merge_size, config.vision.position_table) == (4, 4096)
    full = set(range(34)) - set(config.text.sliding_layers)
    assert full == {5, 11, 17, 23, 29}
    assert config.text.query_scale == 1 / 16 and config.tie_word_embeddings
    assert config.media_token_ids == (255999, 256000, 262144)


# Spellings in circulation, and what leaves more or less to the classes.
FORMS = {
    "published": PUBLISHED,
    "old ropes": changed("text_config", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=None),
    "old type": changed("text_config", rope_scaling={"factor": 4.0, "type": "linear", "rope_type": "linear"}),
    "new ropes": changed(
        "text_config",
        rope_scaling=None,
        rope_parameters={
            "full_attention": {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    ),
    "one new rope": changed(
        "text_config", rope_scaling=None, rope_parameters={"sliding_attention": {"rope_theta": 3e4}}
    ),
    "no ropes": without("text_config", "rope_scaling"),
    "pattern": changed("text_config", sliding_window_pattern=3),
    "layer types": changed(
        "text_config", num_hidden_layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"]
    ),
    "classes": {"model_type": "gemma3", "mm_tokens_per_image": 49},
    "sizes": changed(
        "text_config",
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        query_pre_attn_scalar=168,
        rms_norm_eps=1e-5,
    ),
    "untied": changed("", tie_word_embeddings=False),
    "eps": changed("vision_config", layer_norm_eps=1e-5),
}  # fmt: skip


def theirs_of(settings):
    from transformers import Gemma3Config

    return Gemma3Config.from_dict(copy.deepcopy(settings))


@pytest.mark.parametrize("form", FORMS)
def test_forms_mean_to_transformers_what_they_mean_here(form):
    settings = FORMS[form]
    ours, theirs = read_config(copy.deepcopy(settings)), theirs_of(settings)
    # What we write means the same to both, again.
    written = json.loads(json.dumps(write_config(ours)))
    assert read_config(copy.deepcopy(written)) == ours
    for reading in (theirs, theirs_of(written)):
        check_same(ours, reading)


def check_same(ours, theirs):
    text, vision = theirs.text_config, theirs.vision_config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") + (
        ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
        + ("max_position_embeddings", "sliding_window")
    ):
        assert getattr(ours.text, name) == getattr(text, name), name
    assert ours.text.query_scale == text.query_pre_attn_scalar**-0.5
    kinds = ["full_attention"] * text.num_hidden_layers
    for layer in ours.text.sliding_layers:
        kinds[layer] = "sliding_attention"
    assert kinds == text.layer_types
    full, sliding = (text.rope_parameters[k] for k in ("full_attention", "sliding_attention"))
    assert ours.text.rope_theta == full["rope_theta"]
    assert ours.text.sliding_rope_theta == sliding["rope_theta"]
    factor = full["factor"] if full["rope_type"] == "linear" else 1
    assert ours.text.rope_factor == factor and sliding["rope_type"] == "default"
    named = {
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "in_channels": "num_channels",
        "norm_eps": "layer_norm_eps",
        **{name: name for name in ("hidden_size", "intermediate_size", "patch_size")},
    }
    for name, their_name in named.items():
        assert getattr(ours.vision, name) == getattr(vision, their_name), name
    side = vision.image_size // vision.patch_size
    assert ours.vision.position_table == side**2
    assert ours.vision.position_table // ours.vision.merge_unit == theirs.mm_tokens_per_image
    assert ours.image_token_id == theirs.image_token_id
    assert ours.vision_start_token_id == theirs.boi_token_id
    assert ours.vision_end_token_id == theirs.eoi_token_id
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


REFUSED = {
    "text_config.model_type 'gemma2'": changed("text_config", model_type="gemma2"),
    "vision_config.model_type 'clip_vision_model'": changed(
        "vision_config", model_type="clip_vision_model"
    ),
    "text_config.attention_bias True": changed("text_config", attention_bias=True),
    "text_config.final_logit_softcapping 30.0": changed(
        "text_config", final_logit_softcapping=30.0
    ),
    "text_config.attn_logit_softcapping 50.0": changed("text_config", attn_logit_softcapping=50.0),
    "text_config.use_bidirectional_attention True": changed(
        "text_config", use_bidirectional_attention=True
    ),
    "text_config.hidden_activation silu": changed("text_config", hidden_activation="silu"),
    "vision_config.hidden_act gelu ": changed("vision_config", hidden_act="gelu"),
    "rope_scaling: type 'linear' without": changed(
        "text_config", rope_scaling={"type": "linear", "factor": 8}
    ),
    "rope of full_attention: type 'yarn'": changed(
        "text_config", rope_scaling={"rope_type": "yarn"}
    ),
    "rope of full_attention: factor is missing": changed(
        "text_config", rope_scaling={"rope_type": "linear"}
    ),
    "rope of sliding_attention: type 'linear'": changed(
        "text_config", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2}}
    ),
    "rope_theta is 500000.0, and 1000000.0 in another place": changed(
        "text_config",
        rope_theta=1e6,
        rope_parameters={"full_attention": {"rope_theta": 5e5}},
    ),
    "rope_parameters is not by full_attention": changed(
        "text_config", rope_parameters={"rope_theta": 1e6}
    ),
    "layer_types must be a list of 34": changed("text_config", layer_types=["full_attention"]),
    "layer_types has chunked_attention": changed(
        "text_config", layer_types=["chunked_attention"] * 34
    ),
    "layer_types is not what sliding_window_pattern 2": changed(
        "text_config", layer_types=["full_attention"] * 34, sliding_window_pattern=2
    ),
    "255 tokens an image": changed("", mm_tokens_per_image=255),
    "225 tokens an image": changed("", mm_tokens_per_image=225),
    "image_size 900": changed("vision_config", image_size=900),
    "tie_word_embeddings is one": changed(
        "text_config", tie_word_embeddings=False
    ) | {"tie_word_embeddings": True},
    "text_config is not a JSON object": {**PUBLISHED, "text_config": [1]},
    "model_type 'gemma3_text' is not": {**PUBLISHED, "model_type": "gemma3_text"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_other_arithmetic_is_refused_in_a_line(message):
    with pytest.raises(UserError) as refusal:
        read_config(copy.deepcopy(REFUSED[message]))
    text = str(refusal.value)
    assert message in text and text.startswith("config.json: ") and "\n" not in text


def test_the_published_size_has_the_published_count_of_parameters():
    shapes = tensor_table.parameter_shapes(MEDGEMMA_4B)
    counts = {path: math.prod(shape) for path, shape in shapes.items()}
    assert sum(counts.values()) == 4_300_079_472
    assert sum(count for path, count in counts.items() if path[0] == "vision") == 419_816_304


def test_random_sizes_go_to_json_and_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scalar = float(rng.integers(1, 2000)) + float(rng.random() < 0.2) * 0.5
        text = dataclasses.replace(
            GEMMA_PHANTOM.text,
            query_scale=scalar**-0.5,
            sliding_layers=tuple(np.flatnonzero(rng.random(4) < 0.5).tolist()),
            rope_factor=float(rng.choice([1.0, 8.0, 2.5])),
        )
        config = dataclasses.replace(GEMMA_PHANTOM, text=text)
        assert read_config(json.loads(json.dumps(write_config(config)))) == config
