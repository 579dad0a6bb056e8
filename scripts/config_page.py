"""Writes docs/config.md, the page of all config keys: `python -m scripts.config_page`."""

from pathlib import Path

from cxr_jax.config import schema

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

if __name__ == "__main__":
    PAGE.write_text(schema.markdown(), encoding="utf-8")
    print(PAGE)
