"""What naming everything earns where a table leaves labels blank: `python -m experiments.analysis.blank_labels TABLE`.

TABLE is a label table as `cxr-jax manifest` reads it; the answers are scripted, and no image is read. One Markdown
table, that of docs/rewards.md: Jaccard (which is the reward term accuracy) and macro-F1 of each answer where blank
labels cost nothing to name, half of a false one (`taxonomy.BLANK_PRICE`, what rewards and scores do), and where blank
is negative.
"""

import sys
from collections.abc import Sequence

import numpy as np

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.sources import label_table, policy
from cxr_jax.errors import exit_code
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference

ONE_RESAMPLE = Bootstrap(1)  # intervals are not shown


def read_states(path: str) -> np.ndarray:
    """Read the states of the frontal films that have a row in a manifest: [N, 14], 1, 0, -1; 2 for a blank one."""
    rows, _ = label_table.convert(label_table.read_table(path))
    return np.array([[row["labels"].get(label, 2) for label in CHEXPERT_14] for row in rows])


def answer_all(states: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the scripted answers, bool [N, 14] each.

    The mediocre reader misses 3 of 10 findings and names 1 of 20 labels that are not positive.
    """
    positive = states == 1
    generator = np.random.default_rng(seed)
    seen = positive & (generator.random(states.shape) < 0.7)
    imagined = ~positive & (generator.random(states.shape) < 0.05)
    by_frequency = np.argsort(-positive.mean(axis=0), kind="stable")

    def always(labels: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.tile(np.isin(np.arange(len(CHEXPERT_14)), labels), (len(states), 1))

    return {
        "the truth": positive,
        "the truth and all that is uncertain": positive | (states == -1),
        "mediocre reader": seen | imagined,
        "mediocre reader, and all that is blank": seen | imagined | (states == 2),
        "always all labels": always(np.arange(len(CHEXPERT_14))),
        "always the four most frequent": always(by_frequency[:4]),
        "always No Finding": always([0]),
    }


def references(states: np.ndarray) -> dict[str, Reference]:
    """Give the truth under each way to count what is blank."""
    positive, known, uncertain = states == 1, (states == 0) | (states == 1), states == -1
    blank = ~known & ~policy.may_be_named(positive, known, uncertain)
    return {
        "named for nothing": Reference(positive, known),
        "at half a price": Reference(positive, known, blank=blank),
        "blank=negative": Reference(positive, ~uncertain),
    }


def table(states: np.ndarray) -> dict[str, list[tuple[float, float]]]:
    """Score every answer: name -> (Jaccard, macro-F1) under each of `references`."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in answer_all(states)}
    for reference in references(states).values():
        for name, answer in answer_all(states).items():
            summary = scores.summary(Answers(answer), reference, bootstrap=ONE_RESAMPLE)
            rows[name].append((summary["jaccard"]["value"], summary["macro_f1"]["all"]["value"]))
    return rows


def run(path: str) -> None:
    """Print the table."""
    states = read_states(path)
    known = np.isin(states, (0, 1)).mean()
    print(f"{len(states):,} rows, {known:.1%} of the label cells known\n")
    print(
        "| answer | "
        + " | ".join(f"{name}: Jaccard, macro-F1" for name in references(states))
        + " |"
    )
    print("|---|" + "--:|" * len(references(states)))
    for name, values in table(states).items():
        cells = " | ".join(f"{jaccard:.3f}, {macro_f1:.3f}" for jaccard, macro_f1 in values)
        print(f"| {name} | {cells} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = ArgumentParser("experiments.analysis.blank_labels", description=__doc__)
    parser.add_argument("table", metavar="TABLE.csv")
    return exit_code(lambda: run(parser.parse_args(argv).table), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
