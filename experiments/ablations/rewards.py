"""RL on phantoms under two sets of reward terms, from the embedded SFT model: what does checking the trace buy?

    for p in published checked; do for s in 0 1 2; do bash launch/local.sh --config=experiments/ablations/rewards.py:$p \
        --workdir=runs/${p}_s$s --config.seed=$s --config.data.seed=$((s + 1)) --config.eval.n_final=2000; done; done
    python -m cxr_jax.tools.seeds runs/published_s0 runs/published_s1 runs/published_s2     # checked likewise

Phantom results, three seeds each, 40 steps, 2,000 test images a hospital (2026-11-26, commit 8f350a3; docs/rewards.md says
what the terms are). SFT is where all start:

                                     A                           B (out of distribution)
                                     SFT    published  checked   SFT    published  checked
    answers: Jaccard, mean of seeds  0.926  0.968      0.967     0.862  0.922      0.925
      seed 0                                0.969      0.962            0.923      0.916
      seed 1                                0.971      0.970            0.920      0.931
      seed 2                                0.963      0.970            0.922      0.928
    trace = truth (trace_findings)
      seed 0                         0.909  0.953      0.960     0.829  0.893      0.909
      seed 1                                0.963      0.965            0.897      0.923
      seed 2                                0.737      0.965            0.724      0.922
    false sentences a trace
      seed 0                         0.13   0.12       0.09      0.36   0.32       0.30
      seed 1                                0.12       0.08            0.41       0.26
      seed 2                                1.25       0.08            1.63       0.26

95 % intervals over images: about +-0.007 in Jaccard, +-0.007 on A and +-0.009 on B in trace_findings, +-0.02 and +-0.03 in
false sentences (seed 2 of published: +-0.015 and +-0.05).

The answers are as good under either set: the differences between seeds are as large as between sets. The traces are
better under the checked set in each of the three seeds, and in seed 2 of the published set they went wrong while the
answers improved: from step 20 on, the policy wrote "possible subtle mediastinal widening" on nearly every film (step 40
on the selection images: trace_findings 0.68 on A, from 0.90). The answer list is not touched by a hedge, so that reward
did not see it; this is the drift that the terms of the trace are there for. Trace and answer agreed in all runs (0.997
or more): SFT had taught that, and neither set undid it.

Time: 5.5 to 7 min of training a run, on one core of an AMD EPYC (Zen 5) that other jobs shared, jax 0.10.2. Not tried:
other weights of the terms, single terms left out, more steps.
"""

from ml_collections import ConfigDict

from cxr_jax import rewards
from cxr_jax.errors import UserError
from experiments import rl

SETS = {"published": rewards.PUBLISHED, "checked": rewards.CHECKED}


def get_config(preset: str = "checked") -> ConfigDict:
    """Presets: published (accuracy_hard + overshort), checked (the default of experiments/rl.py)."""
    if preset not in SETS:
        raise UserError(f"experiments/ablations/rewards.py has no preset {preset!r}; it has: {', '.join(SETS)}")
    c = rl.get_config("phantom")
    c.rl.reward_weights = ConfigDict(rewards.weights(SETS[preset]))
    return c
