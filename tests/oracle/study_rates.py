"""How often the study's tests are wrong: null studies that reject, and intervals that hold what was put in.

    python tests/oracle/study_rates.py [--null=200] [--coverage=300] [--models] [--power=20]

Prints the share of null studies (all arms alike) that reject at .05 and the coverage of the 95 % interval of log time,
full less manual, over studies of 6 readers and 60 cases. `--models` also fits confidence and detection (seconds each).
`--power` asks of the default effects, for several designs, how often each interval of the report holds what was put in,
and how often it leaves the null out: what a demonstration of one seed can be expected to show.
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


def _fit(outcome):
    arm, reader, case = (index.ravel() for index in np.indices(outcome.shape))
    fixed = (arm == 1).astype(float)[:, None]
    # As the analysis has them: reader, case and reader by arm.
    return ordinal.fit_ordinal(outcome.ravel(), fixed, [reader, case, 2 * reader + arm])


def _model_p(outcome):
    from scipy import stats

    fit = _fit(outcome)
    return 2 * stats.norm.sf(abs(fit.effects[0] / fit.effect_errors[0]))


def _intervals(conduct, planted, resamples):
    """Each interval that a report of the study would have, with what was put in and the null."""
    fit = _fit(conduct.confidence[1:])
    estimate, error = float(fit.effects[0]), float(fit.effect_errors[0])
    caught = conduct.caught[:, :, :planted].astype(float)
    [gap] = crossed.crossed_bootstrap(
        caught, [crossed.mean_difference(2, 1)], resamples=resamples, seed=1
    )
    gap_paired = paired.contrast(caught[2] - caught[1])
    time = _time(conduct)
    return {
        "time": (time.low, time.high, TRUE),
        "confidence": (estimate - 1.96 * error, estimate + 1.96 * error, 0.9),
        "detection, bootstrap": (gap.low, gap.high, 0.35),
        "detection, paired": (gap_paired.low, gap_paired.high, 0.35),
    }


def _power(studies, resamples=1000):
    designs = ((6, 24, 0.3), (6, 60, 0.3))
    for readers, cases, share in designs:
        planted, abnormal = round(share * cases), np.arange(cases) % 2 == 0
        outcomes = {}
        for seed in range(studies):
            conduct = behaviour.draw_conduct(
                behaviour.Effects(), ARMS, readers, abnormal, [3, seed]
            )
            for name, (low, high, true) in _intervals(conduct, planted, resamples).items():
                outcomes.setdefault(name, []).append((low <= true <= high, low > 0 or high < 0))
        told = "; ".join(
            f"{name}: holds the truth {sum(held for held, _ in rows)}, leaves out 0 "
            f"{sum(left_out for _, left_out in rows)}"
            for name, rows in outcomes.items()
        )
        print(
            f"{readers} readers, {cases} cases, {planted} planted, of {studies}: {told}", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--null", type=int, default=200)
    parser.add_argument("--coverage", type=int, default=300)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--power", type=int, default=0)
    args = parser.parse_args()
    abnormal = np.arange(CASES) % 2 == 0
    if args.power:
        return _power(args.power)

    rejected = {}
    for seed in range(args.null):
        conduct = behaviour.draw_conduct(behaviour.no_effects(), ARMS, READERS, abnormal, [1, seed])
        found = {"H1 time": _time(conduct).p_value}
        found["AUC"] = orh.compare_arms(conduct.suspicion, abnormal).p_value
        caught = conduct.caught[:, :, :PLANTED].astype(float)
        found["detection, paired"] = paired.contrast(caught[2] - caught[1]).p_value
        if args.models:
            # As the analysis decides: the larger p value of the model and of the contrast of the same cells.
            confidence = conduct.confidence[1:]
            found["H2 confidence, model"] = _model_p(confidence)
            of_readers = paired.contrast((confidence[1] - confidence[0]).astype(float)).p_value
            found["H2 confidence"] = max(found["H2 confidence, model"], of_readers)
            detection = conduct.caught[1:, :, :PLANTED].astype(int)
            found["H3 detection, model"] = _model_p(detection)
            found["H3 detection"] = max(found["H3 detection, model"], found["detection, paired"])
            # One-sided against the margin, and doubled.
            reliance = 2 * paired.contrast(caught[0] - caught[2]).one_sided(0.10, -1)
            primary = {
                "H1": found["H1 time"],
                "H2": found["H2 confidence"],
                "H3": min(1.0, max(found["H3 detection"], reliance)),
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
