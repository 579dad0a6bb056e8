"""Gemma 3's `config.json`, read and written, and the published sizes: MedGemma 4B and 1.5 4B are Gemma 3 4B."""

import math
from collections.abc import Mapping
from typing import Any

from cxr_jax.errors import UserError, shown
from cxr_jax.models.config_json import one_int, or_default, token_ids
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig

MODEL_TYPE = "gemma3"
_TEXT_TYPE, _VISION_TYPE = "gemma3_text", "siglip_vision_model"
_ACTIVATION = "gelu_pytorch_tanh"
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Of the rotary settings: theta where a file has none.
_THETA = {_FULL: 1e6, _SLIDING: 1e4}

# ---- Reading config.json -----------------------------------------------------------------------------------


def _section(settings: Mapping[str, Any], key: str, model_type: str) -> dict[str, Any]:
    """A part of the file, which may be left out: then all of it has the class's defaults."""
    section = or_default(dict(settings), key, {})
    if not isinstance(section, dict):
        raise UserError(f"config.json: {key} is not a JSON object")
    told = or_default(section, "model_type", model_type)
    if told != model_type:
        raise UserError(
            f"config.json: {key}.model_type {shown(told)!r} is not supported (only {model_type!r})"
        )
    return section


def _refuse_unless(section: dict[str, Any], place: str, allowed: dict[str, Any]) -> None:
    """Refuse settings of arithmetic that is not computed here, by key and value."""
    for key, only in allowed.items():
        value = or_default(section, key, only)
        if value != only:
            raise UserError(
                f"config.json: {place}.{key} {shown(value)} is not supported (only {only})"
            )


def _vision_from_hf(settings: dict[str, Any], tokens: int, out_hidden_size: int) -> VisionConfig:
    _refuse_unless(settings, "vision_config", {"hidden_act": _ACTIVATION})

    # Where a key is absent: the defaults of transformers' class, which files leave out.
    def value(key: str, default: Any) -> Any:
        return or_default(settings, key, default)

    patch = one_int(value("patch_size", 16), "vision_config.patch_size")
    side, rest = divmod(one_int(value("image_size", 224), "vision_config.image_size"), patch)
    merge, uneven = divmod(side, math.isqrt(tokens))
    if rest or uneven or not merge or math.isqrt(tokens) ** 2 != tokens:
        raise UserError(
            f"config.json: {tokens} tokens an image (mm_tokens_per_image) do not divide the {side} x {side} patches "
            f"of vision_config.image_size {shown(value('image_size', 224))} and patch_size {patch}"
        )
    vision = VisionConfig(
        depth=int(value("num_hidden_layers", 12)),
        hidden_size=int(value("hidden_size", 768)),
        num_heads=int(value("num_attention_heads", 12)),
        intermediate_size=int(value("intermediate_size", 3072)),
        out_hidden_size=out_hidden_size,
        fullatt_block_indexes=None,
        in_channels=int(value("num_channels", 3)),
        patch_size=patch,
        temporal_patch_size=1,  # there are no frames
        spatial_merge_size=merge,
        norm="layer",
        norm_eps=float(value("layer_norm_eps", 1e-6)),
        mlp="gelu",
        patch_bias=True,
        rotary=False,
        position_table=side**2,
        split_qkv=True,
        final_norm=True,
        merger="mean",
    )
    if vision.hidden_size % vision.num_heads:
        raise UserError("config.json: vision_config.num_attention_heads does not divide")
    return vision


