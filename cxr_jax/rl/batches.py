"""The batches of an RL step: prompts to sample from with their truth, and SFT examples that are replayed."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cxr_jax.config.sections import RunConfig
from cxr_jax.data.prompts import as_text
from cxr_jax.data.sources.base import Batch, Source, indices_of
from cxr_jax.inference.prompts import Prompts
from cxr_jax.models import image_batches
from cxr_jax.rl.reward_columns import RewardColumns
from cxr_jax.runtime.layout import ONE_DEVICE, Layout
from cxr_jax.training.checks import group_shares
from cxr_jax.training.conversations import Examples


def make_batch_fn(
    settings: RunConfig,
    source: Source,
    prompts: Prompts,
    examples: Examples | None = None,
    layout: Layout = ONE_DEVICE,
    columns: RewardColumns | None = None,
) -> Callable[[int], Batch]:
    """Build step -> numpy batch, a function of the step alone; of its rows this process makes those of its devices.

    On more devices than prompts, each prompt is in several rows, one after the other (`checks.group_shares`).

    Keys, P prompts (prompts_per_step * oversample): those of the images (`image_batches`), "prompts" as from
    `Prompts.encode`, "solution", "known", "hedged" bool [P, 14], "sides" bool [P, 14, 2]. With config.rl.replay_weight
    "replay", too: examples as SFT has them. "shown": texts of all rows for people, no part of a program's input; nor is
    "rows", what rewards of texts are told of all rows. "columns": those of numbers, if there are any.

    Args:
        examples: encodes the conversations of replayed examples.
        columns: of the manifest, for rewards of the user's.
    """
    prompts_sampled = settings.rollout.prompts_per_step * settings.rollout.oversample
    shares = group_shares(settings, layout.shards)

    def draw(step: int, count: int, shares: int = 1) -> tuple[np.ndarray, np.ndarray, Batch]:
        """Indices of all examples and of this process's rows, and its rows as the source makes them."""
        everywhere = indices_of(step, count, len(source), settings.data.seed)
        here = everywhere[layout.rows_of(count * shares) // shares]
        return everywhere, here, source.batch(here)

    def images_of(batch: Batch, here: np.ndarray) -> tuple[Batch, Any]:
        """The keys of the images of rows, and their grids."""
        films = image_batches.images_of(batch)
        return prompts.images.inputs(films, source.about(here)["ids"]), prompts.images.grids(films)

    def make(step: int) -> Batch:
        everywhere, here, batch = draw(step, prompts_sampled, shares)
        shown, (inputs, grids) = source.about(everywhere), images_of(batch, here)
        step_batch: Batch = {
            **inputs,
            "prompts": prompts.encode(source.about(here)["prompts"], grids),
            "shown": {**shown, "prompts": [as_text(prompt) for prompt in shown["prompts"]]},
        }
        for name in ("solution", "known", "hedged", "sides"):
            step_batch[name] = np.asarray(batch[name])
        if columns is not None:
            step_batch |= columns.of_batch(step_batch["shown"], source.about(here)["ids"])
        if examples is not None and settings.learner.replay_weight:
            _, here, batch = draw(step, settings.learner.replay_batch)
            replay, grids = images_of(batch, here)
            replay |= examples.encode(source.conversations(batch, here), grids)
            step_batch["replay"] = replay
        return step_batch

    return make
