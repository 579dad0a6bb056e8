"""Scores of a model on held-out images: `run` is the program, `guard` chooses steps while a run goes."""
