"""Averages the weights of two steps of an SFT run, its best and its last: `python -m scripts.average_steps RUN OUT`.

The best step is the one that scored highest on the selection stream out of distribution. The mean of weights along a
run often generalises better than either end of it (weight averaging: Izmailov et al., 2018, arXiv:1803.05407). OUT is a
folder in the Hugging Face layout, float32, with the run's tokenizer.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from cxr_jax.config.arguments import wants_debug
from cxr_jax.errors import UserError, exit_code
from cxr_jax.runtime import trees
from cxr_jax.runtime.checkpoints import Checkpoints
from cxr_jax.weights import hf_folder


def average(run_dir: str, out: str) -> int:
    """Write the mean of the weights of a finished run's best step and its last.

    Returns:
        The best step.

    Raises:
        UserError: if the run has no export, no best step, or trained adapters.
    """
    source = Path(run_dir) / "hf"
    if not (source / "config.json").is_file():
        raise UserError(f"{run_dir}: no finished run (it has no hf/)")
    if (Path(run_dir) / "adapter").exists():
        raise UserError(f"{run_dir}: it trained adapters; only whole weights are averaged")
    best = Checkpoints(run_dir).best
    step = best.latest_step()
    if step is None:
        raise UserError(f"{run_dir}: it kept no best step (config.eval.every=0)")
    of_best = best.restore(step)["state"]
    model_config, params = hf_folder.load(source, np.float32)
    averaged: dict = {}
    for path, last in trees.flatten(params):
        node = averaged
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = (last + of_best["/".join(("model", *path))]) / 2
    limits, _ = hf_folder.image_settings(source)
    hf_folder.save(
        out,
        model_config,
        averaged,
        dtype=np.float32,
        pixel_limits=(limits["min_pixels"], limits["max_pixels"]),
        tokenizer=source,
    )
    return step


def main() -> int:
    """Run the command line of the process and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", metavar="RUN", help="the folder of a finished SFT run")
    parser.add_argument("out", metavar="OUT", help="a folder that is made")

    def run() -> None:
        args = parser.parse_args()
        step = average(args.run, args.out)
        print(f"{args.out}: the mean of step {step} and of the last step of {args.run}")

    return exit_code(run, debug=wants_debug(None))


if __name__ == "__main__":
    sys.exit(main())
