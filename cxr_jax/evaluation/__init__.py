"""Evaluation: the task `evaluate`, and what SFT and RL call of it."""

from cxr_jax.evaluation.run import check, run

__all__ = ["check", "run"]
