"""Self-distillation as rows for SFT: of K completions of a model for each training phantom, the one that earns most.

    python -m experiments.analysis.best_of OUT [--model=phantom] [--seed=1] [--phantoms=1280] [--samples=8]

The phantoms are those of hospital A that RL with that data.seed sees in its first steps, and the reward is RL's
(experiments/rl.py). Writes OUT/rows.jsonl and OUT/images, 16-bit PNG; trains by

    python -m cxr_jax.main --config=experiments/sft.py:continued --config.data.source=files .. (see experiments/rl.py)
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

import cxr_jax
from cxr_jax import phantom, rewards
from cxr_jax.config.arguments import ArgumentParser, wants_debug
from cxr_jax.data.prompts import FIND_PROMPT
from cxr_jax.data.sources.base import Batch
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.errors import UserError, exit_code
from cxr_jax.inference.model import Model
from cxr_jax.inference.requests import Completion
from cxr_jax.labels import phrase_reading
from cxr_jax.labels.phrase_bank import device_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.presets import rl
from cxr_jax.runtime import whole_files

AT_A_TIME = 32  # phantoms that are drawn and asked about together


class Scored(NamedTuple):
    """The completions of some phantoms, and what each earns: [B][K], float32 [B, K]."""

    completions: list[list[Completion]]
    reward: np.ndarray


def earn(completions: Sequence[Completion], batch: Batch, rows: np.ndarray) -> np.ndarray:
    """Compute RL's reward of completions, float32 [N].

    Args:
        batch: of the phantoms, with "solution", "hedged" and "sides".
        rows: int [N], which phantom of the batch each is about.
    """
    config = rl.get_config()
    # As the rollout scores its tokens: lengths and repeats of tokens, labels of the text.
    lengths = np.array([len(completion.token_ids) for completion in completions], np.int32)
    tokens = np.zeros((len(completions), max(lengths.max(), 1)), np.int32)
    for row, completion in zip(tokens, completions, strict=True):
        row[: len(completion.token_ids)] = completion.token_ids
    bank = device_phrase_bank(None, phantom.LEXICON)

    @jax.jit
    def compute(stream, sizes, solution, hedged, sides, lengths, repeated):
        truth = phrase_reading.Truth.from_arrays(solution, hedged, sides)
        parsed = rewards.read_bytes(stream, sizes, bank, truth) | {"repeated": repeated}
        terms = rewards.reward_terms(
            parsed,
            solution,
            lengths,
            min_length=config.rl.min_length,
            max_length=int(config.rl.overlong_from * config.max_completion),
            limit=config.max_completion,
        )
        return rewards.combine(terms, rewards.weights(rewards.CHECKED))

    truth = [np.asarray(batch[name])[rows] for name in ("solution", "hedged", "sides")]
    repeated = np.asarray(jax.jit(rewards.repeated)(tokens, lengths))
    texts = [completion.text for completion in completions]
    return np.asarray(map_texts(compute, texts, *truth, lengths, repeated))


def sample(model: Model, batch: Batch, samples: int, seed: int) -> Scored:
    """Sample completions of the phantoms of a batch at temperature 1, and score them."""
    images = list(np.asarray(batch["image"]))
    limit = rl.get_config().max_completion
    found = model.generate(
        images, [FIND_PROMPT] * len(images), limit, temperature=1.0, n=samples, seed=seed
    )
    rows = np.repeat(np.arange(len(images)), samples)
    # Group by group, as `rows` counts them.
    flat = [completion for group in found for completion in group]
    return Scored(found, earn(flat, batch, rows).reshape(len(images), samples))


def write_rows(out: Path, model_name: str, seed: int, phantoms: int, samples: int) -> list[float]:
    """Write the rows; gives the mean reward of all completions, and of those that are kept."""
    if out.exists():
        raise UserError(f"{out}: exists; give a folder that does not")
    # Readers play no part: what is sampled is the model's own text.
    model = cxr_jax.load(model_name)
    source = PhantomSource("A", "train", seed)
    # A half-written folder would train on half of the phantoms.
    with whole_files.atomic_folder(out) as folder:
        (folder / "images").mkdir()
        all_rewards, lines = [], []
        for start in range(0, phantoms, AT_A_TIME):
            indices = np.arange(start, min(start + AT_A_TIME, phantoms))
            batch = source.batch(indices)
            scored = sample(model, batch, samples, seed=seed * 1_000_003 + start)
            all_rewards.append(scored.reward)
            # Of equal ones the first: they are samples of one distribution.
            best = scored.reward.argmax(1)
            for row, index in enumerate(indices):
                # 16 bits: what SFT reads is the phantom to 1 part in 130,000.
                name = f"images/{index:06d}.png"
                levels = np.round(np.asarray(batch["image"][row]) * 65535).astype(np.uint16)
                Image.fromarray(levels).save(folder / name)
                positive = np.flatnonzero(np.asarray(batch["solution"])[row])
                said = [
                    {"role": "user", "content": f"<image>{FIND_PROMPT}"},
                    {"role": "assistant", "content": scored.completions[row][best[row]].text},
                ]
                solution = ", ".join(CHEXPERT_14[place] for place in positive)
                lines.append(
                    {
                        "id": f"phantom-{index}",
                        "image": name,
                        "patient_id": f"phantom-{index}",
                        "solution": solution,
                        "messages": said,
                    }
                )
            print(f"{len(lines)} of {phantoms}", end="\r", flush=True)
        # Ids and order are those of the stream: the same command writes the same file.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "rows.jsonl").write_text(text)
    earned = np.concatenate(all_rewards)
    return [float(earned.mean()), float(earned.max(1).mean())]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the rows and print what they earn; returns the exit code."""
    parser = ArgumentParser("experiments.analysis.best_of", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phantoms", type=int, default=1280)
    parser.add_argument("--samples", type=int, default=8)

    def run() -> None:
        args = parser.parse_args(argv)
        if min(args.phantoms, args.samples) < 1 or args.seed < 0:
            raise UserError("--phantoms and --samples must be at least 1, --seed not negative")
        mean, best = write_rows(args.out, args.model, args.seed, args.phantoms, args.samples)
        print(
            f"{args.phantoms} phantoms, {args.samples} completions each: reward {mean:.4f}, of the best {best:.4f}"
        )

    return exit_code(run, debug=wants_debug(argv))


if __name__ == "__main__":
    sys.exit(main())
