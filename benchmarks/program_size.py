"""How large the programs of a run are, from shapes alone: matrix products and lines of StableHLO, seconds to trace.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/program_size.py --config=experiments/rl.py:nv_reason_3b \\
        --config.rl.micro_batches=64

Also the vision tower of the config's model alone, forward and with the gradient of its parameters. No array is made,
and nothing is compiled.

2026-11-29, 2 cores (AMD EPYC), jax 0.10.2, the command above; before the tower was scanned and taken out of the
choice among four lengths of completions (419e699), and after:

                       products           lines             seconds to trace
                     before   after    before    after      before   after
    tower               395      23     8,635      691         0.3     0.2
    tower, gradient   1,543      85    26,408    2,360         1.3     0.3
    RL rollout        2,428   2,056    78,635   70,691         1.3     1.3
    RL update         6,504     414   116,964   13,515        15.4     3.6

2026-11-30, the same machine, loaded; `--config.data.max_pixels=0 --config.rl.micro_batches=8
--config.rl.sample_micro_batches=8 --config.lora.rank=16 --config.param_dtype=bfloat16`, 128 rows; before adapters
were fused with their kernels and deep models had fewer sizes a stage (fb37e3d), and after:

                     products           lines             seconds to trace
                     before   after    before    after      before   after
    RL rollout       11,760   3,944   152,376   97,333        54.8    32.4

The phantom's tower (4 blocks) is the same StableHLO to the letter. Its update, 8 prompts x 8 completions of 128 tokens
at 224 px, old and new in turns, 20 pairs: 1.005 x as long in one micro-batch, 1.009 x in four (medians of ratios; by
the fastest steps 0.99 x and 0.95 x).
"""

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from cxr_jax.config import command_line, schema
from cxr_jax.config.sections import RunConfig
from cxr_jax.planning import programs
from cxr_jax.runtime.trees import Tree

flags.adopt_module_key_flags(command_line)
IMAGES = 4  # of the tower alone; their number does not change the program's size


def print_size(name: str, step: Any, *arguments: Any) -> None:
    """Print one row; `step` is a jitted function."""
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    seconds = time.perf_counter() - start
    text = lowered.as_text()
    products, lines = text.count("dot_general"), text.count("\n")
    print(f"{name:18}{products:7,} products{lines:9,} lines{seconds:7.1f} s", flush=True)


def tower_steps(settings: RunConfig, shapes: programs.Shapes) -> list[Callable]:
    """The tower alone: forward, and with its gradient."""

    def encode(params: Tree, batch: Tree) -> jax.Array:
        settings_of_tower = {"remat": settings.remat, "dtype": shapes.trainable.dtype}
        return shapes.images.features(params, batch, **settings_of_tower).tokens

    def total(params: Tree, batch: Tree) -> jax.Array:
        return encode(params, batch).astype("float32").sum()

    return [jax.jit(encode), jax.jit(jax.grad(total))]


def main(_: list[str]) -> None:
    """Print a row a program."""
    config = command_line.CONFIG.value
    schema.check_values(config)
    settings = RunConfig.from_config(config)
    shapes = programs.Shapes(settings)
    batch = shapes.batch(IMAGES)
    images = {name: batch[name] for name in shapes.images.names}
    tower = {"vision": shapes.params["vision"]}
    for name, step in zip(("tower", "tower, gradient"), tower_steps(settings, shapes), strict=True):
        print_size(name, step, tower, images)
    for program in programs.programs(settings):
        print_size(program.name, program.step, *program.arguments.values())


if __name__ == "__main__":
    app.run(main)
