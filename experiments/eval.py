"""Evaluation of one model on phantoms of hospitals A and B, or on the held-out rows of a manifest (:files).

    python -m cxr_jax.main --config=experiments/eval.py --workdir=runs/eval --config.model=runs/rl_phantom

About a minute for 2 x 2,000 phantoms on 2 cores.
"""

from cxr_jax.presets.evaluate import get_config

__all__ = ["get_config"]
