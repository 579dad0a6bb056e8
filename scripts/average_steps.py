"""Averages the weights of steps of an SFT run: `python -m scripts.average_steps RUN OUT [--steps=best,last]`.

The steps are "start" (the model that the run began from), "best" (the step that scored highest on the selection stream
out of distribution) and "last". The mean of weights along a run often generalises better than either end of it (weight
averaging: Izmailov et al., 2018, arXiv:1803.05407). OUT is a folder in the Hugging Face layout, float32, with the run's
tokenizer.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from cxr_jax.config.arguments import wants_debug
from cxr_jax.errors import UserError, exit_code
from cxr_jax.runtime import trees
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.runtime.trees import Tree
from cxr_jax.weights import hf_folder, pretrained

STEPS = ("start", "best", "last")


def average(run_dir: str, out: str, steps: tuple[str, ...] = ("best", "last")) -> None:
    """Write the mean of the weights of a finished run's steps.

    Args:
        steps: of STEPS.

    Raises:
        UserError: if the run has no export, has not the step, or trained adapters.
    """
    source = Path(run_dir) / "hf"
    if not (source / "config.json").is_file():
        raise UserError(f"{run_dir}: no finished run (it has no hf/)")
    if (Path(run_dir) / "adapter").exists():
        raise UserError(f"{run_dir}: it trained adapters; only whole weights are averaged")
    if unknown := sorted({*steps} - {*STEPS}):
        raise UserError(f"--steps={','.join(steps)}: {unknown[0]!r} is not {', '.join(STEPS)}")
    model_config, params = hf_folder.load(source, np.float32)
    weights = [_weights_of(step, run_dir, params) for step in steps]
    averaged: Tree = {}
    for path, last in trees.flatten(params):
        node = averaged
        for name in path[:-1]:
            node = node.setdefault(name, {})
        # Parts that were frozen are not kept with the best step: they are those of every step.
        of_steps = [by_path.get(path, last) for by_path in weights]
        node[path[-1]] = np.mean(of_steps, axis=0)
    limits, _ = hf_folder.image_settings(source)
    hf_folder.save(
        out,
        model_config,
        averaged,
        dtype=np.float32,
        pixel_limits=(limits["min_pixels"], limits["max_pixels"]),
        tokenizer=source,
    )


def _weights_of(step: str, run_dir: str, last: Tree) -> dict[tuple[str, ...], np.ndarray]:
    """The weights of a step by their paths."""
    if step == "last":
        return dict(trees.flatten(last))
    if step == "start":
        config = json.loads((Path(run_dir) / "config.json").read_text())["config"]
        return dict(
            trees.flatten(pretrained.load_starting_model(config["model"], config["seed"]).params)
        )
    best = Checkpoints(run_dir).best
    if (number := best.latest_step()) is None:
        raise UserError(f"{run_dir}: it kept no best step (config.eval.every=0)")
    state = best.restore(number)["state"]
    prefix = "model/"
    return {
        tuple(name.removeprefix(prefix).split("/")): np.asarray(leaf)
        for name, leaf in state.items()
        if name.startswith(prefix)
    }


def main() -> int:
    """Run the command line of the process and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", metavar="RUN", help="the folder of a finished SFT run")
    parser.add_argument("out", metavar="OUT", help="a folder that is made")
    parser.add_argument("--steps", default="best,last", help="of start, best, last")

    def run() -> None:
        args = parser.parse_args()
        average(args.run, args.out, tuple(args.steps.split(",")))

    return exit_code(run, debug=wants_debug(None))


if __name__ == "__main__":
    sys.exit(main())
