"""A program that test_generate.py starts: completions of the phantom do not depend on what else is in their batch."""

import jax
import numpy as np
from generating import FIND

import cxr_jax
from cxr_jax.data.sources import phantom
from cxr_jax.inference import generation, requests


def tie(model, picture, seed: int, ids: list[int]) -> float:
    """The gap between the two largest perturbed logits where the token after `ids` is drawn at temperature 1."""
    patches, grid = model.prepare(picture)
    request = requests.Request(model.render(FIND, [grid]), (requests.Picture(patches, grid),))
    logits = model.logits([request.ids + ids], patches, [grid])[0, -1].copy()
    logits[list(model.special["suppress"])] = -np.inf
    [key] = generation.sample_keys(
        np.uint32(seed), np.array([request.mark()], np.uint32), np.array([0], np.int32)
    )
    low, high = np.sort(
        logits + np.asarray(jax.random.gumbel(jax.random.fold_in(key, len(ids)), logits.shape))
    )[-2:]
    return float(high - low)


def company(model, seeds, pictures) -> tuple[int, int]:
    """(completions, those whose log-probs differ in a bit) of pictures read together and alone; asserts that tokens
    differ at rounding ties only."""
    n = bits = 0
    for seed in seeds:
        together = model.generate(pictures, FIND, max_new_tokens=208, temperature=1.0, seed=seed)
        for picture, [want] in zip(pictures, together, strict=True):
            [[got]] = model.generate(
                [picture], FIND, max_new_tokens=208, temperature=1.0, seed=seed
            )
            n, bits = n + 1, bits + (got.logprobs != want.logprobs)
            if got.token_ids != want.token_ids:
                pairs = zip(got.token_ids, want.token_ids, strict=False)
                at = next(t for t, (a, b) in enumerate(pairs) if a != b)
                gap = tie(model, picture, seed, got.token_ids[:at])
                print(
                    f"seed {seed}, token {at}: the two largest perturbed logits differ by {gap:.2e}"
                )
                assert gap < 1e-4
    return n, bits


if __name__ == "__main__":
    films = list(phantom.PhantomSource("A", "test", 0).batch(np.arange(16))["image"])
    count, differing = company(cxr_jax.load("phantom"), range(5), films)
    print(f"{count} completions, {differing} with other bits")
