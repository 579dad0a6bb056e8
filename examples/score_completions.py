"""Score completions of your own: the published reward terms, and those that read the reasoning.

    python examples/score_completions.py

Three completions for one film whose verified labels are Cardiomegaly and Pleural Effusion. Under the published reward
they earn the same, because their answers are the same; the terms of the trace tell them apart. docs/rewards.md explains
every term. About ten seconds.
"""

import numpy as np

from cxr_jax import labels, rewards
from cxr_jax.labels.taxonomy import NOT_MENTIONED

SOLUTION = "Cardiomegaly, Pleural Effusion"
TRACES = {
    "honest": "Heart: enlarged. Pleura: small right effusion; no pneumothorax. Lungs: clear. "
    "Summary: cardiomegaly, right pleural effusion.",
    "says nothing": "I have looked at the film with care, and this is what I see on it, as follows.",
    "says the opposite": "Heart: normal size. Pleura: no effusion; large left pneumothorax.",
}
MIN_LENGTH = 10  # where the term overshort ends; the published run has 400 tokens
SHOWN = ("accuracy_hard", "trace_answer", "trace_findings", "trace_coverage", "trace_false")


def main() -> None:
    """Print the terms of each completion, and the sums that two sets of weights make of them."""
    texts = [f"<think>{trace}</think><answer>{SOLUTION}</answer>" for trace in TRACES.values()]
    solutions = [SOLUTION] * len(texts)
    lengths = [len(text.split()) for text in texts]  # tokens of your tokenizer; here, words
    terms = rewards.score(
        texts, solutions, lengths, min_length=MIN_LENGTH, max_length=380, limit=400
    )

    print(" " * 18, *(f"{name:>14}" for name in (*SHOWN, "published", "checked")))
    sums = [np.asarray(rewards.combine(terms, w)) for w in (rewards.PUBLISHED, rewards.CHECKED)]
    for row, name in enumerate(TRACES):
        values = [column[row] for column in (*(terms[term] for term in SHOWN), *sums)]
        print(f"{name:<18}", *(f"{value:14.2f}" for value in values))

    # What reads the traces reads any report: 1 affirmed, 0 denied, -1 hedged, -2 not mentioned.
    print("\nWhat each trace says:")
    for name, states in zip(TRACES, labels.parse_reports(list(TRACES.values())), strict=True):
        said = [
            f"{label} {state}"
            for label, state in zip(labels.CHEXPERT_14, states, strict=True)
            if state != NOT_MENTIONED
        ]
        print(f"{name:<18} {', '.join(said) or '(nothing)'}")


if __name__ == "__main__":
    main()
