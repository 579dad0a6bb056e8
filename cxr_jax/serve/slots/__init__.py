"""Completions side by side, each at a step of its own: their programs, rooms, prompts and texts."""
