"""Train on your own rows: a few films with their labels, two steps of GRPO, and what the run leaves behind.

    python examples/train_on_rows.py                     # in a temporary folder
    python examples/train_on_rows.py --folder=runs/mine  # in one that stays; more flags go to the run

Writes films and the `rows.jsonl` that lists them, then starts the command that trains on any such file. The settings
are the smallest that run, so nothing is learned; about a minute on two CPU cores, most of it compilation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.labels import CHEXPERT_14

FILMS = 16
PROMPT = "Find abnormalities and support devices."


def write_rows(folder: Path) -> Path:
    """Write phantom films as PNG files, and a row for each: image, patient, prompt, and what is there."""
    batch = PhantomSource(hospital="A", split="train").batch(range(FILMS))
    lines = []
    for number, (pixels, solution) in enumerate(
        zip(batch["image"], batch["solution"], strict=True)
    ):
        name = f"film{number}.png"
        Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(folder / name)
        row = {
            "id": name,
            "image": name,
            "patient_id": f"patient{number}",  # some patients are held out, to be evaluated on
            "conversations": [{"from": "human", "value": PROMPT}],
            "solution": ", ".join(np.array(CHEXPERT_14)[solution]),
        }
        lines.append(json.dumps(row) + "\n")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines))
    return rows


def train(rows: Path, run_folder: Path, flags: list[str]) -> None:
    """Start the command that starts every run; docs/config.md has all keys."""
    settings = {
        "data.manifest": rows,
        "data.image_root": rows.parent,
        "steps": 2,
        "rl.prompts_per_step": 4,
        "rl.group_size": 4,
        "eval.every": 2,
        "eval.n": 2,
        "eval.n_final": 4,
        "eval.batch_size": 2,
        "eval.cases": 1,
        "eval.bootstrap": 10,
    }
    command = [sys.executable, "-m", "cxr_jax.main", "--config=rl:files"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    subprocess.run([*command, f"--workdir={run_folder}", *flags], check=True)


def main() -> None:
    """Write the rows, train on them, and list the folder of the run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = write_rows(folder)
        print(f"first row: {rows.read_text().splitlines()[0]}", flush=True)
        train(rows, folder / "run", flags)
        print(
            "in the folder of the run:", *sorted(path.name for path in (folder / "run").iterdir())
        )


if __name__ == "__main__":
    main()
