"""Quantized folders are refused by name: their tensors need arithmetic that is not here.

A folder says that it is quantized in its config.json, in a file beside it (older writers), or only by its tensors. A
file beside config.json may also be a leftover of other weights, so it counts with packed tensors alone.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cxr_jax.errors import UserError, shown
from cxr_jax.weights.safetensors_file import stored_names

# transformers (AWQ, GPTQ, bitsandbytes, FP8, compressed-tensors ..); compressed-tensors by itself; MLX.
_KEYS = ("quantization_config", "compression_config", "quantization")
# AutoGPTQ, AutoAWQ, ModelOpt: what they wrote before, or write beside, config.json.
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Last parts of the names of what stands in place of a weight, or beside it: packed numbers, scales, code books.
_PACKED = frozenset(
    ("qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "scales")
    + ("input_scale", "weight_zero_point", "absmax", "quant_map", "SCB", "weight_format")
)
# What says how, or to how many bits. All else (group sizes, modules to leave out) describes what these turn on.
_DECISIVE = frozenset(
    ("quant_method", "quant_algo", "quant_type", "format", "quantization")
    + ("bits", "nbits", "num_bits", "w_bit")
    + ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
)
_ADVICE = "quantized weights are not read; take the folder that it was made from"


def refuse(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that says that its weights are quantized; no weight is read.

    Args:
        settings: the content of its config.json.

    Raises:
        UserError: which names `quantization_config`, or what stands in its place.
    """
    # The first that is found says enough.
    for place, key, value in _declared(settings):
        how = f" ({_method(value)})" if _method(value) else ""
        raise UserError(f"{folder}: config.json has {place}{_named(key)}{how}: {_ADVICE}")
    for name in _FILES:
        if (folder / name).is_file() and not _is_plain(folder):
            raise UserError(
                f"{folder}: {name} says what quantization_config says in config.json: {_ADVICE}"
            )


def _is_plain(folder: Path) -> bool:
    """Whether the weights are there and none is packed, by their names."""
    try:
        return packed_tensor(stored_names(folder)) is None
    except UserError:
        # Weights in another file, as AutoGPTQ names them, or of a type such as FP8: then the file beside them is right.
        return False


def _declared(settings: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(where, key, value) of whatever in a config.json says that weights are quantized."""
    # transformers 5 may nest it in the settings of the decoder. Null, and an empty object, say nothing.
    sections = {"": settings} | {f"{name}.": part for name, part in settings.items()}
    for place, section in sections.items():
        for key in _KEYS if isinstance(section, dict) else ():
            # An object of a name that others may use for their own settings counts at the top alone.
            counts = not place or key == "quantization_config"
            if counts and _says_quantized(section.get(key)):
                yield place, key, section[key]


def _says_quantized(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in ("", "none", "null", "false")
    if isinstance(value, dict):
        return any(
            (key in _DECISIVE or isinstance(part, dict)) and _says_quantized(part)
            for key, part in value.items()
        )
    return bool(value)


def _named(key: str) -> str:
    return key if key == "quantization_config" else f"{key} (a quantization_config)"


def _method(value: object) -> str:
    """How the folder was quantized, in its own words."""
    if not isinstance(value, dict):
        return ""
    # The key of transformers, that of ModelOpt, and that of compressed-tensors.
    method = value.get("quant_method") or value.get("quant_algo") or value.get("format")
    bits = value.get("bits") or ("4" if value.get("load_in_4bit") else None)
    words = [] if method is None else [shown(method).strip("'")]
    # A number only: a damaged file may hold anything here.
    if isinstance(bits, int | str) and str(bits).isdecimal():
        words.append(f"{bits} bits")
    return ", ".join(words)


def packed_tensor(tensor_names: Iterable[str]) -> str | None:
    """Find the name of a tensor that only quantized folders have; None without one."""
    for tensor_name in sorted(tensor_names):
        if _PACKED.intersection(tensor_name.split(".")[-2:]) or "quant_state" in tensor_name:
            return tensor_name
    return None
