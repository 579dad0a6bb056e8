"""Readers of `config.json` that families share: values with defaults, rotary settings, and what no family computes."""

from typing import Any

from cxr_jax.errors import UserError, shown

# ---- Values ------------------------------------------------------------------------------------------------


def needed(settings: dict[str, Any], key: str, where: str = "") -> Any:
    """Get a value that must be there. Raises UserError."""
    if settings.get(key) is None:
        raise UserError(f"config.json: {where}{key} is missing")
    return settings[key]


def or_default(settings: dict[str, Any], key: str, default: Any) -> Any:
    """Get a value; a key that is null is one that is not there."""
    return default if settings.get(key) is None else settings[key]


def one_int(value: Any, name: str) -> int:
    """Read a size that newer configs may write as a list of equal numbers. Raises UserError for others."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"config.json: {name} must be square, got {list(value)}")
        value = value[0]
    return int(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """Read stop ids: one stands alone in config.json, several as a list."""
    return tuple(int(token) for token in (value if isinstance(value, (list, tuple)) else [value]))


def special_ids(settings: dict[str, Any], text_settings: dict[str, Any]) -> dict[str, Any]:
    """Read the ids of special tokens, as fields of `Config`: of the top level, else of the decoder's settings."""

    def found(key: str, default: Any) -> Any:
        for level in (settings, text_settings):
            if level.get(key) is not None:
                return level[key]
        return default

    eos_token_id = token_ids(found("eos_token_id", 151645))
    return {
        # The older name, as other families of that time have it.
        "image_token_id": int(found("image_token_id", found("image_token_index", 151655))),
        "video_token_id": int(found("video_token_id", found("video_token_index", 151656))),
        "vision_start_token_id": int(found("vision_start_token_id", 151652)),
        "vision_end_token_id": int(found("vision_end_token_id", 151653)),
        # The published files name no padding id; any id does under a mask, and a stop id is always in range.
        "pad_token_id": int(found("pad_token_id", eos_token_id[-1])),
        "bos_token_id": int(found("bos_token_id", eos_token_id[-1])),
        "eos_token_id": eos_token_id,
    }


EMBEDDED_IDS: dict[str, Any] = {
    "image_token_id": 921,
    "video_token_id": 922,
    "vision_start_token_id": 918,
    "vision_end_token_id": 919,
    "pad_token_id": 915,
    "bos_token_id": 915,
    "eos_token_id": (917, 915),
}
"""The ids of the embedded tokenizer, for models of the phantom's size (tests/models/test_tokenizer.py)."""


# ---- Rotary positions --------------------------------------------------------------------------------------


def rope_settings(
    settings: dict[str, Any], place: str, kinds: tuple[str, ...], *, interleaved: bool = False
) -> dict[str, Any]:
    """Read the rotary settings of one level: transformers 4 writes rope_scaling, transformers 5 rope_parameters.

    Args:
        place: of the level, for messages.
        kinds: of rotation that the family computes.
        interleaved: whether frequencies take turns between the axes; else a config that asks for it is refused.

    Raises:
        UserError: for rotations that this code does not compute, and for two accounts that differ.
    """
    rope: dict[str, Any] = {}
    if settings.get("rope_theta") is not None:
        rope["rope_theta"] = settings["rope_theta"]
    for section in ("rope_scaling", "rope_parameters"):
        where = f"config.json: {place}{section}"
        said = or_default(settings, section, {})
        if not isinstance(said, dict):
            raise UserError(f"{where} is not a JSON object")
        for key, value in said.items():
            # Older writers say `type`, newer ones `rope_type`, some both: each must be one that is known.
            if key in ("type", "rope_type") and value not in (None, *kinds):
                known = " and ".join(map(repr, kinds))
                raise UserError(
                    f"{where}.{key}: rope type {shown(value)!r} is not supported (only {known})"
                )
            is_interleaving = key == "mrope_interleaved" and value and not interleaved
            if isinstance(value, dict) or is_interleaving:
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


# ---- Refusals ----------------------------------------------------------------------------------------------

# Mixtures of experts have tensors of other names; these keys say why.
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def refuse_other_decoders(settings: dict[str, Any], place: str) -> None:
    """Refuse, by key and value, what a config may ask of Qwen's decoders and this code does not compute.

    Raises:
        UserError: for sliding windows, other activations, partial rotations and mixtures of experts.
    """

    def refuse(key: str, only: str = "") -> None:
        note = f" (only {only})" if only else ""
        value = settings[key]
        named = repr(shown(value)) if isinstance(value, str) else shown(value)
        raise UserError(f"config.json: {place}{key} {named} is not supported{note}")

    if settings.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    if or_default(settings, "hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    for layer_type in or_default(settings, "layer_types", ()):
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