def _ropes(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary settings of both kinds of layers: transformers 4 writes keys of its own for each, 5 one section.

    Raises:
        UserError: for rotations that this code does not compute, and for two accounts that differ.
    """
    place = "config.json: text_config"
    told: list[tuple[str, str, Any]] = [  # (where, kind of layers, settings)
        ("rope_theta", _FULL, {"rope_theta": settings.get("rope_theta")}),
        ("rope_local_base_freq", _SLIDING, {"rope_theta": settings.get("rope_local_base_freq")}),
        ("rope_scaling", _FULL, or_default(settings, "rope_scaling", {})),
    ]
    of_kinds = or_default(settings, "rope_parameters", {})
    if not isinstance(of_kinds, dict) or not of_kinds.keys() <= _THETA.keys():
        raise UserError(f"{place}.rope_parameters is not by {_FULL} and {_SLIDING}")
    for kind, said in of_kinds.items():
        told.append((f"rope_parameters.{kind}", kind, {} if said is None else said))
    ropes: dict[str, dict[str, Any]] = {kind: {} for kind in _THETA}
    for where, kind, said in told:
        if not isinstance(said, dict):
            raise UserError(f"{place}.{where} is not a JSON object")
        # transformers 4 reads it, 5 passes over it: the same file would be two models.
        if "type" in said and said["type"] != said.get("rope_type", "default"):
            raise UserError(
                f"{place}.{where}: type {shown(said['type'])!r} without the same rope_type is not supported"
            )
        for key, value in said.items():
            if value is not None and ropes[kind].setdefault(key, value) != value:
                raise UserError(
                    f"{place}.{where}: {key} is {shown(value)}, and {shown(ropes[kind][key])} in another place"
                )
    for kind, rope in ropes.items():
        _check_rope(rope, f"{place}: rope of {kind}", is_full=kind == _FULL)
    return ropes


def _check_rope(rope: dict[str, Any], place: str, *, is_full: bool) -> None:
    rope_type = rope.get("rope_type", "default")
    known = ("default", "linear") if is_full else ("default",)
    if rope_type not in known:
        raise UserError(
            f"{place}: type {shown(rope_type)!r} is not supported (only {' and '.join(known)})"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{place}: partial_rotary_factor is not supported")
    if rope_type == "linear" and rope.get("factor") is None:
        raise UserError(f"{place}: factor is missing")


def _sliding_layers(settings: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The layers that see a window: of their list, or else all but every sixth."""
    pattern = int(or_default(settings, "sliding_window_pattern", 6))
    if pattern < 1:
        raise UserError(
            f"config.json: text_config.sliding_window_pattern is {pattern}, and must be 1 or more"
        )
    by_pattern = [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]
    kinds = or_default(settings, "layer_types", by_pattern)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(
            f"config.json: text_config.layer_types must be a list of {layers}, one a layer"
        )
    if others := [kind for kind in kinds if kind not in (_SLIDING, _FULL)]:
        raise UserError(
            f"config.json: text_config.layer_types has {shown(others[0])}, which is not supported (only {_SLIDING} and "
            f"{_FULL})"
        )
    if settings.get("sliding_window_pattern") is not None and kinds != by_pattern:
        raise UserError(
            f"config.json: text_config.layer_types is not what sliding_window_pattern {pattern} says"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)


def _text_from_hf(settings: dict[str, Any]) -> TextConfig:
    _refuse_unless(
        settings,
        "text_config",
        {"hidden_activation": _ACTIVATION, "attention_bias": False}
        # Newer than the published models: encoders of text that are made of the same layers.
        | {"use_bidirectional_attention": False},
    )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings.get(key) is not None:
            raise UserError(
                f"config.json: text_config.{key} {shown(settings[key])} is not supported (only null)"
            )

    # Where a key is absent: the defaults of transformers' class, which the published files leave out.
    def value(key: str, default: int) -> int:
        return int(or_default(settings, key, default))

    ropes, layers = _ropes(settings), value("num_hidden_layers", 26)
    sliding_layers = _sliding_layers(settings, layers)
    if sliding_layers and value("sliding_window", 4096) < 1:
        raise UserError("config.json: text_config.sliding_window must be 1 or more")
    text = TextConfig(
        vocab_size=value("vocab_size", 262208),
        hidden_size=value("hidden_size", 2304),
        intermediate_size=value("intermediate_size", 9216),
        num_hidden_layers=layers,
        num_attention_heads=value("num_attention_heads", 8),
        num_key_value_heads=value("num_key_value_heads", 4),
        head_size=value("head_dim", 256),
        # One axis, the place in the text, for text and images alike.
        mrope_section=(),
        rope_theta=float(ropes[_FULL].get("rope_theta", _THETA[_FULL])),
        # A factor counts for the linear type alone.
        rope_factor=float(
            ropes[_FULL]["factor"] if ropes[_FULL].get("rope_type") == "linear" else 1
        ),
        sliding_rope_theta=float(ropes[_SLIDING].get("rope_theta", _THETA[_SLIDING])),
        sliding_layers=sliding_layers,
        sliding_window=value("sliding_window", 4096),
        rms_norm_eps=float(or_default(settings, "rms_norm_eps", 1e-6)),
        max_position_embeddings=value("max_position_embeddings", 131072),
        query_scale=float(or_default(settings, "query_pre_attn_scalar", 256)) ** -0.5,
        qkv_bias=False,
        qk_norm=True,
        norm="one_plus",
        post_norms=True,
        activation="gelu_tanh",
        scales_embedding=True,
        image_sees_itself=True,
    )
    if text.num_attention_heads % text.num_key_value_heads or text.head_dim % 2:
        raise UserError(
            "config.json: text_config.num_attention_heads and num_key_value_heads do not divide, or head_dim is odd"
        )
    return text


def read_config(settings: dict[str, Any]) -> Config:
    """Read a parsed `config.json`.

    Raises:
        UserError: for another architecture or an option that this code does not compute.
    """
    if settings.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"config.json: model_type {settings.get('model_type')!r} is not {MODEL_TYPE!r}"
        )
    text_settings = _section(settings, "text_config", _TEXT_TYPE)
    text = _text_from_hf(text_settings)
    vision = _vision_from_hf(
        _section(settings, "vision_config", _VISION_TYPE),
        int(or_default(settings, "mm_tokens_per_image", 256)),
        text.hidden_size,
    )

    def found(key: str, default: Any) -> Any:
        """Of the top level, else of the nested text_config."""
        return or_default(settings, key, or_default(text_settings, key, default))

    is_tied = bool(found("tie_word_embeddings", True))
    if bool(or_default(text_settings, "tie_word_embeddings", is_tied)) != is_tied:
        raise UserError(
            "config.json: tie_word_embeddings is one at the top level, another in text_config"
        )
    return Config(
        vision=vision,
        text=text,
        # transformers reads both names, and writes the older one.
        image_token_id=int(found("image_token_id", found("image_token_index", 262144))),
        video_token_id=None,
        vision_start_token_id=int(found("boi_token_id", found("boi_token_index", 255999))),
        vision_end_token_id=int(found("eoi_token_id", found("eoi_token_index", 256000))),
        pad_token_id=int(found("pad_token_id", 0)),
        bos_token_id=int(found("bos_token_id", 2)),
        eos_token_id=token_ids(found("eos_token_id", 1)),
        tie_word_embeddings=is_tied,
        model_type=MODEL_TYPE,
    )


