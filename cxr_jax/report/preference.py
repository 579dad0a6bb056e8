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
TOLD = 3  # terms that the sentence names; what is left is "all else"
SHOWN_FROM = 0.005  # a smaller difference would be printed as 0


# ---- Numbers ----


def number(value: float, sign: bool = False) -> str:
    """Write a number with two decimals; nearly 0 is 0. sign: also show a plus."""
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def contributions(group: Group, completion: Completion) -> dict[str, float]:
    """Compute value x weight of each weighed term: they add up to the reward."""
    return {
        term: completion.terms[term] * weight
        for term, weight in group.weights.items()
        if weight and term in completion.terms
    }


def _rank(completion: Completion) -> tuple[float, float]:
    return -np.nan_to_num(completion.advantage), -np.nan_to_num(completion.reward)


def ranked(group: Group) -> list[Completion]:
    """Order the completions: highest advantage first, of equal ones the higher reward."""
    return sorted(group.completions, key=_rank)


def is_same_in_all(group: Group, term: str) -> bool:
    """Say whether a term has the same value in all completions."""
    values = [completion.terms.get(term, 0.0) for completion in group.completions]
    return max(values) - min(values) < SAME


# ---- In words ----


def why(group: Group) -> str:
    """Say in one plain sentence what the best completion earned that the worst did not."""
    order = ranked(group)
    best, worst = order[0], order[-1]
    if best.advantage - worst.advantage < SAME:
        return (
            f"All {len(order)} earned the same: none is preferred, and there is nothing to learn."
        )

    # The terms that differ most, each with what in the texts makes it differ.
    of_best, of_worst = contributions(group, best), contributions(group, worst)
    differences = {term: of_best[term] - of_worst[term] for term in of_best}
    by_size = sorted(
        ((difference, term) for term, difference in differences.items()),
        key=lambda pair: -abs(pair[0]),
    )
    told = [(change, term) for change, term in by_size[:TOLD] if abs(change) >= SHOWN_FROM]
    parts = []
    for change, term in told:
        reason = _reason(group, term, best, worst)
        parts.append(f"{number(change, sign=True)} {term}" + (f" ({reason})" if reason else ""))

    # What is left of the whole difference.
    total = best.reward - worst.reward
    rest = total - sum(change for change, _ in told)
    if abs(rest) >= SHOWN_FROM:
        parts.append(f"{number(rest, sign=True)} all else")
    return f"Best against worst, {number(total, sign=True)} reward: {', '.join(parts)}."


def _reason(group: Group, term: str, best: Completion, worst: Completion) -> str:
    """What in the two texts makes a term differ."""
    if term == "accuracy_hard" and best.valid_format != worst.valid_format:
        return f"the {'worst' if best.valid_format else 'best'}’s format is invalid"
    if term in ("accuracy", "accuracy_hard"):
        return _reason_of_answers(group, best, worst)
    if term in ("trace_findings", "trace_truth", "trace_false"):
        return _reason_of_traces(best, worst)
    if term in ("overshort", "overlong"):
        return f"{best.length} against {worst.length} tokens"
    return f"{number(best.terms[term])} against {number(worst.terms[term])}"


def _reason_of_answers(group: Group, best: Completion, worst: Completion) -> str:
    """The labels that only one of two answers names: the true ones first, then the false."""

    def named(completion: Completion, true: bool) -> set[str]:
        return {
            label
            for label in completion.answer
            if (label in group.truth) == true and _is_decided(group, label)
        }

    phrases = []
    for true, only_best, only_worst in (
        (True, "names {}, which the worst misses", "misses {}, which the worst names"),
        (False, "adds {}", "the worst adds {}"),
    ):
        of_best, of_worst = named(best, true), named(worst, true)
        for phrase, labels in ((only_best, of_best - of_worst), (only_worst, of_worst - of_best)):
            if labels:
                listed = ", ".join(label for label in CHEXPERT_14 if label in labels)
                phrases.append(phrase.format(listed))
    return "; ".join(phrases)


def _false_sentences(completion: Completion) -> list[Sentence]:
    return [sentence for sentence in completion.sentences if sentence.verdict == CONTRADICTS]


def _reason_of_traces(best: Completion, worst: Completion) -> str:
    """How many sentences are false, and where the worst has more of them, what is so instead."""
    of_best, of_worst = _false_sentences(best), _false_sentences(worst)
    text = f"false sentences: {len(of_best)} against {len(of_worst)}"
    reasons: Sequence[str] = list(
        dict.fromkeys(reason for sentence in of_worst for reason in sentence.why)
    )[:3]
    if reasons and len(of_worst) > len(of_best):
        text += f"; in truth: {', '.join(reasons)}"
    return text


def _is_decided(group: Group, label: str) -> bool:
    """Whether the reference says anything of a label."""
    return group.known is None or label in group.known
