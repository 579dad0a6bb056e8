"""Train with rewards of your own: one that is compiled, one in plain Python, and a run that is started from Python.

    python examples/own_rewards.py                      # in a temporary folder
    python examples/own_rewards.py --folder=runs/mine   # in one that stays: the same command resumes it

The same functions by name, from the command line: `--config.rl.rewards="('examples/own_rewards.py:short*0.5',)"`.
docs/own_rewards.md says what they are given and what they must return. The settings are the smallest that run, so
nothing is learned; about a minute on two CPU cores, most of it compilation.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import cxr_jax

STEPS = 2


def short(tokens: jax.Array, lengths: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
    """Compiled into the rollout's program: 1 for an empty completion, down to 0 for one that is cut.

    Args:
        tokens: int32 [P, G, C], G completions of P prompts.
        lengths: int32 [P, G]: the first tokens of each, which count.
        batch: arrays [P, ..] of what is known of each prompt.
    """
    return 1.0 - lengths / jnp.float32(tokens.shape[-1])


def names_what_is_there(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Plain Python, called once a rollout: the share of what is there that a text names anywhere.

    Args:
        texts: completions.
        rows: of each what is known of its prompt: id, prompt, solution, and the columns of `config.data.columns`.
    """
    shares = []
    for text, row in zip(texts, rows, strict=True):
        named = [label.lower() in text.lower() for label in row["solution"]]
        shares.append(sum(named) / max(len(named), 1))
    return shares


def main() -> None:
    """Run two steps of GRPO with both rewards beside those of the preset."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = cxr_jax.train(
            "rl:phantom",
            args.folder or temporary,
            {
                "steps": STEPS,
                "max_completion": 16,
                "rl.prompts_per_step": 2,
                "rl.oversample": 1,
                "rl.group_size": 2,
                "eval": {
                    "every": STEPS,
                    "n": 1,
                    "n_final": 2,
                    "batch_size": 2,
                    "cases": 1,
                    "bootstrap": 10,
                },
            },
            rewards=[(short, 0.5), names_what_is_there],
        )
        print(f"step {result.step}, report {result.report.name}, model {result.model.name}/")
        for name in ("reward", "rewards/short/mean", "rewards/names_what_is_there/mean"):
            print(f"{name:<36} {result.metrics[name]:6.3f}")


if __name__ == "__main__":
    main()
