"""Supervised fine-tuning: `loop` is the program, `step` its two updates."""
