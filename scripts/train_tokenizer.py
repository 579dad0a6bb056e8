"""Trains the phantom model's tokenizer: `python -m scripts.train_tokenizer OUT_DIR [--examples=4000]`.

The corpus is phantom targets of both hospitals, the chat frame and the prompts in use. Same arguments, same files.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from cxr_jax.data.sources import phantom
from cxr_jax.models import tokenizer as tokenizers

PROMPTS = (
    "Find abnormalities and support devices.",
    "Examine the chest X-ray.",
    "Provide differentials.",
    "Write a structured report.",
)


BATCH = 64  # phantoms drawn at a time


def corpus(examples: int) -> Iterator[str]:
    """Yield target texts (half a hospital each), then the prompts and the frame often enough to become tokens."""
    for hospital in ("A", "B"):
        source = phantom.PhantomSource(hospital, "train", seed=99)
        for start in range(0, examples // 2, BATCH):
            indices = np.arange(start, start + BATCH)
            yield from source.targets(source.batch(indices), indices)
    for prompt in (*PROMPTS, tokenizers.SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"):
        yield from [prompt] * examples


def main() -> None:
    """Train it and print how many ids it has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--vocab_size", type=int, default=1024)
    args = parser.parse_args()
    print(tokenizers.train(corpus(args.examples), args.out, args.vocab_size), "ids")


if __name__ == "__main__":
    main()
