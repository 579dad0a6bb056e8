"""Signs that a policy is being fooled or is breaking, from the numbers of a step: a name, a test, and what to look at.

TRL's metric names come first; the others are this project's (docs/rewards.md, docs/rl.md). The levels were set by hand
on phantom runs and scripted exploits; they say "look", not "stop".
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Metrics = Mapping[str, float]

# What a test may compare with: the value at the first step, as "first/<name>".
SINCE_FIRST = ("rewards/trace_false/mean", "entropy", "completions/mean_length")


class Alarm(NamedTuple):
    """A test of a step's metrics, and what to do when it goes off."""

    test: Callable[[Metrics], bool]
    advice: str


ALARMS: dict[str, Alarm] = {}  # name -> alarm, in the order of this file


def _alarm(advice: str) -> Callable[[Callable[[Metrics], bool]], Callable[[Metrics], bool]]:
    """Make an alarm of a test; its name is that of the function."""

    def register(test: Callable[[Metrics], bool]) -> Callable[[Metrics], bool]:
        # The name goes into metrics.jsonl and docs: it is that of the function.
        ALARMS[test.__name__.removeprefix("_")] = Alarm(test, advice)
        return test

    return register


# ---- The tests -------------------------------------------------------------------------------------


@_alarm(
    "over 90 % of the groups earn one reward: nearly nothing is learned. Sample more prompts (rl.oversample), or "
    "the task is solved, or no completion holds the format: see rewards/format/mean"
)
def _few_groups_vary(metrics: Metrics) -> bool:
    return metrics["frac_reward_zero_std"] > 0.9


@_alarm(
    "over 20 % of the completions are cut at max_completion: see completions/mean_length, and raise max_completion "
    "or the weight of overlong"
)
def _truncated(metrics: Metrics) -> bool:
    return metrics["completions/clipped_ratio"] > 0.2


@_alarm(
    "entropy is below a fifth of its start: samples of a group become copies. See answers/modal_share; a lower "
    "learning rate, a higher rl.epsilon_high or rl.beta > 0 slow it"
)
def _entropy_collapse(metrics: Metrics) -> bool:
    return metrics["entropy"] < 0.2 * metrics["first/entropy"]


@_alarm(
    "entropy has more than doubled: text falls apart. Read samples.jsonl; lower the learning rate"
)
def _entropy_explosion(metrics: Metrics) -> bool:
    return metrics["entropy"] > 2.0 * metrics["first/entropy"] + 0.5


@_alarm(
    "completions are half as long as at the start: is the reasoning still there? Read samples.jsonl; the overshort "
    "and trace terms guard it"
)
def _length_collapse(metrics: Metrics) -> bool:
    return metrics["completions/mean_length"] < 0.5 * metrics["first/completions/mean_length"]


@_alarm(
    "completions are half as long again as at the start: padding pays? See rewards/repetition/mean and overlong"
)
def _length_explosion(metrics: Metrics) -> bool:
    return metrics["completions/mean_length"] > 1.5 * metrics["first/completions/mean_length"]


@_alarm(
    "sampler and learner disagree by 10 % on the probability of over 5 % of the tokens: the update is off-policy. "
    "Compute in float32, or correct with rl.sampler_correction"
)
def _sampler_and_learner_differ(metrics: Metrics) -> bool:
    return metrics["sampling/outside_0.9_1.1"] > 0.05


@_alarm("an update was not finite and was left out: lower the learning rate; with beta > 0 see kl")
def _steps_skipped(metrics: Metrics) -> bool:
    return metrics["skipped_steps"] > 0


@_alarm(
    "one answer is given to most films: the image is no longer used. See the image-use audit of the report"
)
def _constant_answers(metrics: Metrics) -> bool:
    return metrics["answers/modal_share"] > min(0.95, max(0.5, 2 * metrics["constant/modal_share"]))


