"""Metrics of a step by TRL's names, against NumPy."""

import numpy as np
import pytest

from cxr_jax.data.sources.base import ENDLESS, epoch_of
from cxr_jax.rl import learner, rollout


def samples(finished):
    random = np.random.default_rng(0)
    return {
        "reward": random.normal(size=(4, 3)).astype(np.float32),
        "lengths": np.arange(12).reshape(4, 3) + 5,
        "finished": np.array(finished).reshape(4, 3),
        "answer": np.zeros((4, 3, 14), bool),
        "advantages": np.ones((4, 3), np.float32),
        "kept": np.arange(4),
        "terms": {},
    }


def test_reward_std_is_of_all_rewards_and_that_of_groups_has_its_own_name():
    step = samples([True] * 12)
    metrics = rollout.rollout_metrics(step)
    assert metrics["reward_std"] == pytest.approx(step["reward"].std(ddof=1), rel=1e-5)
    within = step["reward"].std(axis=1, ddof=1).mean()
    assert metrics["groups/reward_std"] == pytest.approx(within, rel=1e-5) and within != 1


@pytest.mark.parametrize("done", [[7], [2, 5, 9], []])
def test_lengths_of_completions_that_came_to_their_end(done):
    metrics = rollout.rollout_metrics(samples([place in done for place in range(12)]))
    lengths = [place + 5 for place in done] or [0]
    assert metrics["completions/min_terminated_length"] == min(lengths)
    assert metrics["completions/max_terminated_length"] == max(lengths)
    assert metrics["completions/min_length"] == 5 and metrics["completions/max_length"] == 16


def test_clip_ratios_of_the_extreme_groups():
    random = np.random.default_rng(1)
    mask = random.random((5, 2, 6)) < 0.7
    mask[3] = False  # a group of which nothing trains says nothing
    scores = {f"clip_{part}": random.random((5, 2, 6)) < 0.4 for part in learner.CLIPPED}
    metrics = learner.update_metrics({"train_mask": mask}, scores)
    groups = [0, 1, 2, 4]
    low, high = (
        [scores[f"clip_{part}"][group][mask[group]].mean() for group in groups]
        for part in ("low", "high")
    )
    assert metrics["clip_ratio/low_min"] == pytest.approx(min(low))
    assert metrics["clip_ratio/high_max"] == pytest.approx(max(high))
    nothing = learner.update_metrics({"train_mask": mask & False}, scores)
    assert nothing["clip_ratio/low_min"] == nothing["clip_ratio/high_max"] == 0


def test_epochs_are_of_sources_that_end():
    assert epoch_of(30, 20) == {"epoch": 1.5} and epoch_of(30, ENDLESS) == {}


@pytest.mark.parametrize(("shares", "flat_groups_count"), [(1, False), (3, True)])
def test_tokens_of_a_step(shares, flat_groups_count):
    random = np.random.default_rng(2)
    step = samples([True] * 12)
    step["advantages"][[1, 2]], step["kept"] = 0.0, np.array([3, 1])
    lengths, ids = random.integers(3, 8, 4), random.integers(5, 7, (4, 8))
    images = [(ids[row, : lengths[row]] == 5).sum() for row in range(4)]
    written = step["lengths"].sum(1)
    # Over many devices the batch has each prompt in several rows, and it is read once all the same.
    rows = {"ids": np.repeat(ids, shares, 0), "lengths": np.repeat(lengths, shares)}
    counts = rollout.tokens_of_step(
        step, {"prompts": rows}, image_token_id=5, flat_groups_count=flat_groups_count
    )
    for name, groups in (
        ("sampled", [0, 1, 2, 3]),
        ("learned", [1, 3] if flat_groups_count else [3]),
    ):
        want = [
            (lengths[groups] + written[groups]).sum(),
            written[groups].sum(),
            np.sum(np.array(images)[groups]),
        ]
        assert [int(count) for count in counts[name]] == want
