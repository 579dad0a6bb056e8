"""The steps of SFT and RL on films of mixed sizes beside as many patches in squares: times in turns, and programs.

    JAX_PLATFORMS=cpu PYTHONPATH=.:benchmarks python benchmarks/mixed_films.py [--shape small] [--prompts 10]

Films have the five sizes of CheXpert and MIMIC that are commonest (`packed_vision.FILMS`), at most 476 x 476 pixels by
area, a film a prompt; squares have the number of patches that films have on average. Every round has other films in
another order: one program must serve them all. Ratios are the median of those of a round.

Reached (2026-11-30, 2 cores of an AMD EPYC, jax 0.10.2, float32, commit 6eb957b; rows of 1,156 patches for films of
1,002 on average, squares of 1,024; the goal is at most 1.15):

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 .. --shape tiny --prompts 5 --rounds 7 --completion 128 --group 8

    SFT 1.119 (0.490 s, 0.437 s), RL 1.027 (1.749 s, 1.704 s), programs 1, 1, 1

Before angles were looked up, SFT took 1.173 to 1.186 and RL 1.000 to 1.173. Larger shapes, whose decoder weighs more,
were not timed. Against TRL 1.16.0 (--peer, 5 rounds; by the code of 66b4329; 40 rows of at most 316 tokens the same ids
and patches): 8.1 times as fast (1.54 s, 12.6 s; without the tunable and a step before the one that counts 5.0: 1.93 s,
9.6 s); the goal is 5.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _common as common
import grpo_step
import jax
import numpy as np
import packed_vision
from _grpo_ours import save_inputs

from cxr_jax.config.sections import RunConfig
from cxr_jax.inference.prompts import Prompts
from cxr_jax.labels.answers import TokenBytes
from cxr_jax.labels.phrase_bank import load_phrase_bank
from cxr_jax.models import registry, tokenizer
from cxr_jax.models.image_batches import Images, PackedImages, SquareImages
from cxr_jax.presets import rl as presets_rl
from cxr_jax.rl.learner import make_learn
from cxr_jax.rl.rollout import make_rollout
from cxr_jax.sft.step import make_steps
from cxr_jax.training.optimizer import init_state, make_optimizer
from cxr_jax.training.trainable import Trainable
from cxr_jax.weights import hf_folder, pretrained

TEXT = "Find abnormalities and support devices."


class Steps:
    """The programs of one way in which images travel."""

    def __init__(self, images: Images, options: argparse.Namespace) -> None:
        """Compile nothing yet."""
        self.images, self.rng = images, np.random.default_rng(0)
        self.model_config, self.completion = images.model_config, options.completion
        words = tokenizer.load(pretrained.PHANTOM)
        self.prompts = Prompts.for_images(words, self.model_config, images, options.completion)
        config = presets_rl.get_config()
        config.update(max_completion=options.completion, dtype=options.dtype)
        config.rl.update(prompts_per_step=options.prompts, oversample=1, group_size=options.group)
        # As peers sample and learn: nothing ends, and all of it trains.
        config.rl.update(temperature=1.0, mask_truncated=False)
        settings = RunConfig.from_config(config)
        trainable = Trainable(dtype=options.dtype, param_dtype=options.dtype)
        optimizer = make_optimizer(settings.optim, 1000)
        params = {"model": common.random_params(self.model_config, options.dtype)}
        self.state = init_state(optimizer, params)
        self.sft = make_steps(
            self.model_config,
            optimizer,
            images,
            trainable,
            micro_batches=1,
            locate_weight=0.0,
            remat="none",
        )[1]
        special = tokenizer.special_ids(words, self.model_config.text.vocab_size)
        # No end: all sides write and learn from as many tokens.
        self.suppress = {*special["suppress"], *special["stop"], *self.model_config.media_token_ids}
        special = {**special, "stop": (-1,), "suppress": tuple(sorted(self.suppress))}
        self.rollout = make_rollout(
            settings.rollout,
            self.model_config,
            images,
            special,
            TokenBytes.from_tokenizer(words),
            trainable,
            load_phrase_bank(),
            seed=0,
            max_completion=options.completion,
        )
        self.learn = make_learn(
            settings.learner,
            settings.loss,
            self.model_config,
            images,
            special,
            optimizer,
            trainable,
            max_completion=options.completion,
            remat="none",
        )

    def batch(self, films: Any) -> dict[str, Any]:
        """Make the batch of both steps: images, prompts, targets and a truth."""
        count = len(films)
        shape = (count, self.completion)
        grids = self.images.grids(films)
        truth = np.zeros((count, 14), bool)
        return {
            **self.images.inputs(films),
            "prompts": self.prompts.encode([TEXT] * count, grids),
            "completions": self.rng.integers(300, 400, shape).astype(np.int32),
            "lengths": np.full(count, self.completion, np.int32),
            "mask": np.ones(shape, bool),
            "solution": truth,
            "known": ~truth,
            "hedged": truth,
            "sides": np.zeros((count, 14, 2), bool),
        }

    def save(self, folder: str, films: Any, group: int) -> None:
        """Write the model and what is asked of films, for a peer."""
        hf_folder.save(
            folder, self.model_config, self.state["params"]["model"], tokenizer=pretrained.PHANTOM
        )
        levels = [level for (level,) in films]
        patchify = registry.processor_of(self.model_config).patchify
        patches = [patchify(level[None] / np.float32(255), np)[0] for level in levels]
        prompts = self.prompts.encode([TEXT] * len(films), self.images.grids(films))
        setting = {
            "text": TEXT,
            "group": group,
            "completion": self.completion,
            "lr": 1e-6,
            "suppress": sorted(self.suppress),
        }
        save_inputs(folder, prompts, levels, patches, setting)

    def sft_step(self, batch: dict[str, Any]) -> None:
        """Take one step of SFT."""
        names = (*self.images.names, "prompts", "completions", "lengths", "mask")
        self.state, _ = self.sft(self.state, {}, {name: batch[name] for name in names})
        jax.block_until_ready(self.state)

    def rl_step(self, batch: dict[str, Any]) -> None:
        """Sample and learn once."""
        names = (*self.images.names, "prompts", "solution", "known", "hedged", "sides")
        batch = {name: batch[name] for name in names}
        samples = self.rollout(self.state["params"], {}, batch, 0)
        self.state, _ = self.learn(self.state, {}, batch, samples)
        jax.block_until_ready(self.state)

    def programs(self) -> list[int]:
        """Count the programs of SFT, rollout and learner."""
        return [step._cache_size() for step in (self.sft, self.rollout, self.learn)]


def seconds(step: Callable, batch: dict[str, Any]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def main() -> None:
    """Print a row a step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=("tiny", "small", "3b"), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=("TRL 0.22.2", "TRL 1.16.0"), help="compare RL with it")
    options = parser.parse_args()

    model_config, rng = common.config(options.shape), np.random.default_rng(0)
    processor = registry.processor_of(model_config)
    grids = packed_vision.film_grids(options.prompts)
    patches = [height * width for _, height, width in grids]
    side = round((sum(patches) / len(patches)) ** 0.5 / 2) * 2
    packed = PackedImages(model_config=model_config, count=1, image_tokens=289, max_pixels=476**2)
    square = SquareImages(model_config=model_config, grid=(1, side, side))
    mixed, squares = Steps(packed, options), Steps(square, options)
    print(
        f"{options.prompts} films of {sum(patches) / len(patches):.0f} patches on average in rows of "
        f"{packed.patches:,}, squares of {side**2:,}",
        flush=True,
    )

    def draw_films() -> list[tuple[np.ndarray]]:
        order = rng.permutation(len(grids))
        sides = [[processor.patch_size * side for side in grids[number][1:]] for number in order]
        return [(rng.integers(0, 256, sides_of_film, np.uint8),) for sides_of_film in sides]

    def draw() -> list[dict[str, Any]]:
        films = draw_films()
        pixels = rng.random((len(grids), *[side * processor.patch_size] * 2), np.float32)
        return [mixed.batch(films), squares.batch(pixels)]

    for name in ("sft_step", "rl_step"):
        steps = [getattr(mixed, name), getattr(squares, name)]
        for step, batch in zip(steps, draw(), strict=True):
            step(batch)  # compiled
        times = [
            # The better of two: after the other way, a step finds cold caches.
            [
                min(seconds(step, batch) for _ in range(2))
                for step, batch in zip(steps, draw(), strict=True)
            ]
            for _ in range(options.rounds)
        ]
        ratio = statistics.median(one / other for one, other in times)
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{name:8} mixed {ours:8.3f} s   squares {theirs:8.3f} s   ratio {ratio:.3f}",
            flush=True,
        )
    print(
        f"programs of SFT, rollout, learner: mixed {mixed.programs()}, squares {squares.programs()}"
    )
    if options.peer:
        compare(options.peer, mixed, draw_films, options)


