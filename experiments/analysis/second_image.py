"""Is the second film of a study used? `python -m experiments.analysis.second_image MODEL [--views=frontal,lateral]`.

Reads phantom studies of the test stream with all films, and with one film that of another patient, grey, or left out of
the prompt; prints Jaccard and macro-F1 of each and how much less than with all films it is, paired, with 95 % bootstrap
intervals. With a lateral, a second table counts the findings that the frontal film hides, and how many are named.

Reached (2026-11-30, phantom results; frontal and lateral; hospital A and B, 256 studies each, seed 0), by a run of 13
minutes and its evaluation on one core of an AMD EPYC, from a clean clone of eeb188f:

    python -m cxr_jax.main --config=experiments/sft.py:continued --workdir=runs/lateral
        --config.data.views=frontal,lateral --config.data.reader_miss=0 --config.max_completion=224
        --config.steps=330 --config.locate_steps=80 --config.locate_weight=0.3 --config.optim.lr=8e-4
    python -m experiments.analysis.second_image runs/lateral -n 256 [--hospital=B]

    films, A           Jaccard  less than with both     macro-F1  hidden findings named
    both               0.925                            0.940     0.795 [0.727, 0.864]
    lateral swapped    0.603    0.322 [0.279, 0.364]    0.775     0.264 [0.191, 0.336]
    lateral left out   0.653    0.271 [0.230, 0.312]    0.789     0.014 [0.000, 0.036]
    lateral grey       0.544    0.381 [0.340, 0.421]    0.716     0.491 [0.409, 0.582]
    frontal swapped    0.356    0.569 [0.532, 0.607]    0.328     0.814 [0.741, 0.877]

    films, B           Jaccard  less than with both     macro-F1  hidden findings named
    both               0.857                            0.874     0.763 [0.658, 0.855]
    lateral swapped    0.649    0.208 [0.171, 0.248]    0.764     0.237 [0.158, 0.316]
    lateral left out   0.672    0.185 [0.142, 0.227]    0.762     0.039 [0.000, 0.079]

On all 2,000 studies of the run's own evaluation, both films: Jaccard A 0.928 [0.921, 0.936], B 0.852 [0.841, 0.862];
the embedded model, from which it began and which has never seen a second film: 0.458, 0.486.

What these figures are not: more than one seed. Prompts of one film are none that the run was trained on, so that the
row "left out" holds that, too; a grey film is like none: the model calls fluid in most of them, and so names hidden
fluid by chance. The swap is the cleanest of the three.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.config.sections import DataConfig
from cxr_jax.data.prompts import FIND_PROMPT, NEW_PROMPT, split_roles
from cxr_jax.data.sources.phantom import PhantomStudies
from cxr_jax.data.sources.splits import held_out
from cxr_jax.errors import UserError, exit_code
from cxr_jax.evaluation.film_use import answer_with_films_changed
from cxr_jax.evaluation.reader import Reader
from cxr_jax.inference.prompts import Prompts
from cxr_jax.metrics.bootstrap import Bootstrap, estimate_mean
from cxr_jax.metrics.scores import Answers, Reference, image_use_audit
from cxr_jax.models.image_batches import open_images
from cxr_jax.phantom import studies
from cxr_jax.report.text_table import with_interval
from cxr_jax.weights import pretrained

BATCH = 16  # studies read at a time
MAX_COMPLETION = 256


def audit(model: str, source: PhantomStudies, count: int) -> dict[str, Any]:
    """Read studies with every film changed in turn.

    Args:
        model: a name or a folder.
        count: studies.

    Returns:
        "scores", see `scores.image_use_audit`; with a lateral "hidden": for each way of showing the films the share of
        hidden findings that are named, {value, lo, hi}.

    Raises:
        UserError: for a model that cannot be used.
    """
    start = pretrained.load_starting_model(model, 0)
    images = open_images(
        DataConfig.with_defaults(), start.config, source.size, count=len(source.views)
    )
    # As wide as the prompts of all films: those of fewer fit into it.
    prompts = Prompts.for_images(
        start.tokenizer, start.config, images, MAX_COMPLETION, texts=source.prompts()
    )
    reader = Reader(start.config, start.tokenizer, prompts, BATCH, lexicon=source.lexicon)
    # The same films for every way of showing them: only what is changed differs.
    batch = held_out(source, count)
    params = pretrained.to_device(start.params, "float32")
    question = NEW_PROMPT if studies.PRIOR in source.views else FIND_PROMPT
    answers = answer_with_films_changed(reader, params, batch, source.views, question)
    bootstrap = Bootstrap()
    result: dict[str, Any] = {
        "scores": image_use_audit(answers, Reference.from_batch(batch), bootstrap=bootstrap)
    }
    if studies.LATERAL in source.views:
        facts = source.facts(np.arange(count))
        hidden = hidden_labels(facts["scene"], facts["hidden"])
        result["hidden"] = {
            name: _share_named(answer, hidden, bootstrap) for name, answer in answers.items()
        }
    return result


def hidden_labels(scene: dict[str, np.ndarray], hidden: np.ndarray) -> np.ndarray:
    """Give the labels that frontal films hide, bool [N, 14]; without their parent, which may be seen for another."""
    severity = np.where(hidden, scene["severity"], 0.0)
    labels = np.asarray(studies.phantom.labels({**scene, "severity": severity})) == 1
    labels[:, [0, 3]] = False  # No Finding, Lung Opacity
    return labels


def _share_named(
    answers: Answers, hidden: np.ndarray, bootstrap: Bootstrap
) -> dict[str, float | None]:
    """The share of the hidden labels that are named, over studies that hide one."""
    rows = hidden.any(1)
    named = np.asarray(answers.labels)[rows] & hidden[rows] & np.asarray(answers.valid)[rows, None]
    return estimate_mean(named.sum(1) / hidden[rows].sum(1), None, bootstrap)


def lines(result: dict[str, Any]) -> list[str]:
    """Write the tables, one string a line."""
    table = [
        "| films | Jaccard | less than real | macro-F1 | less than real | same answer |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["scores"].items():
        cells = [name]
        for metric in ("jaccard", "macro_f1"):
            drop = row.get(f"drop_{metric}")
            cells += [f"{row[metric]:.3f}", with_interval(drop) if drop else ""]
        cells.append(f"{row['same_answer']:.3f}" if "same_answer" in row else "")
        table.append("| " + " | ".join(cells) + " |")
    if "hidden" in result:
        table += ["", "| films | hidden findings named |", "|---|--:|"]
        table += [
            f"| {name} | {with_interval(share)} |" for name, share in result["hidden"].items()
        ]
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = ArgumentParser("experiments.analysis.second_image", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a name, a model folder or a run's folder")
    parser.add_argument("--views", default="frontal,lateral", help="roles of the films")
    parser.add_argument("--hospital", default="A", choices=("A", "B"))
    parser.add_argument("-n", type=int, default=256, help="studies")

    def run() -> None:
        args = parser.parse_args(argv)
        if not 2 <= args.n <= 100_000:
            raise UserError("-n must be from 2 to 100000")
        source = PhantomStudies(args.hospital, "test", views=split_roles(args.views))
        if len(source.views) < 2:
            raise UserError(f"--views={args.views}: one film alone has no second")
        print("\n".join(lines(audit(args.model, source, args.n))))

    return exit_code(run, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
