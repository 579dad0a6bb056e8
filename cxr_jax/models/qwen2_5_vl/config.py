"""Sizes and token ids of a Qwen2.5-VL model, read from and written to a Hugging Face `config.json`.

The dataclasses are frozen and hashable, so a config can be a static argument of `jax.jit`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from cxr_jax.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes in features, `patch_size` and `window_size` in pixels."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    tokens_per_second: int = 2
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that one language-model token stands for."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels * frames * height * width (1176 by default)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `mrope_section` counts rotary frequencies for time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """A whole model. Token ids are those of its tokenizer; `eos_token_id` holds every stop id."""

    model_type: ClassVar[str] = "qwen2_5_vl"  # the family, see `registry`

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    bos_token_id: int = 151643
    eos_token_id: tuple[int, ...] = field(default=(151645, 151643))
    tie_word_embeddings: bool = False

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for pixels: they may never be sampled."""
        return tuple(
            sorted(
                {
                    self.image_token_id,
                    self.video_token_id,
                    self.vision_start_token_id,
                    self.vision_end_token_id,
                }
            )
        )

    @staticmethod
    def from_hf(d: dict) -> "Config":
        """Read a parsed `config.json`: the flat layout of the published weights or the nested one.

        Raises UserError for another architecture or an option that this code does not compute.
        """
        return _from_hf(d)

    def to_hf(self) -> dict:
        """The flat `config.json` layout of the published weights, which transformers 4 and 5 both load."""
        return _to_hf(self)


def _need(d: dict, key: str, where: str):
    if d.get(key) is None:
        raise UserError(f"config.json: {where}{key} is missing")
    return d[key]


