"""The joint step of SFT on texts of about a third of `max_completion`: this code beside that of an earlier commit.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/sft_lengths.py [--before COMMIT] [--shape tiny] [--completion 1800]

Both sides are processes that live for the run and step in turns, in another order each round, with the same weights,
tokens and pixels; the files of the earlier commit come from git. Texts are lognormal about a third of the completion
(sigma 0.3), as traces are, in another draw each round: one program must serve them all. Ratios are the median of those
of a round; the losses of the first step say that both did the same.

Reached (2026-11-30, 2 cores of an AMD EPYC at a load of 13 to 16, jax 0.10.2, against c11d399):

    --rounds 5 --batch 4 --micro_batches 2 --completion 1200: 2.7 (1.2-4.2) times as fast, 6.9 s a step where it was
    14.7; losses equal to 6.8e-8, gradient norms to the last of 7 digits, 1 program. The first step, compilation
    included, took 356 s where it took 31 on this crowded machine, and 122 where it took 94 at another hour.
"""

import argparse
import importlib.util
import pathlib
import statistics
import subprocess
import sys
import tempfile

import _common as common
import numpy as np

OPTIMIZER = {
    "lr": 1e-9,
    "warmup_steps": 1,
    "final_fraction": 1.0,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
}
OPTIMIZER |= {"weight_decay": 0.0, "clip_norm": 1.0}
"""A rate that changes no loss visibly: schedules differ between commits."""


def write_inputs(args, folder: pathlib.Path) -> None:
    """Write the weights and the prompts that both sides read."""
    from cxr_jax.inference.model import Model
    from cxr_jax.models import network
    from cxr_jax.weights import hf_folder, pretrained

    model_config = common.config(args.shape)
    inputs = common.prompts(Model(model_config, {}, folder=pretrained.PHANTOM), args.batch)
    shape = args.batch, args.completion
    completions = np.random.default_rng(1).integers(0, common.WORDS, shape, np.int32)
    both = np.concatenate([inputs["ids"], completions], 1)
    np.savez(
        folder / "inputs.npz",
        completions=completions,
        positions=network.positions(model_config, both, inputs["grid"]),
        **{name: inputs[name] for name in ("image", "ids", "grid")},
    )
    params = common.random_params(model_config, np.float32)
    hf_folder.save(folder / "model", model_config, params)


def step_of_today(args, folder: pathlib.Path, grid):
    """(train state, joint step)."""
    from cxr_jax.config.sections import OptimizerConfig
    from cxr_jax.models.image_batches import SquareImages
    from cxr_jax.sft import step as sft_step
    from cxr_jax.training.optimizer import init_state, make_optimizer
    from cxr_jax.training.trainable import Trainable
    from cxr_jax.weights import hf_folder

    model_config, params = hf_folder.load(folder / "model", np.float32)
    optimizer = make_optimizer(OptimizerConfig.with_defaults(**OPTIMIZER), 1000)
    step = sft_step.make_steps(
        model_config,
        optimizer,
        SquareImages(model_config=model_config, grid=grid),
        Trainable(),
        micro_batches=args.micro_batches,
        locate_weight=0.0,
        remat=args.remat,
    )[1]
    return init_state(optimizer, {"model": params}), step


def step_of_c11d399(args, folder: pathlib.Path, grid):
    """The same of the first commit that this is compared with, whose rooms had other names."""
    from cxr_jax.trainable import Trainable
    from ml_collections import ConfigDict

    from cxr_jax import optim, sft
    from cxr_jax.models import hf

    model_config, params = hf.load_hf(folder / "model", np.float32)
    optimizer = optim.make(ConfigDict(OPTIMIZER), 1000)
    settings = dict(micro_batches=args.micro_batches, remat=args.remat, locate_weight=0.0)
    step = sft.make_steps(ConfigDict(settings), model_config, optimizer, grid, Trainable())[1]
    return optim.init_state(optimizer, {"model": params}), step