def compare(peer: str, mixed: Steps, draw_films: Callable, options: argparse.Namespace) -> None:
    """Print the times of an RL step beside a peer's, in turns; the peer has the same films in every step."""
    environment, script = grpo_step.PEERS[peer]
    with tempfile.TemporaryDirectory() as temp:
        folder = pathlib.Path(temp) / "model"
        mixed.save(str(folder), draw_films(), options.group)
        python = common.ROOT / environment / "bin/python"
        worker = common.Worker(python, pathlib.Path(__file__).with_name(script), folder)
        try:
            print(common.header(common.facts(), worker("facts")))
            times = []
            for _ in range(options.rounds):
                # Each side's first step is not counted: after a rest, it finds cold caches and returned memory.
                _, ours = (seconds(mixed.rl_step, mixed.batch(draw_films())) for _ in range(2))
                _, theirs = (worker("step")["seconds"] for _ in range(2))
                times.append((ours, theirs))
            seen = worker("check")
        finally:
            worker.close()
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"rl_step  ours {ours:8.3f} s   {peer} {theirs:8.3f} s   ours is {ratio:.2f}x")
    print(
        f"{peer}: {seen['rows']} rows of at most {seen['prompt']} tokens, "
        f"{'the' if seen['same ids'] else 'NOT THE'} same, patches {seen['pixels apart']:.0e} apart, "
        f"{seen['tokens']} tokens drawn"
    )


if __name__ == "__main__":
    main()
