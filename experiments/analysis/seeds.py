"""Puts finished runs of several seeds side by side: `python -m experiments.analysis.seeds RUN_DIR...`.

Prints, for each test set, every run's scores and the paired difference with its 95 % interval, as the runs'
evaluation.json hold them, and the mean over the runs.
"""

import json
import sys
from pathlib import Path

import numpy as np

from cxr_jax.errors import UserError, exit_code


def load(folder: str) -> dict:
    """A run's evaluation.json. UserError if the run has none."""
    path = Path(folder) / "evaluation.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a finished run's evaluation") from e


def _value(summary: dict, metric: str) -> float:
    return (summary[metric] if metric == "jaccard" else summary[metric]["all"])["value"]


def lines(folders: list[str]) -> list[str]:
    """The table, one string a line."""
    runs = {f: load(f) for f in folders}
    first = next(iter(runs.values()))
    out = []
    for set_name in next(iter(first["models"].values())):
        for metric in ("jaccard", "macro_f1"):
            out.append(f"{set_name} {metric}")
            diffs = []
            for folder, run in runs.items():
                scores = {m: _value(sets[set_name], metric) for m, sets in run["models"].items()}
                row = "  ".join(f"{m} {v:.3f}" for m, v in scores.items())
                for c in run["comparisons"]:
                    if (c["set"], c["metric"]) == (set_name, metric):
                        row += f"  {c['b']} - {c['a']} {c['diff']:+.4f} [{c['lo']:+.4f}, {c['hi']:+.4f}]"
                        diffs.append(c["diff"])
                out.append(f"  {folder}: {row}")
            if diffs:
                out.append(f"  mean difference over {len(diffs)} runs: {np.mean(diffs):+.4f}")
    return out


def main() -> int:
    def compare():
        if len(sys.argv) < 2:
            raise UserError("name the run folders")
        print("\n".join(lines(sys.argv[1:])))

    return exit_code(compare)


if __name__ == "__main__":
    sys.exit(main())
