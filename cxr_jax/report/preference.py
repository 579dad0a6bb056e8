"""Why the best completion of a group was preferred to the worst, in words."""

import numpy as np

from cxr_jax.labels.sentences import CONTRADICTS
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.report.group_records import SAME, Completion, Group

# In words --------------------------------------------------------------------------------------------

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


def number(x: float, sign: bool = False) -> str:
    text = f"{x:+.2f}" if sign else f"{x:.2f}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def contributions(group: Group, c: Completion) -> dict[str, float]:
    """Weighed term -> value x weight: they add up to the reward."""
    return {k: c.terms[k] * w for k, w in group.weights.items() if w and k in c.terms}


def ranked(group: Group) -> list[Completion]:
    """Highest advantage first, of equal ones the higher reward."""
    return sorted(
        group.completions, key=lambda c: (-np.nan_to_num(c.advantage), -np.nan_to_num(c.reward))
    )


def _is_same(group: Group, term: str) -> bool:
    values = [c.terms.get(term, 0.0) for c in group.completions]
    return max(values) - min(values) < SAME


def why(group: Group) -> str:
    """One plain sentence: what the best completion earned that the worst did not."""
    order = ranked(group)
    best, worst = order[0], order[-1]
    if best.advantage - worst.advantage < SAME:
        return (
            f"All {len(order)} earned the same: none is preferred, and there is nothing to learn."
        )
    a, b = contributions(group, best), contributions(group, worst)
    change = sorted(((a[k] - b[k], k) for k in a), key=lambda x: -abs(x[0]))
    told = [(d, k) for d, k in change[:3] if abs(d) >= 0.005]
    parts = []
    for difference, term in told:
        reason = _reason(group, term, best, worst)
        parts.append(f"{number(difference, True)} {term}" + (f" ({reason})" if reason else ""))
    total = best.reward - worst.reward
    rest = total - sum(d for d, _ in told)
    if abs(rest) >= 0.005:
        parts.append(f"{number(rest, True)} all else")
    return f"Best against worst, {number(total, True)} reward: {', '.join(parts)}."


def _reason(group: Group, term: str, best: Completion, worst: Completion) -> str:
    """What in the two texts makes a term differ."""
    if term in ("accuracy", "accuracy_hard"):
        if term == "accuracy_hard" and best.valid_format != worst.valid_format:
            return f"the {'worst' if best.valid_format else 'best'}’s format is invalid"
        said = []
        true = ("names {}, which the worst misses", "misses {}, which the worst names")
        false = ("adds {}", "the worst adds {}")
        for right, pair in ((True, true), (False, false)):
            named = [
                {k for k in c.answer if (k in group.truth) == right and _counts(group, k)}
                for c in (best, worst)
            ]
            for text, more in zip(pair, (named[0] - named[1], named[1] - named[0]), strict=True):
                if more:
                    said.append(text.format(", ".join(k for k in CHEXPERT_14 if k in more)))
        return "; ".join(said)
    if term in ("trace_findings", "trace_truth", "trace_false"):
        false = [[s for s in c.sentences if s.verdict == CONTRADICTS] for c in (best, worst)]
        reasons = list(dict.fromkeys(w for s in false[1] for w in s.why))[:3]
        text = f"false sentences: {len(false[0])} against {len(false[1])}"
        return text + (
            f"; in truth: {', '.join(reasons)}" if reasons and len(false[1]) > len(false[0]) else ""
        )
    if term in ("overshort", "overlong"):
        return f"{best.length} against {worst.length} tokens"
    return f"{number(best.terms[term])} against {number(worst.terms[term])}"


def _counts(group: Group, label: str) -> bool:
    return group.known is None or label in group.known
