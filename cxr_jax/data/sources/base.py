"""What a source of images with their truth is, and which of its examples a step takes."""

import numpy as np

ENDLESS = 2**31 - 1


def indices_of(step: int, batch_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Example indices of a step; a finite source is walked in a fresh seeded order each epoch."""
    flat = step * batch_size + np.arange(batch_size)
    if length >= ENDLESS:
        return flat
    orders = {
        int(e): np.random.default_rng([int(e), 11, seed]).permutation(length)
        for e in np.unique(flat // length)
    }
    return np.array([orders[int(i // length)][i % length] for i in flat])
