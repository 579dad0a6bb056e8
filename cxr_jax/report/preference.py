"""Why the best completion of a group was preferred to the worst, in words."""

from collections.abc import Sequence

import numpy as np

from cxr_jax.labels.sentences import CONTRADICTS, Sentence
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report.group_records import SAME, Completion, Group

ABOUT = {  # docs/rewards.md, in a line each
    "accuracy": "labels right of all that are named or true (Jaccard)",
    "format": "is the text <think>…</think><answer>…</answer>?",
    "tag_count": "¼ for each tag that occurs once",
    "accuracy_hard": "accuracy, if the format is valid",
    "overshort": "0, or below 0 if the text is short",
    "invented": "answer items that are no label",
    "no_finding_conflict": "No Finding beside a finding",
    "overlong": "0, or below 0 near the limit",
    "repetition": "share of repeated 8-token runs",
    "trace_answer": "does the reasoning say what the answer says?",
    "trace_findings": "does the reasoning affirm what is there, on its side, and nothing else?",
    "trace_coverage": "share of the 13 findings rightly affirmed or denied in the reasoning",
    "trace_truth": "share of claiming sentences without an error",
    "trace_false": "how many sentences claim what is not so",
}
NAMED_TERMS = 3  # terms that the sentence names; what is left is "all else"
SHOWN_FROM = 0.005  # a smaller difference would be printed as 0


# ---- Numbers ----


def number(value: float, sign: bool = False) -> str:
    """Write a number with two decimals; nearly 0 is 0. sign: also show a plus."""
    written = f"{value:+.2f}" if sign else f"{value:.2f}"
    return ("0" if float(written) == 0 else written).replace("-", "−")


def contributions(group: Group, completion: Completion) -> dict[str, float]:
    """Compute value x weight of each weighed term: they add up to the reward."""
    # A term of weight 0 is measured and shown, but is no part of the reward.
    return {
        reward_term: completion.terms[reward_term] * weight
        for reward_term, weight in group.weights.items()
        if weight and reward_term in completion.terms
    }


def _rank(completion: Completion) -> tuple[float, float]:
    # Negative, so that the best comes first while equal ones keep their order.
    return -np.nan_to_num(completion.advantage), -np.nan_to_num(completion.reward)


def ranked(group: Group) -> list[Completion]:
    """Order the completions: highest advantage first, of equal ones the higher reward."""
    return sorted(group.completions, key=_rank)


def is_same_in_all(group: Group, reward_term: str) -> bool:
    """Say whether a term has the same value in all completions."""
    # A term that a completion lacks counts as 0, as it does in its reward.
    values = [completion.terms.get(reward_term, 0.0) for completion in group.completions]
    return max(values) - min(values) < SAME


# ---- In words ----


def why(group: Group) -> str:
    """Say in one plain sentence what the best completion earned that the worst did not."""
    best_first = ranked(group)
    best, worst = best_first[0], best_first[-1]
    # Equal advantages cancel: the update has nothing to prefer.
    if best.advantage - worst.advantage < SAME:
        return f"All {len(best_first)} earned the same: none is preferred, and there is nothing to learn."

    # The terms that differ most, each with what in the texts makes it differ.
    of_best, of_worst = contributions(group, best), contributions(group, worst)
    differences = {
        reward_term: of_best[reward_term] - of_worst[reward_term] for reward_term in of_best
    }
    by_size = sorted(
        ((difference, reward_term) for reward_term, difference in differences.items()),
        key=lambda pair: -abs(pair[0]),
    )
    named_terms = [
        (contribution, reward_term)
        for contribution, reward_term in by_size[:NAMED_TERMS]
        if abs(contribution) >= SHOWN_FROM
    ]
    parts = []
    for contribution, reward_term in named_terms:
        reason = _reason(group, reward_term, best, worst)
        parts.append(
            f"{number(contribution, sign=True)} {reward_term}" + (f" ({reason})" if reason else "")
        )

    # What is left of the whole difference.
    total = best.reward - worst.reward
    remainder = total - sum(contribution for contribution, _ in named_terms)
    if abs(remainder) >= SHOWN_FROM:
        parts.append(f"{number(remainder, sign=True)} all else")
    return f"Best against worst, {number(total, sign=True)} reward: {', '.join(parts)}."


def _reason(group: Group, reward_term: str, best: Completion, worst: Completion) -> str:
    """What in the two texts makes a term differ."""
    # An invalid format takes all of this term, whatever the answers say.
    if reward_term == "accuracy_hard" and best.valid_format != worst.valid_format:
        return f"the {'worst' if best.valid_format else 'best'}’s format is invalid"
    # The other terms are told by what they judge: answers, sentences, lengths.
    if reward_term in ("accuracy", "accuracy_hard"):
        return _reason_of_answers(group, best, worst)
    if reward_term in ("trace_findings", "trace_truth", "trace_false"):
        return _reason_of_traces(best, worst)
    if reward_term in ("overshort", "overlong"):
        return f"{best.length} against {worst.length} tokens"
    return f"{number(best.terms[reward_term])} against {number(worst.terms[reward_term])}"


def _reason_of_answers(group: Group, best: Completion, worst: Completion) -> str:
    """The labels that only one of two answers names: the true ones first, then the false."""

    def named(completion: Completion, is_true: bool) -> set[str]:
        return {
            label
            for label in completion.answer
            if (label in group.truth) == is_true and _is_decided(group, label)
        }

    phrases = []
    # True labels first: they are what the reward asks for.
    for is_true, only_best, only_worst in (
        (True, "names {}, which the worst misses", "misses {}, which the worst names"),
        (False, "adds {}", "the worst adds {}"),
    ):
        of_best, of_worst = named(best, is_true), named(worst, is_true)
        for template, labels in ((only_best, of_best - of_worst), (only_worst, of_worst - of_best)):
            if labels:
                # In the order of the 14, so that a sentence does not change from run to run.
                listed_labels = ", ".join(label for label in CHEXPERT_14 if label in labels)
                phrases.append(template.format(listed_labels))
    return "; ".join(phrases)


def _false_sentences(completion: Completion) -> list[Sentence]:
    return [sentence for sentence in completion.sentences if sentence.verdict == CONTRADICTS]


def _reason_of_traces(best: Completion, worst: Completion) -> str:
    """How many sentences are false, and where the worst has more of them, what is so instead."""
    of_best, of_worst = _false_sentences(best), _false_sentences(worst)
    sentence_counts = f"false sentences: {len(of_best)} against {len(of_worst)}"
    reasons: Sequence[str] = list(
        dict.fromkeys(reason for sentence in of_worst for reason in sentence.why)
    )[:3]
    # What is so instead explains the worse one only if it has more false sentences.
    if reasons and len(of_worst) > len(of_best):
        sentence_counts += f"; in truth: {', '.join(reasons)}"
    return sentence_counts


def _is_decided(group: Group, label: str) -> bool:
    """Whether the reference says anything of a label."""
    return group.known is None or label in group.known
