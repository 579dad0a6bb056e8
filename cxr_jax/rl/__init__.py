"""On-policy GRPO: the task `rl`."""

from cxr_jax.rl.loop import check, run

__all__ = ["check", "run"]