# What a run says of it, and an evaluation, too.
FORMAT_NEVER_HELD = (
    "answers are right and not one text holds the format: nothing is paid, and the traces may be read wrongly. Does "
    "the chat template, the prompt or the target text have other tags, or text in front of <think>? See the texts in "
    "samples.jsonl or the report, and docs/inputs.md, section 4"
)


def format_never_held(accuracy: float, valid_format: float) -> bool:
    """Tell whether answers are right though no text holds the format: more likely a frame than a policy at fault.

    Args:
        accuracy: of the answers whatever the format; scores that count only valid texts are 0 here.
        valid_format: the share of the texts that hold it.
    """
    return accuracy > 0 and valid_format == 0


@_alarm(FORMAT_NEVER_HELD)
def _format_never_held(metrics: Metrics) -> bool:
    return format_never_held(metrics["rewards/accuracy/mean"], metrics["rewards/format/mean"])


@_alarm("a constant answer would earn as much accuracy (constant/best)")
def _no_better_than_constant(metrics: Metrics) -> bool:
    return metrics["rewards/accuracy/mean"] <= metrics["constant/best"]


@_alarm("answers name labels that do not exist, one in two completions")
def _invented_labels(metrics: Metrics) -> bool:
    return metrics["rewards/invented/mean"] > 0.5


@_alarm("answers say No Finding beside findings")
def _no_finding_beside_findings(metrics: Metrics) -> bool:
    return metrics["rewards/no_finding_conflict/mean"] > 0.1


@_alarm("a fifth of the text repeats itself: padding pays?")
def _repetition(metrics: Metrics) -> bool:
    return metrics["rewards/repetition/mean"] > 0.2


@_alarm("the reasoning does not say what the answer says: read samples.jsonl, weigh trace_answer")
def _trace_contradicts_answer(metrics: Metrics) -> bool:
    return metrics["rewards/trace_answer/mean"] < 0.5 * metrics["rewards/format/mean"]


@_alarm(
    "most sentences of the reasoning are false where the answer may be right: read samples.jsonl, weigh "
    "trace_findings"
)
def _trace_contradicts_truth(metrics: Metrics) -> bool:
    return metrics["rewards/trace_truth/mean"] < 0.5 * metrics["rewards/format/mean"]


@_alarm(
    "false sentences have become far more frequent than at the start: read samples.jsonl, weigh trace_findings"
)
def _trace_drifts(metrics: Metrics) -> bool:
    return metrics["rewards/trace_false/mean"] > 0.5 + 2 * metrics["first/rewards/trace_false/mean"]


# ---- The bell ---------------------------------------------------------------------------------------


class Alarms:
    """Tests the metrics of each step, and prints each alarm once, when it first goes off."""

    def __init__(
        self, first: Mapping[str, Any] | None = None, out: Callable[[str], Any] = print
    ) -> None:
        """Start to listen.

        Args:
            first: what `self.first` was in a run that is resumed: the start of the run, and the alarms that it has
                printed.
            out: what takes a line.
        """
        self.first: dict[str, Any] = dict(first or {})
        self._out = out

    def __call__(self, metrics: Metrics) -> dict[str, float]:
        """Test the metrics of a step; returns {"alarms/<name>": 0.0 or 1.0}."""
        for name in SINCE_FIRST:
            # Only the first step sets it; a resumed run brings it along.
            self.first.setdefault(f"first/{name}", float(metrics[name]))
        printed = self.first.setdefault("rung", [])
        current_values = {**metrics, **self.first}
        # What rings is logged at every step, and printed once.
        rings = {name: bool(alarm.test(current_values)) for name, alarm in ALARMS.items()}
        for name in sorted(name for name in rings if rings[name] and name not in printed):
            # A new list: the old one may stand in a checkpoint that is being written.
            self.first["rung"] = [*self.first["rung"], name]
            self._out(f"  alarm: {name.replace('_', ' ')}: {ALARMS[name].advice}")
        return {f"alarms/{name}": float(ringing) for name, ringing in rings.items()}
