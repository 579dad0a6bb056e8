"""Configs of an evaluation: phantom (default), files."""

from ml_collections import ConfigDict

from cxr_jax.config import schema
from cxr_jax.errors import UserError

PRESETS = ("phantom", "files")


def get_config(preset: str = "phantom") -> ConfigDict:
    """Build the config of an evaluation: of phantoms of two hospitals, or of the held-out rows of a manifest.

    Raises:
        UserError: for any other preset.
    """
    if preset not in PRESETS:
        raise UserError(
            f"experiments/eval.py has no preset {preset!r}; it has: {', '.join(PRESETS)}"
        )
    return schema.defaults("evaluate", preset)
