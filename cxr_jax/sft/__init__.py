"""Supervised fine-tuning: the task `sft`."""

from cxr_jax.sft.loop import check, run

__all__ = ["check", "run"]
