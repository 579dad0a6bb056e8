"""Puts finished runs of several seeds side by side: `python -m experiments.analysis.seeds RUN_DIR...`.

Prints, for each test set, every run's scores and the paired difference with its 95 % interval, as the runs'
evaluation.json hold them, and the mean over the runs.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxr_jax.errors import UserError, exit_code


def load(folder: str) -> dict[str, Any]:
    """Read a run's evaluation.json.

    Raises:
        UserError: if the run has none.
    """
    path = Path(folder) / "evaluation.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a finished run's evaluation") from error


def _value(summary: Mapping, metric: str) -> float:
    return (summary[metric] if metric == "jaccard" else summary[metric]["all"])["value"]


def _comparisons(evaluation: Mapping, set_name: str, metric: str) -> list[Mapping]:
    return [
        comparison
        for comparison in evaluation["comparisons"]
        if (comparison["set"], comparison["metric"]) == (set_name, metric)
    ]


def _difference(comparison: Mapping) -> str:
    pair = f"{comparison['b']} - {comparison['a']}"
    interval = f"[{comparison['lo']:+.4f}, {comparison['hi']:+.4f}]"
    return f"  {pair} {comparison['diff']:+.4f} {interval}"


def lines(folders: Sequence[str]) -> list[str]:
    """Write the table, one string a line."""
    runs = {folder: load(folder) for folder in folders}
    first_models = next(iter(runs.values()))["models"]
    table = []
    for set_name in next(iter(first_models.values())):
        for metric in ("jaccard", "macro_f1"):
            table.append(f"{set_name} {metric}")
            differences = []
            for folder, evaluation in runs.items():
                row = "  ".join(
                    f"{model} {_value(summaries[set_name], metric):.3f}"
                    for model, summaries in evaluation["models"].items()
                )
                for comparison in _comparisons(evaluation, set_name, metric):
                    row += _difference(comparison)
                    differences.append(comparison["diff"])
                table.append(f"  {folder}: {row}")
            if differences:
                mean = np.mean(differences)
                table.append(f"  mean difference over {len(differences)} runs: {mean:+.4f}")
    return table


def main() -> int:
    """Run the command; returns the exit code."""

    def compare() -> None:
        if len(sys.argv) < 2:
            raise UserError("name the run folders")
        print("\n".join(lines(sys.argv[1:])))

    return exit_code(compare)


if __name__ == "__main__":
    sys.exit(main())
