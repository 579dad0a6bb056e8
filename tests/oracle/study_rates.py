"""How often the study's tests are wrong: null studies that reject, and intervals that hold what was put in.

    python tests/oracle/study_rates.py [--null=200] [--coverage=300] [--models]

Prints the share of null studies (all arms alike) that reject at .05 and the coverage of the 95 % interval of log time,
full less manual, over studies of 6 readers and 60 cases. `--models` also fits confidence and detection (seconds each).
"""

import argparse
from dataclasses import replace

import numpy as np

from cxr_jax.study import behaviour
from cxr_jax.study.statistics import audit_rates, crossed, ordinal, orh, paired

ARMS = ("manual", "labels", "full")
READERS, CASES, PLANTED = 6, 60, 18
TRUE = -0.25


def _time(conduct):
    return paired.contrast(conduct.log_seconds[2] - conduct.log_seconds[0])


def _model_p(outcome, tables, random_shape):
    arm, reader, case = (index.ravel() for index in np.indices(random_shape))
    fixed = (arm == 1).astype(float)[:, None]
    fit = ordinal.fit_ordinal(outcome.ravel(), fixed, [reader, case])
    from scipy import stats

    return 2 * stats.norm.sf(abs(fit.effects[0] / fit.effect_errors[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--null", type=int, default=200)
    parser.add_argument("--coverage", type=int, default=300)
    parser.add_argument("--models", action="store_true")
    args = parser.parse_args()
    abnormal = np.arange(CASES) % 2 == 0

    rejected = {}
    for seed in range(args.null):
        conduct = behaviour.draw_conduct(behaviour.no_effects(), ARMS, READERS, abnormal, [1, seed])
        found = {"H1 time": _time(conduct).p_value}
        found["AUC"] = orh.compare_arms(conduct.suspicion, abnormal).p_value
        caught = conduct.caught[:, :, :PLANTED].astype(float)
        found["detection, paired"] = paired.contrast(caught[2] - caught[1]).p_value
        if args.models:
            confidence = conduct.confidence[1:]
            found["H2 confidence"] = _model_p(confidence, None, confidence.shape)
            detection = conduct.caught[1:, :, :PLANTED].astype(int)
            found["H3 detection"] = _model_p(detection, None, detection.shape)
            reliance = paired.contrast(caught[0] - caught[2]).one_sided(0.10, -1)
            primary = {
                "H1": found["H1 time"],
                "H2": found["H2 confidence"],
                "H3": max(found["H3 detection"], reliance),
            }
            found["any of H1-H3 after Holm"] = min(audit_rates.holm(primary).values())
        for name, p_value in found.items():
            rejected.setdefault(name, []).append(p_value < 0.05)
    for name, flags in rejected.items():
        print(f"null: {name}: {np.mean(flags):.3f} of {len(flags)}", flush=True)

    effects = replace(behaviour.Effects(), time={"labels": -0.10, "full": TRUE})
    held, power, held_by_bootstrap = [], [], []
    for seed in range(args.coverage):
        conduct = behaviour.draw_conduct(effects, ARMS, READERS, abnormal, [2, seed])
        found = _time(conduct)
        held.append(found.low <= TRUE <= found.high)
        power.append(found.p_value < 0.05)
        if seed < 100:
            [interval] = crossed.crossed_bootstrap(
                conduct.log_seconds, [crossed.mean_difference(2, 0)], resamples=500, seed=seed
            )
            held_by_bootstrap.append(interval.low <= TRUE <= interval.high)
    print(
        f"coverage of full - manual: {np.mean(held):.3f} of {len(held)}, power {np.mean(power):.3f}"
    )
    print(f"coverage of the crossed bootstrap: {np.mean(held_by_bootstrap):.3f} of 100")


if __name__ == "__main__":
    main()
