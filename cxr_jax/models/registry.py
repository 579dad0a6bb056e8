"""The model families by the `model_type` of their `config.json`: a new one is a folder, and a line here."""

import dataclasses
import math
from typing import Any

from cxr_jax.errors import UserError
from cxr_jax.models.family import Family
from cxr_jax.models.gemma3.family import FAMILY as GEMMA3
from cxr_jax.models.image_processor import ImageProcessor
from cxr_jax.models.qwen2_5_vl.family import FAMILY as QWEN2_5_VL
from cxr_jax.models.qwen3_vl.family import FAMILY as QWEN3_VL

# Imported by name and not found in folders, so that a broken family fails here, and says so.
FAMILIES: tuple[Family, ...] = (QWEN2_5_VL, QWEN3_VL, GEMMA3)


def family_of_type(model_type: object) -> Family:
    """Find the family of a `model_type`.

    Raises:
        UserError: for a type that is none of the registered ones.
    """
    # By comparison and not by hash: a damaged file may hold anything here.
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = " or ".join(repr(family.model_type) for family in FAMILIES)
    raise UserError(f"config.json: model_type {model_type!r} is not {known}")


def family_of(model_config: Any) -> Family:
    """Find the family of a config."""
    return family_of_type(model_config.model_type)


def processor_of(model_config: Any) -> ImageProcessor:
    """Find how pictures become patches of a model: its family's processor, with the sizes of patches of its config."""
    vision, processor = model_config.vision, family_of(model_config).processor
    # Small models of tests have small patches.
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    if processor.side is not None:
        # As many patches as the model has positions for.
        side = math.isqrt(vision.position_table) * vision.patch_size
        limits = (side**2, side**2)
        sizes |= {"side": side, "default_limits": limits, "published_limits": limits}
    return dataclasses.replace(processor, **sizes)


def read_config(settings: dict) -> Any:
    """Read a parsed `config.json` as the config of its family.

    Raises:
        UserError: for an unknown family, or an option that the family does not compute.
    """
    return family_of_type(settings.get("model_type")).read_config(settings)


def sizes() -> dict[str, Any]:
    """Collect the named sizes of all families: "random:SIZE" -> config."""
    return {name: config for family in FAMILIES for name, config in family.sizes.items()}