def _one_int(value, name: str) -> int:
    """Newer configs may write a patch size as a list of equal numbers."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"config.json: {name} must be square, got {list(value)}")
        value = value[0]
    return int(value)


def _ids(value) -> tuple[int, ...]:
    return tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _vision_from_hf(v: dict) -> VisionConfig:
    act = v.get("hidden_act", "silu")
    if act != "silu":
        raise UserError(
            f"config.json: vision_config.hidden_act {act!r} is not supported (only 'silu')"
        )
    where = "vision_config."
    model_config = VisionConfig(
        depth=int(_need(v, "depth", where)),
        hidden_size=int(_need(v, "hidden_size", where)),
        num_heads=int(_need(v, "num_heads", where)),
        intermediate_size=int(v.get("intermediate_size", 3420)),
        out_hidden_size=int(_need(v, "out_hidden_size", where)),
        fullatt_block_indexes=tuple(
            int(i) for i in v.get("fullatt_block_indexes", (7, 15, 23, 31))
        ),
        in_channels=int(v.get("in_channels", v.get("in_chans", 3))),
        patch_size=_one_int(v.get("patch_size", 14), "patch_size"),
        temporal_patch_size=_one_int(v.get("temporal_patch_size", 2), "temporal_patch_size"),
        spatial_merge_size=int(v.get("spatial_merge_size", 2)),
        window_size=int(v.get("window_size", 112)),
        tokens_per_second=int(v.get("tokens_per_second", 4)),
        rope_theta=float((v.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )
    if model_config.hidden_size % model_config.num_heads or model_config.head_dim % 4:
        raise UserError(
            "config.json: vision_config.hidden_size / num_heads must be a multiple of 4"
        )
    if model_config.window_size // model_config.patch_size // model_config.spatial_merge_size < 1:
        raise UserError("config.json: vision_config.window_size is smaller than one merged patch")
    return model_config


def _text_from_hf(t: dict) -> TextConfig:
    if t.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is not supported")
    if t.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: hidden_act {t['hidden_act']!r} is not supported (only 'silu')"
        )
    rope = {**(t.get("rope_scaling") or {}), **(t.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UserError(
            f"config.json: rope type {kind!r} is not supported (only 'default' and 'mrope')"
        )
    heads = int(_need(t, "num_attention_heads", ""))
    model_config = TextConfig(
        vocab_size=int(_need(t, "vocab_size", "")),
        hidden_size=int(_need(t, "hidden_size", "")),
        intermediate_size=int(_need(t, "intermediate_size", "")),
        num_hidden_layers=int(_need(t, "num_hidden_layers", "")),
        num_attention_heads=heads,
        num_key_value_heads=int(t.get("num_key_value_heads") or heads),
        mrope_section=tuple(int(i) for i in rope.get("mrope_section", (16, 24, 24))),
        rope_theta=float(rope.get("rope_theta", t.get("rope_theta", 1e6))),
        rms_norm_eps=float(t.get("rms_norm_eps", 1e-5)),
        max_position_embeddings=int(t.get("max_position_embeddings", 32768)),
    )
    if model_config.hidden_size % heads or heads % model_config.num_key_value_heads:
        raise UserError(
            "config.json: hidden_size, num_attention_heads and num_key_value_heads do not divide"
        )
    if sum(model_config.mrope_section) * 2 != model_config.head_dim:
        raise UserError(
            f"config.json: mrope_section {list(model_config.mrope_section)} must sum to half of the "
            f"head size {model_config.head_dim}"
        )
    return model_config


def _from_hf(d: dict) -> Config:
    if d.get("model_type") != "qwen2_5_vl":
        raise UserError(f"config.json: model_type {d.get('model_type')!r} is not 'qwen2_5_vl'")
    t = d.get("text_config") or d
    look = lambda key, default: next((s[key] for s in (d, t) if s.get(key) is not None), default)
    vision = _vision_from_hf(_need(d, "vision_config", ""))
    text = _text_from_hf(t)
    if vision.out_hidden_size != text.hidden_size:
        raise UserError("config.json: vision_config.out_hidden_size differs from hidden_size")
    eos = _ids(look("eos_token_id", 151645))
    return Config(
        vision=vision,
        text=text,
        image_token_id=int(look("image_token_id", 151655)),
        video_token_id=int(look("video_token_id", 151656)),
        vision_start_token_id=int(look("vision_start_token_id", 151652)),
        vision_end_token_id=int(look("vision_end_token_id", 151653)),
        # The published files name no padding id; any id does under a mask, and a stop id is always in range.
        pad_token_id=int(look("pad_token_id", eos[-1])),
        bos_token_id=int(look("bos_token_id", eos[-1])),
        eos_token_id=eos,
        tie_word_embeddings=bool(d.get("tie_word_embeddings") or t.get("tie_word_embeddings")),
    )


def _to_hf(c: Config) -> dict:
    v, t = c.vision, c.text
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id[0] if len(c.eos_token_id) == 1 else list(c.eos_token_id),
        "pad_token_id": c.pad_token_id,
        "image_token_id": c.image_token_id,
        "video_token_id": c.video_token_id,
        "vision_start_token_id": c.vision_start_token_id,
        "vision_end_token_id": c.vision_end_token_id,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": t.intermediate_size,
        "max_position_embeddings": t.max_position_embeddings,
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_hidden_layers,
        "num_key_value_heads": t.num_key_value_heads,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_theta": t.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
        "tie_word_embeddings": c.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": t.vocab_size,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": v.depth,
            "fullatt_block_indexes": list(v.fullatt_block_indexes),
            "hidden_act": "silu",
            "hidden_size": v.hidden_size,
            "in_channels": v.in_channels,
            "in_chans": v.in_channels,
            "intermediate_size": v.intermediate_size,
            "num_heads": v.num_heads,
            "out_hidden_size": v.out_hidden_size,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.spatial_merge_size,
            "spatial_patch_size": v.patch_size,
            "temporal_patch_size": v.temporal_patch_size,
            "tokens_per_second": v.tokens_per_second,
            "window_size": v.window_size,
            # Only newer writers know it; every published model has the default.
            **(
                {}
                if v.rope_theta == 10000.0
                else {"rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta}}
            ),
        },
    }


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
