"""Qwen3-VL's `config.json` (dense models), read and written, and the published sizes."""

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

MODEL_TYPE = "qwen3_vl"
# Where a key is absent: those of transformers' classes.
_VISION_THETA, _TEXT_THETA = 1e4, 5e5

# ---- Reading config.json -----------------------------------------------------------------------------------


def read_config(settings: dict[str, Any]) -> Config:
    """Read a parsed `config.json`, of transformers 4.57 or 5: there is one layout, with two spellings of rotations.

    Raises:
        UserError: for another architecture or an option that this code does not compute.
    """
    if settings.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"config.json: model_type {settings.get('model_type')!r} is not {MODEL_TYPE!r}"
        )
    text_settings = needed(settings, "text_config")
    vision = _read_vision(needed(settings, "vision_config"))
    text = _read_text(text_settings)
    # The tower's tokens take the place of embeddings, so both have the same width.
    if vision.out_hidden_size != text.hidden_size:
        raise UserError(
            f"config.json: vision_config.out_hidden_size is {vision.out_hidden_size}, and text_config.hidden_size "
            f"{text.hidden_size}"
        )
    # transformers ties by the top level alone; to follow one of the two in silence would be to guess.
    is_tied = settings.get("tie_word_embeddings")
    if is_tied is None and text_settings.get("tie_word_embeddings"):
        raise UserError(
            "config.json: tie_word_embeddings stands in text_config only, where transformers does not read it; "
            "write it at the top level"
        )
    return Config(
        vision=vision,
        text=text,
        **special_ids(settings, text_settings),
        tie_word_embeddings=bool(is_tied),
        model_type=MODEL_TYPE,
    )


def _read_vision(settings: dict[str, Any]) -> VisionConfig:
    # Refused and not ignored: with another activation the same weights mean another model.
    activation = or_default(settings, "hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UserError(
            f"config.json: vision_config.hidden_act {shown(activation)!r} is not supported "
            "(only 'gelu_pytorch_tanh')"
        )

    def size(key: str, default: int) -> int:
        return one_int(or_default(settings, key, default), f"vision_config.{key}")

    rope = rope_settings(settings, "vision_config.", ("default", "axial"))
    vision = VisionConfig(
        depth=size("depth", 27),
        hidden_size=size("hidden_size", 1152),
        num_heads=size("num_heads", 16),
        intermediate_size=size("intermediate_size", 4304),
        out_hidden_size=size("out_hidden_size", 3584),
        fullatt_block_indexes=None,
        in_channels=size("in_channels", 3),
        patch_size=size("patch_size", 16),
        temporal_patch_size=size("temporal_patch_size", 2),
        spatial_merge_size=size("spatial_merge_size", 2),
        rope_theta=float(rope.get("rope_theta", _VISION_THETA)),
        position_table=size("num_position_embeddings", 2304),
        tap_blocks=tuple(
            int(block) for block in or_default(settings, "deepstack_visual_indexes", (8, 16, 24))
        ),
        **_TOWER,
    )
    # Half of a head follows the row and half the column, in pairs.
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise UserError(
            "config.json: vision_config.hidden_size / num_heads must be a multiple of 4"
        )
    # Merged features have no name but their block.
    taps = vision.tap_blocks
    if len(set(taps)) < len(taps) or any(block < 0 for block in taps):
        raise UserError(
            f"config.json: vision_config.deepstack_visual_indexes {shown(list(taps))} must name blocks, each once"
        )
    return vision


# The same for every model of the family.
_TOWER: dict[str, Any] = {
    "norm": "layer",
    "mlp": "gelu",
    "patch_bias": True,
    "interpolates_table": True,
}
_DECODER: dict[str, Any] = {"qk_norm": True, "mrope_interleaved": True}


def _read_text(settings: dict[str, Any]) -> TextConfig:
    place = "text_config."
    refuse_other_decoders(settings, place)
    rope = rope_settings(settings, place, ("default",), interleaved=True)
    heads = int(needed(settings, "num_attention_heads", place))
    has_bias = bool(or_default(settings, "attention_bias", False))
    text = TextConfig(
        vocab_size=int(needed(settings, "vocab_size", place)),
        hidden_size=int(needed(settings, "hidden_size", place)),
        intermediate_size=int(needed(settings, "intermediate_size", place)),
        num_hidden_layers=int(needed(settings, "num_hidden_layers", place)),
        num_attention_heads=heads,
        # Without the key every query head has a key head of its own.
        num_key_value_heads=int(settings.get("num_key_value_heads") or heads),
        mrope_section=tuple(int(size) for size in rope.get("mrope_section", (24, 20, 20))),
        rope_theta=float(rope.get("rope_theta", _TEXT_THETA)),
        rms_norm_eps=float(or_default(settings, "rms_norm_eps", 1e-6)),
        max_position_embeddings=int(or_default(settings, "max_position_embeddings", 128000)),
        # Of its own, whatever the width of the model.
        head_size=int(or_default(settings, "head_dim", 128)),
        qkv_bias=has_bias,
        output_bias=has_bias,
        **_DECODER,
    )
    if heads % text.num_key_value_heads:
        raise UserError(
            "config.json: text_config.num_attention_heads and num_key_value_heads do not divide"
        )
    if text.head_dim < 2 or text.head_dim % 2:
        raise UserError(f"config.json: text_config.head_dim {text.head_dim} must be even")
    # How many frequencies follow the height and the width; the first number is never read.
    if len(text.mrope_section) != 3 or min(text.mrope_section) < 0:
        raise UserError(
            f"config.json: mrope_section {list(text.mrope_section)} must be three numbers"
        )
    return text