class Step:
    """A worker: the joint step of the code that PYTHONPATH leads to."""

    def __init__(self, args):
        import jax

        self.args, self.put, folder = args, jax.device_put, pathlib.Path(args.worker)
        self.inputs = dict(np.load(folder / "inputs.npz"))
        grid = tuple(map(int, self.inputs["grid"]))
        is_today = importlib.util.find_spec("cxr_jax.training") is not None
        make = step_of_today if is_today else step_of_c11d399
        state, self.update = make(args, folder, grid)
        self.state = jax.device_put(state)

    def step(self, seed: int) -> dict:
        """Time one step of the texts of `seed`."""
        rng, args = np.random.default_rng(seed), self.args
        lengths = np.exp(rng.normal(np.log(args.completion / 3), args.sigma, args.batch))
        lengths = np.clip(lengths, 1, args.completion).astype(np.int32)
        prompts = {name: self.inputs[name] for name in ("ids", "positions")}
        prompts["lengths"] = np.full(args.batch, common.PROMPT, np.int32)
        batch = {
            "image": self.inputs["image"],
            "completions": self.inputs["completions"],
            "lengths": lengths,
            "mask": np.arange(args.completion) < lengths[:, None],
            "prompts": prompts,
        }
        batch = self.put(batch)

        def run():
            self.state, metrics = self.update(self.state, {}, batch)
            self.metrics = {name: float(value) for name, value in metrics.items()}

        seconds = common.clock(run)
        programs = self.update._cache_size()
        return {
            "seconds": seconds,
            "tokens": int(lengths.sum()),
            "programs": programs,
            **self.metrics,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="c11d399", help="commit of the code to compare with")
    parser.add_argument("--shape", choices=("tiny", "small", "3b"), default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--completion", type=int, default=1800, help="max_completion")
    parser.add_argument("--sigma", type=float, default=0.3, help="spread of the texts' lengths")
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return common.serve({"step": Step(args).step, "facts": common.facts})
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        tree = ["git", "-C", str(common.ROOT), "archive", args.before, "cxr_jax"]
        archive = subprocess.run(tree, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        write_inputs(args, folder)
        command = [sys.executable, __file__, *sys.argv[1:], f"--worker={folder}"]
        sides = {"before": common.Worker(*command, root=folder), "now": common.Worker(*command)}
        try:
            measure(args, sides)
        finally:
            for side in sides.values():
                side.close()


def measure(args, sides: dict) -> None:
    print(common.header(sides["now"]("facts")))
    print(
        f"{args.shape}, {args.batch} rows in {args.micro_batches} parts, {common.PROMPT} + {args.completion} slots, "
        f"before: {args.before}"
    )
    first = {name: side("step", seed=0) for name, side in sides.items()}
    loads, ratios, seconds = [], [], {name: [] for name in sides}
    for number in range(args.rounds):
        loads.append(common.load())
        for name in list(sides)[:: -1 if number % 2 else 1]:
            # One that is not counted: a process finds cold caches after a rest.
            sides[name]("step", seed=number)
            last = sides[name]("step", seed=number + 1)
            seconds[name].append(last["seconds"])
        ratios.append(seconds["before"][-1] / seconds["now"][-1])
    rows = [["", "step, s", "first step, s", "loss", "gradient norm"]]
    for name, times in seconds.items():
        step = first[name]
        facts = f"{step['seconds']:.1f}", f"{step['loss']:.7f}", f"{step['grad_norm']:.6f}"
        rows.append([name, common.spread(times, digits=3), *facts])
    print(common.table(rows))
    gap = abs(first["now"]["loss"] / first["before"]["loss"] - 1)
    print(
        f"now is {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) times as fast; losses agree to "
        f"{gap:.1e}; programs: {last['programs']}; load {' '.join(loads)}"
    )


if __name__ == "__main__":
    main()
