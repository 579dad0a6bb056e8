"""A batch of SFT on films and conversations of random lengths, as `sft_step.make_steps` takes it."""

import numpy as np

from cxr_jax.models import network
from cxr_jax.models.image_batches import PackedImages
from cxr_jax.sft import step as sft_step


def draw(images, seed, rows, width, completion, *, longest=None):
    """Prompts of different lengths with images, and conversations: what stands between answers does not train.

    Args:
        width: slots of a prompt; completion: of what follows it, of which texts have up to `longest`.
    """
    rng = np.random.default_rng(seed)
    model_config = images.model_config
    if isinstance(images, PackedImages):
        sizes = [[(rng.integers(1, 4), 2) for _ in range(1 + row % 2)] for row in range(rows)]
        films = [
            tuple(rng.integers(0, 256, (4 * h, 4 * w), np.uint8) for h, w in row) for row in sizes
        ]
        grids = images.grids(films)
    else:
        films = rng.random((rows, 8, 8), np.float32)
        grids = [[images.grid]] * rows
    first, last = 7, 19  # no special tokens
    ids = rng.integers(first, last, (rows, width)).astype(np.int32)
    prompt_lengths = np.zeros(rows, np.int32)
    positions = np.ones((3, rows, width + completion), np.int32)
    for row, row_grids in enumerate(grids):
        tokens = [first] * (1 + row % 3)
        for grid in row_grids:
            image_tokens = [model_config.image_token_id] * (grid[1] * grid[2] // 4)
            ends = model_config.vision_start_token_id, model_config.vision_end_token_id
            tokens += [ends[0], *image_tokens, ends[1]]
        ids[row, : len(tokens)] = tokens
        prompt_lengths[row] = len(tokens)
        line = np.asarray([*tokens, *[first] * completion])[None]
        positions[:, row, : line.shape[1]] = network.positions(model_config, line, row_grids)[:, 0]
    lengths = rng.integers(1, (longest or completion) + 1, rows).astype(np.int32)
    trained = rng.random((rows, completion)) < 0.7
    batch = {
        "prompts": {"ids": ids, "lengths": prompt_lengths, "positions": positions},
        "completions": rng.integers(first, last + 1, (rows, completion)).astype(np.int32),
        "lengths": lengths,
        "mask": trained & (np.arange(completion) < lengths[:, None]),
        **images.inputs(films),
    }
    if not isinstance(images, PackedImages):
        batch["regions"] = rng.random((rows, sft_step.LOCATED_FINDINGS, 2, 2), np.float32)
        batch["severity"] = rng.random((rows, sft_step.LOCATED_FINDINGS), np.float32)
    return batch
