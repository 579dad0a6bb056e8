"""Qwen2.5-VL's `config.json`, read and written, and the published sizes."""

from typing import Any

from cxr_jax.errors import UserError, shown
from cxr_jax.models.config_json import (
    EMBEDDED_IDS,
    needed,
    one_int,
    or_default,
    refuse_other_decoders,
    rope_settings,
    special_ids,
)
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig

MODEL_TYPE = "qwen2_5_vl"

# ---- Reading config.json -----------------------------------------------------------------------------------


def _vision_from_hf(settings: dict[str, Any]) -> VisionConfig:
    # Refused and not ignored: with another activation the same weights mean another model.
    activation = or_default(settings, "hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"config.json: vision_config.hidden_act {shown(activation)!r} is not supported (only 'silu')"
        )

    # Where a key is absent: the defaults of transformers, which saves of 4.49 to 4.51 leave out, the sizes included.
    def value(key: str, default: Any) -> Any:
        return or_default(settings, key, default)

    rope = rope_settings(settings, "vision_config.", ("default", "axial"))
    vision = VisionConfig(
        depth=int(value("depth", 32)),
        hidden_size=int(value("hidden_size", 3584)),
        num_heads=int(value("num_heads", 16)),
        intermediate_size=int(value("intermediate_size", 3420)),
        out_hidden_size=int(value("out_hidden_size", 3584)),
        fullatt_block_indexes=tuple(
            int(index) for index in value("fullatt_block_indexes", (7, 15, 23, 31))
        ),
        # Both spellings are in circulation.
        in_channels=int(value("in_channels", value("in_chans", 3))),
        patch_size=one_int(value("patch_size", 14), "patch_size"),
        temporal_patch_size=one_int(value("temporal_patch_size", 2), "temporal_patch_size"),
        spatial_merge_size=int(value("spatial_merge_size", 2)),
        window_size=int(value("window_size", 112)),
        tokens_per_second=int(value("tokens_per_second", 4)),
        # transformers 5 writes it; older files have the default.
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
    # Half of a head follows the row and half the column, in pairs.
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise UserError(
            "config.json: vision_config.hidden_size / num_heads must be a multiple of 4"
        )
    # A window must hold a token at least, or there would be no windows.
    if vision.window_size // vision.patch_size // vision.spatial_merge_size < 1:
        raise UserError("config.json: vision_config.window_size is smaller than one merged patch")
    return vision


def _text_from_hf(settings: dict[str, Any], place: str) -> TextConfig:
    refuse_other_decoders(settings, place)
    rope = rope_settings(settings, place, ("default", "mrope"))
    # ---- Sizes ----
    heads = int(needed(settings, "num_attention_heads"))
    text = TextConfig(
        vocab_size=int(needed(settings, "vocab_size")),
        hidden_size=int(needed(settings, "hidden_size")),
        intermediate_size=int(needed(settings, "intermediate_size")),
        num_hidden_layers=int(needed(settings, "num_hidden_layers")),
        num_attention_heads=heads,
        # Without the key every query head has a key head of its own.
        num_key_value_heads=int(settings.get("num_key_value_heads") or heads),
        mrope_section=tuple(int(size) for size in rope.get("mrope_section", (16, 24, 24))),
        rope_theta=float(rope.get("rope_theta", 1e6)),
        rms_norm_eps=float(or_default(settings, "rms_norm_eps", 1e-5)),
        max_position_embeddings=int(or_default(settings, "max_position_embeddings", 32768)),
    )
    if text.hidden_size % heads or heads % text.num_key_value_heads:
        raise UserError(
            "config.json: hidden_size, num_attention_heads and num_key_value_heads do not divide"
        )
    if or_default(settings, "head_dim", text.head_dim) != text.head_dim:
        raise UserError(
            f"config.json: {place}head_dim {shown(settings['head_dim'])} is not supported (only hidden_size / "
            f"num_attention_heads, {text.head_dim})"
        )
    # Every frequency of a head follows one of the three axes.
    if sum(text.mrope_section) * 2 != text.head_dim:
        raise UserError(
            f"config.json: mrope_section {list(text.mrope_section)} must sum to half of the "
            f"head size {text.head_dim}"
        )
    return text


def _check_flat_beside_nested(settings: dict[str, Any], text: TextConfig) -> None:
    """Refuse flat settings that differ from the nested ones in what shapes of weights do not show.

    transformers takes the nested ones, so a change of the flat ones alone would be lost without a word.
    """
    refuse_other_decoders(settings, "")
    said = {**settings, **rope_settings(settings, "", ("default", "mrope"))}
    for key in ("rope_theta", "rms_norm_eps", "num_attention_heads", "mrope_section"):
        flat, nested = said.get(key), getattr(text, key)
        if flat is not None and nested != (tuple(flat) if key == "mrope_section" else flat):
            nested = list(nested) if key == "mrope_section" else nested
            raise UserError(f"config.json: {key} is {shown(flat)}, in text_config {nested}")


def read_config(settings: dict[str, Any]) -> Config:
    """Read a parsed `config.json`: the flat layout of the published weights or the nested one.

    Raises:
        UserError: for another architecture or an option that this code does not compute.
    """
    if settings.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"config.json: model_type {settings.get('model_type')!r} is not {MODEL_TYPE!r}"
        )
    # transformers 4.52 and later nest the decoder's settings, the published files do not, and some have both.
    text_settings = settings.get("text_config") or settings
    vision = _vision_from_hf(needed(settings, "vision_config"))
    text = _text_from_hf(text_settings, "" if text_settings is settings else "text_config.")
    _check_flat_beside_nested(settings, text)
    # The tower's tokens take the place of embeddings, so both have the same width.
    if vision.out_hidden_size != text.hidden_size:
        raise UserError("config.json: vision_config.out_hidden_size differs from hidden_size")

    return Config(
        vision=vision,
        text=text,
        **special_ids(settings, text_settings),
        # Newer files say it at the top, nested ones in the text's settings.
        tie_word_embeddings=bool(
            settings.get("tie_word_embeddings") or text_settings.get("tie_word_embeddings")
        ),
    )