# ---- Writing config.json -----------------------------------------------------------------------------------


def write_config(model_config: Config) -> dict[str, Any]:
    """Write `config.json` in the older spelling of rotary settings, which transformers 4.50 to 5 load."""
    eos = model_config.eos_token_id
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "boi_token_index": model_config.vision_start_token_id,
        "eoi_token_index": model_config.vision_end_token_id,
        "image_token_index": model_config.image_token_id,
        "mm_tokens_per_image": model_config.vision.position_table // model_config.vision.merge_unit,
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": model_config.pad_token_id,
        "initializer_range": 0.02,
        "tie_word_embeddings": model_config.tie_word_embeddings,
        "text_config": _text_to_hf(model_config.text, model_config.tie_word_embeddings),
        "vision_config": _vision_to_hf(model_config.vision),
    }


def _text_to_hf(text: TextConfig, is_tied: bool) -> dict[str, Any]:
    layers = range(text.num_hidden_layers)
    assert text.query_scale is not None
    # The file has what the scale is made of, a whole number in every published model.
    scalar: float = text.query_scale**-2
    if round(scalar) ** -0.5 == text.query_scale:
        scalar = round(scalar)
    linear = {"rope_type": "linear", "factor": text.rope_factor}
    return {
        "model_type": _TEXT_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": text.head_dim,
        "hidden_activation": _ACTIVATION,
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "layer_types": [_SLIDING if layer in text.sliding_layers else _FULL for layer in layers],
        "max_position_embeddings": text.max_position_embeddings,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "query_pre_attn_scalar": scalar,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_local_base_freq": text.sliding_rope_theta,
        "rope_scaling": None if text.rope_factor == 1 else linear,
        "rope_theta": text.rope_theta,
        "sliding_window": text.sliding_window,
        "tie_word_embeddings": is_tied,
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": _VISION_TYPE,
        "attention_dropout": 0.0,
        "hidden_act": _ACTIVATION,
        "hidden_size": vision.hidden_size,
        "image_size": math.isqrt(vision.position_table) * vision.patch_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.norm_eps,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.in_channels,
        "num_hidden_layers": vision.depth,
        "patch_size": vision.patch_size,
        # A head that this model does not use, and that its files do not hold.
        "vision_use_head": False,
    }


# ---- Sizes -------------------------------------------------------------------------------------------------

# As in the published files, whose defaults are filled in. The stop ids are those of generation_config.json.
MEDGEMMA_4B = read_config(
    {
        "model_type": MODEL_TYPE,
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
)

# Small enough for two CPU cores: phantoms of 224 pixels in 64 tokens, windows shorter than a prompt, and layers of both
# kinds. With the ids of the embedded tokenizer.
GEMMA_PHANTOM = read_config(
    {
        "model_type": MODEL_TYPE,
        "mm_tokens_per_image": 64,
        "image_token_index": 921,
        "boi_token_index": 918,
        "eoi_token_index": 919,
        "bos_token_id": 915,
        "eos_token_id": [917, 915],
        "pad_token_id": 915,
        "text_config": {
            "vocab_size": 1024,
            "hidden_size": 192,
            "head_dim": 48,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "query_pre_attn_scalar": 48,
            "sliding_window": 48,
            "sliding_window_pattern": 2,
            "rope_theta": 1e4,
        },
        "vision_config": {
            "hidden_size": 128,
            "image_size": 224,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "patch_size": 14,
        },
    }
)
