"""alarms.py: each goes off for its own reason, is printed once, and remembers the start of a run that is resumed."""

import pytest

from cxr_jax import rewards
from cxr_jax.metrics import alarms


def healthy():
    row = {f"rewards/{t}/mean": 0.0 for t in rewards.TERMS}
    row |= {f"rewards/{t}/mean": 0.8 for t in ("accuracy", "format", "trace_answer", "trace_truth")}
    row |= {"answers/modal_share": 0.2, "constant/modal_share": 0.15, "constant/best": 0.3}
    row |= {
        "frac_reward_zero_std": 0.3,
        "completions/clipped_ratio": 0.01,
        "completions/mean_length": 100.0,
    }
    return row | {"entropy": 0.4, "sampling/outside_0.9_1.1": 0.0, "skipped_steps": 0.0}


CASES = {
    "few_groups_vary": {"frac_reward_zero_std": 0.95},
    "truncated": {"completions/clipped_ratio": 0.3},
    "entropy_collapse": {"entropy": 0.05},
    "entropy_explosion": {"entropy": 2.0},
    "length_collapse": {"completions/mean_length": 40.0},
    "length_explosion": {"completions/mean_length": 160.0},
    "sampler_and_learner_differ": {"sampling/outside_0.9_1.1": 0.08},
    "steps_skipped": {"skipped_steps": 1.0},
    "constant_answers": {"answers/modal_share": 0.9},
    "format_never_held": {"rewards/format/mean": 0.0},
    "no_better_than_constant": {"rewards/accuracy/mean": 0.3},
    "invented_labels": {"rewards/invented/mean": 2.0},
    "no_finding_beside_findings": {"rewards/no_finding_conflict/mean": 0.5},
    "repetition": {"rewards/repetition/mean": 0.5},
    "trace_contradicts_answer": {"rewards/trace_answer/mean": 0.3},
    "trace_contradicts_truth": {"rewards/trace_truth/mean": 0.3},
    "trace_drifts": {"rewards/trace_false/mean": 1.2},
}


def test_every_alarm_has_a_case():
    assert set(CASES) == set(alarms.ALARMS)


@pytest.mark.parametrize("name", CASES)
def test_an_alarm_goes_off_once_and_is_logged_always(name):
    lines = []
    alarm = alarms.Alarms(out=lines.append)
    assert not any(alarm(healthy()).values()) and not lines
    for _ in range(2):
        assert [k for k, v in alarm(healthy() | CASES[name]).items() if v] == [f"alarms/{name}"]
    assert len(lines) == 1 and name.replace("_", " ") in lines[0] and "\n" not in lines[0]


def test_a_resumed_run_compares_with_the_start_and_repeats_no_line():
    before = alarms.Alarms(out=lambda line: None)
    before(healthy())
    before(healthy() | CASES["truncated"])
    lines = []
    after = alarms.Alarms(before.first, out=lines.append)
    row = after(healthy() | CASES["truncated"] | CASES["entropy_collapse"])
    assert row["alarms/truncated"] == row["alarms/entropy_collapse"] == 1
    assert len(lines) == 1 and "entropy collapse" in lines[0]
