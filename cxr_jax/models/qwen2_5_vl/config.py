"""Qwen2.5-VL's `config.json`, read and written, and the published sizes."""

from typing import Any

from cxr_jax.errors import UserError, shown
from cxr_jax.models.network.config import Config, TextConfig, VisionConfig

MODEL_TYPE = "qwen2_5_vl"

# ---- Reading config.json -----------------------------------------------------------------------------------


def _needed(settings: dict[str, Any], key: str, where: str = "") -> Any:
    if settings.get(key) is None:
        raise UserError(f"config.json: {where}{key} is missing")
    return settings[key]


def _one_int(value: Any, name: str) -> int:
    """Newer configs may write a patch size as a list of equal numbers."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"config.json: {name} must be square, got {list(value)}")
        value = value[0]
    return int(value)


def _ids(value: Any) -> tuple[int, ...]:
    # One stop id stands alone in config.json, several as a list.
    return tuple(int(token) for token in (value if isinstance(value, (list, tuple)) else [value]))


def _or_default(settings: dict[str, Any], key: str, default: Any) -> Any:
    """A key that is null is one that is not there."""
    return default if settings.get(key) is None else settings[key]


def _vision_from_hf(settings: dict[str, Any]) -> VisionConfig:
    # Refused and not ignored: with another activation the same weights mean another model.
    activation = _or_default(settings, "hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"config.json: vision_config.hidden_act {shown(activation)!r} is not supported (only 'silu')"
        )

    # Where a key is absent: the defaults of transformers, which saves of 4.49 to 4.51 leave out, the sizes included.
    def value(key: str, default: Any) -> Any:
        return _or_default(settings, key, default)

    rope = _rope(settings, "vision_config.", ("default", "axial"))
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
        patch_size=_one_int(value("patch_size", 14), "patch_size"),
        temporal_patch_size=_one_int(value("temporal_patch_size", 2), "temporal_patch_size"),
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


def _rope(settings: dict[str, Any], place: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The rotary settings of one level: transformers 4 writes rope_scaling, transformers 5 rope_parameters.

    Raises:
        UserError: for rotations that this code does not compute, and for two accounts that differ.
    """
    rope: dict[str, Any] = {}
    if settings.get("rope_theta") is not None:
        rope["rope_theta"] = settings["rope_theta"]
    for section in ("rope_scaling", "rope_parameters"):
        where = f"config.json: {place}{section}"
        said = _or_default(settings, section, {})
        if not isinstance(said, dict):
            raise UserError(f"{where} is not a JSON object")
        for key, value in said.items():
            # Older writers say `type`, newer ones `rope_type`, some both: each must be one that is known.
            if key in ("type", "rope_type") and value not in (None, *kinds):
                known = " and ".join(map(repr, kinds))
                raise UserError(
                    f"{where}.{key}: rope type {shown(value)!r} is not supported (only {known})"
                )
            if isinstance(value, dict) or (key == "mrope_interleaved" and value):
                raise UserError(f"{where}.{key} {shown(value)} is not supported")
            if key == "partial_rotary_factor" and value not in (None, 1):
                raise UserError(f"{where}.{key} {shown(value)} is not supported (only 1)")
            if key in ("rope_theta", "mrope_section") and value is not None:
                if rope.setdefault(key, value) != value:
                    other = shown(rope[key])
                    raise UserError(
                        f"{where}.{key} is {shown(value)}, and {other} in another place"
                    )
    return rope


# Mixtures of experts have tensors of other names; these keys say why.
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def _refuse_other_arithmetic(settings: dict[str, Any], place: str) -> None:
    """Refuse what a config may ask of the decoder and this code does not compute, by key and value."""

    def refuse(key: str, only: str = "") -> None:
        note = f" (only {only})" if only else ""
        value = settings[key]
        named = repr(shown(value)) if isinstance(value, str) else shown(value)
        raise UserError(f"config.json: {place}{key} {named} is not supported{note}")

    if settings.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    if _or_default(settings, "hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    for layer_type in _or_default(settings, "layer_types", ()):
        if layer_type != "full_attention":
            raise UserError(
                f"config.json: {place}layer_types has {shown(layer_type)}, which is not supported "
                "(only full_attention)"
            )
    if settings.get("partial_rotary_factor") not in (None, 1):
        refuse("partial_rotary_factor", "1")
    for key in _EXPERTS:
        if settings.get(key) not in (None, 0):
            refuse(key, "dense models")


def _text_from_hf(settings: dict[str, Any], place: str) -> TextConfig:
    _refuse_other_arithmetic(settings, place)
    rope = _rope(settings, place, ("default", "mrope"))
    # ---- Sizes ----
    heads = int(_needed(settings, "num_attention_heads"))
    text = TextConfig(
        vocab_size=int(_needed(settings, "vocab_size")),
        hidden_size=int(_needed(settings, "hidden_size")),
        intermediate_size=int(_needed(settings, "intermediate_size")),
        num_hidden_layers=int(_needed(settings, "num_hidden_layers")),
        num_attention_heads=heads,
        # Without the key every query head has a key head of its own.
        num_key_value_heads=int(settings.get("num_key_value_heads") or heads),
        mrope_section=tuple(int(size) for size in rope.get("mrope_section", (16, 24, 24))),
        rope_theta=float(rope.get("rope_theta", 1e6)),
        rms_norm_eps=float(_or_default(settings, "rms_norm_eps", 1e-5)),
        max_position_embeddings=int(_or_default(settings, "max_position_embeddings", 32768)),
    )
    if text.hidden_size % heads or heads % text.num_key_value_heads:
        raise UserError(
            "config.json: hidden_size, num_attention_heads and num_key_value_heads do not divide"
        )
    if _or_default(settings, "head_dim", text.head_dim) != text.head_dim:
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
    _refuse_other_arithmetic(settings, "")
    said = {**settings, **_rope(settings, "", ("default", "mrope"))}
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
    vision = _vision_from_hf(_needed(settings, "vision_config"))
    text = _text_from_hf(text_settings, "" if text_settings is settings else "text_config.")
    _check_flat_beside_nested(settings, text)
    # The tower's tokens take the place of embeddings, so both have the same width.
    if vision.out_hidden_size != text.hidden_size:
        raise UserError("config.json: vision_config.out_hidden_size differs from hidden_size")

    def found(key: str, default: Any) -> Any:
        """Of the top level, else of the nested text_config."""
        for level in (settings, text_settings):
            if level.get(key) is not None:
                return level[key]
        return default

    eos_token_id = _ids(found("eos_token_id", 151645))
    return Config(
        vision=vision,
        text=text,
        # The older name, as other families of that time have it.
        image_token_id=int(found("image_token_id", found("image_token_index", 151655))),
        video_token_id=int(found("video_token_id", found("video_token_index", 151656))),
        vision_start_token_id=int(found("vision_start_token_id", 151652)),
        vision_end_token_id=int(found("vision_end_token_id", 151653)),
        # The published files name no padding id; any id does under a mask, and a stop id is always in range.
        pad_token_id=int(found("pad_token_id", eos_token_id[-1])),
        bos_token_id=int(found("bos_token_id", eos_token_id[-1])),
        eos_token_id=eos_token_id,
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
    image_token_id=921,
    video_token_id=922,
    vision_start_token_id=918,
    vision_end_token_id=919,
    pad_token_id=915,
    bos_token_id=915,
    eos_token_id=(917, 915),
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
