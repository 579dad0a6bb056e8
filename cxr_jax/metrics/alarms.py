"""Signs that a policy is being fooled or is breaking, from the numbers of a step: a name, a test, and what to look at.

TRL's metric names come first; the others are this project's (docs/rewards.md, docs/rl.md). The levels were set by hand
on phantom runs and scripted exploits; they say "look", not "stop".
"""

from collections.abc import Mapping

# What a test may compare with: the value at the first step, as "first/<name>".
SINCE_FIRST = ("rewards/trace_false/mean", "entropy", "completions/mean_length")

ALARMS = {
    "few_groups_vary": (
        lambda m: m["frac_reward_zero_std"] > 0.9,
        "over 90 % of the groups earn one reward: nearly nothing is learned. Sample more prompts (rl.oversample), or "
        "the task is solved, or no completion holds the format: see rewards/format/mean",
    ),
    "truncated": (
        lambda m: m["completions/clipped_ratio"] > 0.2,
        "over 20 % of the completions are cut at max_completion: see completions/mean_length, and raise max_completion "
        "or the weight of overlong",
    ),
    "entropy_collapse": (
        lambda m: m["entropy"] < 0.2 * m["first/entropy"],
        "entropy is below a fifth of its start: samples of a group become copies. See answers/modal_share; a lower "
        "learning rate, a higher rl.epsilon_high or rl.beta > 0 slow it",
    ),
    "entropy_explosion": (
        lambda m: m["entropy"] > 2.0 * m["first/entropy"] + 0.5,
        "entropy has more than doubled: text falls apart. Read samples.jsonl; lower the learning rate",
    ),
    "length_collapse": (
        lambda m: m["completions/mean_length"] < 0.5 * m["first/completions/mean_length"],
        "completions are half as long as at the start: is the reasoning still there? Read samples.jsonl; the overshort "
        "and trace terms guard it",
    ),
    "length_explosion": (
        lambda m: m["completions/mean_length"] > 1.5 * m["first/completions/mean_length"],
        "completions are half as long again as at the start: padding pays? See rewards/repetition/mean and overlong",
    ),
    "sampler_and_learner_differ": (
        lambda m: m["sampling/outside_0.9_1.1"] > 0.05,
        "sampler and learner disagree by 10 % on the probability of over 5 % of the tokens: the update is off-policy. "
        "Compute in float32, or correct with rl.sampler_correction",
    ),
    "steps_skipped": (
        lambda m: m["skipped_steps"] > 0,
        "an update was not finite and was left out: lower the learning rate; with beta > 0 see kl",
    ),
    "constant_answers": (
        lambda m: m["answers/modal_share"] > min(0.95, max(0.5, 2 * m["constant/modal_share"])),
        "one answer is given to most films: the image is no longer used. See the image-use audit of the report",
    ),
    "no_better_than_constant": (
        lambda m: m["rewards/accuracy/mean"] <= m["constant/best"],
        "a constant answer would earn as much accuracy (constant/best)",
    ),
    "invented_labels": (
        lambda m: m["rewards/invented/mean"] > 0.5,
        "answers name labels that do not exist, one in two completions",
    ),
    "no_finding_beside_findings": (
        lambda m: m["rewards/no_finding_conflict/mean"] > 0.1,
        "answers say No Finding beside findings",
    ),
    "repetition": (
        lambda m: m["rewards/repetition/mean"] > 0.2,
        "a fifth of the text repeats itself: padding pays?",
    ),
    "trace_contradicts_answer": (
        lambda m: m["rewards/trace_answer/mean"] < 0.5 * m["rewards/format/mean"],
        "the reasoning does not say what the answer says: read samples.jsonl, weigh trace_answer",
    ),
    "trace_contradicts_truth": (
        lambda m: m["rewards/trace_truth/mean"] < 0.5 * m["rewards/format/mean"],
        "most sentences of the reasoning are false where the answer may be right: read samples.jsonl, weigh "
        "trace_findings",
    ),
    "trace_drifts": (
        lambda m: m["rewards/trace_false/mean"] > 0.5 + 2 * m["first/rewards/trace_false/mean"],
        "false sentences have become far more frequent than at the start: read samples.jsonl, weigh trace_findings",
    ),
}


class Alarms:
    """alarms(row of metrics) -> {"alarms/<name>": 0.0 or 1.0}; prints each alarm once, when it first goes off.

    first: what `self.first` was in a run that is resumed: the start of the run, and the alarms that it has printed.
    """

    def __init__(self, first: dict | None = None, out=print):
        self.first, self._out = dict(first or {}), out

    def __call__(self, row: Mapping[str, float]) -> dict[str, float]:
        for name in SINCE_FIRST:
            self.first.setdefault(f"first/{name}", float(row[name]))
        self.first.setdefault("rung", [])
        on = {name: bool(test({**row, **self.first})) for name, (test, _) in ALARMS.items()}
        for name in sorted(
            n for n, ringing in on.items() if ringing and n not in self.first["rung"]
        ):
            self.first["rung"] = [*self.first["rung"], name]
            self._out(f"  alarm: {name.replace('_', ' ')}: {ALARMS[name][1]}")
        return {f"alarms/{name}": float(ringing) for name, ringing in on.items()}