# ---- Writing config.json -----------------------------------------------------------------------------------


def write_config(model_config: Config) -> dict[str, Any]:
    """Write the flat `config.json` layout of the published weights, which transformers 4 and 5 both load."""
    # Flat, as the published files are: readers of both versions know it.
    text, eos = model_config.text, model_config.eos_token_id
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": model_config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": model_config.pad_token_id,
        "image_token_id": model_config.image_token_id,
        "video_token_id": model_config.video_token_id,
        "vision_start_token_id": model_config.vision_start_token_id,
        "vision_end_token_id": model_config.vision_end_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "tie_word_embeddings": model_config.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
        "vision_config": _vision_to_hf(model_config.vision),
    }


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    settings = {
        "model_type": MODEL_TYPE,
        "depth": vision.depth,
        "fullatt_block_indexes": list(vision.fullatt_block_indexes or ()),
        "hidden_act": "silu",
        "hidden_size": vision.hidden_size,
        "in_channels": vision.in_channels,
        # Under both names, for readers that know only one of them.
        "in_chans": vision.in_channels,
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.num_heads,
        "out_hidden_size": vision.out_hidden_size,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "spatial_patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "tokens_per_second": vision.tokens_per_second,
        "window_size": vision.window_size,
    }
    # Only newer writers know it; every published model has the default.
    if vision.rope_theta != 10000.0:
        settings["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return settings


# ---- Sizes -------------------------------------------------------------------------------------------------

# Small enough to train on two CPU cores in about an hour (experiments/sft.py).
PHANTOM = Config(
    vision=VisionConfig(
        depth=4,
        hidden_size=128,
        num_heads=4,
        intermediate_size=384,
        out_hidden_size=192,
        fullatt_block_indexes=(1, 3),
    ),
    text=TextConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        mrope_section=(4, 6, 6),
        rope_theta=1e4,
        max_position_embeddings=4096,
    ),
    **EMBEDDED_IDS,
    tie_word_embeddings=True,
)
"""The embedded model, with the ids of its tokenizer (`tokenizer.config_ids`; tests/models/test_tokenizer.py)."""

# As in the config.json of the published weights.
QWEN2_5_VL_3B = Config(
    vision=VisionConfig(
        depth=32,
        hidden_size=1280,
        num_heads=16,
        intermediate_size=3420,
        out_hidden_size=2048,
        fullatt_block_indexes=(7, 15, 23, 31),
    ),
    text=TextConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        mrope_section=(16, 24, 24),
        max_position_embeddings=128000,
    ),
    tie_word_embeddings=True,
)

# As in the config.json of the published weights; its head is not tied.
QWEN2_5_VL_7B = Config(
    vision=VisionConfig(
        depth=32,
        hidden_size=1280,
        num_heads=16,
        intermediate_size=3420,
        out_hidden_size=3584,
        fullatt_block_indexes=(7, 15, 23, 31),
    ),
    text=TextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        mrope_section=(16, 24, 24),
        max_position_embeddings=128000,
    ),
)
