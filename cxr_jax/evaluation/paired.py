"""Two evaluated models on the same films: `cxr-jax compare RUN_A RUN_B` (`python -m cxr_jax.evaluation.paired`).

Reads predictions.npz of two runs and prints, set by set, B - A of the main numbers with 95 % intervals: both models are
scored on the same resamples of patients, so that an interval can be clear of 0 although the models' own overlap. No
model is loaded: the runs may be of any families and machines. Films are matched by their ids; where a run has films
that the other has not, those of both are compared and it is said. A film whose truth differs in the two runs ends it.

The last model of each run is taken, which is the one that it has made; --model_a and --model_b name another. --sets
pairs sets of other names: --sets=files,nih_test. What was looked for in many numbers is found by chance in some.

Exit codes: 0 done; 2 bad usage, or runs that cannot be compared. Research use only. Not for diagnosis.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.errors import UserError, exit_code, printable
from cxr_jax.evaluation import predictions
from cxr_jax.evaluation.predictions import SetPredictions
from cxr_jax.evaluation.set_scores import paired_rows
from cxr_jax.metrics.label_counts import Answers, Reference, check_rows
from cxr_jax.metrics.run_log import json_value
from cxr_jax.report.text_table import difference_line
from cxr_jax.runtime.notices import NOT_FOR_DIAGNOSIS


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises UserError for bad usage."""
    parser = ArgumentParser("cxr_jax.evaluation.paired", description=__doc__)
    parser.add_argument("run_a", metavar="RUN_A", help="the run that is subtracted")
    parser.add_argument("run_b", metavar="RUN_B", help="the run that it is subtracted from")
    parser.add_argument("--sets", metavar="A,B", help="two sets that are one; default: equal names")
    parser.add_argument("--model_a", metavar="NAME", help="of RUN_A; default: its last one")
    parser.add_argument("--model_b", metavar="NAME", help="of RUN_B; default: its last one")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples (default 1000)")
    parser.add_argument("--json", action="store_true", help="one JSON object a difference")
    arguments = parser.parse_args(argv)
    if arguments.bootstrap < 1:
        raise UserError(f"--bootstrap={arguments.bootstrap}: at least 1")
    return arguments


def compare(arguments: argparse.Namespace) -> None:
    """Print the differences of two runs. Raises UserError where they cannot be compared."""
    # Everything is computed before the first line is printed: half a comparison would look like a whole one.
    saved_runs = [predictions.load(Path(run)) for run in (arguments.run_a, arguments.run_b)]
    printed_lines = []
    for names in _pairs(saved_runs, arguments.sets):
        set_pair = [of_run[name] for of_run, name in zip(saved_runs, names, strict=True)]
        # The last model of a run is the one that it is about.
        models = [
            _model_of(of_set, wanted, flag)
            for of_set, wanted, flag in zip(
                set_pair,
                (arguments.model_a, arguments.model_b),
                ("--model_a", "--model_b"),
                strict=True,
            )
        ]
        difference_rows, what_is_compared = compare_sets(
            names[0], set_pair, models, arguments.bootstrap
        )
        if arguments.json:
            printed_lines += [json.dumps(json_value(row, str)) for row in difference_rows]
            continue
        # First what the numbers are numbers of: both lines where they differ.
        printed_lines += [
            *dict.fromkeys(f"scored: {of_set.protocol}" for of_set in set_pair),
            what_is_compared,
        ]
        printed_lines += map(difference_line, difference_rows)
    print("\n".join(map(printable, printed_lines)))
    if not arguments.json:
        print(NOT_FOR_DIAGNOSIS)


