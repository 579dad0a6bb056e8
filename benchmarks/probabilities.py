"""What probabilities in the batch cost beside the greedy reading that they hang on, and how many programs they are.

    python -m benchmarks.probabilities [--films=256] [--batch=64] [--rounds=5] [--model=phantom]

Reads so many phantoms of hospital A with `evaluation.reader.Reader`, in turns with and without probabilities, and
prints the medians, their ratio, programs compiled for each, and the mean exact mass of the trees. Turns alternate, so
that a busy machine is as busy for both.

2026-11-30, 2 cores shared with other work: ratio 1.95 to 2.5 (256 films, batches of 64); one program each.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import jax

from cxr_jax.config.sections import DataConfig
from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.data.sources.splits import held_out
from cxr_jax.evaluation.reader import Reader
from cxr_jax.inference.prompts import Prompts
from cxr_jax.models.image_batches import open_images
from cxr_jax.weights import pretrained

MAX_COMPLETION = 208  # of the phantom's presets


def open_reader(model: str, batch_size: int) -> tuple[Reader, dict]:
    """A reader of phantoms, and the parameters that it reads with."""
    start = pretrained.load_starting_model(model, 0)
    images = open_images(DataConfig.with_defaults(), start.config, PhantomSource.size, count=1)
    prompts = Prompts.for_images(start.tokenizer, start.config, images, MAX_COMPLETION)
    reader = Reader(start.config, start.tokenizer, prompts, batch_size)
    return reader, pretrained.to_device(start.params, "float32")


def measure(model: str, films: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Seconds of a reading with and without probabilities, medians of alternating rounds."""
    reader, params = open_reader(model, batch_size)
    batch = held_out(PhantomSource("A", "test"), films)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    # The first round compiles, and does not count.
    for round_number in range(rounds + 1):
        for weighs in seconds:
            start = time.perf_counter()
            readings = reader.read(params, batch["image"], batch["texts"], weighs=weighs)
            if round_number:
                seconds[weighs].append(time.perf_counter() - start)
    plain, weighed = (statistics.median(seconds[weighs]) for weighs in (False, True))
    assert readings.exact_mass is not None
    return {
        "greedy": plain,
        "with probabilities": weighed,
        "ratio": weighed / plain,
        "programs, greedy": reader._read_batch._cache_size(),
        "programs, with probabilities": reader._weigh_batch._cache_size(),
        "exact mass": float(readings.exact_mass.mean()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--films", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="phantom")
    flags = parser.parse_args(argv)
    found = measure(flags.model, flags.films, flags.batch, flags.rounds)
    print(f"{flags.films} films in batches of {flags.batch}, {jax.devices()[0].platform}")
    for name, value in found.items():
        print(f"  {name:30} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