# ---- Writing config.json -----------------------------------------------------------------------------------


def write_config(model_config: Config) -> dict[str, Any]:
    """Write `config.json` in the spelling of the published weights, which transformers 4.57 and 5 both load."""
    text, eos = model_config.text, model_config.eos_token_id
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "image_token_id": model_config.image_token_id,
        "video_token_id": model_config.video_token_id,
        "vision_start_token_id": model_config.vision_start_token_id,
        "vision_end_token_id": model_config.vision_end_token_id,
        "tie_word_embeddings": model_config.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": text.qkv_bias,
            "attention_dropout": 0.0,
            "bos_token_id": model_config.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
            "pad_token_id": model_config.pad_token_id,
            "head_dim": text.head_dim,
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
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": list(text.mrope_section),
                "rope_type": "default",
            },
            "use_cache": True,
            "vocab_size": text.vocab_size,
        },
        "vision_config": _write_vision(model_config.vision),
    }


def _write_vision(vision: VisionConfig) -> dict[str, Any]:
    settings = {
        "model_type": MODEL_TYPE,
        "deepstack_visual_indexes": list(vision.tap_blocks),
        "depth": vision.depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "in_channels": vision.in_channels,
        "initializer_range": 0.02,
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.num_heads,
        "num_position_embeddings": vision.position_table,
        "out_hidden_size": vision.out_hidden_size,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    # Only newer writers know it; every published model has the default.
    if vision.rope_theta != _VISION_THETA:
        settings["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return settings


# ---- Sizes -------------------------------------------------------------------------------------------------


def _published(
    text: tuple[int, int, int, int], vision: tuple[int, int, int], taps: tuple[int, ...], tied: bool
) -> Config:
    """A published size: (layers, width, inner, query heads), (depth, width, inner) and what differs besides."""
    layers, width, inner, heads = text
    depth, vision_width, vision_inner = vision
    return Config(
        vision=VisionConfig(
            depth=depth,
            hidden_size=vision_width,
            num_heads=16,
            intermediate_size=vision_inner,
            out_hidden_size=width,
            fullatt_block_indexes=None,
            patch_size=16,
            position_table=48 * 48,
            tap_blocks=taps,
            **_TOWER,
        ),
        text=TextConfig(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            mrope_section=(24, 20, 20),
            rope_theta=5e6,
            max_position_embeddings=262144,
            head_size=128,
            qkv_bias=False,
            **_DECODER,
        ),
        tie_word_embeddings=tied,
        model_type=MODEL_TYPE,
    )


QWEN3_VL_2B = _published((28, 2048, 6144, 16), (24, 1024, 4096), (5, 11, 17), tied=True)
QWEN3_VL_4B = _published((36, 2560, 9728, 32), (24, 1024, 4096), (5, 11, 17), tied=True)
QWEN3_VL_8B = _published((36, 4096, 12288, 32), (27, 1152, 4304), (8, 16, 24), tied=False)

# Of the size of the embedded model: 224 pixels are 14 x 14 patches, between the rows of the table, and 7 x 7 tokens.
PHANTOM = Config(
    vision=VisionConfig(
        depth=4,
        hidden_size=128,
        num_heads=4,
        intermediate_size=512,
        out_hidden_size=192,
        fullatt_block_indexes=None,
        patch_size=16,
        position_table=16 * 16,
        tap_blocks=(0, 2),
        **_TOWER,
    ),
    text=TextConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(12, 10, 10),
        rope_theta=1e4,
        max_position_embeddings=4096,
        head_size=64,
        qkv_bias=False,
        **_DECODER,
    ),
    **EMBEDDED_IDS,
    tie_word_embeddings=True,
    model_type=MODEL_TYPE,
)
"""A model of the embedded one's size, with the ids of its tokenizer."""
