"""Are follow-ups answered, and truly? `python -m experiments.analysis.follow_ups MODEL [-n 100] [--hospital=B]`.

Shows phantoms of the test stream, asks for the list of abnormalities and then, each in a conversation of its own, the
three questions of `phantom.follow_ups`. The report parser reads every answer back and holds it against the scene:

    answered    the model ended its turn
    claims      sentences that say something of the 14 labels, an answer
    false       those of them that are not so of this scene
    found       of the labels that are there (without parents; of differentials without devices) the share affirmed
    as read     answers that affirm exactly what the list before them names (the same labels)

Intervals are 95 % bootstrap intervals over phantoms. Phantom results.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import cxr_jax
from cxr_jax import phantom
from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.data.sources.splits import held_out
from cxr_jax.errors import UserError, exit_code
from cxr_jax.labels import answers, phrase_reading, report_text
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.metrics.bootstrap import Bootstrap, estimate_mean
from cxr_jax.phantom import follow_ups
from cxr_jax.report.text_table import with_interval

MAX_TOKENS = 400  # of one answer
_PARENTS = [CHEXPERT_14.index(name) for name in ("No Finding", "Lung Opacity")]
_DEVICES = CHEXPERT_14.index("Support Devices")


def ask(model: Any, images: np.ndarray, prompt: str) -> dict[str, Any]:
    """Ask for the list, and then each of the other questions.

    Args:
        model: from `cxr_jax.load`.
        images: float32 [N, S, S] in 0..1.
        prompt: what a reading answers.

    Returns:
        "readings": the completions of the list; question -> completions of the answers to it.
    """
    films = list(images)
    readings = model.generate(films, prompt, max_new_tokens=MAX_TOKENS)
    said: dict[str, Any] = {"readings": [row[0] for row in readings]}
    for question in follow_ups.QUESTIONS:
        talks = [
            [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": reading.text},
                {"role": "user", "content": question},
            ]
            for reading in said["readings"]
        ]
        completions = model.generate(films, talks, max_new_tokens=MAX_TOKENS)
        said[question] = [row[0] for row in completions]
    return said


def measure(said: dict[str, Any], batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Hold answers against their scenes.

    Args:
        said: from `ask`.
        batch: of the source, with "solution", "hedged" and "sides".

    Returns:
        question -> measure -> {value, lo, hi}.
    """
    bank = jax.device_put(load_phrase_bank(None, phantom.LEXICON))
    is_there, hedged, sides = (np.asarray(batch[key]) for key in ("solution", "hedged", "sides"))

    @jax.jit
    def read(stream: Any, lengths: Any, *truth: Any) -> Any:
        known = phrase_reading.Truth.from_arrays(*truth)
        return report_text.read_bytes(stream, lengths, bank, known)

    listed = answers.parse_answers([completion.text for completion in said["readings"]])
    bootstrap, table = Bootstrap(), {}
    for question in follow_ups.QUESTIONS:
        completions = said[question]
        texts = [completion.text for completion in completions]
        parsed = map_texts(read, texts, is_there, hedged, sides)
        affirmed = parsed["state"] == 1
        counted = np.ones(len(CHEXPERT_14), bool)
        # A parent is there with each of its children, and no cause is asked of a device.
        counted[_PARENTS] = False
        counted[_DEVICES] = question != follow_ups.DIFFERENTIALS
        there = is_there & counted
        rows = there.any(1)
        measures = {
            "answered": np.array([c.finish_reason == "stop" for c in completions], float),
            "claims": parsed["claims"].astype(float),
            "false": parsed["wrong"].astype(float),
            "found": (affirmed & there)[rows].sum(1) / there[rows].sum(1),
            "as read": ((affirmed == listed) | ~counted).all(1).astype(float),
        }
        table[question] = {
            name: estimate_mean(values, None, bootstrap) for name, values in measures.items()
        }
    return table


def lines(table: dict[str, dict[str, Any]]) -> list[str]:
    """Write the table, a question a row."""
    names = list(next(iter(table.values())))
    rows = ["| question | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for question, measures in table.items():
        cells = [with_interval(measures[name]) for name in names]
        rows.append(f"| {question} | " + " | ".join(cells) + " |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = ArgumentParser("experiments.analysis.follow_ups", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a name, a model folder or a run's folder")
    parser.add_argument("--hospital", default="A", choices=("A", "B"))
    parser.add_argument("-n", type=int, default=100, help="phantoms")

    def run() -> None:
        args = parser.parse_args(argv)
        if not 2 <= args.n <= 100_000:
            raise UserError("-n must be from 2 to 100000")
        source = PhantomSource(args.hospital, "test")
        batch = held_out(source, args.n)
        said = ask(cxr_jax.load(args.model), np.asarray(batch["image"]), source.prompt)
        print("\n".join(lines(measure(said, batch))))

    return exit_code(run, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
