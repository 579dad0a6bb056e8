"""Doors under their old names, kept for one release; see CHANGELOG.md."""