def _pairs(
    saved_runs: Sequence[dict[str, SetPredictions]], sets: str | None
) -> list[tuple[str, str]]:
    """The names of the sets of both runs that are compared."""
    if sets is not None:
        first, _, second = sets.partition(",")
        for name, of_run in ((first, saved_runs[0]), (second, saved_runs[1])):
            if name not in of_run:
                raise UserError(f"--sets={sets}: no set {name!r}; there are {', '.join(of_run)}")
        return [(first, second)]
    # In the order of the first run, as its table has them.
    common_names = [(name, name) for name in saved_runs[0] if name in saved_runs[1]]
    if not common_names:
        there = " and ".join(", ".join(of_run) for of_run in saved_runs)
        raise UserError(f"the runs have no set of one name ({there}): give --sets=A,B")
    return common_names


def _model_of(of_set: SetPredictions, wanted: str | None, flag: str) -> str:
    models = list(of_set.answers)
    if wanted is None:
        return models[-1]
    if wanted not in models:
        raise UserError(f"{flag}={wanted}: no such model; there are {', '.join(models)}")
    return wanted


def compare_sets(
    name: str, set_pair: Sequence[SetPredictions], models: Sequence[str], resamples: int
) -> tuple[list[dict[str, Any]], str]:
    """Compute the paired differences of two models on the units that both have answered.

    Args:
        name: of the set, for the rows.
        set_pair: what was answered in both runs.
        models: one of each run.
        resamples: of patients.

    Returns:
        Rows as in evaluation.json's "comparisons", and one line on what was compared.

    Raises:
        UserError: if no unit is in both, or one has another truth.
    """
    common_places = _common_places(*(list(of_set.ids) for of_set in set_pair))
    if not len(common_places[0]):
        raise UserError(f"{name}: no film is in both runs")
    # Both are cut to the same units in the same order; the patients are those of the first run.
    references = [
        _rows_of(of_set.reference, chosen)
        for of_set, chosen in zip(set_pair, common_places, strict=True)
    ]
    _check_same_truth(name, references)
    reference = references[0]
    difference_rows = paired_rows(
        name,
        _names(models),
        [
            Answers(
                np.asarray(of_set.answers[model].labels)[chosen],
                np.asarray(of_set.answers[model].valid)[chosen],
            )
            for of_set, model, chosen in zip(set_pair, models, common_places, strict=True)
        ],
        [
            of_set.log_odds[model][chosen] if model in of_set.log_odds else None
            for of_set, model, chosen in zip(set_pair, models, common_places, strict=True)
        ],
        reference,
        resamples,
    )
    resampled_units = (
        "images"
        if reference.groups is None
        else f"{len(set(np.asarray(reference.groups)))} patients"
    )
    unit_counts = " and ".join(f"{len(of_set.ids):,}" for of_set in set_pair)
    return (
        difference_rows,
        f"{name}: {len(common_places[0]):,} that both have, of {unit_counts}; intervals draw {resampled_units}",
    )


def _names(models: Sequence[str]) -> tuple[str, str]:
    # Two runs of one recipe call their models alike.
    first, second = models
    return (f"{first} (A)", f"{second} (B)") if first == second else (first, second)


def _common_places(first: list[str], second: list[str]) -> tuple[np.ndarray, np.ndarray]:
    # Ids are unique within a set: a manifest that repeats one is refused.
    place_of = {name: place for place, name in enumerate(second)}
    pairs = [(place, place_of[name]) for place, name in enumerate(first) if name in place_of]
    columns = np.array(pairs, int).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _rows_of(reference: Reference, chosen: np.ndarray) -> Reference:
    columns: dict[str, Any] = {
        name: None if values is None else np.asarray(values)[chosen]
        for name, values in vars(reference).items()
    }
    return Reference(**columns)


def _check_same_truth(name: str, references: Sequence[Reference]) -> None:
    first, second = (check_rows(Answers(reference.truth), reference) for reference in references)
    # Cells that neither knows may hold anything.
    differing_rows = (first.known != second.known) | (first.known & (first.truth != second.truth))
    # Another label policy, another table, or another film under the same name.
    if count := int(differing_rows.any(axis=1).sum()):
        raise UserError(
            f"{name}: what is so of {count:,} of {len(differing_rows):,} differs in the runs: other labels or policy"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return exit_code(lambda: compare(parse_args(argv)), debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
