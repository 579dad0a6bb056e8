"""Configs of an evaluation: phantom (default), files."""

from ml_collections import ConfigDict

from cxr_jax.config import schema
from cxr_jax.errors import UserError

# Where the images come from; both read the embedded model unless a flag names another.
PRESETS = ("phantom", "files")


def get_config(preset: str = "phantom") -> ConfigDict:
    """Build the config of an evaluation: of phantoms of two hospitals, or of the held-out rows of a manifest.

    Raises:
        UserError: for any other preset.
    """
    # Before the config is made: a mistyped preset should not become a source of data.
    if preset not in PRESETS:
        raise UserError(
            f"experiments/eval.py has no preset {preset!r}; it has: {', '.join(PRESETS)}"
        )
    return schema.defaults("evaluate", preset)
