"""Where the presets are that ship with the package: `--config=rl` is presets/rl.py, wherever one stands."""

from pathlib import Path

PRESET_FOLDER = Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """Return what `--config` takes in place of a file."""
    return sorted(preset_path.stem for preset_path in PRESET_FOLDER.glob("[!_]*.py"))
