"""RL on phantoms under two sets of reward terms, from the embedded SFT model: what does checking the trace buy?

    for p in published checked; do for s in 0 1 2; do bash launch/local.sh \\
        --config=experiments/ablations/rewards.py:$p --workdir=runs/${p}_s$s --config.seed=$s \\
        --config.data.seed=$((s + 1)) --config.eval.n_final=2000; done; done
    python -m cxr_jax.tools.seeds runs/published_s0 runs/published_s1 runs/published_s2     # checked likewise

Phantom results, three seeds each, 40 steps, 2,000 test images a hospital (2026-11-26; docs/rewards.md says what the
terms are). SFT is where all start:

                                     A                           B (out of distribution)
                                     SFT    published  checked   SFT    published  checked
    answers: Jaccard, mean of seeds  0.926  0.968      0.969     0.862  0.922      0.926
      seeds 0, 1, 2: published              0.969, 0.971, 0.963         0.923, 0.920, 0.922
                     checked                0.968, 0.970, 0.969         0.929, 0.925, 0.924
    trace = truth (trace_findings)   0.908                       0.825
      seeds 0, 1, 2: published              0.952, 0.960, 0.735         0.888, 0.889, 0.716
                     checked                0.961, 0.964, 0.964         0.913, 0.908, 0.914
    false sentences a trace          0.13                        0.36
      seeds 0, 1, 2: published              0.12, 0.12, 1.25            0.32, 0.41, 1.63
                     checked                0.13, 0.12, 0.11            0.30, 0.37, 0.30

95 % intervals over images: about +-0.005 on A and +-0.008 on B in Jaccard, +-0.007 and +-0.009 in trace_findings,
+-0.02 and +-0.03 in false sentences (seed 2 of published: +-0.015 and +-0.05). The runs of the published set are of
commit 8f350a3, their models evaluated again (experiments/eval.py) with the terms as they are now; those of the checked
set are of 4513e11.

The answers are as good under either set on A, and a little better under the checked one on B in each seed. The traces
say more of what is there under the checked set, in each seed; and in seed 2 of the published set they went wrong while
the answers improved: from step 20 on, the policy wrote "possible subtle mediastinal widening" on nearly every film (on
the selection images of A, trace_findings went from 0.90 to 0.68). The answer list is not touched by a hedge, so that
reward did not see it; this is the drift that the terms of the trace are there for. Trace and answer agreed in all runs
(0.997 or more): SFT had taught that, and neither set undid it.

A checked set with other weights (trace_false -0.02, no trace_coverage, a wrong side paid like none; commit 8f350a3,
three seeds) gave fewer false sentences (A 0.08 to 0.09, B 0.26 to 0.30) at the same answers (A 0.962, 0.970, 0.970; B
0.916, 0.931, 0.928). It was given up for what it pays scripted exploits (docs/rewards.md), not for its scores.

Time: 5.5 to 7 min of training a run, on one core of an AMD EPYC (Zen 5) that other jobs shared, jax 0.10.2. Not tried:
single terms left out, more steps.
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
